// Scores of bf16 tokens with dense expert vectors, on tensor cores and to the last digits of fp32.
//
// x is exact in bf16; a vector is split into three bf16 terms that add up to its fp32 value, and so is x - mean where there is
// a mean. Products of terms below 2^-24 of the score are left out. One pass over x for up to 64 experts: lengths come from
// the same loads, and the block chooses from the scores that it has just written.
#pragma once

#include <algorithm>

#include "mm/launch.h"
#include "mm/mma.cuh"
#include "mm/warp.cuh"
#include "router_choose.cuh"

namespace mm {

inline constexpr int kTerms = 3;
inline constexpr int kMmaThreads = 128, kMmaTokens = 128, kMmaDepth = 32, kMmaStages = 4;

// The terms of vectors, for each `together` experts: [kTerms, together, depth]. Zeros behind the vectors.
struct SplitSizes {
  int groups, together, depth;
  __host__ __device__ __forceinline__ std::int64_t count() const {
    return std::int64_t{kTerms} * groups * together * depth;
  }
};

// Terms of one number; infinities and NaN stay in the first.
__device__ __forceinline__ void split(float value, float (&terms)[kTerms]) {
#pragma unroll
  for (int i = 0; i < kTerms; ++i) {
    terms[i] = __bfloat162float(__float2bfloat16_rn(value));
    value = fabsf(terms[0]) <= 3.4e38f ? value - terms[i] : 0.0f;
  }
}

template <int Threads>
__global__ void __launch_bounds__(Threads)
    split_vectors(const float* vectors, __nv_bfloat16* split_to, int experts, int width, SplitSizes sizes) {
  const int d = static_cast<int>(blockIdx.x) * Threads + static_cast<int>(threadIdx.x);
  const int expert = static_cast<int>(blockIdx.y), group = expert / sizes.together;
  if (d >= sizes.depth) return;
  float terms[kTerms];
  split(expert < experts && d < width ? vectors[std::int64_t{expert} * width + d] : 0.0f, terms);
#pragma unroll
  for (int i = 0; i < kTerms; ++i) {
    const std::int64_t row = (group * kTerms + i) * sizes.together + expert % sizes.together;
    split_to[row * sizes.depth + d] = __float2bfloat16_rn(terms[i]);
  }
}

// A block multiplies 128 tokens with `kExperts` vectors at a time; warp w the tokens of half w / 2 with the experts of half
// w % 2, as 4 x Eights products of 16x16 with 16x8 numbers.
template <int Eights, bool Centred>
struct MmaScoresJob {
  static constexpr int kExperts = 16 * Eights, kChunks = kMmaDepth / 8;  // of 16 bytes
  static constexpr int kRowBytes = kMmaDepth * 2;
  static constexpr int kTogether = Centred ? 1 : 4;  // products whose tokens are in registers at once
  static constexpr int kStageBytes = (kMmaTokens + kTerms * kExperts) * kRowBytes;

  const __nv_bfloat16* x;
  std::int64_t x_stride;  // in elements, a multiple of 8
  const __nv_bfloat16* vectors;
  SplitSizes sizes;
  const float* mean;
  float *scores, *inverse;
  int* chosen;
  int tokens, width, experts, choices;
  bool normalize;

  static size_t shared_bytes() { return static_cast<size_t>(kMmaStages) * kStageBytes; }

  // Where 16 bytes of a row are: turned, so that eight rows' same chunks lie in different banks. The turn is the same for
  // rows that are a multiple of 8 apart.
  static __device__ __forceinline__ int place(int row, int chunk) {
    return row * kRowBytes + (chunk ^ (row / 2 % kChunks)) * 16;
  }

  // Starts the copies of one step: 16 bytes of each kAtOnce-th row, tokens first, then each term's vectors.
  __device__ __forceinline__ void copy(unsigned char* stage, int first_token, int first_expert, int depth) const {
    constexpr int kAtOnce = kMmaThreads / kChunks;
    const int row = static_cast<int>(threadIdx.x) / kChunks, chunk = static_cast<int>(threadIdx.x) % kChunks;
    stage += place(row, chunk);
    depth += chunk * 8;
    const __nv_bfloat16* from = x + (first_token + row) * x_stride + depth;
#pragma unroll
    for (int i = 0; i < kMmaTokens; i += kAtOnce, from += kAtOnce * x_stride) {
      const bool inside = first_token + row + i < tokens && depth < width;
      copy_async(stage + i * kRowBytes, inside ? from : x, inside ? 16 : 0);
    }
    stage += kMmaTokens * kRowBytes;
    from = vectors + (std::int64_t{first_expert} * kTerms + row) * sizes.depth + depth;
#pragma unroll
    for (int i = 0; i < kTerms * kExperts; i += kAtOnce, from += kAtOnce * sizes.depth) {
      if (kTerms * kExperts % kAtOnce == 0 || row + i < kTerms * kExperts) copy_async(stage + i * kRowBytes, from, 16);
    }
  }

