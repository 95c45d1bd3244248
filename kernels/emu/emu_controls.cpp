// Is the emulator able to find what it promises to find? Every case is a kernel in a right and in a broken version.
//   emu_controls          runs all right versions: exit code 0
//   emu_controls NAME     runs the broken version of one: a wrong result (1), mm::emu::Error (2), a sanitizer's report
//   emu_controls --list   the names
#include <cstdio>
#include <cstring>
#include <functional>
#include <numeric>
#include <vector>

#include "mm/device.cuh"
#include "mm/warp.cuh"

namespace {

constexpr int kThreads = 96;
constexpr int kBlocks = 6;

std::vector<int> counted(int n) {
  std::vector<int> values(n);
  std::iota(values.begin(), values.end(), 0);
  return values;
}

// A block turns its part around through shared memory.
template <bool Broken>
__global__ void reverse(const int* in, int* out) {
  MM_SHARED(int, part, kThreads);
  const int t = threadIdx.x, first = blockIdx.x * kThreads;
  part[t] = in[first + t];
  if (!Broken) __syncthreads();
  out[first + t] = part[kThreads - 1 - t];
}

template <bool Broken>
bool barrier() {
  const std::vector<int> in = counted(kBlocks * kThreads);
  std::vector<int> out(in.size(), -1);
  mm::launch(reverse<Broken>, kBlocks, kThreads, 0, nullptr, in.data(), out.data());
  bool right = true;
  for (int i = 0; i < kBlocks * kThreads; ++i) right &= out[i] == i / kThreads * kThreads + kThreads - 1 - i % kThreads;
  return right;
}

// The same within each warp, and in dynamic shared memory.
template <bool Broken>
__global__ void reverse_in_warps(const int* in, int* out) {
  MM_DYNAMIC_SHARED(int, part);
  const int t = threadIdx.x;
  part[t] = in[t];
  if (!Broken) __syncwarp();
  out[t] = part[t / 32 * 32 + 31 - t % 32];
}

template <bool Broken>
bool warp_sync() {
  const std::vector<int> in = counted(kThreads);
  std::vector<int> out(in.size(), -1);
  mm::launch(reverse_in_warps<Broken>, 1, kThreads, kThreads * sizeof(int), nullptr, in.data(), out.data());
  bool right = true;
  for (int i = 0; i < kThreads; ++i) right &= out[i] == i / 32 * 32 + 31 - i % 32;
  return right;
}

// A shuffle hands over a value but orders no memory.
template <bool Broken>
__global__ void through_shuffle(int* out) {
  MM_SHARED(int, part, 32);
  const int t = threadIdx.x;
  part[t] = t;
  const int other = __shfl_xor_sync(0xffffffffu, t, 1);
  if (!Broken) __syncwarp();
  out[t] = part[other];
}

template <bool Broken>
bool shuffle_order() {
  std::vector<int> out(32, -1);
  mm::launch(through_shuffle<Broken>, 1, 32, 0, nullptr, out.data());
  bool right = true;
  for (int i = 0; i < 32; ++i) right &= out[i] == (i ^ 1);
  return right;
}

template <bool Broken>
__global__ void fill(int* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (Broken ? i <= n : i < n) out[i] = i;
}

template <bool Broken>
bool global_bounds() {
  std::vector<int> out(kThreads + 5, -1);
  mm::launch(fill<Broken>, 2, kThreads, 0, nullptr, out.data(), static_cast<int>(out.size()));
  return out == counted(kThreads + 5);
}

template <bool Broken>
__global__ void shift(int* out) {
  MM_SHARED(int, part, kThreads);
  const int t = threadIdx.x;
  part[Broken ? t + 1 : t] = t;
  __syncthreads();
  out[t] = part[t];
}

template <bool Broken>
bool shared_bounds() {
  std::vector<int> out(kThreads, -1);
  mm::launch(shift<Broken>, 1, kThreads, 0, nullptr, out.data());
  return out == counted(kThreads);
}

template <bool Broken>
__global__ void shift_dynamic(int* out) {
  MM_DYNAMIC_SHARED(int, part);
  const int t = threadIdx.x;
  part[Broken ? t + 1 : t] = t;
  __syncthreads();
  out[t] = part[t];
}

template <bool Broken>
bool dynamic_bounds() {
  std::vector<int> out(kThreads, -1);
  mm::launch(shift_dynamic<Broken>, 1, kThreads, kThreads * sizeof(int), nullptr, out.data());
  return out == counted(kThreads);
}

// Shared memory holds nothing that a kernel did not write: 0x7f in every byte.
template <bool Broken>
__global__ void count(int* out) {
  MM_SHARED(int, sum, 1);
  if (!Broken && threadIdx.x == 0) sum[0] = 0;
  __syncthreads();
  atomicAdd(sum, 1);
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = sum[0];
}

template <bool Broken>
bool unwritten() {
  std::vector<int> out(kBlocks, -1);
  mm::launch(count<Broken>, kBlocks, kThreads, 0, nullptr, out.data());
  return out == std::vector<int>(kBlocks, kThreads);
}

// All blocks add to one sum.
template <bool Broken>
__global__ void add(int* sum) {
  if (threadIdx.x != 0) return;
  if (Broken) {
    *sum += 1;
  } else {
    atomicAdd(sum, 1);
  }
}

template <bool Broken>
bool blocks() {
  int sum = 0;
  mm::launch(add<Broken>, kBlocks, 32, 0, nullptr, &sum);
  return sum == kBlocks;
}

// Every block leaves a number, the last one to come adds them up.
template <bool Broken>
__global__ void last_block(int* parts, int* arrived, int* sum) {
  if (threadIdx.x != 0) return;
  parts[blockIdx.x] = static_cast<int>(blockIdx.x);
  if (!Broken) __threadfence();
  if (atomicAdd(arrived, 1) != static_cast<int>(gridDim.x) - 1) return;
  if (!Broken) __threadfence();
  for (unsigned b = 0; b < gridDim.x; ++b) *sum += parts[b];
}

template <bool Broken>
bool fence() {
  std::vector<int> parts(kBlocks, -1);
  int arrived = 0, sum = 0;
  mm::launch(last_block<Broken>, kBlocks, 32, 0, nullptr, parts.data(), &arrived, &sum);
  return sum == kBlocks * (kBlocks - 1) / 2;
}

template <bool Broken>
__global__ void leave_early(int* out) {
  if (Broken && threadIdx.x >= 64) return;
  __syncthreads();
  out[threadIdx.x] = threadIdx.x;
}

template <bool Broken>
bool left_barrier() {
  std::vector<int> out(kThreads, -1);
  mm::launch(leave_early<Broken>, 1, kThreads, 0, nullptr, out.data());
  return out == counted(kThreads);
}

template <bool Broken>
__global__ void two_barriers(int* out) {
  if (Broken && threadIdx.x % 2 == 0) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = threadIdx.x;
}

template <bool Broken>
bool other_barrier() {
  std::vector<int> out(kThreads, -1);
  mm::launch(two_barriers<Broken>, 1, kThreads, 0, nullptr, out.data());
  return out == counted(kThreads);
}

template <bool Broken>
__global__ void sum_lanes(int* out, int n) {
  const int t = threadIdx.x;
  if (Broken && t >= n) return;
  const int sum = mm::warp_sum(t < n ? 1 : 0);
  if (t < n) out[t] = sum;
}

template <bool Broken>
bool left_lane() {
  std::vector<int> out(20, -1);
  mm::launch(sum_lanes<Broken>, 1, 32, 0, nullptr, out.data(), 20);
  return out == std::vector<int>(20, 20);
}

template <bool Broken>
__global__ void copy_vectors(const int* in, int* out) {
  const int* from = in + (Broken ? 1 : 0);
  reinterpret_cast<int4*>(out)[threadIdx.x] = reinterpret_cast<const int4*>(from)[threadIdx.x];
}

template <bool Broken>
bool misaligned() {
  const std::vector<int> in = counted(4 * 32 + 1);
  std::vector<int> out(4 * 32, -1);
  mm::launch(copy_vectors<Broken>, 1, 32, 0, nullptr, in.data(), out.data());
  return out == counted(4 * 32);
}

template <bool Broken>
__global__ void wait_for_flag(int* flag, int* out) {
  if (threadIdx.x == 33 && !Broken) atomicExch(flag, 1);
  while (atomicAdd(flag, 0) == 0) __nanosleep(100);
  out[threadIdx.x] = threadIdx.x;
}

template <bool Broken>
bool spinning() {
  std::vector<int> out(64, -1);
  int flag = 0;
  mm::launch(wait_for_flag<Broken>, 1, 64, 0, nullptr, &flag, out.data());
  return out == counted(64);
}

struct Control {
  const char* name;
  bool (*right)();
  bool (*broken)();
};

#define CONTROL(name) Control{#name, name<false>, name<true>}
const Control kControls[] = {
    CONTROL(barrier),       CONTROL(warp_sync), CONTROL(shuffle_order), CONTROL(global_bounds), CONTROL(shared_bounds),
    CONTROL(dynamic_bounds), CONTROL(unwritten), CONTROL(blocks),        CONTROL(fence),         CONTROL(left_barrier),
    CONTROL(other_barrier), CONTROL(left_lane), CONTROL(misaligned),    CONTROL(spinning),
};

int run(const char* name, bool (*control)()) {
  try {
    const bool right = control();
    std::printf("%s: %s\n", name, right ? "right" : "wrong result");
    return right ? 0 : 1;
  } catch (const mm::emu::Error& error) {
    std::printf("%s: %s\n", name, error.what());
    return 2;
  }
}

}  // namespace

int main(int argc, char** argv) {
  int worst = 0;
  for (const Control& control : kControls) {
    if (argc == 1) worst = std::max(worst, run(control.name, control.right));
    if (argc > 1 && !std::strcmp(argv[1], "--list")) std::puts(control.name);
    if (argc > 1 && !std::strcmp(argv[1], control.name)) return run(control.name, control.broken);
  }
  return worst;
}
