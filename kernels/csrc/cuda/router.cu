// The router's ops on CUDA: arguments, units and launches. The schemas are in cpu/router.cpp, the kernels in router_*.cuh.
#include <tuple>
#include <type_traits>

#include "mm/router_check.h"
#include "mm/units.h"
#include "router_dense.cuh"
#include "router_grap.cuh"
#include "router_mma.cuh"

namespace mm {
namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor>;
using Gradients = std::tuple<Tensor, Tensor>;

int multiprocessors(const Tensor& tensor) {
  int count = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, tensor.get_device_index()));
  return count;
}

// Affinity or scores, inverse lengths, choice.
Outputs outputs_for(const Tensor& x, const RouterSizes& sizes, bool normalize, int64_t k) {
  return {empty({sizes.tokens, sizes.experts}, ScalarType::Float, x),
          empty({normalize ? sizes.tokens : 0}, ScalarType::Float, x), empty({sizes.tokens, k}, ScalarType::Int, x)};
}

constexpr int64_t kWidest = 1 << 14, kMostTokens = 1 << 22;

void check_sizes(const char* op, const RouterSizes& sizes) {
  MM_CHECK(sizes.experts <= kMostExperts, op, "experts", text(sizes.experts), text("at most ", kMostExperts));
  MM_CHECK(sizes.width <= kWidest, op, "x", text(sizes.width, " features"), text("at most ", kWidest));
  MM_CHECK(sizes.tokens < kMostTokens, op, "x", text(sizes.tokens, " rows"), text("less than ", kMostTokens));
}

// Whether rows of all tensors are made of units of 16 bytes.
template <typename X, typename... Tensors>
bool in_units(int64_t width, const Tensors&... tensors) {
  return unit_bytes(sizeof(X), width * static_cast<int64_t>(sizeof(X)), alignment_of(tensors)...) == 16;
}

// body.operator()<Bytes, Units>(): the unit that fits x, and as many of them for each thread as the width needs.
template <typename X, typename Body>
void by_width(const Tensor& x, const Body& body) {
  constexpr int kCount = 16 / sizeof(X);
  const int64_t each = (x.size(1) / kCount + kGrapThreads - 1) / kGrapThreads;
  if (each > 4 || !in_units<X>(x.size(1), x)) return body.template operator()<sizeof(X), 1>();
  if (each <= 1) return body.template operator()<16, 1>();
  if (each <= 2) return body.template operator()<16, 2>();
  return body.template operator()<16, 4>();
}

Outputs grap_fwd(Tensor x, Tensor unit, Tensor mean, int64_t experts, int64_t k) {
  constexpr const char* op = "grap_fwd";
  const RouterSizes sizes = check_grap_fwd(x, unit, mean, experts, k);
  check_sizes(op, sizes);
  const OnDeviceOf device(x);
  Outputs outputs;
  by_dtype<float, __nv_bfloat16, __half>({op, "x", x}, [&]<typename X>() {
    outputs = outputs_for(x, sizes, true, k);
    const auto& [affinity, inverse, chosen] = outputs;
    by_width<X>(x, [&]<int Bytes, int Units>() {
      GrapForwardJob<X, Bytes, Units> job{};
      job.x = units_in<Bytes>(x);
      job.unit = in<float>(unit);
      job.mean = in<float>(mean);
      job.affinity = out<float>(affinity);
      job.inverse = out<float>(inverse);
      job.chosen = out<int32_t>(chosen);
      job.tokens = static_cast<int>(sizes.tokens);
      job.experts = static_cast<int>(experts);
      job.choices = static_cast<int>(k);
      launch_grap_forward(job, static_cast<int>(sizes.width), multiprocessors(x), stream_of(x));
    });
  });
  return outputs;
}

Gradients grap_bwd(Tensor grad, Tensor x, Tensor unit, Tensor mean, Tensor affinity, Tensor inverse) {
  constexpr const char* op = "grap_bwd";
  const RouterSizes sizes = check_grap_bwd(grad, x, unit, mean, affinity, inverse);
  check_sizes(op, sizes);
  const OnDeviceOf device(x);
  const Tensor dx = empty({sizes.tokens, sizes.width}, x.scalar_type(), x);
  const Tensor d_unit = empty({sizes.width}, ScalarType::Float, x);
  by_dtype<float, __nv_bfloat16, __half>({op, "x", x}, [&]<typename X>() {
    const auto run = [&]<int Bytes>() {
      const int width = static_cast<int>(sizes.width), processors = multiprocessors(x);
      const int partials = grap_partials<X, Bytes>(sizes.tokens, width, processors);
      const Tensor partial = empty({partials, sizes.width}, ScalarType::Float, x);
      GrapBackwardJob<X, Bytes> job{};
      job.grad = in<float>(grad);
      job.grad_stride = row_stride(grad);
      job.x = units_in<Bytes>(x);
      job.dx = units_out<Bytes>(dx);
      job.unit = in<float>(unit);
      job.mean = in<float>(mean);
      job.affinity = in<float>(affinity);
      job.inverse = in<float>(inverse);
      job.partial = out<float>(partial);
      job.tokens = sizes.tokens;
      job.experts = static_cast<int>(sizes.experts);
      launch_grap_backward(job, out<float>(d_unit), width, processors, stream_of(x));
    };
    in_units<X>(sizes.width, x, dx) ? run.template operator()<16>() : run.template operator()<sizeof(X)>();
  });
  return {dx, d_unit};
}

