// One-sided exchange of rows between the ranks of a group: schemas, and the CPU's implementation for processes of one
// machine, over memory that all of them have mapped. cuda/comm.cuh says what the ops do, in which order.
#include "comm.h"

#include <cstring>
#include <tuple>

#include "row_lanes.h"

STABLE_TORCH_LIBRARY_FRAGMENT(megamoe, m) {
  m.def("window_bytes(Tensor box) -> int");
  m.def("exchange_counts(Tensor counts, Tensor box, int exchange, float limit, Tensor(a!) report) -> ()");
  m.def("wait_counts(Tensor counts, Tensor box, int exchange, float limit, Tensor(a!) report) -> Tensor");
  m.def(
      "dispatch_push(Tensor x, Tensor? values, Tensor source, Tensor start, Tensor counts, Tensor first, int choices,"
      " Tensor box, int exchange, float limit, Tensor(a!) report, int blocks=0) -> ()");
  m.def(
      "wait_flags(Tensor like, bool values, int rows, Tensor counts, Tensor first, Tensor(a!) seen,"
      " Tensor box, int exchange, float limit, Tensor(b!) report, int blocks=0) -> (Tensor, Tensor)");
  m.def(
      "publish_rows(Tensor y, Tensor? values, Tensor counts, Tensor first,"
      " Tensor box, int exchange, float limit, Tensor(a!) report, int blocks=0) -> ()");
  m.def(
      "combine_pull(Tensor like, bool values, Tensor place, Tensor counts, Tensor first, Tensor(a!) seen,"
      " Tensor box, int exchange, float limit, Tensor(b!) report, int blocks=0) -> (Tensor, Tensor)");
}

namespace mm {
namespace {

// One exchange as this rank sees it; the counterpart of that in cuda/comm.cuh.
struct Exchange {
  Window window;
  Patience patience;
  unsigned number;
  const int32_t* counts;
  const int32_t* first;

  int buffer() const { return static_cast<int>(number & 1u); }
  int own(int local) const { return window.me * window.experts + local; }
  int count(bool home, int from, int local) const {
    const int expert = home ? from * window.experts + local : own(local);
    return counts[(home ? window.me : from) * window.all_experts() + expert];
  }
  // Of the rows that rank `from` sends to this rank's expert.
  int first_row(int from, int local) const { return first[from * window.all_experts() + own(local)]; }

  bool wait(const unsigned* flag, unsigned wanted, Awaited awaited, int peer, int expert = -1, int row = 0) const {
    return wait_until(flag, wanted, patience, {awaited, peer, expert, row, static_cast<int>(number)});
  }

  bool free_to_write() const {
    for (int peer = 0; peer < window.ranks; ++peer) {
      if (!wait(window.done(window.me, peer), number - 2, Awaited::done, peer)) return false;
    }
    return true;
  }

  // body(from, local, part, rows, index) for every tile with rows, index that of its flag; ends when it returns false.
  template <typename Body>
  bool each_tile(bool home, const Body& body) const {
    for (int index = 0; index < window.all_tiles(); ++index) {
      const int part = index % window.tiles(), expert = index / window.tiles();
      const int from = expert / window.experts, local = expert % window.experts;
      const int rows = rows_of_tile(count(home, from, local), part);
      if (rows > 0 && !body(from, local, part, rows, index)) return false;
    }
    return true;
  }

  unsigned* flag(int at, int from, int index) const {
    return window.flag(at, buffer(), from, index % (window.experts * window.tiles()));
  }

  // All rows of this exchange, and then the word to the peers that they have been read.
  bool wait_for_all(bool home, const unsigned* seen) const {
    return each_tile(home, [&](int from, int local, int part, int rows, int index) {
      const int expert = home ? from * window.experts + local : own(local);
      const unsigned wanted = seen[int64_t{buffer()} * window.all_tiles() + index] + static_cast<unsigned>(rows);
      return wait(flag(window.me, from, index), wanted, home ? Awaited::results : Awaited::rows, from, expert,
                  part * kTileRows);
    });
  }

