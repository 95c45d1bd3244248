// glu_fwd and glu_bwd: the kernels' bodies against a loop in double.
#include <cmath>
#include <numeric>

#include "emu_cases.h"
#include "glu.cuh"

namespace {

using namespace mm;
using namespace mm::emu;

Report report;
constexpr int kProcessors = 1;  // few blocks, so that each takes several rows

struct Case {
  int rows, width, more;  // more: columns beside h1 and h3 that are not theirs
  bool weighted;
  std::vector<std::int64_t> counts;
  bool all = false;  // no counts: all rows

  Used used() const {
    return {counts.data(), all ? -1 : static_cast<int>(counts.size()), rows};
  }
  std::int64_t used_rows() const {
    const std::int64_t sum = std::accumulate(counts.begin(), counts.end(), std::int64_t{0});
    return all || sum > rows ? rows : sum;
  }
};

struct Right {
  double value, slope;
};

Right gate_of(Glu kind, double x) {
  if (kind == Glu::swiglu) {
    const double s = 1.0 / (1.0 + std::exp(-x));
    return {x * s, s * (1.0 + x * (1.0 - s))};
  }
  const double below = 0.5 * std::erfc(-x / std::sqrt(2.0));
  return {x * below, below + x * std::exp(-0.5 * x * x) / std::sqrt(2.0 * M_PI)};
}

template <typename T>
std::vector<T> input(const Case& c) {
  std::vector<T> rows = random_numbers<T>(c.rows * (c.width + c.more), 3.0f);
  for (std::size_t i = c.used_rows() * (c.width + c.more); i < rows.size(); ++i) rows[i] = T(NAN);  // not to be read
  return rows;
}

template <int Bytes, typename T>
ConstUnitRows<Bytes> in(const std::vector<T>& rows, int stride) {
  return {reinterpret_cast<const Unit<Bytes>*>(rows.data()), static_cast<std::int64_t>(stride * sizeof(T) / Bytes)};
}

template <int Bytes, typename T>
UnitRows<Bytes> out(std::vector<T>& rows, int stride) {
  return {reinterpret_cast<Unit<Bytes>*>(rows.data()), static_cast<std::int64_t>(stride * sizeof(T) / Bytes)};
}

template <typename T>
bool is_zero(T value) {
  return float(value) == 0.0f;
}

template <Glu kind, typename T, int Bytes>
void run(const Case& c) {
  const int stride = c.width + c.more, units = static_cast<int>(c.width * sizeof(T) / Bytes);
  const auto h1 = input<T>(c), h3 = input<T>(c), d_act = input<T>(c);
  const auto weights = random_numbers<float>(c.rows);
  const float* const w = c.weighted ? weights.data() : nullptr;
  const std::size_t size = c.rows * c.width;
  auto act = poisoned<T>(size), again = act, d_h1 = act, d_h3 = act;
  auto d_weights = poisoned<float>(c.rows);
  launch_glu<kind, T, Bytes>({in<Bytes>(h1, stride), in<Bytes>(h3, stride), out<Bytes>(act, c.width), w, c.used(), units, 0},
                             kProcessors, nullptr);
  launch_glu_back<kind, T, Bytes>({in<Bytes>(d_act, stride), in<Bytes>(h1, stride), in<Bytes>(h3, stride),
                                   out<Bytes>(d_h1, c.width), out<Bytes>(d_h3, c.width), out<Bytes>(again, c.width), w,
                                   c.weighted ? d_weights.data() : nullptr, c.used(), units},
                                  kProcessors, nullptr);
  bool forward = same_bits(act, again), backward = true, of_weights = true;
  for (int row = 0; row < c.rows; ++row) {
    double sum = 0.0, sum_size = 0.0;
    const double weight = w ? w[row] : 1.0;
    for (int f = 0; f < c.width; ++f) {
      const std::size_t at = row * c.width + f;
      if (row >= c.used_rows()) {
        forward = forward && is_zero(act[at]);
        backward = backward && is_zero(d_h1[at]) && is_zero(d_h3[at]);
        continue;
      }
      const double a = float(h1[row * stride + f]), b = float(h3[row * stride + f]), d = float(d_act[row * stride + f]);
      const Right g = gate_of(kind, a);
      forward = forward && close(act[at], weight * g.value * b, std::fabs(weight * a * b));
      backward = backward && close(d_h1[at], weight * d * b * g.slope, std::fabs(weight * d * b) * (1 + a * a));
      backward = backward && close(d_h3[at], weight * d * g.value, std::fabs(weight * d * a));
      sum += d * g.value * b;
      sum_size += std::fabs(d * a * b);
    }
    of_weights = of_weights && (!w || close(d_weights[row], sum, sum_size));
  }
  report.expect(forward && backward && of_weights,
                "glu %d (forward %d, backward %d, weights %d): R %d F %d used %d, %d bytes, %d in a unit", int(kind),
                int(forward), int(backward), int(of_weights), c.rows, c.width, int(c.used_rows()), int(sizeof(T)), Bytes);
}

template <Glu kind>
void all() {
  for (const bool weighted : {true, false}) {
    run<kind, __nv_bfloat16, 16>({40, 64, 8, weighted, {3, 0, 30}});
    run<kind, __nv_bfloat16, 2>({5, 37, 1, weighted, {}, true});
    run<kind, __nv_bfloat16, 16>({4, 8, 0, weighted, {}});
    run<kind, __half, 16>({3, 1032, 0, weighted, {0, 0}});
    run<kind, float, 16>({7, 132, 4, weighted, {7}});
    run<kind, float, 4>({70, 33, 0, weighted, std::vector<std::int64_t>(65, 1)});
  }
  run<kind, __half, 16>({70, 1032, 0, true, {69}});  // several rows for each block, several warps for each row
  run<kind, __half, 2>({0, 8, 0, true, {0}});
  run<kind, __nv_bfloat16, 16>({2, 2056, 0, true, {9}});  // wide: all threads, several parts; more counted than there are
}

}  // namespace

int main() {
  all<mm::Glu::swiglu>();
  all<mm::Glu::geglu>();
  return report.exit_code("glu");
}
