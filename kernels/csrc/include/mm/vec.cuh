// Rows in memory as units of 16 bytes, or of fewer where a row does not start at a multiple of 16: one load or store
// instruction each. And the numbers in them as floats.
#pragma once

#include <cstdint>
#include <cstring>

#include "mm/device.cuh"

namespace mm {

template <int Bytes>
struct UnitOf;
template <>
struct UnitOf<16> {
  using type = uint4;
};
template <>
struct UnitOf<4> {
  using type = unsigned;
};
template <>
struct UnitOf<2> {
  using type = unsigned short;
};
template <int Bytes>
using Unit = typename UnitOf<Bytes>::type;

// The widest unit that divides all of `numbers` (addresses, row strides and widths in bytes), at least one element.
template <typename... Numbers>
int unit_bytes(int element, Numbers... numbers) {
  const std::uint64_t all = (static_cast<std::uint64_t>(numbers) | ...);
  return all % 16 == 0 ? 16 : all % 4 == 0 ? 4 : element;
}

template <typename T>
struct Pair;  // two neighbours, converted by one instruction
template <>
struct Pair<__nv_bfloat16> {
  using type = __nv_bfloat162;
  static __device__ __forceinline__ type of(float a, float b) { return __floats2bfloat162_rn(a, b); }
};
template <>
struct Pair<__half> {
  using type = __half2;
  static __device__ __forceinline__ type of(float a, float b) { return __floats2half2_rn(a, b); }
};

__device__ __forceinline__ float widened(float value) { return value; }
__device__ __forceinline__ float widened(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float widened(__half value) { return __half2float(value); }

template <typename T>
__device__ __forceinline__ T narrowed(float value) {
  if constexpr (sizeof(T) == 4) {
    return value;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else {
    return __float2bfloat16_rn(value);
  }
}

// The numbers of one unit.
template <typename T, int Bytes>
struct Numbers {
  static constexpr int kCount = Bytes / static_cast<int>(sizeof(T));
  float at[kCount];

  Numbers() = default;

  explicit __device__ __forceinline__ Numbers(const Unit<Bytes>& unit) {
    T parts[kCount];
    memcpy(static_cast<void*>(parts), &unit, Bytes);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      at[i] = widened(parts[i]);
    }
  }

  // Rounded to the nearest, ties to even.
  __device__ __forceinline__ Unit<Bytes> unit() const {
    Unit<Bytes> unit;
    if constexpr (sizeof(T) == 2 && kCount % 2 == 0) {
      typename Pair<T>::type parts[kCount / 2];
#pragma unroll
      for (int i = 0; i < kCount / 2; ++i) {
        parts[i] = Pair<T>::of(at[2 * i], at[2 * i + 1]);
      }
      memcpy(&unit, static_cast<const void*>(parts), Bytes);
    } else {
      T parts[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        parts[i] = narrowed<T>(at[i]);
      }
      memcpy(&unit, static_cast<const void*>(parts), Bytes);
    }
    return unit;
  }
};

// Rows as units: the address of the first, how far apart they start, in units.
template <int Bytes>
struct UnitRows {
  Unit<Bytes>* data;
  std::int64_t stride;
  __device__ __forceinline__ Unit<Bytes>* operator[](std::int64_t row) const { return data + row * stride; }
};

template <int Bytes>
struct ConstUnitRows {
  const Unit<Bytes>* data;
  std::int64_t stride;
  __device__ __forceinline__ const Unit<Bytes>* operator[](std::int64_t row) const { return data + row * stride; }
};

// How the units of a row are shared out: `parts` of `length` each (the last may be shorter), a multiple of `lanes` and at
// most `longest`.
struct Parts {
  int parts, length;
};

inline Parts share_row(std::int64_t units, int lanes, int longest) {
  const std::int64_t parts = units <= longest ? 1 : (units + longest - 1) / longest;
  const std::int64_t even = (units + parts - 1) / parts;
  return {static_cast<int>(parts), static_cast<int>((even + lanes - 1) / lanes * lanes)};
}

}  // namespace mm
