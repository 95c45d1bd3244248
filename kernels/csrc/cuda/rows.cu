// Moving rows on CUDA: arguments, units and launches. The schemas are in cpu/rows.cpp, the kernels in rows.cuh.
#include "rows.cuh"

#include <cstring>
#include <tuple>

#include "mm/rows_check.h"
#include "mm/units.h"

namespace mm {
namespace {

// by_unit for rows of T: a unit holds at least one number.
template <typename T, typename Body, typename... Tensors>
void by_unit_of(int64_t width, const Body& body, const Tensors&... tensors) {
  by_unit(sizeof(T), width * static_cast<int64_t>(sizeof(T)), [&]<int Bytes>() {
    if constexpr (Bytes >= static_cast<int>(sizeof(T))) body.template operator()<Bytes>();
  }, tensors...);
}

Places places_of(const Tensor& place, const RowSizes& sizes) {
  return {in<int32_t>(place), static_cast<int>(sizes.choices), static_cast<int>(sizes.rows)};
}

Beside beside_of(const std::optional<Tensor>& values, double empty, const Tensor& y, int64_t width) {
  const auto last = static_cast<float>(empty);
  Beside beside{};
  if (values.has_value()) {
    const int64_t element = y.element_size();
    beside = {true, static_cast<const unsigned*>(values->const_data_ptr()), 0, element == 2,
              static_cast<char*>(y.mutable_data_ptr()) + width * element, stride_bytes(y)};
    std::memcpy(&beside.empty, &last, sizeof last);
  }
  return beside;
}

Tensor permute_rows(Tensor x, Tensor source, Tensor place, std::optional<Tensor> values, double empty) {
  constexpr const char* op = "permute_rows";
  const RowSizes sizes = check_rows(op, source, place, x);
  Argument{op, "x", x}
      .dtype({ScalarType::Float, ScalarType::BFloat16, ScalarType::Half})
      .rows()
      .shape({sizes.tokens, -1});
  const OnDeviceOf device(x);
  const int64_t element = x.element_size(), width = x.size(1);
  int64_t more = 0;
  if (values.has_value()) {
    check_values<float, float>(op, *values, sizes, x);
    more = static_cast<int64_t>(sizeof(float)) / element;
  }
  const Tensor y = mm::empty({sizes.rows, width + more}, x.scalar_type(), x);
  by_unit(static_cast<int>(element), width * element, [&]<int Bytes>() {
    const PermuteJob<Bytes> job{units_in<Bytes>(x), units_out<Bytes>(y), in<int32_t>(source), places_of(place, sizes),
                                beside_of(values, empty, y, width), sizes.tokens, sizes.rows,
                                static_cast<int>(width * element / Bytes), 0};
    launch_permute(job, stream_of(x));
  }, x, y);
  return y;
}

Tensor unpermute_rows(Tensor y, Tensor place, Tensor source, std::optional<Tensor> weights) {
  constexpr const char* op = "unpermute_rows";
  const RowSizes sizes = check_rows(op, source, place, y);
  Argument{op, "y", y}.rows().shape({sizes.rows, -1});
  if (weights.has_value()) check_weights<float>(op, *weights, sizes, y);
  const OnDeviceOf device(y);
  Tensor result;
  by_dtype<float, __nv_bfloat16, __half>({op, "y", y}, [&]<typename T>() {
    result = empty({sizes.tokens, y.size(1)}, y.scalar_type(), y);
    by_unit_of<T>(y.size(1), [&]<int Bytes>() {
      const UnpermuteJob<T, Bytes> job{units_in<Bytes>(y), units_out<Bytes>(result), places_of(place, sizes),
                                       in<float>(weights), sizes.tokens,
                                       static_cast<int>(y.size(1) * sizeof(T) / Bytes), 0};
      launch_unpermute(job, stream_of(y));
    }, y, result);
  });
  return result;
}

std::tuple<Tensor, Tensor> unpermute_bwd(Tensor dout, Tensor y, Tensor place, Tensor source, Tensor weights) {
  constexpr const char* op = "unpermute_bwd";
  const RowSizes sizes = check_rows(op, source, place, dout);
  Argument{op, "dout", dout}.rows().shape({sizes.tokens, -1});
  Argument{op, "y", y}.dtype({dout.scalar_type()}).rows().shape({sizes.rows, dout.size(1)}).on(dout);
  check_weights<float>(op, weights, sizes, dout);
  const OnDeviceOf device(dout);
  Tensor d_y;
  const Tensor d_weights = empty({sizes.tokens, sizes.choices}, ScalarType::Float, dout);
  by_dtype<float, __nv_bfloat16, __half>({op, "dout", dout}, [&]<typename T>() {
    d_y = empty({sizes.rows, dout.size(1)}, dout.scalar_type(), dout);
    by_unit_of<T>(dout.size(1), [&]<int Bytes>() {
      const UnpermuteBackJob<T, Bytes> job{units_in<Bytes>(dout), units_in<Bytes>(y), units_out<Bytes>(d_y),
                                           in<int32_t>(source), places_of(place, sizes), in<float>(weights),
                                           out<float>(d_weights), sizes.tokens, sizes.rows,
                                           static_cast<int>(dout.size(1) * sizeof(T) / Bytes)};
      launch_unpermute_back(job, stream_of(dout));
    }, dout, y, d_y);
  });
  return {d_y, d_weights};
}

}  // namespace
}  // namespace mm

STABLE_TORCH_LIBRARY_IMPL(megamoe, CUDA, m) {
  m.impl("permute_rows", TORCH_BOX(&mm::permute_rows));
  m.impl("unpermute_rows", TORCH_BOX(&mm::unpermute_rows));
  m.impl("unpermute_bwd", TORCH_BOX(&mm::unpermute_bwd));
}
