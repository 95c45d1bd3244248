// Moving rows to their experts' places and summing them up again: schemas, and the CPU's implementation.
#include <cstring>
#include <tuple>

#include "mm/rows_check.h"
#include "row_lanes.h"

STABLE_TORCH_LIBRARY_FRAGMENT(megamoe, m) {
  m.def("permute_rows(Tensor x, Tensor source, Tensor place, Tensor? values=None, float empty=-1.0) -> Tensor");
  m.def("unpermute_rows(Tensor y, Tensor place, Tensor source, Tensor? weights=None) -> Tensor");
  m.def(
      "unpermute_bwd(Tensor dout, Tensor y, Tensor place, Tensor source, Tensor weights)"
      " -> (Tensor, Tensor)");
}

namespace mm {
namespace {

// A number beyond the end would read or write somewhere else; negative ones mean that there is nothing.
void check_below(const char* op, const char* argument, const Tensor& indices, int64_t end) {
  int64_t largest = -1;
  const int32_t* all = in<int32_t>(indices);
  for (int64_t i = 0; i < indices.numel(); ++i) {
    largest = all[i] > largest ? all[i] : largest;
  }
  MM_CHECK(largest < end, op, argument, text("the number ", largest), text("numbers below ", end));
}

template <typename T>
void zero(const Rows<T>& rows, int64_t row) {
  std::memset(static_cast<void*>(rows[row]), 0, rows.width * sizeof(T));
}

template <typename T>
void permute(const Rows<const T>& x, const int32_t* source, int64_t choices, const Wide<T>* values, Wide<T> empty,
             const Rows<T>& y) {
  const bool beside = y.width > x.width;
  torch::stable::parallel_for(0, y.count, rows_per_task(y.width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t choice = source[row];
      if (choice < 0) {
        zero(y, row);
      } else {
        std::memcpy(static_cast<void*>(y[row]), x[choice / choices], x.width * sizeof(T));
      }
      if (beside) {
        std::memcpy(static_cast<void*>(y[row] + x.width), choice < 0 ? &empty : values + choice, sizeof(Wide<T>));
      }
    }
  });
}

// Columns [at, at + count) of one token's sum, count <= Strips * 8, in the order of its choices.
template <int Strips, typename T>
void sum_choices(const Rows<const T>& y, const int32_t* place, const Wide<T>* weights, int64_t choices, int64_t at,
                 int64_t count, T* out) {
  Lanes<Wide<T>> sum[Strips] = {};
  for (int64_t k = 0; k < choices; ++k) {
    if (place[k] >= 0) {
      const T* const from = y[place[k]] + at;
      const Wide<T> weight = weights ? weights[k] : Wide<T>(1);  // times 1 changes no bit
      for (int i = 0; i < Strips; ++i) {
        sum[i] += load_up_to(from + i * kLanes, count - i * kLanes) * weight;
      }
    }
  }
  for (int i = 0; i < Strips; ++i) {
    store_up_to(out + at + i * kLanes, sum[i], count - i * kLanes);
  }
}

template <typename T>
void unpermute(const Rows<const T>& y, const int32_t* place, const Wide<T>* weights, int64_t choices,
               const Rows<T>& out) {
  constexpr int kStrips = 4;  // so that what is asked of each choice is asked once for 32 columns
  torch::stable::parallel_for(0, out.count, rows_per_task(out.width), [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int32_t* const places = place + token * choices;
      const Wide<T>* const own = weights ? weights + token * choices : nullptr;
      int64_t at = 0;
      for (; at + kStrips * kLanes <= y.width; at += kStrips * kLanes) {
        sum_choices<kStrips>(y, places, own, choices, at, kStrips * kLanes, out[token]);
      }
      for (; at < y.width; at += kLanes) {
        sum_choices<1>(y, places, own, choices, at, y.width - at, out[token]);
      }
    }
  });
}

// d_y = weight * d_out, and the weight's gradient <d_out, y>.
template <typename T>
Wide<T> scale_and_dot(const T* d_out, const T* y, Wide<T> weight, int64_t width, T* d_y) {
  Lanes<Wide<T>> dot{};
  for (int64_t at = 0; at < width; at += kLanes) {
    const auto d = load_up_to(d_out + at, width - at);
    dot += d * load_up_to(y + at, width - at);
    store_up_to(d_y + at, d * weight, width - at);
  }
  return sum<Wide<T>>(dot);
}

