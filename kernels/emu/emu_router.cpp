// The router's kernels on the CPU, against literal loops in double: sizes where slices end inside of units, few and many
// experts, no tokens; outputs filled with NaN before. Exit code 0: all right.
#include <cmath>
#include <cstdio>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "router_dense.cuh"
#include "router_grap.cuh"
#include "router_mma.cuh"

namespace {

using mm::Numbers;

constexpr float kPoison = std::numeric_limits<float>::quiet_NaN();
constexpr int kPoisonInt = 0x7f7f7f7f;
constexpr int kMultiprocessors = 1;  // so that blocks work on many tokens
int failures = 0;

void check(bool right, const char* what, const char* about) {
  if (!right) {
    std::printf("FAILED: %s, %s\n", about, what);
    ++failures;
  }
}

// |got - wanted| / |wanted|; infinite where an element of `got` was never written.
template <typename T>
double error(const std::vector<T>& got, const std::vector<double>& wanted) {
  double difference = 0, size = 0;
  for (size_t i = 0; i < wanted.size(); ++i) {
    const double value = static_cast<float>(got[i]);
    if (std::isnan(value)) return INFINITY;
    difference += (value - wanted[i]) * (value - wanted[i]);
    size += wanted[i] * wanted[i];
  }
  return size == 0 ? std::sqrt(difference) : std::sqrt(difference / size);
}

std::mt19937 generator(20240601);

template <typename T>
std::vector<T> random(size_t count, float shift = 0) {
  std::normal_distribution<float> normal(shift);
  std::vector<T> values(count);
  for (T& value : values) value = normal(generator);
  return values;
}

// The k largest of a row of scores, of equal ones the first.
std::vector<int> best(const float* scores, int experts, int k) {
  std::vector<int> order(experts);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return scores[a] > scores[b]; });
  order.resize(k);
  return order;
}

bool chosen_well(const std::vector<int>& chosen, const std::vector<float>& scores, int tokens, int experts, int k) {
  bool right = true;
  for (int t = 0; t < tokens; ++t) {
    const std::vector<int> wanted = best(&scores[size_t(t) * experts], experts, k);
    right &= std::equal(wanted.begin(), wanted.end(), chosen.begin() + size_t(t) * k);
  }
  return right;
}

// The rounding of one element of T.
template <typename T>
constexpr double kTolerance = sizeof(T) == 4 ? 1e-6 : 3e-3;

struct GrapCase {
  int tokens, width, experts, k;
};

template <typename X, int Bytes, int Units>
void grap(const GrapCase& c) {
  char about[128];
  std::snprintf(about, sizeof about, "grap, %zu bytes in units of %d, %d for each thread, T %d D %d E %d K %d", sizeof(X), Bytes,
                Units, c.tokens, c.width, c.experts, c.k);
  const int T = c.tokens, D = c.width, E = c.experts;
  std::vector<X> x = random<X>(size_t(T) * D, 0.5f);
  const std::vector<float> unit = random<float>(D), mean = random<float>(D, 0.5f);
  const std::vector<float> grad = random<float>(size_t(T) * E);
  if (T > 2) {
    for (int d = 0; d < D; ++d) x[2 * D + d] = mean[d];  // of length 0 where X is float
  }
  std::vector<int> owner;
  for (int e = 0; e < E; ++e) owner.insert(owner.end(), D / E + (e < D % E), e);
  std::vector<double> affinity(size_t(T) * E), inverse(T), dx(size_t(T) * D), d_unit(D);
  for (int t = 0; t < T; ++t) {
    double square = 0, along = 0;
    for (int d = 0; d < D; ++d) {
      const double centred = double(float(x[t * D + d])) - mean[d];
      square += centred * centred;
      affinity[t * E + owner[d]] += centred * unit[d];
    }
    inverse[t] = square == 0 ? 0 : 1 / std::sqrt(square);
    for (int e = 0; e < E; ++e) along += grad[t * E + e] * (affinity[t * E + e] *= inverse[t]);
    for (int d = 0; d < D; ++d) {
      const double u = (double(float(x[t * D + d])) - mean[d]) * inverse[t], g = grad[t * E + owner[d]];
      dx[t * D + d] = inverse[t] * (g * unit[d] - u * along);
      d_unit[d] += g * u;
    }
  }

  std::vector<float> a(affinity.size(), kPoison), r(T, kPoison), du(D, kPoison);
  std::vector<int> chosen(size_t(T) * c.k, kPoisonInt);
  std::vector<X> dx_got(dx.size(), X(kPoison));
  const std::int64_t stride = D * sizeof(X) / Bytes;
  const mm::ConstUnitRows<Bytes> rows{reinterpret_cast<const mm::Unit<Bytes>*>(x.data()), stride};
  mm::GrapForwardJob<X, Bytes, Units> forward{rows,     unit.data(), mean.data(), a.data(), r.data(), chosen.data(), T, 0,
                                                 E,        c.k,         false,       {},       0,        0};
  mm::launch_grap_forward(forward, D, kMultiprocessors, nullptr);
  check(error(a, affinity) < 1e-6, "affinity", about);
  check(error(r, inverse) < 1e-6, "inverse", about);
  check(chosen_well(chosen, a, T, E, c.k), "choice", about);

  std::vector<float> partial(size_t(D) * mm::grap_partials<X, Bytes>(T, D, kMultiprocessors), kPoison);
  mm::GrapBackwardJob<X, Bytes> backward{grad.data(), E, rows,
      {reinterpret_cast<mm::Unit<Bytes>*>(dx_got.data()), stride}, unit.data(), mean.data(), a.data(), r.data(),
      partial.data(), T, 0, E, false, {}};
  mm::launch_grap_backward(backward, du.data(), D, kMultiprocessors, nullptr);
  check(error(dx_got, dx) < kTolerance<X>, "dx", about);
  check(error(du, d_unit) < 2e-6, "d unit", about);
}

