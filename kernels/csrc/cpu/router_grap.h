// GrAP: the cosine between x - mean and expert vectors that live on disjoint contiguous slices of the features.
//
// One pass over x in each direction. A row is written as x - mean into a buffer that stays in the first cache; a slice's
// sum then takes the vectors of eight that its features fill, the last one filled up with features of the next slice, whose
// weight here is 0.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "lanes.h"
#include "router_choose.h"

namespace mm {

// x - mean of one row, in the type it is computed in, with zeros behind it.
template <typename A>
class Centred {
 public:
  Centred(const A* mean, int64_t width) : width_(width), mean_(width + kLanes), row_(width + kLanes) {
    if (mean != nullptr) {
      std::copy_n(mean, width, mean_.begin());
    }
  }

  // Returns |x - mean|^2.
  template <typename X>
  A fill(const X* x) {
    Lanes<A> squares[4] = {};
    int64_t d = 0;
    for (; d + 4 * kLanes <= width_; d += 4 * kLanes) {
      for (int64_t i = 0; i < 4; ++i) {
        put(d + i * kLanes, load(x + d + i * kLanes), squares[i]);
      }
    }
    for (; d + kLanes <= width_; d += kLanes) {
      put(d, load(x + d), squares[0]);
    }
    if (d < width_) {
      put(d, load_first(x + d, width_ - d), squares[1]);
    }
    return sum<A>((squares[0] + squares[1]) + (squares[2] + squares[3]));
  }

  const A* row() const { return row_.data(); }
  const A* mean() const { return mean_.data(); }

 private:
  void put(int64_t d, const Lanes<A>& x, Lanes<A>& squares) {
    const Lanes<A> centred = x - loaded(&mean_[d]);
    squares += centred * centred;
    store(&row_[d], centred);
  }

  int64_t width_;
  std::vector<A> mean_, row_;
};

// 1 / |v| of a vector with this squared length; 0 for the vector 0, whose cosines then are 0.
template <typename A>
inline A inverse_length(A square) {
  return square == 0 ? A(0) : 1 / std::sqrt(square);
}

// The slices' weights, each slice filled up with zeros to whole vectors of eight.
template <typename A>
struct Slices {
  struct Slice {
    int64_t begin;   // its first feature
    int64_t vector;  // its first vector in `weights`
  };
  std::vector<Slice> slices;  // of the experts, and the end
  std::vector<A> weights;

  Slices(const A* unit, int64_t width, int64_t experts) {
    int64_t begin = 0, vectors = 0;
    for (int64_t e = 0; e < experts; ++e) {
      slices.push_back({begin, vectors});
      const int64_t length = width / experts + (e < width % experts);
      begin += length;
      vectors += (length + kLanes - 1) / kLanes;
    }
    slices.push_back({begin, vectors});
    weights.resize(vectors * kLanes);
    for (int64_t e = 0; e < experts; ++e) {
      std::copy(unit + slices[e].begin, unit + slices[e + 1].begin, &weights[slices[e].vector * kLanes]);
    }
  }

  int64_t experts() const { return static_cast<int64_t>(slices.size()) - 1; }

  // The eight lanes of slice e's sum.
  Lanes<A> product(const A* row, int64_t e) const {
    Lanes<A> total = {};
    const A* features = row + slices[e].begin;
    const A* weight = &weights[slices[e].vector * kLanes];
    const int64_t vectors = slices[e + 1].vector - slices[e].vector;
    for (int64_t v = 0; v < vectors * kLanes; v += kLanes) {
      total += loaded(features + v) * loaded(weight + v);
    }
    return total;
  }

  // sums[e] = factor * <row, weights of slice e>.
  void products(const A* row, A factor, A* sums) const {
    int64_t e = 0;
    Lanes<A> eight[kLanes];
    for (; e + kLanes <= experts(); e += kLanes) {
      for (int64_t i = 0; i < kLanes; ++i) {
        eight[i] = product(row, e + i);
      }
      store(sums + e, factor * sum_of_each<A>(eight));
    }
    for (; e < experts(); ++e) {
      sums[e] = factor * sum<A>(product(row, e));
    }
  }
};

// Rows that are worth a thread of their own.
inline int64_t grain(int64_t width) { return std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, width)); }

template <typename X, typename A = Wide<X>>
void grap_fwd(const Rows<const X>& x, const A* unit, const A* mean, int64_t experts, int64_t k, A* affinity, A* inverse,
              int32_t* chosen) {
  const Slices<A> slices(unit, x.width, experts);
  torch::stable::parallel_for(0, x.count, grain(x.width), [&](int64_t begin, int64_t end) {
    Centred<A> centred(mean, x.width);
    Chooser<A> chooser(experts);
    for (int64_t t = begin; t < end; ++t) {
      inverse[t] = inverse_length(centred.fill(x[t]));
      slices.products(centred.row(), inverse[t], affinity + t * experts);
      chooser.choose(affinity + t * experts, k, chosen + t * k);
    }
  });
}