  void finish(bool home, unsigned* seen) const {
    each_tile(home, [&](int, int, int, int rows, int index) {
      seen[int64_t{buffer()} * window.all_tiles() + index] += static_cast<unsigned>(rows);
      return true;
    });
    for (int peer = 0; peer < window.ranks; ++peer) release_store(window.done(peer, window.me), number);
  }
};

Exchange exchange_of(const char* op, const Tensor& box, int64_t number, double limit, const Tensor& report) {
  const Window window = window_of(op, box);
  return {window, patience_of(op, window, limit, report), static_cast<unsigned>(number), nullptr, nullptr};
}

// With the tables, whose rows must have a place: a wrong number would write over a peer's memory.
Exchange exchange_with(const char* op, const Tensor& counts, const Tensor& first, const Tensor& box, int64_t number,
                       double limit, const Tensor& report, const Tensor& rows) {
  Exchange task = exchange_of(op, box, number, limit, report);
  check_tables(op, task.window, counts, first, rows);
  task.counts = in<int32_t>(counts);
  task.first = in<int32_t>(first);
  for (int64_t i = 0; i < counts.numel(); ++i) {
    const bool fits = task.counts[i] >= 0 && task.counts[i] <= task.window.capacity && task.first[i] >= 0 &&
                      int64_t{task.first[i]} + task.counts[i] <= task.window.rows();
    MM_CHECK(fits, op, "counts", text(task.counts[i], " rows from row ", task.first[i]),
             text("at most ", task.window.capacity, " that end at ", task.window.rows()));
  }
  return task;
}

template <typename T>
void check_beside(const char* op, const std::optional<Tensor>& values, int64_t count, const Tensor& rows) {
  if (values.has_value()) Argument{op, "values", *values}.dtype({DtypeOf<Wide<T>>::value}).shape({count}).contiguous().on(rows);
}

template <typename T>
T* row_at(const Window& window, int at, int buffer, int64_t row) {
  return reinterpret_cast<T*>(window.row(at, buffer, row));
}

template <typename T>
void put(const T* row, int64_t width, const Wide<T>* value, const Window& window, int at, int buffer, int64_t to) {
  std::memcpy(window.row(at, buffer, to), static_cast<const void*>(row), width * sizeof(T));
  if (value) std::memcpy(window.value(at, buffer, to), value, sizeof *value);
}

void exchange_counts(Tensor counts, Tensor box, int64_t number, double limit, Tensor report) {
  constexpr const char* op = "exchange_counts";
  const Exchange task = exchange_of(op, box, number, limit, report);
  const Window& window = task.window;
  Argument{op, "counts", counts}.dtype({ScalarType::Long}).shape({window.all_experts()}).contiguous();
  const int64_t* const mine = in<int64_t>(counts);
  for (int e = 0; e < window.all_experts(); ++e) {
    MM_CHECK(mine[e] >= 0 && mine[e] <= window.capacity, op, "counts", text(mine[e], " rows of an expert"),
             text("0 to ", window.capacity));
  }
  if (!task.free_to_write()) return;
  for (int peer = 0; peer < window.ranks; ++peer) {
    std::copy_n(mine, window.all_experts(), window.counts(peer, task.buffer(), window.me));
    release_store(window.arrived(peer, window.me), task.number);
  }
}

Tensor wait_counts(Tensor counts, Tensor box, int64_t number, double limit, Tensor report) {
  const Exchange task = exchange_of("wait_counts", box, number, limit, report);
  const Window& window = task.window;
  const Tensor all = empty({window.ranks, window.all_experts()}, ScalarType::Int, counts);
  std::memset(out<int32_t>(all), 0, all.numel() * sizeof(int32_t));
  for (int peer = 0; peer < window.ranks; ++peer) {
    if (!task.wait(window.arrived(window.me, peer), task.number, Awaited::counts, peer)) break;
    std::copy_n(window.counts(window.me, task.buffer(), peer), window.all_experts(),
                out<int32_t>(all) + int64_t{peer} * window.all_experts());
  }
  return all;
}

// Every assignment of this rank is a choice of a token.
void check_source(const Exchange& task, const Tensor& source, const Tensor& start, int64_t num_choices) {
  constexpr const char* op = "dispatch_push";
  const int experts = task.window.all_experts();
  for (int e = 0; e < experts; ++e) {
    const int64_t begin = in<int32_t>(start)[e], count = task.counts[task.window.me * experts + e];
    MM_CHECK(begin >= 0 && begin + count <= source.numel(), op, "start", text(begin, " and ", count, " rows"),
             text("at most ", source.numel(), " assignments"));
    for (int64_t i = begin; i < begin + count; ++i) {
      const int64_t choice = in<int32_t>(source)[i];
      MM_CHECK(choice >= 0 && choice < num_choices, op, "source", text("choice ", choice), text("0 to ", num_choices - 1));
    }
  }
}

void dispatch_push(Tensor x, std::optional<Tensor> values, Tensor source, Tensor start, Tensor counts, Tensor first,
                   int64_t choices, Tensor box, int64_t number, double limit, Tensor report, int64_t) {
  constexpr const char* op = "dispatch_push";
  const Exchange task = exchange_with(op, counts, first, box, number, limit, report, x);
  const Window& window = task.window;
  check_width(op, "x", window, x);
  Argument{op, "source", source}.dtype({ScalarType::Int}).shape({-1}).contiguous().on(x);
  Argument{op, "start", start}.dtype({ScalarType::Int}).shape({window.all_experts()}).contiguous().on(x);
  MM_CHECK(choices >= 1, op, "choices", text(choices), "at least one for each token");
  check_source(task, source, start, x.size(0) * choices);
  by_dtype<float, BFloat16, Half, double>({op, "x", x}, [&]<typename T>() {
    check_beside<T>(op, values, x.size(0) * choices, x);
    const Rows<const T> rows = rows_in<T>(x);
    const int32_t* const of = in<int32_t>(source);
    const Wide<T>* const beside = in<Wide<T>>(values);
    if (!task.free_to_write()) return;
    const int tiles = window.tiles(), mine = window.me * window.all_experts();
    // Each rank begins with its own experts, so that not all write to the same peer at first.
    for (int i = 0; i < window.all_experts(); ++i) {
      const int expert = (i + task.own(0)) % window.all_experts(), owner = expert / window.experts;
      const int64_t from = in<int32_t>(start)[expert], to = task.first[mine + expert];
      const int count = task.counts[mine + expert];
      for (int part = 0; part < tiles; ++part) {
        const int here = rows_of_tile(count, part), begin = part * kTileRows;
        for (int row = begin; row < begin + here; ++row) {
          const int64_t choice = of[from + row];
          put(rows[choice / choices], rows.width, beside ? beside + choice : nullptr, window, owner, task.buffer(),
              to + row);
        }
        const int index = expert % window.experts * tiles + part;
        if (here > 0) release_add(window.flag(owner, task.buffer(), window.me, index), here);
      }
    }
  });
}

std::tuple<Tensor, Tensor> wait_flags(Tensor like, bool values, int64_t num_rows, Tensor counts, Tensor first,
                                      Tensor seen, Tensor box, int64_t number, double limit, Tensor report, int64_t) {
  constexpr const char* op = "wait_flags";
  const Exchange task = exchange_with(op, counts, first, box, number, limit, report, like);
  const Window& window = task.window;
  check_width(op, "like", window, like);
  check_seen(op, window, seen, like);
  const int64_t arriving = task.first_row(window.ranks - 1, window.experts - 1) +
                           task.count(false, window.ranks - 1, window.experts - 1);
  MM_CHECK(arriving <= num_rows, op, "rows", text(num_rows), text("at least ", arriving, ", which arrive"));
  const Tensor rows = empty({num_rows, like.size(1)}, like.scalar_type(), like);
  Tensor beside;
  by_dtype<float, BFloat16, Half, double>({op, "like", like}, [&]<typename T>() {
    beside = empty({values ? num_rows : 0}, DtypeOf<Wide<T>>::value, like);
    if (!task.wait_for_all(false, reinterpret_cast<unsigned*>(out<int32_t>(seen)))) {
      std::memset(rows.mutable_data_ptr(), 0xff, rows.numel() * sizeof(T));  // NaN: nobody shall take it for rows
      std::memset(beside.mutable_data_ptr(), 0xff, beside.numel() * sizeof(Wide<T>));
      return;
    }
    const Rows<T> to = rows_out<T>(rows);
    Wide<T>* const to_values = out<Wide<T>>(beside);
    torch::stable::parallel_for(0, num_rows, rows_per_task(to.width), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const char* const from = row < arriving ? window.row(window.me, task.buffer(), row) : nullptr;
        if (from) std::memcpy(static_cast<void*>(to[row]), from, to.width * sizeof(T));
        else std::memset(static_cast<void*>(to[row]), 0, to.width * sizeof(T));
        if (!values) continue;
        to_values[row] = 0;
        if (from) std::memcpy(to_values + row, window.value(window.me, task.buffer(), row), sizeof(Wide<T>));
      }
    });
    task.finish(false, reinterpret_cast<unsigned*>(out<int32_t>(seen)));
  });
  return {rows, beside};
}

