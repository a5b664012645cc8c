// z = softcap_c(logit_scale · (raw + bias)) / temperature, softcap_c(x) = c·tanh(x / c).
#pragma once

namespace dlogp {

struct LogitTransform {
  double logit_scale = 1;
  double softcap = 0;  // 0: none
  double temperature = 1;

  bool has_softcap() const { return softcap > 0; }
  bool is_identity() const { return logit_scale == 1 && !has_softcap() && temperature == 1; }
  double tanh_scale() const { return logit_scale / softcap; }
  // From the tanh to z, or where there is none from the raw logit.
  double output_scale() const { return (has_softcap() ? softcap : logit_scale) / temperature; }
  // ∂z/∂raw where there is no softcap; times 1 − tanh² where there is.
  double derivative() const { return logit_scale / temperature; }
};

}  // namespace dlogp