  // x - mean of a pair of columns, as terms.
  static __device__ __forceinline__ void centre(unsigned pair, float2 about, unsigned (&terms)[kTerms], float& square) {
    const float first = first_of(pair) - about.x, second = second_of(pair) - about.y;
    float a[kTerms], b[kTerms];
    split(first, a);
    split(second, b);
#pragma unroll
    for (int i = 0; i < kTerms; ++i) terms[i] = pair_bits(a[i], b[i]);
    square += first * first + second * second;
  }

  __device__ __forceinline__ float2 mean_at(int d) const {
    return make_float2(d < width ? mean[d] : 0.0f, d + 1 < width ? mean[d + 1] : 0.0f);
  }

  // One step of 16 in depth. squares: of rows g and g + 8 of each product, over this lane's columns.
  __device__ __forceinline__ void step(const unsigned char* stage, int k, int depth, float (&sums)[4][Eights][4],
                                       float (&squares)[4][2], bool measure) const {
    const int lane = lane_id();
    const unsigned char* const a_rows = stage + place(warp_id() / 2 * 64 + lane % 16, 2 * k + lane / 16);
    const unsigned char* const b_rows = stage + kMmaTokens * kRowBytes +
                                        place(warp_id() % 2 * 8 * Eights + lane % 8, 2 * k + lane / 8 % 2);
    float2 about[2] = {};
    if constexpr (Centred) {
      about[0] = mean_at(depth + lane % 4 * 2);
      about[1] = mean_at(depth + 8 + lane % 4 * 2);
    }
#pragma unroll
    for (int first = 0; first < 4; first += kTogether) {
      unsigned a[Centred ? kTerms : 1][kTogether][4];
#pragma unroll
      for (int m = 0; m < kTogether; ++m) {
        load_matrices(a[0][m], a_rows + (first + m) * 16 * kRowBytes);
        float square[2] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if constexpr (Centred) {
            unsigned terms[kTerms];
            centre(a[0][m][i], about[i / 2], terms, square[i % 2]);
#pragma unroll
            for (int term = 0; term < kTerms; ++term) a[term][m][i] = terms[term];
          } else if (measure) {
            const float one = first_of(a[0][m][i]), other = second_of(a[0][m][i]);
            square[i % 2] += one * one + other * other;
          }
        }
        if (measure) {
          squares[first + m][0] += square[0];
          squares[first + m][1] += square[1];
        }
      }
#pragma unroll
      for (int n = 0; n < Eights; ++n) {
        float part[kTogether][4] = {};  // few products on the tensor cores, which cut off, then a sum that rounds
#pragma unroll
        for (int term = kTerms - 1; term >= 0; --term) {
          unsigned b[2];
          load_matrices(b, b_rows + (term * kExperts + n * 8) * kRowBytes);
#pragma unroll
          for (int other = Centred ? kTerms - 1 - term : 0; other >= 0; --other) {
#pragma unroll
            for (int m = 0; m < kTogether; ++m) multiply_add(part[m], a[other][m], b);
          }
        }
#pragma unroll
        for (int m = 0; m < kTogether; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[first + m][n][i] += part[m][i];
        }
      }
    }
  }

  __device__ __forceinline__ void multiply(unsigned char* shared, int first_token, int first_expert,
                                           float (&sums)[4][Eights][4], float (&squares)[4][2]) const {
    const int steps = sizes.depth / kMmaDepth;
#pragma unroll 1
    for (int i = 0; i < kMmaStages - 1; ++i) {
      if (i < steps) copy(shared + i * kStageBytes, first_token, first_expert, i * kMmaDepth);
      end_copies();
    }
#pragma unroll 1
    for (int s = 0; s < steps; ++s) {
      wait_copies<kMmaStages - 2>();
      __syncthreads();  // step s is here for all, and all have left the stage that is filled next
      const int next = s + kMmaStages - 1;
      if (next < steps) copy(shared + next % kMmaStages * kStageBytes, first_token, first_expert, next * kMmaDepth);
      end_copies();
      const unsigned char* const stage = shared + s % kMmaStages * kStageBytes;
#pragma unroll(Centred ? 1 : kMmaDepth / 16)
      for (int k = 0; k < kMmaDepth / 16; ++k) {
        // Both warps of a half of the tokens have their rows: each measures every second step.
        step(stage, k, s * kMmaDepth + k * 16, sums, squares, normalize && first_expert == 0 && k % 2 == warp_id() % 2);
      }
    }
    __syncthreads();
  }

