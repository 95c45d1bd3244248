// What the programs of the emulator share: random inputs, poisoned outputs, comparison with a sum in double.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "mm/device.cuh"

namespace mm::emu {

inline std::mt19937& generator() {
  static std::mt19937 numbers(1);
  return numbers;
}

template <typename T>
std::vector<T> random_numbers(std::size_t count, float scale = 1.0f) {
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<T> all(count);
  for (T& one : all) one = T(normal(generator()));
  return all;
}

// An output nobody has written yet: NaN in every dtype.
template <typename T>
std::vector<T> poisoned(std::size_t count) {
  std::vector<T> all(count);
  if (count > 0) std::memset(static_cast<void*>(all.data()), 0xff, count * sizeof(T));
  return all;
}

template <typename T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

// Is `got` the number `right`, rounded to T, after sums in fp32 of terms that add up to `size` without their signs?
template <typename T>
bool close(T got, double right, double size) {
  const double rounding = sizeof(T) == 4 ? 0x1p-24 : std::is_same_v<T, __half> ? 0x1p-11 : 0x1p-8;
  const double allowed = 2e-6 * size + rounding * std::fabs(right) + 0x1p-25;
  return std::fabs(static_cast<double>(static_cast<float>(got)) - right) <= allowed;  // false for NaN
}

// Prints what failed, and remembers that something did.
class Report {
 public:
  template <typename... Words>
  void expect(bool right, const char* format, Words... words) {
    ++cases_;
    if (right) return;
    ++failures_;
    std::printf("WRONG ");
    std::printf(format, words...);
    std::printf("\n");
  }

  int exit_code(const char* name) const {
    std::printf("%s: %d comparisons, %d wrong\n", name, cases_, failures_);
    return failures_ == 0 ? 0 : 1;
  }

 private:
  int cases_ = 0, failures_ = 0;
};

}  // namespace mm::emu
