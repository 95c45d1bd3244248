// Ops of the router: grap_fwd, grap_bwd, router_fwd, router_bwd. Schemas, checks, and the implementation on a CPU.
#include "mm/router_check.h"
#include "mm/tensor.h"

#include "router_dense.h"
#include "router_grap.h"

namespace mm {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor>;
using Gradients = std::tuple<Tensor, Tensor>;

// Affinity or scores, inverse lengths, choice.
Outputs outputs_for(const Tensor& x, const RouterSizes& sizes, bool normalize, int64_t k) {
  const ScalarType wide = wide_of(x.scalar_type());
  return {empty({sizes.tokens, sizes.experts}, wide, x), empty({normalize ? sizes.tokens : 0}, wide, x),
          empty({sizes.tokens, k}, ScalarType::Int, x)};
}

Outputs grap_fwd_cpu(const Tensor& x, const Tensor& unit, const Tensor& mean, int64_t experts, int64_t k) {
  const RouterSizes sizes = check_grap_fwd(x, unit, mean, experts, k);
  Outputs outputs;
  by_dtype<float, BFloat16, Half, double>({"grap_fwd", "x", x}, [&]<typename X>() {
    using A = Wide<X>;
    outputs = outputs_for(x, sizes, true, k);
    const auto& [affinity, inverse, chosen] = outputs;
    grap_fwd(rows_in<X>(x), in<A>(unit), in<A>(mean), experts, k, out<A>(affinity), out<A>(inverse),
             out<int32_t>(chosen));
  });
  return outputs;
}

Gradients grap_bwd_cpu(const Tensor& grad, const Tensor& x, const Tensor& unit, const Tensor& mean,
                       const Tensor& affinity, const Tensor& inverse) {
  const RouterSizes sizes = check_grap_bwd(grad, x, unit, mean, affinity, inverse);
  const Tensor dx = empty({sizes.tokens, sizes.width}, x.scalar_type(), x);
  const Tensor d_unit = empty({sizes.width}, wide_of(x.scalar_type()), x);
  by_dtype<float, BFloat16, Half, double>({"grap_bwd", "x", x}, [&]<typename X>() {
    using A = Wide<X>;
    grap_bwd(rows_in<A>(grad), rows_in<X>(x), in<A>(unit), in<A>(mean), in<A>(affinity), in<A>(inverse),
             rows_out<X>(dx), out<A>(d_unit));
  });
  return {dx, d_unit};
}

Outputs router_fwd_cpu(const Tensor& x, const Tensor& vectors, const std::optional<Tensor>& mean, bool normalize,
                       int64_t k) {
  const RouterSizes sizes = check_router_fwd(x, vectors, mean, k);
  Outputs outputs;
  by_dtype<float, BFloat16, Half, double>({"router_fwd", "x", x}, [&]<typename X>() {
    using A = Wide<X>;
    outputs = outputs_for(x, sizes, normalize, k);
    const auto& [scores, inverse, chosen] = outputs;
    router_fwd(rows_in<X>(x), in<A>(vectors), sizes.experts, in<A>(mean), normalize, k, out<A>(scores), out<A>(inverse),
               out<int32_t>(chosen));
  });
  return outputs;
}

Gradients router_bwd_cpu(const Tensor& grad, const Tensor& x, const Tensor& vectors, const std::optional<Tensor>& mean,
                         bool normalize, const Tensor& scores, const Tensor& inverse) {
  const RouterSizes sizes = check_router_bwd(grad, x, vectors, mean, normalize, scores, inverse);
  const Tensor dx = empty({sizes.tokens, sizes.width}, x.scalar_type(), x);
  const Tensor d_vectors = empty({sizes.experts, sizes.width}, wide_of(x.scalar_type()), x);
  by_dtype<float, BFloat16, Half, double>({"router_bwd", "x", x}, [&]<typename X>() {
    using A = Wide<X>;
    const DenseBackward<X> backward(rows_in<A>(grad), rows_in<X>(x), in<A>(vectors), in<A>(mean), in<A>(scores),
                                    normalize ? in<A>(inverse) : nullptr);
    backward.rows(rows_out<X>(dx));
    backward.vectors(out<A>(d_vectors));
  });
  return {dx, d_vectors};
}

}  // namespace
}  // namespace mm

STABLE_TORCH_LIBRARY_FRAGMENT(megamoe, m) {
  m.def(
      "grap_fwd(Tensor x, Tensor unit, Tensor mean, int num_experts, int top_k)"
      " -> (Tensor affinity, Tensor inverse, Tensor experts)");
  m.def(
      "grap_bwd(Tensor grad, Tensor x, Tensor unit, Tensor mean, Tensor affinity, Tensor inverse)"
      " -> (Tensor dx, Tensor dunit)");
  m.def(
      "router_fwd(Tensor x, Tensor vectors, Tensor? mean, bool normalize, int top_k)"
      " -> (Tensor scores, Tensor inverse, Tensor experts)");
  m.def(
      "router_bwd(Tensor grad, Tensor x, Tensor vectors, Tensor? mean, bool normalize, Tensor scores, Tensor inverse)"
      " -> (Tensor dx, Tensor dvectors)");
}

STABLE_TORCH_LIBRARY_IMPL(megamoe, CPU, m) {
  m.impl("grap_fwd", TORCH_BOX(&mm::grap_fwd_cpu));
  m.impl("grap_bwd", TORCH_BOX(&mm::grap_bwd_cpu));
  m.impl("router_fwd", TORCH_BOX(&mm::router_fwd_cpu));
  m.impl("router_bwd", TORCH_BOX(&mm::router_bwd_cpu));
}
