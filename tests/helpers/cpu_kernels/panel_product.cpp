// panel_product with vectors of every width, beside sums in long double: prints the largest error of each in roundings.
// A width that this processor does not have is taken apart by the compiler, so all of them can run.
#include "../../../csrc/cpu/panel_product.cpp"

#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

namespace {

using dlogp::kPanel;
using dlogp::Product;

const Product kProducts[] = {{1, 1, 1, 1, 1, 1},         {7, 17, 3, 5, 17, 20},        {64, 128, 896, 896, 128, 128},
                             {65, 30, 513, 513, 30, 30}, {13, 48, 1024, 1030, 48, 48}, {3, 5, 1500, 1500, 16, 5},
                             {12, 33, 512, 512, 33, 40}};

// B (inner, columns) as the panels that matrix.h describes. What fills the last one must not matter.
template <typename Real>
std::vector<Real> packed(const Product& p, const std::vector<Real>& b) {
  const int64_t panels = (p.columns + kPanel<Real> - 1) / kPanel<Real>;
  std::vector<Real> result(panels * p.inner * kPanel<Real>, std::numeric_limits<Real>::quiet_NaN());
  for (int64_t k = 0; k < p.inner; ++k)
    for (int64_t j = 0; j < p.columns; ++j)
      result[(j / kPanel<Real> * p.inner + k) * kPanel<Real> + j % kPanel<Real>] = b[k * p.columns + j];
  return result;
}

// In roundings of the sum of magnitudes; infinite where a place beside C was written.
template <int Bytes, typename Real>
double error_of(const Product& p, bool accumulate) {
  std::mt19937 generator(1);
  std::normal_distribution<Real> normal;
  std::vector<Real> a(p.rows * p.a_stride), b(p.inner * p.columns), c(p.rows * p.c_stride);
  for (auto* values : {&a, &b, &c})
    for (Real& value : *values) value = normal(generator);
  const std::vector<Real> before = c;
  dlogp::product_of<Bytes>(p, a.data(), packed(p, b).data(), c.data(), accumulate);
  double worst = 0;
  for (int64_t i = 0; i < p.rows; ++i) {
    for (int64_t j = 0; j < p.columns; ++j) {
      long double sum = accumulate ? before[i * p.c_stride + j] : 0, size = std::fabs(sum);
      for (int64_t k = 0; k < p.inner; ++k) {
        const long double term = (long double)(a[i * p.a_stride + k]) * b[k * p.columns + j];
        sum += term;
        size += std::fabs(term);
      }
      const double error = std::fabs(double(c[i * p.c_stride + j] - sum));
      worst = std::max(worst, std::isnan(error) ? INFINITY : error / double(size));
    }
    for (int64_t j = p.columns; j < p.c_stride; ++j)
      if (c[i * p.c_stride + j] != before[i * p.c_stride + j]) return INFINITY;
  }
  return worst / std::numeric_limits<Real>::epsilon();
}

template <int Bytes, typename Real>
void print(const char* name) {
  double worst = 0;
  for (const Product& product : kProducts)
    for (bool accumulate : {false, true}) worst = std::max(worst, error_of<Bytes, Real>(product, accumulate));
  std::printf("%s %d %g\n", name, Bytes, worst);
}

}  // namespace

int main() {
  print<16, float>("float");
  print<32, float>("float");
  print<64, float>("float");
  print<16, double>("double");
  print<32, double>("double");
  print<64, double>("double");
}
