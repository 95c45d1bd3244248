// Scores of tokens with dense expert vectors: <x - mean, v_e>, or the cosine for unit vectors. Plain blocked loops that are
// right to the last digits of fp32; torch's matrix products are faster on a CPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "lanes.h"
#include "router_choose.h"
#include "router_grap.h"

namespace mm {

// Rows of A that are filled up with zeros to a multiple of eight.
template <typename A>
struct Padded {
  int64_t pitch;
  std::vector<A> data;

  Padded(int64_t rows, int64_t width) : pitch((width + kLanes - 1) / kLanes * kLanes), data(rows * pitch) {}
  Padded(const A* from, int64_t rows, int64_t width) : Padded(rows, width) {
    for (int64_t r = 0; r < rows; ++r) {
      std::copy_n(from + r * width, width, (*this)[r]);
    }
  }
  A* operator[](int64_t row) { return data.data() + row * pitch; }
  const A* operator[](int64_t row) const { return data.data() + row * pitch; }
};

template <typename X, typename A = Wide<X>>
void router_fwd(const Rows<const X>& x, const A* vectors, int64_t experts, const A* mean, bool normalize, int64_t k,
                A* scores, A* inverse, int32_t* chosen) {
  const Padded<A> vector(vectors, experts, x.width);
  torch::stable::parallel_for(0, x.count, grain(x.width * experts), [&](int64_t begin, int64_t end) {
    Padded<A> rows(kLanes, x.width);
    Centred<A> centred(mean, x.width);
    Chooser<A> chooser(experts);
    for (int64_t first = begin; first < end; first += kLanes) {
      const int64_t count = std::min(kLanes, end - first);
      Lanes<A> factors = Lanes<A>{} + A(1);
      for (int64_t i = 0; i < count; ++i) {
        const A square = centred.fill(x[first + i]);
        std::copy_n(centred.row(), x.width, rows[i]);
        if (normalize) {
          factors[i] = inverse[first + i] = inverse_length(square);
        }
      }
      for (int64_t e = 0; e < experts; ++e) {
        Lanes<A> eight[kLanes] = {};
        for (int64_t d = 0; d < rows.pitch; d += kLanes) {
          const Lanes<A> weight = loaded(vector[e] + d);
          for (int64_t i = 0; i < kLanes; ++i) {
            eight[i] += loaded(rows[i] + d) * weight;
          }
        }
        const Lanes<A> score = factors * sum_of_each<A>(eight);
        for (int64_t i = 0; i < count; ++i) {
          scores[(first + i) * experts + e] = score[i];
        }
      }
      for (int64_t i = 0; i < count; ++i) {
        chooser.choose(scores + (first + i) * experts, k, chosen + (first + i) * k);
      }
    }
  });
}

// With u = x - mean, g the gradient of the scores s, and r = 1 or, normalised, the inverse length of u:
//   dx = r sum_e g_e v_e - r^2 u sum_e g_e s_e (the second term only when normalised),   dv_e = sum_t r g_te u_t.
template <typename X, typename A = Wide<X>>
class DenseBackward {
 public:
  static constexpr int64_t kTogether = 256;

  DenseBackward(const Rows<const A>& grad, const Rows<const X>& x, const A* vectors, const A* mean, const A* scores,
                const A* inverse)
      : x_(x), experts_(grad.width), factors_(x.count, experts_), along_(x.count), vectors_(vectors, experts_, x.width),
        mean_(1, x.width) {
    if (mean != nullptr) {
      std::copy_n(mean, x.width, mean_[0]);
    }
    for (int64_t t = 0; t < x.count; ++t) {
      A along = 0;
      for (int64_t e = 0; e < experts_; ++e) {
        factors_[t][e] = inverse != nullptr ? grad[t][e] * inverse[t] : grad[t][e];
        along += inverse != nullptr ? grad[t][e] * scores[t * experts_ + e] : A(0);
      }
      along_[t] = inverse != nullptr ? along * inverse[t] * inverse[t] : A(0);
    }
  }

  void rows(const Rows<X>& dx) const {
    torch::stable::parallel_for(0, x_.count, grain(x_.width * experts_), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        for (int64_t d = 0; d < x_.width; d += kLanes) {
          Lanes<A> total = -along_[t] * centred(t, d);
          for (int64_t e = 0; e < experts_; ++e) {
            total += factors_[t][e] * loaded(vectors_[e] + d);
          }
          store_first(dx[t] + d, total, std::min(kLanes, x_.width - d));
        }
      }
    });
  }

  // Each thread adds up some features of all tokens, so the order does not depend on the number of threads.
  void vectors(A* d_vectors) const {
    const int64_t pieces = mean_.pitch / kLanes;
    torch::stable::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
      std::vector<Lanes<A>> sums(experts_);
      std::vector<Lanes<double>> total(experts_);
      for (int64_t d = begin * kLanes; d < end * kLanes; d += kLanes) {
        std::fill(total.begin(), total.end(), Lanes<double>{});
        for (int64_t first = 0; first < x_.count; first += kTogether) {
          piece(first, std::min(x_.count, first + kTogether), d, sums);
          for (int64_t e = 0; e < experts_; ++e) {
            total[e] += __builtin_convertvector(sums[e], Lanes<double>);
          }
        }
        for (int64_t e = 0; e < experts_; ++e) {
          store_first(d_vectors + e * x_.width + d, __builtin_convertvector(total[e], Lanes<A>),
                      std::min(kLanes, x_.width - d));
        }
      }
    });
  }

 private:
  Lanes<A> centred(int64_t t, int64_t d) const {
    const bool whole = d + kLanes <= x_.width;
    return (whole ? load(x_[t] + d) : load_first(x_[t] + d, x_.width - d)) - loaded(mean_[0] + d);
  }

  void piece(int64_t begin, int64_t end, int64_t d, std::vector<Lanes<A>>& sums) const {
    std::fill(sums.begin(), sums.end(), Lanes<A>{});
    for (int64_t t = begin; t < end; ++t) {
      const Lanes<A> u = centred(t, d);
      for (int64_t e = 0; e < experts_; ++e) {
        sums[e] += factors_[t][e] * u;
      }
    }
  }

  Rows<const X> x_;
  int64_t experts_;
  Padded<A> factors_;
  std::vector<A> along_;
  Padded<A> vectors_, mean_;
};

}  // namespace mm
