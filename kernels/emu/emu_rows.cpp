// permute_rows, unpermute_rows, unpermute_bwd: the kernels' bodies against a loop.
#include <algorithm>
#include <numeric>

#include "emu_cases.h"
#include "rows.cuh"

namespace {

using namespace mm;
using namespace mm::emu;

Report report;

// T tokens of K choices, some without a row, in R rows, some of which are holes.
struct Plan {
  int tokens, choices, rows;
  std::vector<int> place, source;

  Plan(int t, int k, int holes) : tokens(t), choices(k), place(t * k, -1) {
    std::vector<int> taken;
    for (int choice = 0; choice < t * k; ++choice) {
      if (generator()() % 5 != 0) taken.push_back(choice);
    }
    rows = static_cast<int>(taken.size()) + holes;
    source.assign(rows, -1);
    std::vector<int> free(rows);
    std::iota(free.begin(), free.end(), 0);
    std::shuffle(free.begin(), free.end(), generator());
    for (std::size_t i = 0; i < taken.size(); ++i) {
      place[taken[i]] = free[i];
      source[free[i]] = taken[i];
    }
  }

  Places places() const { return {place.data(), choices, rows}; }
};

template <int Bytes, typename T>
ConstUnitRows<Bytes> in(const std::vector<T>& rows, int stride) {
  return {reinterpret_cast<const Unit<Bytes>*>(rows.data()), static_cast<std::int64_t>(stride * sizeof(T) / Bytes)};
}

template <int Bytes, typename T>
UnitRows<Bytes> out(std::vector<T>& rows, int stride) {
  return {reinterpret_cast<Unit<Bytes>*>(rows.data()), static_cast<std::int64_t>(stride * sizeof(T) / Bytes)};
}

template <typename T, int Bytes>
void permute(const Plan& plan, int width, int more, bool with_values) {
  const int beside = with_values ? 4 / static_cast<int>(sizeof(T)) : 0, stride = width + more, wide = width + beside;
  const auto x = random_numbers<T>(plan.tokens * stride);
  const auto values = random_numbers<float>(plan.tokens * plan.choices);
  const float empty = -1.0f;
  auto y = poisoned<T>(plan.rows * wide), right = poisoned<T>(plan.rows * wide);
  for (int row = 0; row < plan.rows; ++row) {
    const int choice = plan.source[row];
    T* const to = right.data() + row * wide;
    std::fill(to, to + width, T(0.0f));
    if (choice >= 0) std::copy_n(x.data() + choice / plan.choices * stride, width, to);
    if (with_values) std::memcpy(static_cast<void*>(to + width), choice < 0 ? &empty : &values[choice], sizeof(float));
  }
  Beside columns{};
  if (with_values) {
    columns = {true, reinterpret_cast<const unsigned*>(values.data()), __float_as_uint(empty), sizeof(T) == 2,
               reinterpret_cast<char*>(y.data() + width), static_cast<std::int64_t>(wide * sizeof(T))};
  }
  const PermuteJob<Bytes> job{in<Bytes>(x, stride), out<Bytes>(y, wide), plan.source.data(), plan.places(), columns,
                              plan.tokens, plan.rows, static_cast<int>(width * sizeof(T) / Bytes), 0};
  launch_permute(job, nullptr);
  report.expect(same_bits(y, right), "permute: T %d K %d R %d D %d, %d bytes, %d in a unit, values %d", plan.tokens,
                plan.choices, plan.rows, width, int(sizeof(T)), Bytes, int(with_values));
}

template <typename T, int Bytes>
void unpermute(const Plan& plan, int width, int more, bool weighted) {
  const int stride = width + more;
  auto y = random_numbers<T>(plan.rows * stride);
  for (int row = 0; row < plan.rows; ++row) {  // holes are not read
    if (plan.source[row] < 0) std::fill_n(y.data() + row * stride, width, T(NAN));
  }
  const auto weights = random_numbers<float>(plan.tokens * plan.choices);
  auto result = poisoned<T>(plan.tokens * width);
  const UnpermuteJob<T, Bytes> job{in<Bytes>(y, stride), out<Bytes>(result, width), plan.places(),
                                   weighted ? weights.data() : nullptr, plan.tokens,
                                   static_cast<int>(width * sizeof(T) / Bytes), 0};
  launch_unpermute(job, nullptr);
  bool right = true;
  for (int t = 0; t < plan.tokens; ++t) {
    for (int d = 0; d < width; ++d) {
      double sum = 0.0, size = 0.0;
      for (int k = 0; k < plan.choices; ++k) {
        const int choice = t * plan.choices + k, row = plan.place[choice];
        if (row < 0) continue;
        const double term = double(float(y[row * stride + d])) * (weighted ? weights[choice] : 1.0f);
        sum += term;
        size += std::fabs(term);
      }
      right = right && close(result[t * width + d], sum, size);
    }
  }
  report.expect(right, "unpermute: T %d K %d R %d D %d, %d bytes, %d in a unit, weights %d", plan.tokens, plan.choices,
                plan.rows, width, int(sizeof(T)), Bytes, int(weighted));
}

template <typename T, int Bytes>
void unpermute_back(const Plan& plan, int width, int more) {
  const int stride = width + more;
  const auto d_out = random_numbers<T>(plan.tokens * stride), y = random_numbers<T>(plan.rows * width);
  const auto weights = random_numbers<float>(plan.tokens * plan.choices);
  auto d_y = poisoned<T>(plan.rows * width);
  auto d_weights = poisoned<float>(plan.tokens * plan.choices);
  const UnpermuteBackJob<T, Bytes> job{in<Bytes>(d_out, stride), in<Bytes>(y, width), out<Bytes>(d_y, width),
                                       plan.source.data(), plan.places(), weights.data(), d_weights.data(), plan.tokens,
                                       plan.rows, static_cast<int>(width * sizeof(T) / Bytes)};
  launch_unpermute_back(job, nullptr);
  bool rows_right = true, weights_right = true;
  for (int row = 0; row < plan.rows; ++row) {
    const int choice = plan.source[row];
    for (int d = 0; d < width; ++d) {
      const T expected = choice < 0 ? T(0.0f) : T(weights[choice] * float(d_out[choice / plan.choices * stride + d]));
      rows_right = rows_right && std::memcmp(&expected, &d_y[row * width + d], sizeof(T)) == 0;
    }
  }
  for (int choice = 0; choice < plan.tokens * plan.choices; ++choice) {
    double sum = 0.0, size = 0.0;
    for (int d = 0; d < width && plan.place[choice] >= 0; ++d) {
      const double term = double(float(d_out[choice / plan.choices * stride + d])) *
                          float(y[plan.place[choice] * width + d]);
      sum += term;
      size += std::fabs(term);
    }
    weights_right = weights_right && close(d_weights[choice], sum, size);
  }
  report.expect(rows_right && weights_right, "unpermute_bwd (rows %d, weights %d): T %d K %d R %d D %d, %d in a unit",
                int(rows_right), int(weights_right), plan.tokens, plan.choices, plan.rows, width, Bytes);
}

template <typename T, int Bytes>
void all(const Plan& plan, int width, int more) {
  permute<T, Bytes>(plan, width, more, false);
  if constexpr (Bytes < 16) permute<T, Bytes>(plan, width, more, true);
  for (const bool weighted : {false, true}) unpermute<T, Bytes>(plan, width, more, weighted);
  unpermute_back<T, Bytes>(plan, width, more);
}

}  // namespace

int main() {
  struct Size {
    int tokens, choices, holes;
  };
  for (const Size size : {Size{0, 2, 0}, {0, 2, 35}, {1, 1, 0}, {5, 2, 40}, {33, 3, 1}, {9, 8, 0}, {3, 33, 7}}) {
    const Plan plan(size.tokens, size.choices, size.holes);
    all<__nv_bfloat16, 16>(plan, 64, 8);
    all<__nv_bfloat16, 4>(plan, 66, 2);
    all<__half, 2>(plan, 37, 1);
    all<float, 4>(plan, 37, 0);
  }
  const Plan plan(3, 2, 2);  // rows of several parts, and of several tiles
  all<__nv_bfloat16, 16>(plan, 8192 + 8, 0);
  all<__nv_bfloat16, 2>(plan, 2049, 0);
  all<__half, 16>(plan, 4104, 0);
  all<float, 16>(plan, 1028, 4);
  return report.exit_code("rows");
}
