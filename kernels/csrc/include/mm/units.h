// Rows of tensors as units, and the width that fits them: host side of CUDA ops.
#pragma once

#include "mm/tensor.h"
#include "mm/vec.cuh"

namespace mm {

inline int64_t stride_bytes(const Tensor& tensor) { return row_stride(tensor) * tensor.element_size(); }

inline int64_t alignment_of(const Tensor& tensor) {
  return reinterpret_cast<int64_t>(tensor.const_data_ptr()) | stride_bytes(tensor);
}

template <int Bytes>
ConstUnitRows<Bytes> units_in(const Tensor& tensor) {
  return {static_cast<const Unit<Bytes>*>(tensor.const_data_ptr()), stride_bytes(tensor) / Bytes};
}

template <int Bytes>
UnitRows<Bytes> units_out(const Tensor& tensor) {
  return {static_cast<Unit<Bytes>*>(tensor.mutable_data_ptr()), stride_bytes(tensor) / Bytes};
}

// body.operator()<Bytes>() with the widest unit that fits rows of `width` bytes in all these tensors.
template <typename Body, typename... Tensors>
void by_unit(int element, int64_t width, const Body& body, const Tensors&... tensors) {
  switch (unit_bytes(element, width, alignment_of(tensors)...)) {
    case 16: return body.template operator()<16>();
    case 4: return body.template operator()<4>();
    default: return body.template operator()<2>();
  }
}

}  // namespace mm
