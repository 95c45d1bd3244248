// Op `plan` on CUDA: arguments and work space; plan.cuh has the kernels.
#include "../cpu/plan.h"
#include "plan.cuh"

#include <tuple>

namespace mm {
namespace {

template <typename Expert>
void plan_on_gpu(PlanTask<Expert> task, const Tensor& experts) {
  divide(task);
  const auto ints = [&](int64_t count) { return empty({count}, ScalarType::Int, experts); };
  const int64_t sorted = task.selects() ? task.choices : 0;
  const Tensor histogram = ints(task.blocks * task.num_experts), ranges = ints(3 * task.num_experts);
  const Tensor choices = ints(sorted), keys = ints(sorted);
  task.histogram = out<int>(histogram);
  task.ranges = out<int>(ranges);
  task.sorted = out<int>(choices);
  task.sorted_keys = reinterpret_cast<unsigned*>(out<int>(keys));
  run_plan(task, stream_of(experts));
}

std::tuple<Tensor, Tensor, Tensor> plan_cuda(const Tensor& experts, int64_t num_experts,
                                             const std::optional<Tensor>& keys, const std::optional<Tensor>& capacity,
                                             int64_t slots, int64_t max_rows) {
  const PlanSizes sizes = check_plan(experts, num_experts, keys, capacity, slots, max_rows);
  MM_CHECK(num_experts <= kPlanMaxExperts, "plan", "num_experts", text(num_experts),
           text("at most ", kPlanMaxExperts, " on CUDA"));
  const OnDeviceOf device(experts);
  const Planned made = empty_plan(experts, sizes);
  by_dtype<int64_t, int32_t>({"plan", "experts", experts}, [&]<typename Expert>() {
    PlanTask<Expert> task{};
    task.experts = in<Expert>(experts);
    task.keys = keys.has_value() ? static_cast<const unsigned*>(keys->const_data_ptr()) : nullptr;
    task.float_keys = keys.has_value() && keys->scalar_type() == ScalarType::Float;
    task.capacity = in<int64_t>(capacity);
    task.place = out<int32_t>(made.place);
    task.source = out<int32_t>(made.source);
    task.counts = out<int64_t>(made.counts);
    task.choices = sizes.choices;
    task.rows = sizes.rows;
    task.num_experts = static_cast<int>(num_experts);
    task.slots = static_cast<int>(slots);
    plan_on_gpu(task, experts);
  });
  return {made.place, made.source, made.counts};
}

}  // namespace
}  // namespace mm

STABLE_TORCH_LIBRARY_IMPL(megamoe, CUDA, m) { m.impl("plan", TORCH_BOX(&mm::plan_cuda)); }