void all_grap() {
  using bf16 = __nv_bfloat16;
  grap<float, 16, 1>({13, 96, 24, 3});    // one unit for each expert
  grap<float, 16, 1>({9, 104, 8, 8});     // units of which three and a bit make a slice
  grap<bf16, 16, 1>({33, 512, 8, 2});     // 8 units for each expert
  grap<bf16, 16, 1>({7, 512, 64, 1});
  grap<bf16, 16, 1>({5, 264, 16, 16});    // slices of 16 and 17: they end inside of units
  grap<bf16, 16, 1>({5, 200, 37, 3});     // slices of 6 and 5: up to three in a unit
  grap<__half, 16, 1>({3, 64, 1, 1});     // one expert
  grap<__half, 2, 1>({3, 67, 5, 2});      // rows at odd addresses
  grap<float, 4, 1>({6, 33, 33, 4});      // one feature for each expert
  grap<float, 4, 1>({2, 5, 9, 9});        // experts without a feature
  grap<bf16, 2, 1>({40, 711, 64, 2});     // more features than threads
  grap<bf16, 16, 2>({17, 4112, 256, 8});  // more units than threads
  grap<float, 16, 2>({5, 2304, 1024, 2});
  grap<float, 16, 4>({3, 4352, 64, 2});
  grap<bf16, 16, 1>({0, 64, 8, 2});       // no tokens
  grap<bf16, 16, 1>({100, 8, 4, 0});      // no choice
}

struct DenseCase {
  int tokens, width, experts, k;
  bool centred, normalize;
};

// A dense case with its results in double.
template <typename X>
struct Dense {
  DenseCase c;
  std::vector<X> x;
  std::vector<float> vectors, mean, grad;
  std::vector<double> scores, inverse, dx, d_vectors;
  char about[128];

  Dense(const DenseCase& c_, const char* name) : c(c_) {
    std::snprintf(about, sizeof about, "%s, %zu bytes, T %d D %d E %d K %d%s%s", name, sizeof(X), c.tokens, c.width,
                  c.experts, c.k, c.centred ? ", centred" : "", c.normalize ? ", normalised" : "");
    const size_t T = c.tokens, D = c.width, E = c.experts;
    x = random<X>(T * D, 0.5f);
    vectors = random<float>(E * D);
    mean = random<float>(D, 0.5f);
    grad = random<float>(T * E);
    if (T > 2 && c.centred) std::copy(mean.begin(), mean.end(), x.begin() + 2 * D);
    scores.resize(T * E), inverse.resize(T), dx.resize(T * D), d_vectors.resize(E * D);
    std::vector<double> u(D);
    for (size_t t = 0; t < T; ++t) {
      double square = 0, along = 0;
      for (size_t d = 0; d < D; ++d) {
        u[d] = double(float(x[t * D + d])) - (c.centred ? mean[d] : 0.0f);
        square += u[d] * u[d];
      }
      inverse[t] = square == 0 ? 0 : 1 / std::sqrt(square);
      const double r = c.normalize ? inverse[t] : 1;
      for (size_t e = 0; e < E; ++e) {
        double& score = scores[t * E + e];
        for (size_t d = 0; d < D; ++d) score += u[d] * vectors[e * D + d];
        along += grad[t * E + e] * (score *= r);
        for (size_t d = 0; d < D; ++d) {
          dx[t * D + d] += r * grad[t * E + e] * vectors[e * D + d];
          d_vectors[e * D + d] += r * grad[t * E + e] * u[d];
        }
      }
      for (size_t d = 0; c.normalize && d < D; ++d) dx[t * D + d] -= r * r * along * u[d];
    }
  }

