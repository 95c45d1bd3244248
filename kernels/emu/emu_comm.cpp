// One-sided exchange between ranks that run at the same time, each on an OS thread of its own: the kernels' bodies against
// a loop, both buffers used again and again, every rank held up at random.
//   emu_comm          all right; and ranks that wait for one that never comes report it
//   emu_comm NAME     with one fault: relaxed_release, dropped_wait, no_ack
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <functional>
#include <memory>
#include <numeric>
#include <thread>

#include "comm.cuh"
#include "emu_cases.h"

namespace {

using namespace mm;
using namespace mm::emu;

Report report;

struct Sizes {
  int ranks, experts, capacity, choices, width;  // P, L, C, K, D
  int all_experts() const { return ranks * experts; }
  int rows() const { return all_experts() * capacity; }
};

// What one rank routes: choices [T, K] in an order by expert.
struct Routing {
  int tokens;
  std::vector<int> source, start, counts;  // as in PushJob; rows for each expert
};

// Who sends how much to whom is drawn; `from` without tokens, or all on one expert, are cases of their own.
enum class Load { ragged, one_expert, one_way, empty };

Routing draw_routing(const Sizes& sizes, int rank, Load load) {
  const int tokens = load == Load::empty || (load == Load::ragged && rank == 1) ? 0
                     : load == Load::one_way && rank > 0                        ? 0
                                                         : static_cast<int>(generator()() % sizes.capacity) + 1;
  std::vector<std::vector<int>> of(sizes.all_experts());
  for (int choice = 0; choice < tokens * sizes.choices; ++choice) {
    const auto drawn = static_cast<int>(generator()() % (sizes.all_experts() + 1));
    const int expert = load == Load::one_expert ? sizes.all_experts() - 1
                       : load == Load::one_way  ? sizes.all_experts() - 1 - static_cast<int>(drawn % sizes.experts)
                                                : drawn;
    if (expert == sizes.all_experts()) continue;  // dropped
    if (static_cast<int>(of[expert].size()) < sizes.capacity) of[expert].push_back(choice);
  }
  Routing routing{tokens, {}, {}, {}};
  for (const std::vector<int>& choices : of) {
    routing.start.push_back(static_cast<int>(routing.source.size()));
    routing.counts.push_back(static_cast<int>(choices.size()));
    routing.source.insert(routing.source.end(), choices.begin(), choices.end());
  }
  routing.source.resize(tokens * sizes.choices, -1);
  return routing;
}

// How the rows of all ranks lie: [P, E], as the ranks must find it by themselves.
struct Placed {
  std::vector<int> counts, first;
};

Placed place(const Sizes& sizes, const std::vector<Routing>& routings) {
  Placed placed;
  for (const Routing& routing : routings) {
    placed.counts.insert(placed.counts.end(), routing.counts.begin(), routing.counts.end());
  }
  placed.first.resize(placed.counts.size());
  for (int owner = 0; owner < sizes.ranks; ++owner) {
    int row = 0;
    for (int e = owner * sizes.experts; e < (owner + 1) * sizes.experts; ++e) {
      for (int from = 0; from < sizes.ranks; ++from) {
        placed.first[from * sizes.all_experts() + e] = row;
        row += placed.counts[from * sizes.all_experts() + e];
      }
    }
  }
  return placed;
}

// [T, K]: owner * R + row.
std::vector<int> places(const Sizes& sizes, const Routing& routing, const Placed& placed, int rank) {
  std::vector<int> all(routing.tokens * sizes.choices, -1);
  for (int e = 0; e < sizes.all_experts(); ++e) {
    const int first = placed.first[rank * sizes.all_experts() + e];
    for (int i = 0; i < routing.counts[e]; ++i) {
      all[routing.source[routing.start[e] + i]] = e / sizes.experts * sizes.rows() + first + i;
    }
  }
  return all;
}

// One round of all ranks, drawn before they start: two exchanges forward, two backward.
template <typename T>
struct Round {
  Sizes sizes;
  std::vector<Routing> routings;
  Placed placed;
  std::vector<std::vector<int>> place_of;
  std::vector<std::vector<T>> x, y;             // tokens [T, D], rows [R, D]
  std::vector<std::vector<float>> weights, dw;  // by choice, by row

