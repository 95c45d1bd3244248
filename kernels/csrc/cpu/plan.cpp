// Op `plan` (megamoe/ops/plan.py is the specification): its schema, and its CPU side, a counting sort in two passes.
//
// One thread: 65,536 choices take a tenth of a millisecond.
#include "plan.h"

#include <bit>
#include <functional>
#include <memory>
#include <tuple>
#include <vector>

namespace mm {
namespace {

struct Keys {
  const void* data = nullptr;
  bool floats = false;

  // Compares as the keys do, the choices of equal keys by their place; no two are equal.
  uint64_t preference(int64_t choice) const {
    const auto bits = static_cast<const uint32_t*>(data)[choice];
    const auto place = static_cast<uint64_t>(std::numeric_limits<int32_t>::max() - choice);
    return static_cast<uint64_t>(floats ? ordered(std::bit_cast<float>(bits)) : bits ^ kSign) << 32 | place;
  }

 private:
  static constexpr uint32_t kSign = 0x80000000u;

  static uint32_t ordered(float key) {
    if (key != key) return ~0u;
    const auto bits = std::bit_cast<uint32_t>(key == 0.0f ? 0.0f : key);  // -0 is 0
    return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | kSign);  // negative ones turned round
  }
};

// E for nobody.
template <typename Expert>
size_t expert_of(Expert value, size_t experts) {
  return std::min(static_cast<size_t>(value), experts);  // a negative one is beyond all as unsigned
}

template <typename Expert>
std::vector<int64_t> count_choices(const Expert* experts, const PlanSizes& sizes) {
  std::vector<int64_t> counts(sizes.experts + 1);
  for (int64_t i = 0; i < sizes.choices; ++i) {
    ++counts[expert_of(experts[i], sizes.experts)];
  }
  counts.pop_back();
  return counts;
}

// How many each expert may keep.
std::vector<int64_t> limits(const int64_t* capacity, const PlanSizes& sizes) {
  std::vector<int64_t> limit(sizes.experts, sizes.slots > 0 ? sizes.slots : sizes.choices);
  for (int64_t e = 0; capacity != nullptr && e < sizes.experts; ++e) {
    limit[e] = std::clamp<int64_t>(capacity[e], 0, limit[e]);
  }
  return limit;
}

// The rank-th largest of `count` values, rank 1 the largest; the values are overwritten. Byte by byte from the highest,
// what has another byte than the result drops out: no branch that cannot be predicted, as nth_element has them.
uint64_t of_rank(uint64_t* values, int64_t count, int64_t rank) {
  for (int shift = 56; shift >= 0 && count > 32; shift -= 8) {
    int64_t of_byte[256] = {};
    for (int64_t i = 0; i < count; ++i) {
      ++of_byte[values[i] >> shift & 255];
    }
    uint64_t byte = 255;
    for (; of_byte[byte] < rank; --byte) {
      rank -= of_byte[byte];
    }
    int64_t left = 0;
    for (int64_t i = 0; i < count; ++i) {
      const uint64_t value = values[i];
      values[left] = value;
      left += (value >> shift & 255) == byte;
    }
    count = left;
  }
  std::nth_element(values, values + rank - 1, values + count, std::greater<>());
  return values[rank - 1];
}

// The lowest preference that each expert keeps; 0 where it keeps all or none.
template <typename Expert>
std::vector<uint64_t> lowest_kept(const Expert* experts, const Keys& keys, const std::vector<int64_t>& counts,
                                  const std::vector<int64_t>& limit, const PlanSizes& sizes) {
  std::vector<uint64_t> lowest(sizes.experts + 1);
  std::vector<int64_t> next(sizes.experts + 1);
  for (int64_t e = 0; e < sizes.experts; ++e) {
    next[e + 1] = next[e] + counts[e];
  }
  const auto preferences = std::make_unique_for_overwrite<uint64_t[]>(sizes.choices);
  for (int64_t i = 0; i < sizes.choices; ++i) {
    preferences[next[expert_of(experts[i], sizes.experts)]++] = keys.preference(i);
  }
  for (int64_t e = 0; e < sizes.experts; ++e) {
    if (counts[e] <= limit[e] || limit[e] == 0) continue;
    lowest[e] = of_rank(preferences.get() + next[e] - counts[e], counts[e], limit[e]);
  }
  return lowest;
}

template <typename Expert>
void plan(const Expert* experts, const Keys& keys, const int64_t* capacity, const PlanSizes& sizes, int32_t* place,
          int32_t* source, int64_t* rows_of) {
  const std::vector<int64_t> counts = count_choices(experts, sizes), limit = limits(capacity, sizes);
  const bool select = keys.data != nullptr && (capacity != nullptr || sizes.slots > 0);
  std::vector<uint64_t> lowest;
  if (select) lowest = lowest_kept(experts, keys, counts, limit, sizes);
  std::vector<int64_t> next(sizes.experts + 1), end(sizes.experts + 1);  // the last one is nobody's: no row
  for (int64_t e = 0, row = 0; e < sizes.experts; ++e) {
    if (sizes.slots > 0) row = e * sizes.slots;
    next[e] = row;
    row += std::min(counts[e], limit[e]);
    end[e] = std::min(row, sizes.rows);
    rows_of[e] = std::max<int64_t>(0, end[e] - next[e]);
  }
  std::fill_n(source, sizes.rows, -1);
  for (int64_t i = 0; i < sizes.choices; ++i) {
    const size_t e = expert_of(experts[i], sizes.experts);
    const int64_t row = next[e];
    const bool free = row < end[e];
    const bool kept = free & (!select || keys.preference(i) >= lowest[e]);
    place[i] = kept ? static_cast<int32_t>(row) : -1;
    next[e] = row + kept;
    // Whether one is kept cannot be predicted, so there is no branch on it: one that is not leaves the row to the next.
    if (free) source[row] = static_cast<int32_t>(i);
  }
}

std::tuple<Tensor, Tensor, Tensor> plan_cpu(const Tensor& experts, int64_t num_experts,
                                            const std::optional<Tensor>& keys, const std::optional<Tensor>& capacity,
                                            int64_t slots, int64_t max_rows) {
  const PlanSizes sizes = check_plan(experts, num_experts, keys, capacity, slots, max_rows);
  const Planned made = empty_plan(experts, sizes);
  Keys preferred;
  if (keys.has_value()) preferred = {keys->const_data_ptr(), keys->scalar_type() == ScalarType::Float};
  by_dtype<int64_t, int32_t>({"plan", "experts", experts}, [&]<typename Expert>() {
    plan(in<Expert>(experts), preferred, in<int64_t>(capacity), sizes, out<int32_t>(made.place),
         out<int32_t>(made.source), out<int64_t>(made.counts));
  });
  return {made.place, made.source, made.counts};
}

}  // namespace
}  // namespace mm

STABLE_TORCH_LIBRARY_FRAGMENT(megamoe, m) {
  m.def(
      "plan(Tensor experts, int num_experts, Tensor? keys=None, Tensor? capacity=None, int slots=0, int max_rows=0)"
      " -> (Tensor place, Tensor source, Tensor counts)");
}

STABLE_TORCH_LIBRARY_IMPL(megamoe, CPU, m) { m.impl("plan", TORCH_BOX(&mm::plan_cpu)); }
