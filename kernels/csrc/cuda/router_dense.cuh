// Scores of tokens with dense expert vectors in plain fp32, and their gradients: three products of matrices in one kernel.
//
// The products are exact to fp32 (no TF32) and sums are made in a fixed order: 16 products, then the tiles of 16, then where
// there are many tokens the spans of them. For scores of bf16 tokens router_mma.cuh is faster.
#pragma once

#include <algorithm>

#include "mm/launch.h"
#include "mm/vec.cuh"
#include "mm/warp.cuh"
#include "router_choose.cuh"
#include "router_sums.cuh"

namespace mm {

inline constexpr int kTile = 64, kTileDepth = 16, kTileThreads = 256;
inline constexpr int kTokenThreads = 256, kTokenWarps = kTokenThreads / kWarpSize;

// x - mean, an element at a time: any width, any address.
template <typename X>
struct CentredRows {
  const X* x;
  std::int64_t stride;
  const float* mean;  // nullptr: 0
  int tokens, width;

  __device__ __forceinline__ float at(int token, int d) const {
    const float value = widened(x[token * stride + d]);
    return mean == nullptr ? value : value - __ldg(mean + d);
  }
};

// A block's 64 x 64 numbers of a product, each thread 4 x 4 of them. Job says what is multiplied:
//   rows(), columns(): sizes of the result; span(): begin and end of the dimension that is summed over
//   a(row, k), b(k, column): the factors; put(row, column, sum)
//   kRowsTogether, kColumnsTogether: neighbours of a's rows, b's columns lie side by side in memory, else those of k
template <typename Job>
__global__ void __launch_bounds__(kTileThreads) tile_product(Job job) {
  MM_SHARED(float, a, kTileDepth * (kTile + 4));
  MM_SHARED(float, b, kTileDepth * (kTile + 4));
  const int thread = static_cast<int>(threadIdx.x), row = thread / 16 * 4, column = thread % 16 * 4;
  const int first_row = static_cast<int>(blockIdx.y) * kTile, first_column = static_cast<int>(blockIdx.x) * kTile;
  const int2 span = job.span();
  float sum[4][4] = {};
  for (int first = span.x; first < span.y; first += kTileDepth) {
#pragma unroll
    for (int i = 0; i < kTile * kTileDepth / kTileThreads; ++i) {
      const int at = thread + i * kTileThreads;
      const int r = Job::kRowsTogether ? at % kTile : at / kTileDepth;
      const int k = Job::kRowsTogether ? at / kTile : at % kTileDepth;
      const bool inside = first_row + r < job.rows() && first + k < span.y;
      a[k * (kTile + 4) + r] = inside ? job.a(first_row + r, first + k) : 0.0f;
      const int c = Job::kColumnsTogether ? at % kTile : at / kTileDepth;
      const int l = Job::kColumnsTogether ? at / kTile : at % kTileDepth;
      const bool within = first_column + c < job.columns() && first + l < span.y;
      b[l * (kTile + 4) + c] = within ? job.b(first + l, first_column + c) : 0.0f;
    }
    __syncthreads();
    float part[4][4] = {};
#pragma unroll
    for (int k = 0; k < kTileDepth; ++k) {
      float4 of_a, of_b;
      memcpy(&of_a, a + k * (kTile + 4) + row, sizeof of_a);
      memcpy(&of_b, b + k * (kTile + 4) + column, sizeof of_b);
      const float mine[4] = {of_a.x, of_a.y, of_a.z, of_a.w}, other[4] = {of_b.x, of_b.y, of_b.z, of_b.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) part[i][j] += mine[i] * other[j];
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[i][j] += part[i][j];
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (first_row + row + i < job.rows() && first_column + column + j < job.columns()) {
        job.put(first_row + row + i, first_column + column + j, sum[i][j]);
      }
    }
  }
}

template <typename Job>
void launch_tiles(const Job& job, int spans, cudaStream_t stream) {
  const auto tiles = [](int size) { return static_cast<unsigned>((size + kTile - 1) / kTile); };
  launch(tile_product<Job>, dim3(tiles(job.columns()), tiles(job.rows()), static_cast<unsigned>(spans)), kTileThreads, 0,
         stream, job);
}

inline unsigned token_blocks(int tokens) { return static_cast<unsigned>((tokens + kTokenWarps - 1) / kTokenWarps); }

// ---------------------------------------------------------------------------------------------------- forward

template <typename X>
__global__ void __launch_bounds__(kTokenThreads) inverse_lengths(CentredRows<X> rows, float* inverse) {
  const int token = static_cast<int>(blockIdx.x) * kTokenWarps + warp_id();
  if (token >= rows.tokens) return;
  float square = 0.0f;
#pragma unroll 4
  for (int d = lane_id(); d < rows.width; d += kWarpSize) {
    const float value = rows.at(token, d);
    square += value * value;
  }
  square = warp_sum(square);
  if (lane_id() == 0) inverse[token] = square == 0.0f ? 0.0f : 1.0f / sqrtf(square);
}

template <typename X>
struct ScoresJob {
  static constexpr bool kRowsTogether = false, kColumnsTogether = false;
  CentredRows<X> x;
  const float *vectors, *inverse;  // inverse nullptr: not normalised
  float* scores;
  int experts;

