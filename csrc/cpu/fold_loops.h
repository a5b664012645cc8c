// The loops that fold.h declares, for Acc (for_each_accumulator.h).

namespace dlogp {

template <>
DLOGP_CLONED void transform_row(const LogitTransform& transform, int64_t count, const Acc* bias, Acc* z) {
  if (bias != nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) z[i] += bias[i];
  }
  if (transform.is_identity()) return;
  const Acc output_scale = Acc(transform.output_scale());
  if (!transform.has_softcap()) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) z[i] *= output_scale;
    return;
  }
  const Acc tanh_scale = Acc(transform.tanh_scale());
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) z[i] = output_scale * tanh_of(z[i] * tanh_scale);
}

template <>
DLOGP_CLONED void fold_row(int64_t count, const Acc* z, SoftmaxState<Acc>& state) {
  fold_body<true>(count, z, state);
}

template <>
DLOGP_CLONED void fold_sum(int64_t count, const Acc* z, SoftmaxState<Acc>& state) {
  fold_body<false>(count, z, state);
}

template <>
DLOGP_CLONED void fold_row(int64_t count, const Acc* z, const Acc* base_z, PairState<Acc>& state) {
  PairTileSums<Acc> tile = {};
  if (state.model.empty() || state.base.empty()) {
    tile.model.largest = largest(count, z);
    tile.base.largest = largest(count, base_z);
  } else {
    tile = sum_pair_tile<Maxima::kSummed>(count, z, base_z, state.model.max, state.base.max);
  }
  const bool apart = tile.is_far_above(state);
  if (apart)
    tile = sum_pair_tile<Maxima::kApart>(count, z, base_z, larger(tile.model.largest, state.model.max),
                                         larger(tile.base.largest, state.base.max));
  if (!tile.finite()) return fold_special(count, z, base_z, state);
  if (apart) return tile.add_apart(state);
  tile.add_summed(state);
}

template <>
DLOGP_CLONED void gradient_row(const GradientTerms<Acc>& terms, int64_t count, const Acc* z, Acc* grad) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const Acc logp = bounded((z[i] - terms.max) - terms.log_sum);
    grad[i] = exp_of(logp) * (terms.constant + terms.log_term * logp);
  }
}

template <>
DLOGP_CLONED void gradient_row(const GradientTerms<Acc>& terms, int64_t count, const Acc* z, const Acc* other_z,
                               Acc* grad) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const Acc logp = bounded((z[i] - terms.max) - terms.log_sum);
    const Acc other_logp = bounded((other_z[i] - terms.other_max) - terms.other_log_sum);
    const Acc own = terms.constant + terms.log_term * logp + terms.ratio_term * (logp - other_logp);
    grad[i] = exp_of(logp) * own + terms.other_term * exp_of(other_logp);
  }
}

template <>
DLOGP_CLONED void softcap_gradient_row(const LogitTransform& transform, int64_t count, const Acc* z, Acc* grad) {
  const Acc to_tanh = Acc(transform.temperature / transform.softcap);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const Acc t = z[i] * to_tanh;
    grad[i] *= (Acc(1) - t) * (Acc(1) + t);
  }
}

template <>
DLOGP_CLONED void add_row(int64_t count, const Acc* values, Acc* sums) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) sums[i] += values[i];
}

}  // namespace dlogp
