// What the arguments of the ops that move rows have in common, on every device.
#pragma once

#include "mm/tensor.h"

namespace mm {

struct RowSizes {
  int64_t tokens, choices, rows;  // T, K, R
};

// place [T, K] and source [R], on the device of `rows`.
inline RowSizes check_rows(const char* op, const Tensor& source, const Tensor& place, const Tensor& rows) {
  Argument{op, "place", place}.dtype({ScalarType::Int}).shape({-1, -1}).contiguous().on(rows);
  Argument{op, "source", source}.dtype({ScalarType::Int}).shape({-1}).contiguous().on(rows);
  const int64_t choices = place.size(1);
  MM_CHECK(choices >= 1, op, "place", "no choices", "at least one for each token");
  return {place.size(0), choices, source.size(0)};
}

template <typename W>
void check_weights(const char* op, const Tensor& weights, const RowSizes& sizes, const Tensor& rows) {
  Argument{op, "weights", weights}.dtype({DtypeOf<W>::value}).shape({sizes.tokens, sizes.choices}).contiguous().on(rows);
}

// How many columns of T the bits of one value take.
template <typename T, typename W>
int64_t check_values(const char* op, const Tensor& values, const RowSizes& sizes, const Tensor& rows) {
  Argument{op, "values", values}.dtype({DtypeOf<W>::value}).shape({sizes.tokens, sizes.choices}).contiguous().on(rows);
  return static_cast<int64_t>(sizeof(W) / sizeof(T));
}

}  // namespace mm