  Round(const Sizes& s, Load load) : sizes(s) {
    for (int rank = 0; rank < s.ranks; ++rank) routings.push_back(draw_routing(s, rank, load));
    placed = place(s, routings);
    for (int rank = 0; rank < s.ranks; ++rank) {
      place_of.push_back(places(s, routings[rank], placed, rank));
      x.push_back(random_numbers<T>(routings[rank].tokens * s.width));
      weights.push_back(random_numbers<float>(routings[rank].tokens * s.choices));
      y.push_back(random_numbers<T>(s.rows() * s.width));
      dw.push_back(random_numbers<float>(s.rows()));
    }
  }

  // What arrives at a rank, zeros behind it.
  std::pair<std::vector<T>, std::vector<float>> taken(int rank) const {
    std::vector<T> rows(sizes.rows() * sizes.width, T(0.0f));
    std::vector<float> values(sizes.rows(), 0.0f);
    for (int from = 0; from < sizes.ranks; ++from) {
      for (std::size_t choice = 0; choice < place_of[from].size(); ++choice) {
        const int there = place_of[from][choice];
        if (there < 0 || there / sizes.rows() != rank) continue;
        const int row = there % sizes.rows();
        std::copy_n(x[from].data() + choice / sizes.choices * sizes.width, sizes.width, rows.data() + row * sizes.width);
        values[row] = weights[from][choice];
      }
    }
    return {rows, values};
  }

  // What a rank's tokens get back.
  std::pair<std::vector<T>, std::vector<float>> pulled(int rank) const {
    const int tokens = routings[rank].tokens;
    std::vector<T> rows(tokens * sizes.width);
    std::vector<float> values(tokens * sizes.choices, 0.0f);
    for (int t = 0; t < tokens; ++t) {
      std::vector<float> sum(sizes.width, 0.0f);
      for (int k = 0; k < sizes.choices; ++k) {
        const int choice = t * sizes.choices + k, there = place_of[rank][choice];
        if (there < 0) continue;
        const int owner = there / sizes.rows(), row = there % sizes.rows();
        for (int d = 0; d < sizes.width; ++d) sum[d] += float(y[owner][row * sizes.width + d]);
        values[choice] = dw[owner][row];
      }
      for (int d = 0; d < sizes.width; ++d) rows[t * sizes.width + d] = T(sum[d]);
    }
    return {rows, values};
  }
};

// Memory of all ranks. Exact in size, so that AddressSanitizer sees what lies beyond.
struct World {
  Sizes sizes;
  unsigned begin;  // the exchange before the first one: every total begins there
  std::int64_t limit_ns;
  std::vector<std::unique_ptr<void, void (*)(void*)>> memory;
  std::vector<std::vector<unsigned>> seen;
  std::vector<std::vector<int>> reports;

  World(const Sizes& s, std::size_t element, unsigned before, std::int64_t limit)
      : sizes(s), begin(before), limit_ns(limit), row_bytes_((s.width * element + 15) / 16 * 16) {
    const Window window = lay_out(s.ranks, 0, s.experts, s.capacity, row_bytes_);
    for (int rank = 0; rank < s.ranks; ++rank) {
      void* here = nullptr;
      if (posix_memalign(&here, 128, window.bytes) != 0) throw std::bad_alloc();
      memory.emplace_back(here, std::free);
      std::memset(here, 0xff, window.bytes);
      Window mine = of(rank);
      for (int peer = 0; peer < s.ranks; ++peer) *mine.arrived(rank, peer) = *mine.done(rank, peer) = begin;
      std::fill_n(mine.flag(rank, 0, 0, 0), 2 * mine.all_tiles(), begin);
      *mine.claimed() = 0;
      seen.emplace_back(2 * mine.all_tiles(), begin);
      reports.emplace_back(8, 0);
    }
  }

  Window of(int rank) const {
    Window window = lay_out(sizes.ranks, rank, sizes.experts, sizes.capacity, row_bytes_);
    for (std::size_t peer = 0; peer < memory.size(); ++peer) window.of[peer] = static_cast<char*>(memory[peer].get());
    return window;
  }