void publish_rows(Tensor y, std::optional<Tensor> values, Tensor counts, Tensor first, Tensor box, int64_t number,
                  double limit, Tensor report, int64_t) {
  constexpr const char* op = "publish_rows";
  const Exchange task = exchange_with(op, counts, first, box, number, limit, report, y);
  const Window& window = task.window;
  check_width(op, "y", window, y);
  by_dtype<float, BFloat16, Half, double>({op, "y", y}, [&]<typename T>() {
    check_beside<T>(op, values, y.size(0), y);
    const Rows<const T> rows = rows_in<T>(y);
    const Wide<T>* const beside = in<Wide<T>>(values);
    if (!task.free_to_write()) return;
    task.each_tile(false, [&](int to, int local, int part, int here, int index) {
      const int begin = task.first_row(to, local) + part * kTileRows;
      MM_CHECK(begin + here <= rows.count, op, "y", text(rows.count, " rows"), text("at least ", begin + here));
      for (int row = begin; row < begin + here; ++row) {
        put(rows[row], rows.width, beside ? beside + row : nullptr, window, window.me, task.buffer(), row);
      }
      release_add(window.flag(to, task.buffer(), window.me, index % (window.experts * window.tiles())), here);
      return true;
    });
  });
}

// A token's rows at the peers, added up in the order of its choices.
template <typename T>
void pull_token(const Exchange& task, const int32_t* place, int64_t choices, int64_t width, T* sum, Wide<T>* values) {
  const Window& window = task.window;
  const auto each = [&](const auto& body) {
    for (int64_t k = 0; k < choices; ++k) {
      if (place[k] >= 0) body(k, static_cast<int>(place[k] / window.rows()), place[k] % window.rows());
    }
  };
  for (int64_t at = 0; at < width; at += kLanes) {
    Lanes<Wide<T>> total{};
    each([&](int64_t, int owner, int64_t row) {
      total += load_up_to(row_at<const T>(window, owner, task.buffer(), row) + at, width - at);
    });
    store_up_to(sum + at, total, width - at);
  }
  if (!values) return;
  std::fill_n(values, choices, Wide<T>(0));
  each([&](int64_t k, int owner, int64_t row) {
    std::memcpy(values + k, window.value(owner, task.buffer(), row), sizeof(Wide<T>));
  });
}

