// Host side of the CUDA ops: the current stream, the launch of a kernel and its errors. The emulator has its own mm::launch
// of the same signature in emu/cuda_emu.h.
#pragma once

#ifdef MM_EMU
#include "cuda_emu.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>

#include "mm/tensor.h"

namespace mm {

MM_DTYPE(__nv_bfloat16, BFloat16)
MM_DTYPE(__half, Half)

// For the duration of an op: the tensor's device is the current one.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& tensor) : guard_(tensor.get_device_index()) {}

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

// The stream that torch works on, on the tensor's device.
inline cudaStream_t stream_of(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Starts kernel<<<grid, block, dynamic_smem, stream>>>(args...), each argument converted to the parameter's type; an
// empty grid starts nothing, as CUDA would refuse it.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t dynamic_smem, cudaStream_t stream,
            Arguments&&... args) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "one argument for each parameter of the kernel");
  constexpr size_t kWithoutAsking = 48 << 10;  // more has to be allowed for each kernel
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) {
    return;
  }
  if (dynamic_smem > kWithoutAsking) {
    STD_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(dynamic_smem)));
  }
  kernel<<<grid, block, dynamic_smem, stream>>>(static_cast<Parameters>(args)...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace mm

#endif
