// What the CPU and the CUDA side of the op `plan` share: its arguments, checked.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>

#include "mm/tensor.h"

namespace mm {

struct PlanSizes {
  int64_t choices;  // T * K
  int64_t experts;  // E
  int64_t slots;    // C, 0: compact
  int64_t rows;     // R
};

struct Planned {
  Tensor place, source, counts;
};

inline PlanSizes check_plan(const Tensor& experts, int64_t num_experts, const std::optional<Tensor>& keys,
                            const std::optional<Tensor>& capacity, int64_t slots, int64_t max_rows) {
  constexpr const char* op = "plan";
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  const auto sized = [](const char* name, int64_t value) { return text(name, " = ", value); };
  Argument{op, "experts", experts}.dtype({ScalarType::Long, ScalarType::Int}).shape({-1, -1}).contiguous();
  MM_CHECK(num_experts >= 1 && num_experts <= kMost, op, "num_experts", text(num_experts), "1 or more");
  if (keys.has_value()) {
    Argument{op, "keys", *keys}
        .dtype({ScalarType::Float, ScalarType::Int})
        .shape({experts.size(0), experts.size(1)})
        .contiguous()
        .on(experts);
  }
  if (capacity.has_value()) {
    Argument{op, "capacity", *capacity}.dtype({ScalarType::Long}).shape({num_experts}).contiguous().on(experts);
  }
  const int64_t choices = experts.numel();
  MM_CHECK(choices <= kMost, op, "experts", sized("T * K", choices), "fewer than 2^31 choices");
  MM_CHECK(slots >= 0 && slots <= kMost / num_experts, op, "slots", text(slots), "0 or more, E * slots below 2^31");
  MM_CHECK(max_rows >= 0 && max_rows <= kMost, op, "max_rows", text(max_rows), "0 or more, below 2^31");
  MM_CHECK(slots == 0 || max_rows == 0, op, "max_rows", text(max_rows), "0 with slots, which make R = E * slots");
  return {choices, num_experts, slots, slots > 0 ? num_experts * slots : max_rows > 0 ? max_rows : choices};
}

inline Planned empty_plan(const Tensor& experts, const PlanSizes& sizes) {
  return {empty({experts.size(0), experts.size(1)}, ScalarType::Int, experts),
          empty({sizes.rows}, ScalarType::Int, experts), empty({sizes.experts}, ScalarType::Long, experts)};
}

}  // namespace mm
