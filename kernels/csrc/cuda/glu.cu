// Gated linear units on CUDA: arguments, units and launches. The schemas are in cpu/glu.cpp, the kernels in glu.cuh.
#include "glu.cuh"

#include <tuple>

#include "mm/units.h"

namespace mm {
namespace {

int processors_of(const Tensor& tensor) {
  int count = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, tensor.get_device_index()));
  return count;
}

// body.operator()<kind>()
template <typename Body>
void by_kind(const char* op, const std::string& kind, const Body& body) {
  MM_CHECK(kind == "swiglu" || kind == "geglu", op, "kind", kind, "swiglu or geglu");
  kind == "swiglu" ? body.template operator()<Glu::swiglu>() : body.template operator()<Glu::geglu>();
}

// Of 16 bytes, else of one number.
template <typename T, typename Body, typename... Tensors>
void by_wide_unit(int64_t width, const Body& body, const Tensors&... tensors) {
  constexpr int kOne = static_cast<int>(sizeof(T));
  const bool wide = unit_bytes(kOne, width * kOne, alignment_of(tensors)...) == 16;
  wide ? body.template operator()<16>() : body.template operator()<kOne>();
}

Used check(const char* op, const Tensor& h1, const Tensor& h3, const std::optional<Tensor>& weights,
           const std::optional<Tensor>& counts) {
  Argument{op, "h1", h1}.rows();
  Argument{op, "h3", h3}.dtype({h1.scalar_type()}).rows().shape({h1.size(0), h1.size(1)}).on(h1);
  if (weights.has_value()) {
    Argument{op, "weights", *weights}.dtype({ScalarType::Float}).shape({h1.size(0)}).contiguous().on(h1);
  }
  if (counts.has_value()) {
    Argument{op, "counts", *counts}.dtype({ScalarType::Long}).shape({-1}).contiguous().on(h1);
  }
  return {in<int64_t>(counts), counts.has_value() ? static_cast<int>(counts->size(0)) : -1, h1.size(0)};
}

Tensor glu_fwd(Tensor h1, Tensor h3, std::optional<Tensor> weights, std::optional<Tensor> counts, std::string kind) {
  constexpr const char* op = "glu_fwd";
  const Used used = check(op, h1, h3, weights, counts);
  const OnDeviceOf device(h1);
  Tensor act;
  by_dtype<float, __nv_bfloat16, __half>({op, "h1", h1}, [&]<typename T>() {
    by_kind(op, kind, [&]<Glu k>() {
      act = empty({h1.size(0), h1.size(1)}, h1.scalar_type(), h1);
      by_wide_unit<T>(h1.size(1), [&]<int Bytes>() {
        const GluJob<Bytes> job{units_in<Bytes>(h1), units_in<Bytes>(h3), units_out<Bytes>(act), in<float>(weights),
                                used, static_cast<int>(h1.size(1) * sizeof(T) / Bytes), 0};
        launch_glu<k, T>(job, processors_of(h1), stream_of(h1));
      }, h1, h3, act);
    });
  });
  return act;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> glu_bwd(Tensor dact, Tensor h1, Tensor h3, std::optional<Tensor> weights,
                                                   std::optional<Tensor> counts, std::string kind) {
  constexpr const char* op = "glu_bwd";
  const Used used = check(op, h1, h3, weights, counts);
  Argument{op, "dact", dact}.dtype({h1.scalar_type()}).rows().shape({h1.size(0), h1.size(1)}).on(h1);
  const OnDeviceOf device(h1);
  Tensor d_h1, d_h3, act;
  const Tensor d_weights = empty({weights.has_value() ? h1.size(0) : 0}, ScalarType::Float, h1);
  by_dtype<float, __nv_bfloat16, __half>({op, "h1", h1}, [&]<typename T>() {
    by_kind(op, kind, [&]<Glu k>() {
      for (Tensor* made : {&d_h1, &d_h3, &act}) {
        *made = empty({h1.size(0), h1.size(1)}, h1.scalar_type(), h1);
      }
      by_wide_unit<T>(h1.size(1), [&]<int Bytes>() {
        const GluBackJob<Bytes> job{units_in<Bytes>(dact), units_in<Bytes>(h1), units_in<Bytes>(h3),
                                    units_out<Bytes>(d_h1), units_out<Bytes>(d_h3), units_out<Bytes>(act),
                                    in<float>(weights), out<float>(d_weights), used,
                                    static_cast<int>(h1.size(1) * sizeof(T) / Bytes)};
        launch_glu_back<k, T>(job, processors_of(h1), stream_of(h1));
      }, dact, h1, h3, d_h1, d_h3, act);
    });
  });
  return {d_h1, d_h3, d_weights, act};
}

}  // namespace
}  // namespace mm

STABLE_TORCH_LIBRARY_IMPL(megamoe, CUDA, m) {
  m.impl("glu_fwd", TORCH_BOX(&mm::glu_fwd));
  m.impl("glu_bwd", TORCH_BOX(&mm::glu_bwd));
}