  // Of rows g and g + 8 of each product, in every lane; stored once.
  __device__ __forceinline__ void lengths(float* length, int first_token, float (&squares)[4][2],
                                          float (&factor)[4][2]) const {
    const int tokens_half = warp_id() / 2 * 64, half = warp_id() % 2;
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float square = warp_sum<4>(squares[m][i]);
        if (lane_id() % 4 == 0) length[half * kMmaTokens + tokens_half + m * 16 + i * 8 + lane_id() / 4] = square;
      }
    }
    __syncthreads();
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = tokens_half + m * 16 + i * 8 + lane_id() / 4;
        const float square = length[row] + length[kMmaTokens + row];
        factor[m][i] = square == 0.0f ? 0.0f : 1.0f / sqrtf(square);
        if (half == 0 && lane_id() % 4 == 0 && first_token + row < tokens) inverse[first_token + row] = factor[m][i];
      }
    }
    __syncthreads();
  }

  __device__ __forceinline__ void write(int first_token, int first_expert, const float (&sums)[4][Eights][4],
                                        const float (&factor)[4][2]) const {
    const int expert_of_lane = first_expert + warp_id() % 2 * 8 * Eights + lane_id() % 4 * 2;
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = first_token + warp_id() / 2 * 64 + m * 16 + i / 2 * 8 + lane_id() / 4;
        if (token >= tokens) continue;
#pragma unroll
        for (int n = 0; n < Eights; ++n) {
          const int expert = expert_of_lane + n * 8 + i % 2;
          if (expert < experts) scores[std::int64_t{token} * experts + expert] = sums[m][n][i] * factor[m][i / 2];
        }
      }
    }
  }

  __device__ __forceinline__ void run() const {
    MM_DYNAMIC_SHARED(unsigned char, shared);
    const int first_token = static_cast<int>(blockIdx.x) * kMmaTokens;
    float factor[4][2] = {{1.0f, 1.0f}, {1.0f, 1.0f}, {1.0f, 1.0f}, {1.0f, 1.0f}};
    for (int first_expert = 0; first_expert < experts; first_expert += kExperts) {
      float sums[4][Eights][4] = {}, squares[4][2] = {};
      multiply(shared, first_token, first_expert, sums, squares);
      if (normalize && first_expert == 0) lengths(reinterpret_cast<float*>(shared), first_token, squares, factor);
      write(first_token, first_expert, sums, factor);
    }
    if (choices == 0) return;
    __syncthreads();
    choose_rows(scores, first_token, min(first_token + kMmaTokens, tokens), experts, choices, chosen,
                reinterpret_cast<int*>(shared));
  }
};

template <int Eights, bool Centred>
__global__ void __launch_bounds__(kMmaThreads, 2)
    mma_scores(MmaScoresJob<Eights, Centred> job) {
  job.run();
}

// How many vectors, in eights for each warp, a block takes at once: for few experts less, or most of the products would be
// with zeros; with a mean less, since its terms need registers.
inline int expert_eights(int experts, bool centred) { return experts <= 16 ? 1 : centred ? 2 : 4; }

inline SplitSizes split_sizes(int experts, int width, bool centred) {
  const int together = 16 * expert_eights(experts, centred);
  return {(experts + together - 1) / together, together, (width + kMmaDepth - 1) / kMmaDepth * kMmaDepth};
}

// body.operator()<Eights, Centred>().
template <typename Body>
void by_eights(int experts, bool centred, const Body& body) {
  switch (expert_eights(experts, centred)) {
    case 1: return centred ? body.template operator()<1, true>() : body.template operator()<1, false>();
    case 2: return body.template operator()<2, true>();
    default: return body.template operator()<4, false>();
  }
}

// split_to has room for split_sizes(...).count().
template <int Eights, bool Centred>
void launch_mma_scores(MmaScoresJob<Eights, Centred> job, const float* vectors, __nv_bfloat16* split_to,
                       cudaStream_t stream) {
  constexpr int kThreads = 256;
  job.sizes = split_sizes(job.experts, job.width, Centred);
  job.vectors = split_to;
  const dim3 grid(static_cast<unsigned>((job.sizes.depth + kThreads - 1) / kThreads),
                  static_cast<unsigned>(job.sizes.groups * job.sizes.together));
  launch(split_vectors<kThreads>, grid, kThreads, 0, stream, vectors, split_to, job.experts, job.width, job.sizes);
  const auto blocks = static_cast<unsigned>((job.tokens + kMmaTokens - 1) / kMmaTokens);
  launch(mma_scores<Eights, Centred>, blocks, kMmaThreads, job.shared_bytes(), stream, job);
}

}  // namespace mm
