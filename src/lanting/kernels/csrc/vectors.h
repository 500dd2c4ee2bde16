// Vectors of float32, as wide as the processor's, in memory also as bfloat16.
#pragma once
#include "numbers.h"

namespace {
namespace vec {

#if defined(__AVX512F__)
constexpr int lanes = 16;
#elif defined(__AVX2__)
constexpr int lanes = 8;
#else
constexpr int lanes = 4;
#endif
typedef float Vector __attribute__((vector_size(lanes * 4), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(lanes * 4), aligned(4), may_alias));
typedef uint16_t Brains __attribute__((vector_size(lanes * 2), aligned(2), may_alias));

inline Vector vector_at(const float* at) { return *reinterpret_cast<const Vector*>(at); }

inline Vector vector_at(const uint16_t* at) {
  return (Vector)(__builtin_convertvector(*reinterpret_cast<const Brains*>(at), Bits) << 16);
}

inline void put(float* to, Vector x) { *reinterpret_cast<Vector*>(to) = x; }

inline void put(uint16_t* to, Vector x) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
  Bits bits = (Bits)x;
  *reinterpret_cast<Brains*>(to) = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, Brains);
#endif
}

inline float one_at(const float* at) { return *at; }
inline float one_at(const uint16_t* at) { return wide(*at); }
inline void put_one(float* to, float x) { *to = x; }
inline void put_one(uint16_t* to, float x) { *to = narrow(x); }

// Integers less one of them.
inline Vector from_integers(const int32_t* at, int32_t less) {
  typedef int32_t Integers __attribute__((vector_size(lanes * 4), aligned(4), may_alias));
  return __builtin_convertvector(*reinterpret_cast<const Integers*>(at) - less, Vector);
}

inline float sum_of(Vector x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float sum = 0;
  for (int i = 0; i < lanes; i++) sum += x[i];
  return sum;
#endif
}

// Neighbours change places.
inline Vector swapped(Vector x) {
  typedef uint64_t Pairs __attribute__((vector_size(lanes * 4), aligned(4), may_alias));
  return (Vector)((Pairs)x << 32 | (Pairs)x >> 32);
}

// The sum of what `each` makes of numbers.
template <class F> inline float total(const float* x, int64_t count, F each) {
  Vector sums[4] = {};
  int64_t j = 0;
  for (; j + 4 * lanes <= count; j += 4 * lanes)
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) sums[i] += each(vector_at(x + j + i * lanes));
  for (; j + lanes <= count; j += lanes) sums[0] += each(vector_at(x + j));
  float sum = sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; j < count; j++) sum += each(Vector{} + x[j])[0];
  return sum;
}

// x, or `low` where it is less.
inline Vector least(Vector x, float low) {
  Bits below = (Bits)(x < low);
  return (Vector)(((Bits)x & ~below) | (as_bits(low) & below));
}

// 1 / (1 + 2^x), as in `gelu` and `silu` of numbers.h. `near`: within 4e-6, far finer than the bfloat16 it becomes.
template <bool near = false> inline Vector share_of(Vector x) {
  constexpr float rest[] = {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.f};
  constexpr int skipped = near ? 2 : 0;
  Vector p = Vector{} + (near ? rest[1] : 1.5403530e-4f);
#if defined(__AVX512F__)
  const __m512 most = _mm512_set1_ps(126.f);  // beyond, reciprocals fail
  __m512 e = _mm512_max_ps(-most, _mm512_min_ps(most, (__m512)x)), whole = _mm512_roundscale_ps(e, 0);
#pragma GCC unroll 6
  for (int i = skipped; i < 6; i++) p = p * (Vector)(e - whole) + rest[i];
  __m512 sum = _mm512_scalef_ps((__m512)p, whole) + _mm512_set1_ps(1.f), per = _mm512_rcp14_ps(sum);
  return (Vector)(per * (_mm512_set1_ps(2.f) - sum * per));
#else
  Vector e = least(-least(-x, -126.f), -126.f), moved = e + 12582912.f, r = e - (moved - 12582912.f);
  for (int i = skipped; i < 6; i++) p = p * r + rest[i];
  return 1.f / (1.f + p * (Vector)(((Bits)moved - (0x4b400000u - 127)) << 23));
#endif
}

inline Vector silu_of(Vector x) { return x * share_of(x * -LOG2E); }

template <bool near> inline Vector gelu_of(Vector x) {
  constexpr float per = -2 * LOG2E * 0.7978845608f;
  return x * share_of<near>(x * (per + per * 0.044715f * (x * x)));
}

}  // namespace vec
}  // namespace
