// 64 bytes at once, in one register of AVX-512 or in two of AVX2: what weights are expanded with.
#pragma once
#include "numbers.h"

namespace {

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define LT_BYTES
typedef __m512i Bytes;

inline Bytes load64(const void* at) { return _mm512_loadu_si512(at); }
inline void store64(void* to, Bytes x) { _mm512_storeu_si512(to, x); }
inline Bytes halves(__m256i a, __m256i b) { return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1); }
inline Bytes same(__m128i x) { return _mm512_broadcast_i32x4(x); }
inline Bytes and64(Bytes x, int8_t y) { return _mm512_and_si512(x, _mm512_set1_epi8(y)); }
inline Bytes xor64(Bytes x, int8_t y) { return _mm512_xor_si512(x, _mm512_set1_epi8(y)); }
inline Bytes or64(Bytes x, Bytes y) { return _mm512_or_si512(x, y); }
inline Bytes less(Bytes x, int8_t y) { return _mm512_sub_epi8(x, _mm512_set1_epi8(y)); }
inline Bytes bits_down(Bytes x) { return _mm512_srli_epi16(x, 4); }  // by four, in pairs of bytes
inline Bytes bits_up(Bytes x) { return _mm512_slli_epi16(x, 4); }
inline Bytes at_least(Bytes x, int8_t y) { return _mm512_max_epi8(x, _mm512_set1_epi8(y)); }
inline Bytes look_up(Bytes tables, Bytes codes) { return _mm512_shuffle_epi8(tables, codes); }  // in lanes of 16
inline Bytes first_of(Bytes x, int64_t count) { return _mm512_maskz_mov_epi8((uint64_t(1) << count) - 1, x); }

// The 16 values that a 4-bit code stands for, (code * step + start) in int8.
inline __m128i sixteen(float step, float start) {
  const __m512 codes = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  __m512i q = _mm512_cvtps_epi32(_mm512_fmadd_ps(codes, _mm512_set1_ps(step), _mm512_set1_ps(start)));
  return _mm512_cvtsepi32_epi8(q);
}

// 64 signed bytes, 16 in a row times a number of 15 bits each.
inline Bytes times(Bytes q, const int16_t* f, int shift) {
  __m256i low = _mm512_castsi512_si256(q), high = _mm512_extracti64x4_epi64(q, 1);
  auto pair = [&](int i) { return halves(_mm256_set1_epi16(f[i]), _mm256_set1_epi16(f[i + 1])); };
  __m512i a = _mm512_slli_epi16(_mm512_cvtepi8_epi16(low), shift), b = _mm512_slli_epi16(_mm512_cvtepi8_epi16(high), shift);
  a = _mm512_mulhrs_epi16(a, pair(0)), b = _mm512_mulhrs_epi16(b, pair(2));
  return halves(_mm512_cvtsepi16_epi8(a), _mm512_cvtsepi16_epi8(b));
}

// 16 rows of 64 bytes -> 16 columns of 4 bytes: out[j] holds bytes 4j..4j+3 of every row.
inline void turn_around(__m512i v[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]), v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]), v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88), t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88), t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; i++) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

#elif defined(__AVX2__)
#define LT_BYTES
struct Bytes {
  __m256i a, b;
};

inline Bytes load64(const void* at) {
  const __m256i* from = static_cast<const __m256i*>(at);
  return {_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)};
}
inline void store64(void* to, Bytes x) {
  __m256i* at = static_cast<__m256i*>(to);
  _mm256_storeu_si256(at, x.a), _mm256_storeu_si256(at + 1, x.b);
}
inline Bytes halves(__m256i a, __m256i b) { return {a, b}; }
inline Bytes same(__m128i x) { return {_mm256_broadcastsi128_si256(x), _mm256_broadcastsi128_si256(x)}; }
template <class F> inline Bytes each(Bytes x, F f) { return {f(x.a), f(x.b)}; }
inline Bytes and64(Bytes x, int8_t y) {
  return each(x, [y](__m256i v) { return _mm256_and_si256(v, _mm256_set1_epi8(y)); });
}
inline Bytes xor64(Bytes x, int8_t y) {
  return each(x, [y](__m256i v) { return _mm256_xor_si256(v, _mm256_set1_epi8(y)); });
}
inline Bytes or64(Bytes x, Bytes y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
inline Bytes less(Bytes x, int8_t y) {
  return each(x, [y](__m256i v) { return _mm256_sub_epi8(v, _mm256_set1_epi8(y)); });
}
inline Bytes bits_down(Bytes x) {
  return each(x, [](__m256i v) { return _mm256_srli_epi16(v, 4); });
}
inline Bytes bits_up(Bytes x) {
  return each(x, [](__m256i v) { return _mm256_slli_epi16(v, 4); });
}
inline Bytes at_least(Bytes x, int8_t y) {
  return each(x, [y](__m256i v) { return _mm256_max_epi8(v, _mm256_set1_epi8(y)); });
}
inline Bytes look_up(Bytes tables, Bytes codes) {
  return {_mm256_shuffle_epi8(tables.a, codes.a), _mm256_shuffle_epi8(tables.b, codes.b)};
}
inline Bytes first_of(Bytes x, int64_t count) {
  alignas(64) int8_t all[64] = {}, some[64] = {};
  store64(all, x);
  memcpy(some, all, count);
  return load64(some);
}

inline __m128i sixteen(float step, float start) {
  const __m256 low = _mm256_set_ps(7, 6, 5, 4, 3, 2, 1, 0), high = _mm256_set_ps(15, 14, 13, 12, 11, 10, 9, 8);
  __m256 by = _mm256_set1_ps(step), from = _mm256_set1_ps(start);
  __m256i a = _mm256_cvtps_epi32(_mm256_fmadd_ps(low, by, from)), b = _mm256_cvtps_epi32(_mm256_fmadd_ps(high, by, from));
  __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
  return _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

inline Bytes times(Bytes q, const int16_t* f, int shift) {
  auto one = [&](__m128i x, int i) {
    return _mm256_mulhrs_epi16(_mm256_slli_epi16(_mm256_cvtepi8_epi16(x), shift), _mm256_set1_epi16(f[i]));
  };
  auto two = [&](__m256i x, int i) {
    __m256i a = one(_mm256_castsi256_si128(x), i), b = one(_mm256_extracti128_si256(x, 1), i + 1);
    return _mm256_permute4x64_epi64(_mm256_packs_epi16(a, b), 0xd8);
  };
  return {two(q.a, 0), two(q.b, 2)};
}
#endif

#if defined(__AVX2__)
// Eight rows of eight numbers of 32 bits: columns become rows, `step` numbers apart.
inline void turn_eight(const __m256* v, float* to, int64_t step) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0x44);
      b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0xee);
    }
  for (int i = 0; i < 4; i++) {
    _mm256_storeu_ps(to + i * step, _mm256_permute2f128_ps(b[i], b[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * step, _mm256_permute2f128_ps(b[i], b[i + 4], 0x31));
  }
}
#endif

}  // namespace
