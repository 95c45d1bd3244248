// What the body of a kernel may use: CUDA, or with -DMM_EMU its emulation on the CPU.
#pragma once

#ifdef MM_EMU
#include "cuda_emu.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// Shared memory of a block. Under the emulator the array has its exact size and red zones, so prefer these to
// __shared__. MM_DYNAMIC_SHARED is the launch's dynamic_smem, aligned to 16 bytes; `name` is a pointer to `type`.
#define MM_SHARED(type, name, count) __shared__ type name[count]
#define MM_DYNAMIC_SHARED(type, name)                                    \
  extern __shared__ __align__(16) unsigned char mm_dynamic_shared[];     \
  type* const name = reinterpret_cast<type*>(mm_dynamic_shared)

#endif