  __host__ __device__ __forceinline__ int rows() const { return x.tokens; }
  __host__ __device__ __forceinline__ int columns() const { return experts; }
  __device__ __forceinline__ int2 span() const { return make_int2(0, x.width); }
  __device__ __forceinline__ float a(int token, int d) const { return x.at(token, d); }
  __device__ __forceinline__ float b(int d, int expert) const { return vectors[std::int64_t{expert} * x.width + d]; }
  __device__ __forceinline__ void put(int token, int expert, float sum) const {
    scores[std::int64_t{token} * experts + expert] = inverse == nullptr ? sum : sum * inverse[token];
  }
};

template <int Threads>
__global__ void __launch_bounds__(Threads)
    choose_all(const float* scores, int tokens, int experts, int choices, int* chosen) {
  MM_DYNAMIC_SHARED(int, keys);
  const int first = static_cast<int>(blockIdx.x) * (Threads / kWarpSize);
  choose_rows(scores, first, min(first + Threads / kWarpSize, tokens), experts, choices, chosen, keys);
}

// inverse: nullptr when not normalised.
template <typename X>
void launch_dense_forward(const CentredRows<X>& x, const float* vectors, int experts, int choices, float* scores,
                          float* inverse, int* chosen, cudaStream_t stream) {
  if (inverse != nullptr) {
    launch(inverse_lengths<X>, token_blocks(x.tokens), kTokenThreads, 0, stream, x, inverse);
  }
  launch_tiles(ScoresJob<X>{x, vectors, inverse, scores, experts}, 1, stream);
  if (choices > 0) {
    launch(choose_all<kTokenThreads>, token_blocks(x.tokens), kTokenThreads, sizeof(int) * kTokenWarps * experts, stream,
           scores, x.tokens, experts, choices, chosen);
  }
}

// ---------------------------------------------------------------------------------------------------- backward

// With u = x - mean, g the gradient of the scores s, and r = 1 or, normalised, the inverse length of u:
//   dx = r sum_e g_e v_e - r^2 u sum_e g_e s_e (the second term only when normalised),   dv_e = sum_t r g_te u_t.
struct Gradient {
  const float* grad;
  std::int64_t stride;
  const float* inverse;  // nullptr: not normalised
  int experts;

