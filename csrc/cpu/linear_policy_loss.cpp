#include "linear_policy_loss.h"

#include <algorithm>

namespace dlogp {
namespace {

// Returns whether there are any.
template <typename Real>
bool gather(const Real* from, const int64_t* rows, int64_t count, Real* to) {
  if (from == nullptr) return false;
  for (int64_t i = 0; i < count; ++i) to[i] = from[rows[i]];
  return true;
}

}  // namespace

template <typename Real>
void PolicyBlock<Real>::resize(int64_t count, int models) {
  for (auto* values : {&logp, &entropy, &lse, &grad_logp, &grad_entropy}) values->resize(count);
  if (models == 1) return;
  for (auto* values : {&delta_logp, &base_logp, &base_entropy, &base_lse, &kl, &reverse_kl, &grad_kl})
    values->resize(count);
}

template <typename Real>
StatsOutputs<Real> PolicyBlock<Real>::outputs() {
  return {logp.data(),         entropy.data(),  lse.data(), delta_logp.data(), base_logp.data(),
          base_entropy.data(), base_lse.data(), kl.data(),  reverse_kl.data()};
}

template <typename Real>
Upstream<Real> PolicyBlock<Real>::upstream(int models, int64_t ignore_index) const {
  const ModelUpstream<Real> model = {grad_logp.data(), grad_entropy.data(), nullptr, entropy.data(), lse.data()};
  if (models == 1) return {{model, {}}, nullptr, nullptr, nullptr, nullptr, 1, ignore_index};
  const ModelUpstream<Real> base = {nullptr, nullptr, nullptr, base_entropy.data(), base_lse.data()};
  return {{model, base}, grad_kl.data(), nullptr, kl.data(), nullptr, 1, ignore_index};
}

template <typename Real>
double policy_block(const PolicyOptions& options, const PolicyRows<Real>& known, const int64_t* rows, int64_t count,
                    PolicyBlock<Real>& block, PolicySums& sums) {
  PolicyTokens<Real> tokens;
  Real scale[kPolicyTokens];
  double loss = 0;
  for (int64_t first = 0; first < count; first += kPolicyTokens) {
    const int64_t n = std::min(kPolicyTokens, count - first);
    const int64_t* own = rows + first;
    std::fill_n(tokens.mask, n, Real(1));
    std::copy_n(block.logp.data() + first, n, tokens.logp);
    std::copy_n(block.entropy.data() + first, n, tokens.entropy);
    gather(known.old_logp, own, n, tokens.old_logp);
    gather(known.advantage, own, n, tokens.advantage);
    gather(known.score, own, n, tokens.score);
    gather(known.scale, own, n, scale);
    tokens.has_entropy = true;
    tokens.has_ref_logp = gather(known.ref_logp, own, n, tokens.ref_logp);
    tokens.has_token_weight = gather(known.token_weight, own, n, tokens.token_weight);
    tokens.has_kl = !block.kl.empty();
    if (tokens.has_kl) std::copy_n(block.kl.data() + first, n, tokens.kl);
    policy_tokens(options, n, tokens, sums);
    for (int64_t i = 0; i < n; ++i) {
      loss += scale[i] == 0 ? 0 : double(scale[i]) * double(tokens.loss[i]);
      block.grad_logp[first + i] = scale[i] * tokens.coefficient[i];
      block.grad_entropy[first + i] = Real(-options.entropy_coef) * scale[i];
      if (tokens.has_kl) block.grad_kl[first + i] = Real(options.kl_beta) * scale[i];
    }
  }
  return loss;
}

template <typename T>
void add_weight_gradient(const Tiling& tiling, const BackwardTile& tile, int64_t begin, int64_t end, int64_t width,
                         bool accumulate, const BackwardBuffers<T>& buffers, const T* packed_hidden,
                         std::vector<T>& transposed, Accumulator<T>* out) {
  const int64_t rows = end - begin;
  transposed.resize(rows * tile.inner);
  transpose(tile.inner, rows, buffers.grad_logits + begin, tiling.columns, transposed.data(), tile.inner);
  multiply({rows, width, tile.inner, tile.inner, buffers.hidden.stride, width}, transposed.data(), packed_hidden,
           out + begin * width, accumulate);
}

#define DLOGP_INSTANTIATE(Real)                                                                              \
  template struct PolicyBlock<Real>;                                                                         \
  template double policy_block<Real>(const PolicyOptions&, const PolicyRows<Real>&, const int64_t*, int64_t, \
                                     PolicyBlock<Real>&, PolicySums&);
DLOGP_INSTANTIATE(float)
DLOGP_INSTANTIATE(double)
#undef DLOGP_INSTANTIATE

#define DLOGP_INSTANTIATE(T)                                                                                \
  template void add_weight_gradient<T>(const Tiling&, const BackwardTile&, int64_t, int64_t, int64_t, bool, \
                                       const BackwardBuffers<T>&, const T*, std::vector<T>&, Accumulator<T>*);
DLOGP_INSTANTIATE(c10::BFloat16)
DLOGP_INSTANTIATE(float)
DLOGP_INSTANTIATE(double)
#undef DLOGP_INSTANTIATE

}  // namespace dlogp