// Tokens whose contributions to d unit are added up before others join: a number of their own, not the threads', so that
// the sum is always the same one. At most 128 sums are kept.
inline int64_t tokens_together(int64_t tokens) { return std::max<int64_t>(64, (tokens + 127) / 128); }

// With u = (x - mean) * inverse and the gradient g of the affinity a:
//   dx = inverse * (sum_e g_e w_e - u sum_e g_e a_e),   d unit = sum_t g_te u on the slice of e.
template <typename A>
class GrapBackward {
 public:
  GrapBackward(const A* unit, const A* mean, int64_t width, int64_t experts)
      : width_(width), experts_(experts), unit_(width + kLanes), mean_(width + kLanes), factor_(width + kLanes) {
    std::copy_n(unit, width, unit_.begin());
    std::copy_n(mean, width, mean_.begin());
  }

  // Writes dx of one row, adds its part to `d_unit` [width + 8].
  template <typename X>
  void row(const A* grad, const X* x, const A* affinity, A inverse, X* dx, A* d_unit) {
    spread(grad, inverse);
    const A along = dot(grad, affinity) * inverse * inverse;
    int64_t d = 0;
    for (; d + kLanes <= width_; d += kLanes) {
      store(dx + d, features(d, load(x + d), along, d_unit));
    }
    if (d < width_) {
      store_first(dx + d, features(d, load_first(x + d, width_ - d), along, d_unit), width_ - d);
    }
  }

 private:
  Lanes<A> features(int64_t d, const Lanes<A>& x, A along, A* d_unit) const {
    const Lanes<A> centred = x - loaded(&mean_[d]), factor = loaded(&factor_[d]);
    store(d_unit + d, loaded(d_unit + d) + factor * centred);
    return factor * loaded(&unit_[d]) - along * centred;
  }

  // Each feature's factor is that of its expert: grad * inverse. Whole vectors; the next slice overwrites what is too much.
  void spread(const A* grad, A inverse) {
    const int64_t small = width_ / experts_, longer = width_ % experts_;
    A* to = factor_.data();
    for (int64_t e = 0; e < experts_; ++e) {
      const int64_t length = small + (e < longer);
      const Lanes<A> factor = Lanes<A>{} + grad[e] * inverse;
      for (int64_t i = 0; i < length; i += kLanes) {
        store(to + i, factor);
      }
      to += length;
    }
  }

  A dot(const A* a, const A* b) const {
    Lanes<A> total = {};
    int64_t e = 0;
    for (; e + kLanes <= experts_; e += kLanes) {
      total += loaded(a + e) * loaded(b + e);
    }
    if (e < experts_) {
      total += load_first(a + e, experts_ - e) * load_first(b + e, experts_ - e);
    }
    return sum<A>(total);
  }

  int64_t width_, experts_;
  std::vector<A> unit_, mean_, factor_;
};

template <typename X, typename A = Wide<X>>
void grap_bwd(const Rows<const A>& grad, const Rows<const X>& x, const A* unit, const A* mean, const A* affinity,
              const A* inverse, const Rows<X>& dx, A* d_unit) {
  const int64_t together = tokens_together(x.count), sums = (x.count + together - 1) / together;
  const int64_t pitch = x.width + kLanes, experts = grad.width;
  const std::unique_ptr<A[]> partial(new A[sums * pitch]);
  torch::stable::parallel_for(0, sums, std::max<int64_t>(1, grain(x.width) / together), [&](int64_t begin, int64_t end) {
    GrapBackward<A> backward(unit, mean, x.width, experts);
    for (int64_t s = begin; s < end; ++s) {
      std::fill_n(&partial[s * pitch], pitch, A(0));
      for (int64_t t = s * together; t < std::min(x.count, (s + 1) * together); ++t) {
        backward.row(grad[t], x[t], affinity + t * experts, inverse[t], dx[t], &partial[s * pitch]);
      }
    }
  });
  torch::stable::parallel_for(0, x.width, 256, [&](int64_t begin, int64_t end) {
    std::vector<double> total(end - begin);
    for (int64_t s = 0; s < sums; ++s) {
      for (int64_t d = begin; d < end; ++d) {
        total[d - begin] += partial[s * pitch + d];
      }
    }
    std::copy(total.begin(), total.end(), d_unit + begin);
  });
}

}  // namespace mm