template <typename X>
CentredRows<X> centred_rows(const Tensor& x, const std::optional<Tensor>& mean) {
  return {in<X>(x), row_stride(x), in<float>(mean), static_cast<int>(x.size(0)), static_cast<int>(x.size(1))};
}

// On tensor cores.
void mma_forward(const Tensor& x, const Tensor& vectors, const std::optional<Tensor>& mean, const Outputs& outputs,
                 bool normalize) {
  const auto& [scores, inverse, chosen] = outputs;
  const int experts = static_cast<int>(scores.size(1)), width = static_cast<int>(x.size(1));
  const Tensor terms = empty({split_sizes(experts, width, mean.has_value()).count()}, ScalarType::BFloat16, x);
  by_eights(experts, mean.has_value(), [&]<int Eights, bool Centred>() {
    MmaScoresJob<Eights, Centred> job{};
    job.x = in<__nv_bfloat16>(x);
    job.x_stride = row_stride(x);
    job.mean = in<float>(mean);
    job.scores = out<float>(scores);
    job.inverse = out<float>(inverse);
    job.chosen = out<int32_t>(chosen);
    job.tokens = static_cast<int>(x.size(0));
    job.width = width;
    job.experts = experts;
    job.choices = static_cast<int>(chosen.size(1));
    job.normalize = normalize;
    launch_mma_scores(job, in<float>(vectors), out<__nv_bfloat16>(terms), stream_of(x));
  });
}

Outputs router_fwd(Tensor x, Tensor vectors, std::optional<Tensor> mean, bool normalize, int64_t k) {
  constexpr const char* op = "router_fwd";
  const RouterSizes sizes = check_router_fwd(x, vectors, mean, k);
  check_sizes(op, sizes);
  const OnDeviceOf device(x);
  Outputs outputs;
  by_dtype<float, __nv_bfloat16, __half>({op, "x", x}, [&]<typename X>() {
    outputs = outputs_for(x, sizes, normalize, k);
    const auto& [scores, inverse, chosen] = outputs;
    if (std::is_same_v<X, __nv_bfloat16> && sizes.width > 0 && in_units<X>(sizes.width, x)) {
      mma_forward(x, vectors, mean, outputs, normalize);
    } else {
      launch_dense_forward(centred_rows<X>(x, mean), in<float>(vectors), static_cast<int>(sizes.experts),
                           static_cast<int>(k), out<float>(scores), normalize ? out<float>(inverse) : nullptr,
                           out<int32_t>(chosen), stream_of(x));
    }
  });
  return outputs;
}

Gradients router_bwd(Tensor grad, Tensor x, Tensor vectors, std::optional<Tensor> mean, bool normalize, Tensor scores,
                     Tensor inverse) {
  constexpr const char* op = "router_bwd";
  const RouterSizes sizes = check_router_bwd(grad, x, vectors, mean, normalize, scores, inverse);
  check_sizes(op, sizes);
  const OnDeviceOf device(x);
  const Tensor dx = empty({sizes.tokens, sizes.width}, x.scalar_type(), x);
  const Tensor d_vectors = empty({sizes.experts, sizes.width}, ScalarType::Float, x);
  const Tensor along = empty({normalize ? sizes.tokens : 0}, ScalarType::Float, x);
  const int tokens = static_cast<int>(sizes.tokens);
  const Tensor partial = empty({token_spans(tokens), sizes.experts, sizes.width}, ScalarType::Float, x);
  const Gradient gradient{in<float>(grad), row_stride(grad), normalize ? in<float>(inverse) : nullptr,
                          static_cast<int>(sizes.experts)};
  by_dtype<float, __nv_bfloat16, __half>({op, "x", x}, [&]<typename X>() {
    launch_dense_backward(centred_rows<X>(x, mean), gradient, in<float>(vectors), in<float>(scores), out<float>(along),
                          out<float>(partial), out<X>(dx), out<float>(d_vectors), stream_of(x));
  });
  return {dx, d_vectors};
}

}  // namespace
}  // namespace mm

STABLE_TORCH_LIBRARY_IMPL(megamoe, CUDA, m) {
  m.impl("grap_fwd", TORCH_BOX(&mm::grap_fwd));
  m.impl("grap_bwd", TORCH_BOX(&mm::grap_bwd));
  m.impl("router_fwd", TORCH_BOX(&mm::router_fwd));
  m.impl("router_bwd", TORCH_BOX(&mm::router_bwd));
}
