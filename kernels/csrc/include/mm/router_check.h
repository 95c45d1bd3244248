// What the router's ops expect of their arguments, on every device.
#pragma once

#include "mm/tensor.h"

namespace mm {

struct RouterSizes {
  int64_t tokens, width, experts;
};

// The dtype in which rows of this one are computed.
inline ScalarType wide_of(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_choice(const char* op, int64_t experts, int64_t k) {
  MM_CHECK(k >= 0 && k <= experts, op, "top_k", text(k), text("0 to the number of experts, ", experts));
}

inline void check_feature_vector(const char* op, const char* name, const Tensor& vector, const Tensor& x) {
  Argument{op, name, vector}.dtype({wide_of(x.scalar_type())}).shape({x.size(1)}).contiguous().on(x);
}

inline RouterSizes check_grap_fwd(const Tensor& x, const Tensor& unit, const Tensor& mean, int64_t experts, int64_t k) {
  constexpr const char* op = "grap_fwd";
  Argument{op, "x", x}.rows();
  check_feature_vector(op, "unit", unit, x);
  check_feature_vector(op, "mean", mean, x);
  MM_CHECK(experts >= 1, op, "num_experts", text(experts), "at least 1");
  check_choice(op, experts, k);
  return {x.size(0), x.size(1), experts};
}

inline RouterSizes check_grap_bwd(const Tensor& grad, const Tensor& x, const Tensor& unit, const Tensor& mean,
                                  const Tensor& affinity, const Tensor& inverse) {
  constexpr const char* op = "grap_bwd";
  const ScalarType wide = wide_of(x.scalar_type());
  Argument{op, "x", x}.rows();
  Argument{op, "grad", grad}.dtype({wide}).rows().shape({x.size(0), -1}).on(x);
  MM_CHECK(grad.size(1) >= 1, op, "grad", "no experts", "at least one");
  check_feature_vector(op, "unit", unit, x);
  check_feature_vector(op, "mean", mean, x);
  Argument{op, "affinity", affinity}.dtype({wide}).shape({x.size(0), grad.size(1)}).contiguous().on(x);
  Argument{op, "inverse", inverse}.dtype({wide}).shape({x.size(0)}).contiguous().on(x);
  return {x.size(0), x.size(1), grad.size(1)};
}

inline RouterSizes check_vectors(const char* op, const Tensor& x, const Tensor& vectors,
                                 const std::optional<Tensor>& mean) {
  Argument{op, "x", x}.rows();
  Argument{op, "vectors", vectors}.dtype({wide_of(x.scalar_type())}).shape({-1, x.size(1)}).contiguous().on(x);
  if (mean.has_value()) {
    check_feature_vector(op, "mean", *mean, x);
  }
  return {x.size(0), x.size(1), vectors.size(0)};
}

inline RouterSizes check_router_fwd(const Tensor& x, const Tensor& vectors, const std::optional<Tensor>& mean, int64_t k) {
  const RouterSizes sizes = check_vectors("router_fwd", x, vectors, mean);
  check_choice("router_fwd", sizes.experts, k);
  return sizes;
}

inline RouterSizes check_router_bwd(const Tensor& grad, const Tensor& x, const Tensor& vectors,
                                    const std::optional<Tensor>& mean, bool normalize, const Tensor& scores,
                                    const Tensor& inverse) {
  constexpr const char* op = "router_bwd";
  const ScalarType wide = wide_of(x.scalar_type());
  const RouterSizes sizes = check_vectors(op, x, vectors, mean);
  Argument{op, "grad", grad}.dtype({wide}).rows().shape({sizes.tokens, sizes.experts}).on(x);
  Argument{op, "scores", scores}.dtype({wide}).shape({sizes.tokens, sizes.experts}).contiguous().on(x);
  Argument{op, "inverse", inverse}.dtype({wide}).shape({normalize ? sizes.tokens : 0}).contiguous().on(x);
  return sizes;
}

}  // namespace mm
