// Gated linear units with the gate weight of each row folded in: schemas, and the CPU's implementation.
#include <cstring>
#include <tuple>

#include "row_lanes.h"
#include "mm/activation.h"
#include "mm/tensor.h"

STABLE_TORCH_LIBRARY_FRAGMENT(megamoe, m) {
  m.def("glu_fwd(Tensor h1, Tensor h3, Tensor? weights=None, Tensor? counts=None, str kind=\"swiglu\") -> Tensor");
  m.def(
      "glu_bwd(Tensor dact, Tensor h1, Tensor h3, Tensor? weights=None, Tensor? counts=None, str kind=\"swiglu\")"
      " -> (Tensor, Tensor, Tensor, Tensor)");
}

namespace mm {
namespace {

// Rows that count: the sum of `counts`, all where it is absent. On CUDA nothing can be raised, so it is bounded there.
int64_t used_rows(const char* op, const std::optional<Tensor>& counts, int64_t rows) {
  if (!counts.has_value()) {
    return rows;
  }
  int64_t used = 0;
  for (int64_t i = 0; i < counts->size(0); ++i) {
    const int64_t count = in<int64_t>(*counts)[i];
    MM_CHECK(count >= 0, op, "counts", text(count, " at place ", i), "numbers of rows, none negative");
    used += count;
  }
  MM_CHECK(used <= rows, op, "counts", text("a sum of ", used), text("at most the ", rows, " rows of h1"));
  return used;
}

template <typename T>
struct Inputs {
  Rows<const T> h1, h3;
  const Wide<T>* weights;  // or nullptr
  int64_t used;
};

// body(row, weight, used) for every row of a [R, F] tensor, on torch's threads.
template <typename T, typename Body>
void for_each_row(const Inputs<T>& inputs, const Body& body) {
  torch::stable::parallel_for(0, inputs.h1.count, rows_per_task(inputs.h1.width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      body(row, inputs.weights ? inputs.weights[row] : Wide<T>(1), row < inputs.used);
    }
  });
}

template <Glu kind, typename F>
Gate<Lanes<F>> gates(const Lanes<F>& x) {
  if constexpr (std::is_same_v<F, float>) {
    return gate<kind>(x);
  } else {
    Gate<Lanes<F>> all;
    for (int64_t i = 0; i < kLanes; ++i) {
      const Gate<F> one = gate<kind>(x[i]);
      all.value[i] = one.value;
      all.slope[i] = one.slope;
    }
    return all;
  }
}

template <Glu kind, typename T>
void forward(const Inputs<T>& inputs, const Rows<T>& act) {
  for_each_row(inputs, [&](int64_t row, Wide<T> weight, bool used) {
    if (!used) {
      std::memset(static_cast<void*>(act[row]), 0, act.width * sizeof(T));
      return;
    }
    for (int64_t at = 0; at < act.width; at += kLanes) {
      const int64_t count = act.width - at;
      const auto h1 = load_up_to(inputs.h1[row] + at, count), h3 = load_up_to(inputs.h3[row] + at, count);
      store_up_to(act[row] + at, gates<kind, Wide<T>>(h1).value * h3 * weight, count);
    }
  });
}

template <typename T>
struct Gradients {
  Rows<const T> d_act;
  Rows<T> d_h1, d_h3, act;
  Wide<T>* d_weights;  // or nullptr
};

template <Glu kind, typename T>
void backward_row(const Inputs<T>& inputs, const Gradients<T>& out, int64_t row, Wide<T> weight) {
  Lanes<Wide<T>> d_weight{};
  for (int64_t at = 0; at < inputs.h1.width; at += kLanes) {
    const int64_t count = inputs.h1.width - at;
    const auto h1 = load_up_to(inputs.h1[row] + at, count), h3 = load_up_to(inputs.h3[row] + at, count);
    const auto d_act = load_up_to(out.d_act[row] + at, count);
    const auto g = gates<kind, Wide<T>>(h1);
    const auto act = g.value * h3;
    const auto d = d_act * weight;
    d_weight += act * d_act;
    store_up_to(out.act[row] + at, act * weight, count);
    store_up_to(out.d_h3[row] + at, d * g.value, count);
    store_up_to(out.d_h1[row] + at, d * h3 * g.slope, count);
  }
  if (out.d_weights) {
    out.d_weights[row] = sum<Wide<T>>(d_weight);
  }
}

template <Glu kind, typename T>
void backward(const Inputs<T>& inputs, const Gradients<T>& out) {
  for_each_row(inputs, [&](int64_t row, Wide<T> weight, bool used) {
    if (used) {
      backward_row<kind>(inputs, out, row, weight);
      return;
    }
    for (const Rows<T>& rows : {out.d_h1, out.d_h3, out.act}) {
      std::memset(static_cast<void*>(rows[row]), 0, rows.width * sizeof(T));
    }
    if (out.d_weights) {
      out.d_weights[row] = 0;
    }
  });
}

Glu parse_kind(const char* op, const std::string& kind) {
  MM_CHECK(kind == "swiglu" || kind == "geglu", op, "kind", kind, "swiglu or geglu");
  return kind == "swiglu" ? Glu::swiglu : Glu::geglu;
}

template <typename T>
Inputs<T> check(const char* op, const Tensor& h1, const Tensor& h3, const std::optional<Tensor>& weights,
                const std::optional<Tensor>& counts) {
  Argument{op, "h1", h1}.rows();
  Argument{op, "h3", h3}.dtype({DtypeOf<T>::value}).rows().shape({h1.size(0), h1.size(1)}).on(h1);
  if (weights.has_value()) {
    Argument{op, "weights", *weights}.dtype({DtypeOf<Wide<T>>::value}).shape({h1.size(0)}).contiguous().on(h1);
  }
  if (counts.has_value()) {
    Argument{op, "counts", *counts}.dtype({ScalarType::Long}).shape({-1}).contiguous().on(h1);
  }
  return {rows_in<T>(h1), rows_in<T>(h3), in<Wide<T>>(weights), used_rows(op, counts, h1.size(0))};
}

Tensor glu_fwd(Tensor h1, Tensor h3, std::optional<Tensor> weights, std::optional<Tensor> counts, std::string kind) {
  constexpr const char* op = "glu_fwd";
  const Glu parsed = parse_kind(op, kind);
  Tensor act;
  by_dtype<float, BFloat16, Half, double>({op, "h1", h1}, [&]<typename T>() {
    const Inputs<T> inputs = check<T>(op, h1, h3, weights, counts);
    act = empty({h1.size(0), h1.size(1)}, h1.scalar_type(), h1);
    parsed == Glu::swiglu ? forward<Glu::swiglu>(inputs, rows_out<T>(act))
                          : forward<Glu::geglu>(inputs, rows_out<T>(act));
  });
  return act;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> glu_bwd(Tensor dact, Tensor h1, Tensor h3, std::optional<Tensor> weights,
                                                   std::optional<Tensor> counts, std::string kind) {
  constexpr const char* op = "glu_bwd";
  const Glu parsed = parse_kind(op, kind);
  Tensor d_h1, d_h3, d_weights, act;
  by_dtype<float, BFloat16, Half, double>({op, "h1", h1}, [&]<typename T>() {
    const Inputs<T> inputs = check<T>(op, h1, h3, weights, counts);
    Argument{op, "dact", dact}.dtype({DtypeOf<T>::value}).rows().shape({h1.size(0), h1.size(1)}).on(h1);
    for (Tensor* made : {&d_h1, &d_h3, &act}) {
      *made = empty({h1.size(0), h1.size(1)}, h1.scalar_type(), h1);
    }
    d_weights = empty({weights.has_value() ? h1.size(0) : 0}, DtypeOf<Wide<T>>::value, h1);
    const Gradients<T> out{rows_in<T>(dact), rows_out<T>(d_h1), rows_out<T>(d_h3), rows_out<T>(act),
                           weights.has_value() ? mm::out<Wide<T>>(d_weights) : nullptr};
    parsed == Glu::swiglu ? backward<Glu::swiglu>(inputs, out) : backward<Glu::geglu>(inputs, out);
  });
  return {d_h1, d_h3, d_weights, act};
}

}  // namespace
}  // namespace mm

STABLE_TORCH_LIBRARY_IMPL(megamoe, CPU, m) {
  m.impl("glu_fwd", TORCH_BOX(&mm::glu_fwd));
  m.impl("glu_bwd", TORCH_BOX(&mm::glu_bwd));
}
