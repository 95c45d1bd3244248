// The kernels of op `plan` on the CPU: many random cases against a literal loop, outputs and work space poisoned.
//   emu_plan [first seed = 1] [number of cases = 200]
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "plan.cuh"

namespace {

constexpr int kPoisoned = 0x7f7f7f7f;

struct Case {
  std::vector<int64_t> experts, capacity;  // capacity empty: none
  std::vector<unsigned> keys;              // empty: none
  bool float_keys = false;
  int64_t rows = 0;
  int num_experts = 1, slots = 0;
};

struct Result {
  std::vector<int32_t> place, source;
  std::vector<int64_t> counts;
  bool operator==(const Result&) const = default;
};

bool prefers(const Case& c, int64_t a, int64_t b) {
  if (!c.float_keys) return static_cast<int>(c.keys[a]) > static_cast<int>(c.keys[b]);
  const auto x = std::bit_cast<float>(c.keys[a]), y = std::bit_cast<float>(c.keys[b]);
  return std::isnan(x) ? !std::isnan(y) : x > y;
}

// As a person would do it.
Result by_hand(const Case& c) {
  const auto choices = static_cast<int64_t>(c.experts.size());
  Result result{std::vector<int32_t>(choices, -1), std::vector<int32_t>(c.rows, -1),
                std::vector<int64_t>(c.num_experts)};
  int64_t row = 0;
  for (int e = 0; e < c.num_experts; ++e) {
    std::vector<int64_t> mine;
    for (int64_t i = 0; i < choices; ++i)
      if (c.experts[i] == e) mine.push_back(i);
    auto limit = static_cast<int64_t>(mine.size());
    if (!c.capacity.empty()) limit = std::min(limit, std::max<int64_t>(0, c.capacity[e]));
    if (c.slots > 0) limit = std::min<int64_t>(limit, c.slots), row = int64_t{e} * c.slots;
    const auto by_key = [&](int64_t a, int64_t b) { return prefers(c, a, b); };
    if (!c.keys.empty()) std::stable_sort(mine.begin(), mine.end(), by_key);
    mine.resize(limit);
    std::sort(mine.begin(), mine.end());
    for (const int64_t i : mine) {
      if (row < c.rows) {
        result.place[i] = static_cast<int32_t>(row);
        result.source[row] = static_cast<int32_t>(i);
        ++result.counts[e];
      }
      ++row;
    }
  }
  return result;
}

template <typename Expert>
Result by_kernels(const Case& c) {
  const std::vector<Expert> experts(c.experts.begin(), c.experts.end());
  Result result{std::vector<int32_t>(experts.size(), kPoisoned), std::vector<int32_t>(c.rows, kPoisoned),
                std::vector<int64_t>(c.num_experts, kPoisoned)};
  mm::PlanTask<Expert> task{};
  task.experts = experts.data();
  task.keys = c.keys.empty() ? nullptr : c.keys.data();
  task.float_keys = c.float_keys;
  task.capacity = c.capacity.empty() ? nullptr : c.capacity.data();
  task.place = result.place.data();
  task.source = result.source.data();
  task.counts = result.counts.data();
  task.choices = static_cast<int64_t>(experts.size());
  task.rows = c.rows;
  task.num_experts = c.num_experts;
  task.slots = c.slots;
  mm::divide(task);
  std::vector<int> histogram(task.blocks * c.num_experts, kPoisoned), ranges(3 * c.num_experts, kPoisoned);
  std::vector<int> sorted(task.selects() ? experts.size() : 0, kPoisoned);
  std::vector<unsigned> sorted_keys(sorted.size(), kPoisoned);
  task.histogram = histogram.data();
  task.ranges = ranges.data();
  task.sorted = sorted.data();
  task.sorted_keys = sorted_keys.data();
  mm::run_plan(task, nullptr);
  return result;
}

class Draw {
 public:
  explicit Draw(unsigned seed) : random_(seed) {}
  int64_t between(int64_t low, int64_t high) { return low + static_cast<int64_t>(random_() % (high - low + 1)); }
  int64_t one_of(std::initializer_list<int64_t> values) { return values.begin()[random_() % values.size()]; }
  bool chance(int percent) { return between(1, 100) <= percent; }
  unsigned bits() { return static_cast<unsigned>(random_()); }

