// The gates of gated linear units and their slopes. One text for the CPU, for CUDA and for the emulator: arithmetic without
// branches, for one number (float, double) or for a vector of floats (cpu/lanes.h). Standard library only.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __CUDACC__
#define MM_BOTH __host__ __device__ __forceinline__
#else
#define MM_BOTH inline
#endif

namespace mm {

enum class Glu : int { swiglu, geglu };

// The quotient of b in [1, 2^126].
template <typename F>
MM_BOTH F divide(F a, F b) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<F, float>) {
    return __fdividef(a, b);
  }
#endif
  return a / b;
}

// exp(x) for x <= 0; of floats 0 below -87. On the host 2^n exp(r) with |r| <= ln(2)/2 and a polynomial that was fitted to
// exp on that interval (largest relative error 3e-9, so what is left is the rounding: at most 1 ulp).
template <typename F>
MM_BOTH F exp_nonpositive(F x) {
  if constexpr (std::is_same_v<F, double>) {
    return exp(x);
  } else {
#ifdef __CUDA_ARCH__
    return __expf(x);
#else
    using Bits = std::conditional_t<std::is_same_v<F, float>, int32_t, decltype(x < x)>;  // of a vector: int32 each
    constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23: a sum with it is rounded to an integer, in its lowest bits
    const F shifted = x * 1.44269504f + kToInteger;
    const F n = shifted - kToInteger;
    const F r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln(2) in two parts, the first of few bits
    F p = r * 0.00138145395f + 0.00836874545f;
    p = p * r + 0.0416683890f;
    p = p * r + 0.166665211f;
    p = p * r + 0.499999940f;
    p = (p * r) * r + r + 1.0f;
    Bits bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 23) + 0x3f800000;
    F power;
    std::memcpy(&power, &bits, sizeof power);
    return x < F{} - 87.0f ? F{} : p * power;  // below, p * power means nothing
#endif
  }
}

// P(X > a) exp(a^2 / 2) for a standard normal X and a >= 0. Of floats a polynomial in (a - 3) / (a + 3), divided by a + 3:
// fitted on [0, 13.3], largest relative error 4e-8; beyond, exp(-a^2 / 2) is 0.
template <typename F>
MM_BOTH F scaled_tail(F a) {
  if constexpr (std::is_same_v<F, double>) {
    return 0.5 * erfc(a * 0.70710678118654752) * exp(0.5 * a * a);
  } else {
    const F bounded = a > F{} + 14.0f ? F{} + 14.0f : a;
    const F inverse = divide(F{} + 1.0f, bounded + 3.0f);
    const F u = (bounded - 3.0f) * inverse;
    F p = u * -0.000272204023f - 0.000911420502f;
    p = p * u + 0.00107748446f;
    p = p * u + 0.00692950003f;
    p = p * u - 0.0104795191f;
    p = p * u - 0.0472572222f;
    p = p * u + 0.230019256f;
    p = p * u - 0.509332240f;
    p = p * u + 0.729083657f;
    return p * inverse;
  }
}

template <typename F>
struct Gate {
  F value, slope;
};

// swiglu: x sigmoid(x). geglu: x P(X <= x), the exact form of gelu. From exp(-|x|) and exp(-x^2 / 2), which cannot
// overflow.
template <Glu kind, typename F>
MM_BOTH Gate<F> gate(F x) {
  const F size = x < F{} ? -x : x;
  if constexpr (kind == Glu::swiglu) {
    const F small = exp_nonpositive<F>(-size);
    const F sigmoid = divide<F>(x < F{} ? small : F{} + 1, small + 1);
    const F value = x * sigmoid;
    return {value, sigmoid + value * (1 - sigmoid)};
  } else {
    using Number = std::conditional_t<std::is_same_v<F, double>, double, float>;
    const F density = exp_nonpositive<F>(x * x * Number(-0.5));
    const F tail = density * scaled_tail<F>(size);
    const F below = x < F{} ? tail : 1 - tail;
    return {x * below, below + x * density * Number(0.3989422804014327)};
  }
}

}  // namespace mm