template <typename T>
void unpermute_backward(const Rows<const T>& d_out, const Rows<const T>& y, const int32_t* source, int64_t choices,
                        const Wide<T>* weights, const Rows<T>& d_y, Wide<T>* d_weights) {
  std::memset(d_weights, 0, d_out.count * choices * sizeof(Wide<T>));  // of choices without a row
  torch::stable::parallel_for(0, d_y.count, rows_per_task(d_y.width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t choice = source[row];
      if (choice < 0) {
        zero(d_y, row);
      } else {
        d_weights[choice] = scale_and_dot(d_out[choice / choices], y[row], weights[choice], y.width, d_y[row]);
      }
    }
  });
}

Tensor permute_rows(Tensor x, Tensor source, Tensor place, std::optional<Tensor> values, double empty) {
  constexpr const char* op = "permute_rows";
  const RowSizes sizes = check_rows(op, source, place, x);
  Argument{op, "x", x}.rows().shape({sizes.tokens, -1});
  check_below(op, "source", source, sizes.tokens * sizes.choices);
  Tensor y;
  by_dtype<float, BFloat16, Half, double>({op, "x", x}, [&]<typename T>() {
    const int64_t more = values.has_value() ? check_values<T, Wide<T>>(op, *values, sizes, x) : 0;
    y = mm::empty({sizes.rows, x.size(1) + more}, x.scalar_type(), x);
    permute(rows_in<T>(x), in<int32_t>(source), sizes.choices, in<Wide<T>>(values), static_cast<Wide<T>>(empty),
            rows_out<T>(y));
  });
  return y;
}

Tensor unpermute_rows(Tensor y, Tensor place, Tensor source, std::optional<Tensor> weights) {
  constexpr const char* op = "unpermute_rows";
  const RowSizes sizes = check_rows(op, source, place, y);
  Argument{op, "y", y}.rows().shape({sizes.rows, -1});
  check_below(op, "place", place, sizes.rows);
  Tensor out;
  by_dtype<float, BFloat16, Half, double>({op, "y", y}, [&]<typename T>() {
    if (weights.has_value()) {
      check_weights<Wide<T>>(op, *weights, sizes, y);
    }
    out = empty({sizes.tokens, y.size(1)}, y.scalar_type(), y);
    unpermute(rows_in<T>(y), in<int32_t>(place), in<Wide<T>>(weights), sizes.choices, rows_out<T>(out));
  });
  return out;
}

std::tuple<Tensor, Tensor> unpermute_bwd(Tensor dout, Tensor y, Tensor place, Tensor source, Tensor weights) {
  constexpr const char* op = "unpermute_bwd";
  const RowSizes sizes = check_rows(op, source, place, dout);
  Argument{op, "dout", dout}.rows().shape({sizes.tokens, -1});
  Argument{op, "y", y}.dtype({dout.scalar_type()}).rows().shape({sizes.rows, dout.size(1)}).on(dout);
  check_below(op, "source", source, sizes.tokens * sizes.choices);
  Tensor d_y, d_weights;
  by_dtype<float, BFloat16, Half, double>({op, "dout", dout}, [&]<typename T>() {
    check_weights<Wide<T>>(op, weights, sizes, dout);
    d_y = empty({sizes.rows, dout.size(1)}, dout.scalar_type(), dout);
    d_weights = empty({sizes.tokens, sizes.choices}, weights.scalar_type(), weights);
    unpermute_backward(rows_in<T>(dout), rows_in<T>(y), in<int32_t>(source), sizes.choices, in<Wide<T>>(weights),
                       rows_out<T>(d_y), out<Wide<T>>(d_weights));
  });
  return {d_y, d_weights};
}

}  // namespace
}  // namespace mm

STABLE_TORCH_LIBRARY_IMPL(megamoe, CPU, m) {
  m.impl("permute_rows", TORCH_BOX(&mm::permute_rows));
  m.impl("unpermute_rows", TORCH_BOX(&mm::unpermute_rows));
  m.impl("unpermute_bwd", TORCH_BOX(&mm::unpermute_bwd));
}
