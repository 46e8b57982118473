// GELU with erf, and its derivative, for the instruction set of this compilation.
#pragma once

#include "vec.h"

namespace dsnet::cpu::DSNET_CPU_ARCH {

// GELU(u) = u·Φ(u) = u / 2 + |u|·(Φ(|u|) − 1/2), and its slope is 1/2 ± (Φ(a) − 1/2 + a·φ(a)) at
// a = |u|. What is in parentheses are polynomials on intervals of a, and 1/2 behind the last.

#if defined(__AVX2__)

// Chebyshev interpolants of degree 5 on a = (i + t) / 2.5 with |t| ≤ 1/2, i = 0 … 15; the
// coefficients of the highest power of t first. Their errors are at most one unit in the last place
// of 1/2 for Φ, two for the slope.
constexpr float intervals_per_unit = 2.5f, last_position = 15.49f;
alignas(64) constexpr float half_phi[6][16] = {
    {0.000101282385f, 6.44861357e-05f, -1.03158936e-05f, -5.85012058e-05f, -5.46646552e-05f,
        -2.31192516e-05f, 2.89352943e-06f, 1.16550027e-05f, 9.42491806e-06f, 4.88603564e-06f,
        1.87975297e-06f, 5.65755727e-07f, 1.36722292e-07f, 2.69335345e-08f, 4.36725145e-09f,
        5.86778903e-10f},
    {0.0f, 0.000442049262f, 0.000578964711f, 0.000386419328f, 8.48126583e-05f, -0.000113115719f,
        -0.000157149887f, -0.000114326525f, -5.91988428e-05f, -2.36534397e-05f, -7.55015935e-06f,
        -1.96134988e-06f, -4.19358855e-07f, -7.43500834e-08f, -1.09877245e-08f, -1.35870482e-09f},
    {-0.0042552785f, -0.00329964724f, -0.00111245597f, 0.000911305484f, 0.00184568588f,
        0.0017277213f, 0.00113706966f, 0.00057752576f, 0.000234978041f, 7.80599439e-05f,
        2.14105548e-05f, 4.88362593e-06f, 9.30899716e-07f, 1.48811651e-07f, 2.00022718e-08f,
        2.26515784e-09f},
    {0.0f, -0.0117842518f, -0.0185398441f, -0.0186417364f, -0.0141980089f, -0.00863874797f,
        -0.00429985113f, -0.00177307019f, -0.000610300223f, -0.000176204296f, -4.28137537e-05f,
        -8.77541152e-06f, -1.51992492e-06f, -2.22749364e-07f, -2.76496799e-08f, -2.90929969e-09f},
    {0.159576908f, 0.147308052f, 0.115876622f, 0.0776744261f, 0.0443683341f, 0.021596387f,
        0.00895781163f, 0.0031661801f, 0.000953635201f, 0.000244760857f, 5.35321633e-05f,
        9.97702318e-06f, 1.58453133e-06f, 2.14444427e-07f, 2.47310936e-08f, 2.43045228e-09f},
    {0.0f, 0.155421734f, 0.288144588f, 0.384930342f, 0.445200711f, 0.477249861f, 0.491802454f,
        0.497444868f, 0.499312848f, 0.499840885f, 0.49996832f, 0.499994576f, 0.499999195f,
        0.499999911f, 0.5f, 0.5f},
};
alignas(64) constexpr float half_slope[6][16] = {
    {0.000606009096f, 0.000319300045f, -0.000202582611f, -0.000413836242f, -0.000231075435f,
        2.56625935e-05f, 0.000120784374f, 8.07392207e-05f, 2.06924014e-05f, -6.64744721e-06f,
        -9.05613706e-06f, -4.76284276e-06f, -1.674597e-06f, -4.40208368e-07f, -9.05159823e-08f,
        -1.49073482e-08f},
    {0.0f, 0.00252390606f, 0.00278347405f, 0.00105369068f, -0.000665043248f, -0.00113985513f,
        -0.000697961426f, -0.000164316414f, 8.02933719e-05f, 0.000101277888f, 5.6164572e-05f,
        2.1314534e-05f, 6.11665291e-06f, 1.38322116e-06f, 2.51930459e-07f, 3.7448288e-08f},
    {-0.017020693f, -0.0114134876f, 0.000217065768f, 0.00829796121f, 0.00871551782f, 0.00460747629f,
        0.000750825449f, -0.000893742021f, -0.000945486594f, -0.000530293153f, -0.000211280494f,
        -6.47255511e-05f, -1.57818922e-05f, -3.12050497e-06f, -5.06123399e-07f, -6.78542804e-08f},
    {0.0f, -0.0452500507f, -0.0622927323f, -0.0477232933f, -0.0204465799f, -1.11968063e-06f,
        0.0075675156f, 0.00680894405f, 0.00380870537f, 0.00157906685f, 0.000513888896f,
        0.000134832531f, 2.89507207e-05f, 5.13460145e-06f, 7.56928614e-07f, 9.31605157e-08f},
    {0.319153786f, 0.271046817f, 0.157592222f, 0.0434976928f, -0.0248462651f, -0.0431927815f,
        -0.0336813778f, -0.0184904952f, -0.0078579532f, -0.00268257712f, -0.000749449013f,
        -0.000173200591f, -3.33383723e-05f, -5.36964671e-06f, -7.26096687e-07f, -8.26340738e-08f},
    {0.0f, 0.302729756f, 0.519897819f, 0.617953598f, 0.622674048f, 0.585231841f, 0.545549333f,
        0.51960814f, 0.506941915f, 0.502043724f, 0.500503659f, 0.500104308f, 0.500018239f,
        0.500002682f, 0.500000358f, 0.50000006f},
};

// Where a lies: the interval, as the lowest bits of a word, and t.
struct Position {
  VecF32 interval, t;
};

inline Position position_of(VecF32 a) {
  // Adding it rounds to a whole number in the lowest bits. A NaN stays one in t.
  const VecF32 whole = VecF32::fill(12582912.0f);
  const VecF32 scaled = least(VecF32::fill(last_position), a * VecF32::fill(intervals_per_unit));
  const VecF32 interval = scaled + whole;
  return {interval, scaled - (interval - whole)};
}

inline VecF32 polynomial(const float (&coefficients)[6][16], Position at) {
  VecF32 sum = lookup(coefficients[0], at.interval);
#pragma GCC unroll 5
  for (int k = 1; k < 6; ++k) sum = fma(sum, at.t, lookup(coefficients[k], at.interval));
  return sum;
}

inline VecF32 gelu(VecF32 u) {
  const VecF32 a = magnitude(u);
  return fma(a, polynomial(half_phi, position_of(a)), VecF32::fill(0.5f) * u);
}

// GELU(u), and in `slope` its derivative.
inline VecF32 gelu(VecF32 u, VecF32& slope) {
  const VecF32 a = magnitude(u);
  const Position at = position_of(a);
  slope = VecF32::fill(0.5f) + with_sign_of(polynomial(half_slope, at), u);
  return fma(a, polynomial(half_phi, at), VecF32::fill(0.5f) * u);
}

#endif

template <typename A>
inline VecGeneric<A> gelu(VecGeneric<A> u, VecGeneric<A>& slope) {
  constexpr A root_half = static_cast<A>(0.707106781186547524401);
  constexpr A density_at_0 = static_cast<A>(0.398942280401432677940);
  for (int i = 0; i < VecGeneric<A>::size; ++i) {
    const A x = u.v[i], probability = (1 + error_function(x * root_half)) / 2;
    slope.v[i] = probability + x * density_at_0 * exponential(-x * x / 2);
    u.v[i] = x * probability;
  }
  return u;
}

template <typename A>
inline VecGeneric<A> gelu(VecGeneric<A> u) {
  constexpr A root_half = static_cast<A>(0.707106781186547524401);
  for (int i = 0; i < VecGeneric<A>::size; ++i) {
    u.v[i] *= (1 + error_function(u.v[i] * root_half)) / 2;
  }
  return u;
}

}  // namespace dsnet::cpu::DSNET_CPU_ARCH
