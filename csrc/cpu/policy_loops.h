// The loops of policy_loss.cpp over tokens next to each other, for Acc (for_each_accumulator.h).

// `from` may be `to`.
DLOGP_CLONED void copy_counted(int64_t count, const Acc* mask, const Acc* from, Acc* to) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] = mask[i] != 0 ? from[i] : Acc(0);
}

DLOGP_CLONED void mask_row(int64_t count, const uint8_t* from, Acc* to) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] = Acc(int32_t(from[i] != 0));
}

DLOGP_CLONED void multiply_row(int64_t count, Acc factor, const Acc* from, Acc* to) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] = from[i] * factor;
}

// Adds `value` where tokens count. A product with the mask would make 0 · ∞ of the others.
DLOGP_CLONED void add_counted(int64_t count, const Acc* mask, Acc value, Acc* to) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] += mask[i] != 0 ? value : Acc(0);
}

DLOGP_CLONED void sum_tokens(int64_t count, const Acc* mask, const Acc* logp, const Acc* old_logp,
                             PolicySequence& sequence) {
  Acc tokens = 0;
  double sum = 0, log_ratio = 0;
#pragma omp simd reduction(+ : tokens, sum, log_ratio)
  for (int64_t i = 0; i < count; ++i) {
    const Acc old = mask[i] != 0 ? old_logp[i] : Acc(0), own = mask[i] != 0 ? logp[i] : Acc(0);
    tokens += mask[i];
    sum += double(old);
    log_ratio += double(own - old);
  }
  sequence.count += int64_t(tokens);
  sequence.old_logp += sum;
  sequence.log_ratio += log_ratio;
}
