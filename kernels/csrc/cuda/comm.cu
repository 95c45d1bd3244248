// One-sided exchange of rows on CUDA: arguments, units and launches. The schemas are in cpu/comm.cpp, the kernels in
// comm.cuh. `box` and `report` are the host's: the one travels as a kernel's argument, the other is pinned memory.
#include "comm.cuh"

#include <tuple>

#include "../cpu/comm.h"
#include "mm/units.h"

namespace mm {
namespace {

Exchange exchange_of(const char* op, const Tensor& box, int64_t number, double limit, const Tensor& report) {
  const Window window = window_of(op, box);
  return {window, patience_of(op, window, limit, report), static_cast<unsigned>(number), nullptr, nullptr, nullptr};
}

Exchange exchange_with(const char* op, const Tensor& counts, const Tensor& first, const Tensor& box, int64_t number,
                       double limit, const Tensor& report, const Tensor& rows) {
  Exchange task = exchange_of(op, box, number, limit, report);
  check_tables(op, task.window, counts, first, rows);
  task.counts = in<int32_t>(counts);
  task.first = in<int32_t>(first);
  return task;
}

Exchange with_seen(const char* op, Exchange task, const Tensor& seen, const Tensor& rows) {
  check_seen(op, task.window, seen, rows);
  task.seen = reinterpret_cast<unsigned*>(out<int32_t>(seen));
  return task;
}

const unsigned* check_beside(const char* op, const std::optional<Tensor>& values, int64_t count, const Tensor& rows) {
  if (!values.has_value()) return nullptr;
  Argument{op, "values", *values}.dtype({ScalarType::Float}).shape({count}).contiguous().on(rows);
  return static_cast<const unsigned*>(values->const_data_ptr());
}

// body.operator()<Bytes>() for rows of these tensors; those in the window begin at multiples of 16 bytes.
template <typename Body>
void by_units(const Tensor& rows, const Body& body) {
  const int64_t width = rows.size(1) * rows.element_size();
  by_unit(static_cast<int>(rows.element_size()), width, body, rows);
}

template <int Bytes>
int units_of(const Tensor& rows) {
  return static_cast<int>(rows.size(1) * rows.element_size() / Bytes);
}

template <int Bytes>
RowsBeside<Bytes> beside_of(const Tensor& rows, const Tensor& values) {
  const bool any = values.size(0) > 0;
  return {units_out<Bytes>(rows), units_of<Bytes>(rows), any ? static_cast<unsigned*>(values.mutable_data_ptr()) : nullptr};
}

void check_rows_in(const char* op, const char* argument, const Window& window, const Tensor& rows) {
  check_width(op, argument, window, rows);
  Argument{op, argument, rows}.dtype({ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
}

void exchange_counts(Tensor counts, Tensor box, int64_t number, double limit, Tensor report) {
  constexpr const char* op = "exchange_counts";
  const Exchange task = exchange_of(op, box, number, limit, report);
  Argument{op, "counts", counts}.dtype({ScalarType::Long}).shape({task.window.all_experts()}).contiguous();
  const OnDeviceOf device(counts);
  launch_exchange_counts(task, in<int64_t>(counts), stream_of(counts));
}

Tensor wait_counts(Tensor counts, Tensor box, int64_t number, double limit, Tensor report) {
  const Exchange task = exchange_of("wait_counts", box, number, limit, report);
  const OnDeviceOf device(counts);
  const Tensor all = empty({task.window.ranks, task.window.all_experts()}, ScalarType::Int, counts);
  launch_wait_counts(task, out<int32_t>(all), stream_of(counts));
  return all;
}

void dispatch_push(Tensor x, std::optional<Tensor> values, Tensor source, Tensor start, Tensor counts, Tensor first,
                   int64_t choices, Tensor box, int64_t number, double limit, Tensor report, int64_t blocks) {
  constexpr const char* op = "dispatch_push";
  const Exchange task = exchange_with(op, counts, first, box, number, limit, report, x);
  check_rows_in(op, "x", task.window, x);
  Argument{op, "source", source}.dtype({ScalarType::Int}).shape({-1}).contiguous().on(x);
  Argument{op, "start", start}.dtype({ScalarType::Int}).shape({task.window.all_experts()}).contiguous().on(x);
  MM_CHECK(choices >= 1, op, "choices", text(choices), "at least one for each token");
  const unsigned* const beside = check_beside(op, values, x.size(0) * choices, x);
  const OnDeviceOf device(x);
  by_units(x, [&]<int Bytes>() {
    const PushJob<Bytes> job{task, units_in<Bytes>(x), units_of<Bytes>(x), beside, in<int32_t>(source),
                             in<int32_t>(start), static_cast<int>(choices)};
    launch_push(job, static_cast<int>(blocks), stream_of(x));
  });
}

std::tuple<Tensor, Tensor> wait_flags(Tensor like, bool values, int64_t num_rows, Tensor counts, Tensor first,
                                      Tensor seen, Tensor box, int64_t number, double limit, Tensor report,
                                      int64_t blocks) {
  constexpr const char* op = "wait_flags";
  Exchange task = exchange_with(op, counts, first, box, number, limit, report, like);
  check_rows_in(op, "like", task.window, like);
  task = with_seen(op, task, seen, like);
  const OnDeviceOf device(like);
  const Tensor rows = empty({num_rows, like.size(1)}, like.scalar_type(), like);
  const Tensor beside = empty({values ? num_rows : 0}, ScalarType::Float, like);
  by_units(rows, [&]<int Bytes>() {
    const TakeJob<Bytes> job{task, beside_of<Bytes>(rows, beside), static_cast<int>(num_rows)};
    launch_take(job, static_cast<int>(blocks), stream_of(like));
  });
  return {rows, beside};
}

void publish_rows(Tensor y, std::optional<Tensor> values, Tensor counts, Tensor first, Tensor box, int64_t number,
                  double limit, Tensor report, int64_t blocks) {
  constexpr const char* op = "publish_rows";
  const Exchange task = exchange_with(op, counts, first, box, number, limit, report, y);
  check_rows_in(op, "y", task.window, y);
  const unsigned* const beside = check_beside(op, values, y.size(0), y);
  const OnDeviceOf device(y);
  by_units(y, [&]<int Bytes>() {
    const PublishJob<Bytes> job{task, units_in<Bytes>(y), units_of<Bytes>(y), beside};
    launch_publish(job, static_cast<int>(blocks), stream_of(y));
  });
}

std::tuple<Tensor, Tensor> combine_pull(Tensor like, bool values, Tensor place, Tensor counts, Tensor first, Tensor seen,
                                        Tensor box, int64_t number, double limit, Tensor report, int64_t blocks) {
  constexpr const char* op = "combine_pull";
  Exchange task = exchange_with(op, counts, first, box, number, limit, report, like);
  check_rows_in(op, "like", task.window, like);
  task = with_seen(op, task, seen, like);
  Argument{op, "place", place}.dtype({ScalarType::Int}).shape({-1, -1}).contiguous().on(like);
  const OnDeviceOf device(like);
  const int64_t tokens = place.size(0), choices = place.size(1);
  const Tensor sums = empty({tokens, like.size(1)}, like.scalar_type(), like);
  const Tensor beside = empty({values ? tokens : 0, choices}, ScalarType::Float, like);
  by_dtype<float, __nv_bfloat16, __half>({op, "like", like}, [&]<typename T>() {
    by_units(sums, [&]<int Bytes>() {
      if constexpr (Bytes >= static_cast<int>(sizeof(T))) {
        const RowsBeside<Bytes> to = beside_of<Bytes>(sums, beside);
        const PullJob<T, Bytes> job{task,        to.rows, to.units, to.values, in<int32_t>(place), tokens,
                                    static_cast<int>(choices)};
        launch_pull(job, static_cast<int>(blocks), stream_of(like));
      }
    });
  });
  return {sums, beside};
}

int64_t bytes_of_window(Tensor box) { return window_bytes(box); }

}  // namespace
}  // namespace mm

STABLE_TORCH_LIBRARY_IMPL(megamoe, CUDA, m) {
  m.impl("window_bytes", TORCH_BOX(&mm::bytes_of_window));
  m.impl("exchange_counts", TORCH_BOX(&mm::exchange_counts));
  m.impl("wait_counts", TORCH_BOX(&mm::wait_counts));
  m.impl("dispatch_push", TORCH_BOX(&mm::dispatch_push));
  m.impl("wait_flags", TORCH_BOX(&mm::wait_flags));
  m.impl("publish_rows", TORCH_BOX(&mm::publish_rows));
  m.impl("combine_pull", TORCH_BOX(&mm::combine_pull));
}