  Exchange exchange(int rank, unsigned number, const Placed& placed) {
    const Window window = of(rank);
    return {window, {limit_ns, window.claimed(), reports[rank].data()}, number, placed.counts.data(),
            placed.first.data(), seen[rank].data()};
  }

 private:
  std::int64_t row_bytes_;
};

// Holds a rank up for a while, or not at all.
class Jitter {
 public:
  explicit Jitter(unsigned seed) : random_(seed) {}
  void operator()() {
    const unsigned drawn = random_() % 8;
    if (drawn == 0) std::this_thread::sleep_for(std::chrono::microseconds(random_() % 500));
    for (unsigned i = 0; drawn > 4 && i < random_() % 50; ++i) std::this_thread::yield();
  }

 private:
  std::mt19937 random_;
};

template <int Bytes, typename T>
ConstUnitRows<Bytes> in(const std::vector<T>& rows, int width) {
  return {reinterpret_cast<const Unit<Bytes>*>(rows.data()), static_cast<std::int64_t>(width * sizeof(T) / Bytes)};
}

template <int Bytes, typename T>
RowsBeside<Bytes> out(std::vector<T>& rows, std::vector<float>& values, bool beside, int width) {
  const auto units = static_cast<int>(width * sizeof(T) / Bytes);
  return {{reinterpret_cast<Unit<Bytes>*>(rows.data()), units}, units,
          beside ? reinterpret_cast<unsigned*>(values.data()) : nullptr};
}

const unsigned* bits(const std::vector<float>& values) { return reinterpret_cast<const unsigned*>(values.data()); }

// One rank's side of an exchange. Blocks: few, so that each has several tiles.
template <typename T, int Bytes>
class Side {
 public:
  Side(World& world, int rank) : world_(world), rank_(rank), jitter_(rank + 1) {}

  // The counts of all, found as on a GPU.
  bool counts(const Round<T>& round, unsigned number) {
    const Exchange task = world_.exchange(rank_, number, round.placed);
    const std::vector<int> mine = round.routings[rank_].counts;
    std::vector<int> all(round.placed.counts.size(), 0x7f7f7f7f);
    launch_exchange_counts(task, mine.data(), nullptr);
    jitter_();
    launch_wait_counts(task, all.data(), nullptr);
    return all == round.placed.counts;
  }

  void push(const Round<T>& round, unsigned number, bool beside) {
    const Routing& routing = round.routings[rank_];
    const int width = round.sizes.width;
    jitter_();
    launch_push(PushJob<Bytes>{world_.exchange(rank_, number, round.placed), in<Bytes>(round.x[rank_], width),
                               static_cast<int>(width * sizeof(T) / Bytes), beside ? bits(round.weights[rank_]) : nullptr,
                               routing.source.data(), routing.start.data(), round.sizes.choices},
                3, nullptr);
  }

  bool take(const Round<T>& round, unsigned number, bool beside) {
    auto rows = poisoned<T>(round.sizes.rows() * round.sizes.width);
    auto values = poisoned<float>(round.sizes.rows());
    jitter_();
    launch_take(TakeJob<Bytes>{world_.exchange(rank_, number, round.placed),
                               out<Bytes>(rows, values, beside, round.sizes.width), round.sizes.rows()},
                3, nullptr);
    const auto right = round.taken(rank_);
    return same_bits(rows, right.first) && (!beside || same_bits(values, right.second));
  }

  void publish(const Round<T>& round, unsigned number, bool beside) {
    jitter_();
    launch_publish(PublishJob<Bytes>{world_.exchange(rank_, number, round.placed),
                                     in<Bytes>(round.y[rank_], round.sizes.width),
                                     static_cast<int>(round.sizes.width * sizeof(T) / Bytes),
                                     beside ? bits(round.dw[rank_]) : nullptr},
                   3, nullptr);
  }