  __device__ __forceinline__ float factor(int token, int expert) const {
    const float g = grad[token * stride + expert];
    return inverse == nullptr ? g : g * inverse[token];
  }
};

// r^2 sum_e g_e s_e of each token.
template <int Threads>
__global__ void __launch_bounds__(Threads)
    shortenings(Gradient gradient, const float* scores, int tokens, float* along) {
  const int token = static_cast<int>(blockIdx.x) * (Threads / kWarpSize) + warp_id();
  if (token >= tokens) return;
  float dot = 0.0f;
  for (int e = lane_id(); e < gradient.experts; e += kWarpSize) {
    dot += gradient.factor(token, e) * scores[std::int64_t{token} * gradient.experts + e];
  }
  dot = warp_sum(dot);
  if (lane_id() == 0) along[token] = dot * gradient.inverse[token];
}

template <typename X>
struct RowsGradientJob {
  static constexpr bool kRowsTogether = false, kColumnsTogether = true;
  CentredRows<X> x;
  Gradient gradient;
  const float *vectors, *along;  // along nullptr: not normalised
  X* dx;

  __host__ __device__ __forceinline__ int rows() const { return x.tokens; }
  __host__ __device__ __forceinline__ int columns() const { return x.width; }
  __device__ __forceinline__ int2 span() const { return make_int2(0, gradient.experts); }
  __device__ __forceinline__ float a(int token, int expert) const { return gradient.factor(token, expert); }
  __device__ __forceinline__ float b(int expert, int d) const { return vectors[std::int64_t{expert} * x.width + d]; }
  __device__ __forceinline__ void put(int token, int d, float sum) const {
    if (along != nullptr) sum -= along[token] * x.at(token, d);
    dx[std::int64_t{token} * x.width + d] = narrowed<X>(sum);
  }
};

// The part of d vectors that a span of tokens makes: blockIdx.z says which.
template <typename X>
struct VectorsGradientJob {
  static constexpr bool kRowsTogether = true, kColumnsTogether = true;
  CentredRows<X> x;
  Gradient gradient;
  int tokens_together;
  float* partial;  // [spans, experts, width]

  __host__ __device__ __forceinline__ int rows() const { return gradient.experts; }
  __host__ __device__ __forceinline__ int columns() const { return x.width; }
  __device__ __forceinline__ int2 span() const {
    const int begin = static_cast<int>(blockIdx.z) * tokens_together;
    return make_int2(begin, min(begin + tokens_together, x.tokens));
  }
  __device__ __forceinline__ float a(int expert, int token) const { return gradient.factor(token, expert); }
  __device__ __forceinline__ float b(int token, int d) const { return x.at(token, d); }
  __device__ __forceinline__ void put(int expert, int d, float sum) const {
    partial[(std::int64_t{blockIdx.z} * gradient.experts + expert) * x.width + d] = sum;
  }
};

// Tokens whose part of d vectors one block sums up: at most 32 sums are left to add.
inline int tokens_together(int tokens) {
  return std::max(256, ((tokens + 31) / 32 + kTileDepth - 1) / kTileDepth * kTileDepth);
}
inline int token_spans(int tokens) { return (tokens + tokens_together(tokens) - 1) / tokens_together(tokens); }

// along [tokens], partial [token_spans(tokens), experts, width]: memory for the time of the call.
template <typename X>
void launch_dense_backward(const CentredRows<X>& x, const Gradient& gradient, const float* vectors, const float* scores,
                           float* along, float* partial, X* dx, float* d_vectors, cudaStream_t stream) {
  if (gradient.inverse != nullptr) {
    launch(shortenings<kTokenThreads>, token_blocks(x.tokens), kTokenThreads, 0, stream, gradient, scores, x.tokens, along);
  }
  launch_tiles(RowsGradientJob<X>{x, gradient, vectors, gradient.inverse == nullptr ? nullptr : along, dx}, 1, stream);
  const int spans = token_spans(x.tokens);
  launch_tiles(VectorsGradientJob<X>{x, gradient, tokens_together(x.tokens), partial}, spans, stream);
  launch_sum_partials(partial, d_vectors, std::int64_t{gradient.experts} * x.width, spans, stream);
}

}  // namespace mm
