// Eight numbers at once, as the compiler's portable vectors: no instruction set is named, so every CPU gets its own.
#pragma once

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

#include "mm/tensor.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // everything below is inlined: no vector crosses a call
#endif

namespace mm {

constexpr int64_t kLanes = 8;

template <typename T>
struct LanesOf {
  typedef T type __attribute__((vector_size(kLanes * sizeof(T))));
};
template <typename T>
using Lanes = typename LanesOf<T>::type;

// The type in which rows of T are computed.
template <typename T>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};
template <typename T>
using Wide = typename WideOf<T>::type;

template <typename To, typename From>
inline To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename T>
inline Lanes<T> loaded(const T* from) {
  Lanes<T> lanes;
  std::memcpy(&lanes, from, sizeof(lanes));
  return lanes;
}

// Eight elements in the type they are computed in.
template <typename T>
inline Lanes<Wide<T>> load(const T* from) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const auto halves = loaded(reinterpret_cast<const uint16_t*>(from));
    return bits<Lanes<float>>(__builtin_convertvector(halves, Lanes<uint32_t>) << 16);
  } else if constexpr (std::is_same_v<T, Half>) {
#if defined(__F16C__)
    return bits<Lanes<float>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
    Lanes<float> lanes;
    for (int64_t i = 0; i < kLanes; ++i) {
      lanes[i] = static_cast<float>(from[i]);
    }
    return lanes;
#endif
  } else {
    return loaded(from);
  }
}

// Eight results, rounded to nearest even where T is narrower.
template <typename T>
inline void store(T* to, const Lanes<Wide<T>>& lanes) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const auto word = bits<Lanes<uint32_t>>(lanes);
    const Lanes<uint32_t> rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
    const Lanes<uint32_t> result = (word & 0x7fffffff) > 0x7f800000 ? (rounded & 0) + 0x7fc0 : rounded;  // NaN stays one
    const auto halves = __builtin_convertvector(result, Lanes<uint16_t>);
    std::memcpy(to, &halves, sizeof(halves));
  } else if constexpr (std::is_same_v<T, Half>) {
#if defined(__F16C__)
    const __m128i halves = _mm256_cvtps_ph(bits<__m256>(lanes), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    std::memcpy(to, &halves, sizeof(halves));
#else
    for (int64_t i = 0; i < kLanes; ++i) {
      to[i] = static_cast<Half>(lanes[i]);
    }
#endif
  } else {
    std::memcpy(to, &lanes, sizeof(lanes));
  }
}

// The first `count` < 8 elements, then zeros.
template <typename T>
inline Lanes<Wide<T>> load_first(const T* from, int64_t count) {
  T eight[kLanes] = {};
  std::memcpy(eight, from, count * sizeof(T));
  return load(eight);
}

template <typename T>
inline void store_first(T* to, const Lanes<Wide<T>>& lanes, int64_t count) {
  T eight[kLanes];
  store(eight, lanes);
  std::memcpy(to, eight, count * sizeof(T));
}

#if defined(__clang__)
#define MM_PICK(T, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MM_PICK(T, a, b, ...) \
  __builtin_shuffle(a, b, (Lanes<std::conditional_t<sizeof(T) == 4, int32_t, int64_t>>{__VA_ARGS__}))
#endif

// Sums of neighbours of a and of b, within each half: a01 a23 b01 b23 a45 a67 b45 b67.
template <typename T>
inline Lanes<T> neighbours(const Lanes<T>& a, const Lanes<T>& b) {
  return MM_PICK(T, a, b, 0, 2, 8, 10, 4, 6, 12, 14) + MM_PICK(T, a, b, 1, 3, 9, 11, 5, 7, 13, 15);
}

// The sum of each of eight vectors. Together they take a third of the instructions of one after the other.
template <typename T>
inline Lanes<T> sum_of_each(const Lanes<T> (&v)[kLanes]) {
  const Lanes<T> low = neighbours<T>(neighbours<T>(v[0], v[1]), neighbours<T>(v[2], v[3]));
  const Lanes<T> high = neighbours<T>(neighbours<T>(v[4], v[5]), neighbours<T>(v[6], v[7]));
  return MM_PICK(T, low, high, 0, 1, 2, 3, 8, 9, 10, 11) + MM_PICK(T, low, high, 4, 5, 6, 7, 12, 13, 14, 15);
}

template <typename T>
inline T sum(const Lanes<T>& v) {
  return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
}

}  // namespace mm