  bool pull(const Round<T>& round, unsigned number, bool beside) {
    const Routing& routing = round.routings[rank_];
    auto rows = poisoned<T>(routing.tokens * round.sizes.width);
    auto values = poisoned<float>(routing.tokens * round.sizes.choices);
    const RowsBeside<Bytes> to = out<Bytes>(rows, values, beside, round.sizes.width);
    jitter_();
    launch_pull(PullJob<T, Bytes>{world_.exchange(rank_, number, round.placed), to.rows, to.units, to.values,
                                  round.place_of[rank_].data(), routing.tokens, round.sizes.choices},
                2, nullptr);
    const auto right = round.pulled(rank_);
    return same_bits(rows, right.first) && (!beside || same_bits(values, right.second));
  }

  // As in a layer: there with weights, home; then the gradients.
  bool all(const Round<T>& round, unsigned number) {
    bool right = counts(round, number);
    push(round, number, true);
    right = take(round, number, true) && right;
    publish(round, number + 1, false);
    right = pull(round, number + 1, false) && right;
    push(round, number + 2, false);
    right = take(round, number + 2, false) && right;
    publish(round, number + 3, true);
    return pull(round, number + 3, true) && right;
  }

 private:
  World& world_;
  int rank_;
  Jitter jitter_;
};

// body(rank) on every rank at once; whether all returned true.
bool on_every_rank(int ranks, const std::function<bool(int)>& body) {
  std::vector<std::thread> threads;
  std::vector<char> right(ranks, 0);
  for (int rank = 0; rank < ranks; ++rank) {
    threads.emplace_back([&right, &body, rank] { right[rank] = body(rank); });
  }
  for (std::thread& thread : threads) thread.join();
  return std::all_of(right.begin(), right.end(), [](char one) { return one != 0; });
}

constexpr std::int64_t kLong = 60'000'000'000, kShort = 50'000'000;

template <typename T, int Bytes>
void exchange_rounds(const Sizes& sizes, unsigned before) {
  std::vector<Round<T>> rounds;
  for (const Load load : {Load::ragged, Load::one_expert, Load::one_way, Load::empty, Load::ragged}) {
    rounds.emplace_back(sizes, load);
  }
  World world(sizes, sizeof(T), before, kLong);
  const bool right = on_every_rank(sizes.ranks, [&](int rank) {
    Side<T, Bytes> side(world, rank);
    bool all = true;
    for (std::size_t i = 0; i < rounds.size(); ++i) {
      all = side.all(rounds[i], before + 1 + 4 * static_cast<unsigned>(i)) && all;
    }
    return all;
  });
  report.expect(right, "P %d L %d C %d K %d D %d, %d bytes, %d in a unit, from %u", sizes.ranks, sizes.experts,
                sizes.capacity, sizes.choices, sizes.width, int(sizeof(T)), Bytes, before);
}

using Number = float;
constexpr int kUnit = 16;

// Rank 0 counts its rows and never sends any; its peers wait for them, `home` for its results.
void silent_rank(bool home) {
  const Sizes sizes{3, 2, 40, 2, 8};
  const Round<Number> round(sizes, Load::one_expert);
  World world(sizes, sizeof(Number), 0, kShort);
  on_every_rank(sizes.ranks, [&](int rank) {
    Side<Number, kUnit> side(world, rank);
    if (rank == (home ? 2 : 0)) return true;
    if (home) {
      side.publish(round, 1, false);
      return side.pull(round, 1, false);
    }
    side.push(round, 1, false);
    return side.take(round, 1, false);
  });
  // All rows go to the last expert, which is rank 2's.
  for (int rank = 0; rank < sizes.ranks; ++rank) {
    const bool waits = home ? rank != 2 : rank == 2;
    const int who = home ? 2 : 0, what = static_cast<int>(home ? Awaited::results : Awaited::rows);
    const std::vector<int>& found = world.reports[rank];
    const bool right = waits ? found[0] == 1 && found[1] == what && found[2] == who && found[3] == 5 && found[5] == 1 &&
                                   found[6] == 0 && found[7] > 0
                             : found == std::vector<int>(8, 0);
    report.expect(right, "rank %d tells of a silent rank (home %d): %d %d %d %d", rank, int(home), found[0], found[1],
                  found[2], found[3]);
  }
}

// Nobody hears of rank 0's counts, and nothing may be written before it has read.
void silent_counts() {
  const Sizes sizes{2, 1, 3, 1, 8};
  const Round<Number> round(sizes, Load::one_expert);
  World world(sizes, sizeof(Number), 0, kShort);
  const bool right = Side<Number, kUnit>(world, 1).counts(round, 1);
  report.expect(!right && world.reports[1][1] == static_cast<int>(Awaited::counts) && world.reports[1][2] == 0,
                "missing counts are told: %d %d", world.reports[1][0], world.reports[1][1]);
  World again(sizes, sizeof(Number), 0, kShort);
  Side<Number, kUnit>(again, 1).push(round, 3, false);
  report.expect(again.reports[1][1] == static_cast<int>(Awaited::done) && again.reports[1][5] == 3,
                "a missing ack is told: %d %d", again.reports[1][0], again.reports[1][1]);
}

// ---------------------------------------------------------------------------------------------------------------- the faults

// Relaxed, so that the thread sanitizer sees no order in it.
void wait_for(const std::atomic<int>& gate, int value) {
  while (gate.load(std::memory_order_relaxed) < value) std::this_thread::yield();
}

// Rank 0 sends to rank 1, and nothing comes back: three pushes, whose third writes where the first did. What a missing wait
// allows is brought about: for a wrong result rank 0 is late, or rank 1 looks after the third; for the thread sanitizer
// everything comes in the right order, and only by chance.
bool one_way() {
  const Sizes sizes{2, 1, 40, 1, 8};
  std::vector<Round<Number>> rounds;
  for (int i = 0; i < 3; ++i) rounds.emplace_back(sizes, Load::one_way);
  World world(sizes, sizeof(Number), 0, kLong);
  std::atomic<int> looked = 0, sent = 0;
#ifdef MM_EMU_TSAN
  const bool in_order = true;
#else
  const bool in_order = false;
#endif
  const auto before_push = [&](int i) {
    if (fault == Fault::dropped_wait && !in_order) wait_for(looked, i + 1);
    if (fault == Fault::no_ack && in_order) wait_for(looked, i - 1);
  };
  const auto before_take = [&](int i) {
    if (fault == Fault::dropped_wait && in_order) wait_for(sent, i + 1);
    if (fault == Fault::no_ack && !in_order) wait_for(sent, 3);
  };
  return on_every_rank(2, [&](int rank) {
    Side<Number, kUnit> side(world, rank);
    bool right = true;
    for (int i = 0; i < 3; ++i) {
      if (rank == 0) before_push(i);
      if (rank == 0) side.push(rounds[i], i + 1, false);  // rank 1 has nothing, and so hears nothing on the way
      if (rank == 0) sent.fetch_add(1, std::memory_order_relaxed);
      if (rank == 1) before_take(i);
      right = side.take(rounds[i], i + 1, false) && right;
      if (rank == 1) looked.fetch_add(1, std::memory_order_relaxed);
    }
    return right;
  });
}

int with_fault(const char* name) {
  fault = !std::strcmp(name, "relaxed_release") ? Fault::relaxed_release
          : !std::strcmp(name, "dropped_wait")  ? Fault::dropped_wait
          : !std::strcmp(name, "no_ack")        ? Fault::no_ack
                                                : Fault::none;
  const bool right = one_way();
  std::printf("%s: %s\n", name, right ? "right" : "wrong result");
  return right ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) return with_fault(argv[1]);
  const unsigned wraps = ~0u - 9;  // all totals pass through zero
  exchange_rounds<float, 16>({2, 2, 70, 2, 12}, 0);
  exchange_rounds<__nv_bfloat16, 16>({4, 1, 33, 2, 40}, 0);
  exchange_rounds<__nv_bfloat16, 4>({3, 2, 20, 3, 66}, wraps);
  exchange_rounds<__half, 2>({2, 1, 40, 1, 37}, wraps);
  exchange_rounds<float, 4>({2, 1, 5, 34, 261}, 0);
  report.expect(one_way(), "%s", "three pushes one way");
  for (const bool home : {false, true}) silent_rank(home);
  silent_counts();
  return report.exit_code("comm");
}
