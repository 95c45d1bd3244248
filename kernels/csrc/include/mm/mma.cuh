// Tensor cores and asynchronous copies behind small names, for sm_80 and later; under MM_EMU a twin in plain code.
//
// A product of 16x16 and 16x8 numbers is shared out over a warp. With g = lane / 4 and q = 2 * (lane % 4):
//   a: at[0] row g, columns q, q+1; at[1] row g+8; at[2] row g, columns q+8, q+9; at[3] row g+8, columns q+8, q+9
//   b: at[0] rows q, q+1 of column g; at[1] rows q+8, q+9
//   sums: [0], [1] row g, columns q, q+1; [2], [3] row g+8
// Two bf16 in 32 bits, the first in the lower half.
#pragma once

#include <cstdint>
#include <cstring>

#include "mm/device.cuh"
#include "mm/warp.cuh"

namespace mm {

__device__ __forceinline__ unsigned pair_bits(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  unsigned bits;
  memcpy(&bits, static_cast<const void*>(&pair), sizeof bits);
  return bits;
}

__device__ __forceinline__ float first_of(unsigned pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float second_of(unsigned pair) { return __uint_as_float(pair & 0xffff0000u); }

#ifndef MM_EMU

__device__ __forceinline__ unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// sums += a b. The tensor core cuts sums off instead of rounding them: add up no more than a few steps here.
__device__ __forceinline__ void multiply_add(float (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Matrices of 8 rows of 16 bytes in shared memory: lane i says where row i % 8 of matrix i / 8 is, and gets of every matrix
// the 32 bits at lane % 4 of row lane / 4.
__device__ __forceinline__ void load_matrices(unsigned (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrices(unsigned (&to)[2], const void* row) {  // lanes 0 to 15 say where
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(to[0]), "=r"(to[1])
               : "r"(shared_address(row))
               : "memory");
}

// Starts copying 16 bytes to shared memory, of which those from `bytes` on become zeros; `global` has to be a valid address.
__device__ __forceinline__ void copy_async(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}
// The copies that this thread started since the last call are one group.
__device__ __forceinline__ void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most the last `Groups` groups of this thread are under way.
template <int Groups>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Groups) : "memory");
}

#else

// As multiply_add is on a GPU at its worst: products exact, the sum of each step cut off to 24 bits.
inline void multiply_add(float (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  double exact[4] = {sums[0], sums[1], sums[2], sums[3]};
  const int group = lane_id() / 4, column = lane_id() % 4 * 2;
  for (int quarter = 0; quarter < 4; ++quarter) {
    for (int half = 0; half < 2; ++half) {
      const unsigned row[2] = {__shfl_sync(kWholeWarp, a[2 * half], group * 4 + quarter),
                               __shfl_sync(kWholeWarp, a[2 * half + 1], group * 4 + quarter)};
      const unsigned other[2] = {__shfl_sync(kWholeWarp, b[half], column * 4 + quarter),
                                 __shfl_sync(kWholeWarp, b[half], (column + 1) * 4 + quarter)};
      for (int i = 0; i < 4; ++i) {
        exact[i] += double{first_of(row[i / 2])} * first_of(other[i % 2]);
        exact[i] += double{second_of(row[i / 2])} * second_of(other[i % 2]);
      }
    }
  }
  for (int i = 0; i < 4; ++i) {
    sums[i] = static_cast<float>(exact[i]);
    if (std::fabs(sums[i]) > std::fabs(exact[i])) sums[i] = std::nextafter(sums[i], 0.0f);
  }
}

template <int Matrices>
void load_matrices(unsigned (&to)[Matrices], const void* row) {
  const auto address = reinterpret_cast<std::uintptr_t>(row);
  for (int i = 0; i < Matrices; ++i) {
    const std::uintptr_t mine = __shfl_sync(kWholeWarp, address, i * 8 + lane_id() / 4);
    to[i] = reinterpret_cast<const unsigned*>(mine)[lane_id() % 4];
  }
}

// Copies at once: that a wait is missing does not show.
inline void copy_async(void* shared, const void* global, int bytes) {
  std::memset(shared, 0, 16);
  if (bytes > 0) std::memcpy(shared, global, static_cast<std::size_t>(bytes));
}
inline void end_copies() {}
template <int Groups>
void wait_copies() {}

#endif

}  // namespace mm