 private:
  std::mt19937 random_;
};

// Kind 0: no keys.
void draw_keys(Draw& draw, int64_t kind, Case& c) {
  const unsigned odd[] = {0u, 0x80000000u, 0x7fc00000u, 0xffc00001u, 0x7f800000u, 0xff800000u, 0x3f800000u, 1u};
  c.float_keys = kind <= 3;
  for (size_t i = 0; kind > 0 && i < c.experts.size(); ++i) {
    const auto close = std::bit_cast<unsigned>(0.25f + static_cast<float>(draw.between(0, 1000)) * 1e-6f);
    const unsigned of_kind[] = {0, draw.bits(), close, odd[draw.between(0, 7)], draw.bits(),
                                static_cast<unsigned>(draw.between(-2, 1))};
    c.keys.push_back(of_kind[kind]);
  }
}

void draw_experts(Draw& draw, int64_t choices, Case& c) {
  const int64_t any = -2, everyone = draw.chance(20) ? draw.one_of({-1, 0, c.num_experts - 1, 1000000}) : any;
  for (int64_t i = 0; i < choices; ++i) {
    const int64_t nobody = draw.one_of({-1, c.num_experts, 0x7fffffff});
    const int64_t somebody = draw.chance(10) ? nobody : draw.between(0, c.num_experts - 1);
    c.experts.push_back(everyone == any ? somebody : everyone);
  }
}

Case draw_case(unsigned seed) {
  Draw draw(seed);
  Case c;
  int64_t choices = draw.one_of({0, 1, 31, 32, 33, 257, 600, 1099});
  c.num_experts = static_cast<int>(draw.one_of({1, 2, 3, 8, 60, 64, 65, 256, 257}));
  if (seed % 20 == 0) c.num_experts = 1024;
  // A few with several steps of a warp in each part and of a block in the selection; every other with more parts than
  // there may be blocks.
  const bool large = seed % 50 == 0;
  if (large) choices = draw.between(5000, seed % 100 == 0 ? 70000 : 6000);
  if (large) c.num_experts = static_cast<int>(draw.between(1, 2));
  draw_experts(draw, choices, c);
  draw_keys(draw, draw.between(large ? 1 : 0, 5), c);
  const int64_t fair = choices / c.num_experts + 1;
  if (large || draw.chance(60))
    for (int e = 0; e < c.num_experts; ++e) c.capacity.push_back(draw.between(large ? fair / 2 : -1, fair + 2));
  c.slots = static_cast<int>(!large && draw.chance(30) ? draw.between(1, fair + 3) : 0);
  c.rows = draw.chance(40) ? draw.one_of({1, choices / 2 + 1, choices + 5}) : choices;
  if (c.slots > 0) c.rows = int64_t{c.num_experts} * c.slots;
  return c;
}

bool check(unsigned seed) {
  const Case c = draw_case(seed);
  const Result expected = by_hand(c), got = seed % 2 ? by_kernels<int64_t>(c) : by_kernels<int32_t>(c);
  if (got == expected) return true;
  std::printf("seed %u: wrong%s%s%s; choices %zu, experts %d, slots %d, rows %lld, keys %zu, capacity %zu\n", seed,
              got.place == expected.place ? "" : " place", got.source == expected.source ? "" : " source",
              got.counts == expected.counts ? "" : " counts", c.experts.size(), c.num_experts, c.slots,
              static_cast<long long>(c.rows), c.keys.size(), c.capacity.size());
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  const auto first = static_cast<unsigned>(argc > 1 ? std::atoi(argv[1]) : 1);
  const auto cases = static_cast<unsigned>(argc > 2 ? std::atoi(argv[2]) : 200);
  unsigned wrong = 0;
  for (unsigned seed = first; seed < first + cases; ++seed) wrong += !check(seed);
  std::printf("plan: %u of %u cases wrong\n", wrong, cases);
  return wrong > 0;
}
