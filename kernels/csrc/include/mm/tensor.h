// Tensors of the stable ABI: checks that name op and argument, typed pointers, views of rows, dispatch on the dtype.
//
// Only what the headers of torch 2.11 declare for TORCH_TARGET_VERSION 2.11 is used, so that one library fits every later
// torch. In functions for STABLE_TORCH_LIBRARY a schema's `int` is int64_t, `float` is double, `str` is std::string,
// `Tensor?` is std::optional<Tensor>.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "mm/check.h"

namespace mm {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The dtype of a C++ type. launch.h adds CUDA's own 16-bit types.
template <typename T>
struct DtypeOf;
#define MM_DTYPE(type, scalar)                                   \
  template <>                                                    \
  struct DtypeOf<type> {                                         \
    static constexpr ScalarType value = ScalarType::scalar;      \
  };
MM_DTYPE(float, Float)
MM_DTYPE(double, Double)
MM_DTYPE(BFloat16, BFloat16)
MM_DTYPE(Half, Half)
MM_DTYPE(int32_t, Int)
MM_DTYPE(int64_t, Long)

// As Python prints it, without "torch.".
inline std::string name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return torch::headeronly::toString(dtype);
  }
}

inline std::string names(std::initializer_list<ScalarType> dtypes) {
  std::string all;
  for (const ScalarType dtype : dtypes) {
    all += (all.empty() ? "" : ", ") + name(dtype);
  }
  return all;
}

// "[3, any]": -1 stands for any size.
template <typename Sizes>
std::string shape_text(const Sizes& sizes) {
  std::string all;
  for (const int64_t size : sizes) {
    all += (all.empty() ? "" : ", ") + (size < 0 ? std::string("any") : std::to_string(size));
  }
  return "[" + all + "]";
}

inline std::string device_text(const Tensor& tensor) {
  return tensor.is_cuda() ? text("cuda:", tensor.get_device_index()) : tensor.is_cpu() ? "cpu" : "another device";
}

// One argument of an op, to be checked in one line:
//   Argument{"plan", "keys", keys}.dtype({ScalarType::Float, ScalarType::Int}).shape({T, K}).contiguous().on(experts);
struct Argument {
  const char* op;
  const char* argument;
  const Tensor& tensor;

  const Argument& dtype(std::initializer_list<ScalarType> allowed) const {
    const ScalarType got = tensor.scalar_type();
    bool found = false;
    for (const ScalarType one : allowed) {
      found = found || one == got;
    }
    MM_CHECK(found, op, argument, name(got), names(allowed));
    return *this;
  }

  // -1: any size.
  const Argument& shape(std::initializer_list<int64_t> wanted) const {
    const auto sizes = tensor.sizes();
    bool same = sizes.size() == wanted.size();
    for (size_t i = 0; same && i < wanted.size(); ++i) {
      same = wanted.begin()[i] < 0 || wanted.begin()[i] == sizes[i];
    }
    MM_CHECK(same, op, argument, "shape " + shape_text(sizes), "shape " + shape_text(wanted));
    return *this;
  }

  const Argument& contiguous() const {
    MM_CHECK(tensor.is_contiguous(), op, argument, "strides " + shape_text(tensor.strides()), "a contiguous tensor");
    return *this;
  }

  // Two dimensions, each row's elements side by side; the rows may lie further apart than they are wide, not closer.
  const Argument& rows() const {
    shape({-1, -1});
    const bool side_by_side = tensor.size(1) <= 1 || tensor.stride(1) == 1;
    const bool apart = tensor.size(0) <= 1 || tensor.stride(0) >= tensor.size(1);
    MM_CHECK(side_by_side && apart, op, argument, "strides " + shape_text(tensor.strides()),
             "rows with their elements side by side, call .contiguous()");
    return *this;
  }

  const Argument& on(const Tensor& first) const {
    const bool same = tensor.is_cuda() == first.is_cuda() && tensor.is_cpu() == first.is_cpu() &&
                      tensor.get_device_index() == first.get_device_index();
    MM_CHECK(same, op, argument, "a tensor on " + device_text(tensor),
             "one on " + device_text(first) + ", where the first argument is");
    return *this;
  }
};

// Calls body.operator()<T>() with the one of Types that is the argument's dtype; any other dtype is an error:
//   by_dtype<float, BFloat16, Half, double>(x, [&]<typename T>() { permute<T>(...); });
template <typename... Types, typename Body>
void by_dtype(const Argument& argument, Body&& body) {
  argument.dtype({DtypeOf<Types>::value...});
  const ScalarType dtype = argument.tensor.scalar_type();
  const auto run = [&]<typename T>(std::type_identity<T>) {
    if (dtype == DtypeOf<T>::value) {
      body.template operator()<T>();
    }
  };
  (run(std::type_identity<Types>{}), ...);
}

// Uninitialised, contiguous, on the device of `like`.
inline Tensor empty(std::vector<int64_t> sizes, ScalarType dtype, const Tensor& like) {
  return torch::stable::new_empty(like, sizes, dtype);
}

// The caller has checked the dtype.
template <typename T>
const T* in(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

// nullptr where the argument is absent.
template <typename T>
const T* in(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? in<T>(*tensor) : nullptr;
}

template <typename T>
T* out(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// A 2-d tensor whose rows may lie further apart than they are wide. stride in elements.
template <typename T>
struct Rows {
  T* data;
  int64_t count, width, stride;
  T* operator[](int64_t row) const { return data + row * stride; }
};

// The stride of a tensor with one row or none means nothing: torch leaves any number there.
inline int64_t row_stride(const Tensor& tensor) {
  return tensor.size(0) > 1 ? tensor.stride(0) : tensor.size(1);
}

template <typename T>
Rows<const T> rows_in(const Tensor& tensor) {
  return {in<T>(tensor), tensor.size(0), tensor.size(1), row_stride(tensor)};
}

template <typename T>
Rows<T> rows_out(const Tensor& tensor) {
  return {out<T>(tensor), tensor.size(0), tensor.size(1), row_stride(tensor)};
}

}  // namespace mm