std::tuple<Tensor, Tensor> combine_pull(Tensor like, bool values, Tensor place, Tensor counts, Tensor first, Tensor seen,
                                        Tensor box, int64_t number, double limit, Tensor report, int64_t) {
  constexpr const char* op = "combine_pull";
  const Exchange task = exchange_with(op, counts, first, box, number, limit, report, like);
  const Window& window = task.window;
  check_width(op, "like", window, like);
  check_seen(op, window, seen, like);
  Argument{op, "place", place}.dtype({ScalarType::Int}).shape({-1, -1}).contiguous().on(like);
  const int32_t* const places = in<int32_t>(place);
  for (int64_t i = 0; i < place.numel(); ++i) {
    MM_CHECK(places[i] < window.ranks * window.rows(), op, "place", text(places[i]),
             text("below ", window.ranks * window.rows()));
  }
  const int64_t tokens = place.size(0), choices = place.size(1), width = like.size(1);
  const Tensor sums = empty({tokens, width}, like.scalar_type(), like);
  Tensor beside;
  by_dtype<float, BFloat16, Half, double>({op, "like", like}, [&]<typename T>() {
    beside = empty({values ? tokens : 0, choices}, DtypeOf<Wide<T>>::value, like);
    if (!task.wait_for_all(true, reinterpret_cast<unsigned*>(out<int32_t>(seen)))) {
      std::memset(sums.mutable_data_ptr(), 0xff, sums.numel() * sizeof(T));
      std::memset(beside.mutable_data_ptr(), 0xff, beside.numel() * sizeof(Wide<T>));
      return;
    }
    torch::stable::parallel_for(0, tokens, rows_per_task(width), [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) {
        pull_token<T>(task, places + token * choices, choices, width, out<T>(sums) + token * width,
                      values ? out<Wide<T>>(beside) + token * choices : nullptr);
      }
    });
    task.finish(true, reinterpret_cast<unsigned*>(out<int32_t>(seen)));
  });
  return {sums, beside};
}

int64_t bytes_of_window(Tensor box) { return window_bytes(box); }

}  // namespace
}  // namespace mm

STABLE_TORCH_LIBRARY_IMPL(megamoe, CPU, m) {
  m.impl("window_bytes", TORCH_BOX(&mm::bytes_of_window));
  m.impl("exchange_counts", TORCH_BOX(&mm::exchange_counts));
  m.impl("wait_counts", TORCH_BOX(&mm::wait_counts));
  m.impl("dispatch_push", TORCH_BOX(&mm::dispatch_push));
  m.impl("wait_flags", TORCH_BOX(&mm::wait_flags));
  m.impl("publish_rows", TORCH_BOX(&mm::publish_rows));
  m.impl("combine_pull", TORCH_BOX(&mm::combine_pull));
}