  const float* mean_or_null() const { return c.centred ? mean.data() : nullptr; }

  // Of a kernel that writes scores, inverse lengths and choice.
  template <typename Run>
  std::pair<std::vector<float>, std::vector<float>> forward(const Run& run) const {
    std::vector<float> s(scores.size(), kPoison), r(c.tokens, kPoison);
    std::vector<int> chosen(size_t(c.tokens) * c.k, kPoisonInt);
    run(s.data(), c.normalize ? r.data() : nullptr, chosen.data());
    check(error(s, scores) < 1e-6, "scores", about);
    check(!c.normalize || error(r, inverse) < 1e-6, "inverse", about);
    check(chosen_well(chosen, s, c.tokens, c.experts, c.k), "choice", about);
    return {s, r};
  }
};

template <typename X>
void dense(const DenseCase& c) {
  const Dense<X> d(c, "dense");
  const mm::CentredRows<X> rows{d.x.data(), c.width, d.mean_or_null(), c.tokens, c.width};
  const auto [scores, inverse] = d.forward([&](float* s, float* r, int* chosen) {
    mm::launch_dense_forward(rows, d.vectors.data(), c.experts, c.k, s, r, chosen, nullptr);
  });
  std::vector<X> dx(d.dx.size(), X(kPoison));
  std::vector<float> d_vectors(d.d_vectors.size(), kPoison), along(c.tokens, kPoison);
  std::vector<float> partial(mm::token_spans(c.tokens) * d_vectors.size(), kPoison);
  mm::launch_dense_backward(rows, {d.grad.data(), c.experts, c.normalize ? inverse.data() : nullptr, c.experts},
                            d.vectors.data(), scores.data(), along.data(), partial.data(), dx.data(), d_vectors.data(),
                            nullptr);
  check(error(dx, d.dx) < kTolerance<X>, "dx", d.about);
  check(error(d_vectors, d.d_vectors) < 1e-6, "d vectors", d.about);
}

template <int Eights, bool Centred>
void mma_as(const Dense<__nv_bfloat16>& d) {
  const DenseCase& c = d.c;
  std::vector<__nv_bfloat16> terms(mm::split_sizes(c.experts, c.width, Centred).count(), __nv_bfloat16(kPoison));
  d.forward([&](float* s, float* r, int* chosen) {
    mm::MmaScoresJob<Eights, Centred> job{};
    job.x = d.x.data(), job.x_stride = c.width, job.mean = d.mean_or_null();
    job.scores = s, job.inverse = r, job.chosen = chosen;
    job.tokens = c.tokens, job.width = c.width, job.experts = c.experts, job.choices = c.k, job.normalize = c.normalize;
    mm::launch_mma_scores(job, d.vectors.data(), terms.data(), nullptr);
  });
}

void mma(const DenseCase& c) {
  const Dense<__nv_bfloat16> d(c, "mma");
  mm::by_eights(c.experts, c.centred, [&]<int Eights, bool Centred>() { mma_as<Eights, Centred>(d); });
}

void all_dense() {
  dense<float>({70, 67, 5, 2, true, true});
  dense<float>({3, 40, 70, 4, false, false});
  dense<__half>({70, 33, 9, 9, true, false});
  dense<__nv_bfloat16>({300, 24, 16, 1, false, true});  // two spans of tokens
  dense<__nv_bfloat16>({0, 24, 16, 1, false, true});
  mma({130, 64, 64, 2, false, true});
  mma({130, 136, 8, 3, true, true});     // a depth that is no multiple of 32, the second block with two tokens
  mma({5, 288, 16, 0, false, false});    // more steps than stages
  mma({40, 40, 70, 7, true, true});      // more experts than a block takes at once, an odd number of tokens' bytes
  mma({3, 72, 33, 1, false, true});
  mma({0, 72, 33, 1, false, true});
}

}  // namespace

int main() {
  all_grap();
  all_dense();
  std::printf(failures ? "%d failures\n" : "all right\n", failures);
  return failures != 0;
}
