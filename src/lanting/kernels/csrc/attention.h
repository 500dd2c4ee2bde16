// Attention in one pass: scores of a few queries with a block of keys, their softmax so far, their share of the values.
//
// Keys and values are first laid out for the micro-kernel, once per head; then queries are shared out over threads.
// Products are bfloat16 with float32 sums where the processor has them and the input is bfloat16, else float32.
#pragma once
#include "amx.h"

namespace {

constexpr int64_t KEYS = 512;  // scored at once

// Float32, in vectors of the processor's width.
struct Wide {
#if defined(__AVX512F__)
  static constexpr int lanes = 16, rows = 12;
#elif defined(__AVX2__)
  static constexpr int lanes = 8, rows = 6;
#else
  static constexpr int lanes = 4, rows = 4;
#endif
  static constexpr int tile = 2 * lanes, pair = 1;
  using Element = float;
  struct Shapes {};  // what `micro` needs while it is used
  typedef float Vector __attribute__((vector_size(lanes * 4), aligned(4)));

  // acc (rows, tile) = or += a (rows, n), `stride` apart, times w (n, tile)
  template <bool fresh> static inline void micro(const float* a, int64_t stride, const float* w, int64_t n, float* acc, int64_t to) {
    multiply_floats<rows>(a, stride, w, n, acc, to, fresh);
  }

  // to = 2^(s * scale - most); returns their sum
  static inline float shares(const float* s, float* to, int64_t n, float scale, float most) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; j++) {
      float e = exp2_of(s[j] * scale - most);
      sum += e;
      to[j] = e;
    }
    return sum;
  }
};

#if defined(__AVX512BF16__)
struct Brain {
  static constexpr int lanes = 16, tile = 32, pair = 2;
  using Element = uint16_t;
#if defined(LT_AMX)
  static constexpr int rows = 32;
  using Shapes = ::Shapes;

  template <bool fresh> static inline void micro(const uint16_t* a, int64_t stride, const uint16_t* w, int64_t n, float* acc, int64_t to) {
    multiply_tiles<true>(a, 2 * stride, 64, w, n / 32, acc, 4 * to, fresh, true);
  }
#else
  static constexpr int rows = 14;
  struct Shapes {};

  template <bool fresh> static inline void micro(const uint16_t* a, int64_t stride, const uint16_t* w, int64_t n, float* acc, int64_t to) {
    multiply_pairs<rows>(a, stride, 2, w, n / 2, acc, to, fresh);
  }
#endif

  static inline __m512 exp2_near(__m512 x) {  // within 4e-6, far finer than the bfloat16 that becomes of it; x <= 0
    x = _mm512_max_ps(_mm512_set1_ps(-126.f), x);  // in this order NaN stays
    const __m512 magic = _mm512_set1_ps(12582912.f);  // as `nearest`; other units than scalef's are free
    __m512 moved = _mm512_add_ps(x, magic), r = _mm512_sub_ps(x, _mm512_sub_ps(moved, magic));
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(9.6181291e-3f), r, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9314718e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f));
    __m512i whole = _mm512_slli_epi32(_mm512_castps_si512(moved), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), whole));
  }

  static inline float shares(const float* s, uint16_t* to, int64_t n, float scale, float most) {
    const __m512 per = _mm512_set1_ps(scale), high = _mm512_set1_ps(most);
    __m512 sum = _mm512_setzero_ps();
    int64_t j = 0;
    auto some = [&](int64_t at, __mmask16 there) {
      return _mm512_maskz_mov_ps(there, exp2_near(_mm512_fmsub_ps(_mm512_loadu_ps(s + at), per, high)));
    };
    for (; j + 32 <= n; j += 32) {
      __m512 e = some(j, 0xffff), f = some(j + 16, 0xffff);
      sum = _mm512_add_ps(sum, _mm512_add_ps(e, f));
      _mm512_storeu_si512(to + j, (__m512i)_mm512_cvtne2ps_pbh(f, e));
    }
    for (; j < n; j += 16) {
      __m512 e = some(j, n - j >= 16 ? 0xffff : (1 << (n - j)) - 1);
      sum = _mm512_add_ps(sum, e);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + j), (__m256i)_mm512_cvtneps_pbh(e));
    }
    return _mm512_reduce_add_ps(sum);
  }

  // 16 keys of 32 numbers each, at the same place of each row, as (16, tile, pair).
  static inline void lay_keys(const uint16_t* const* rows, int64_t from, uint16_t* to) {
    __m512i v[16];
    for (int i = 0; i < 16; i++) v[i] = rows[i] ? _mm512_loadu_si512(rows[i] + from) : _mm512_setzero_si512();
    turn_around(v);
    for (int j = 0; j < 16; j++) _mm512_storeu_si512(to + j * 64, v[j]);
  }

  // 32 numbers of two values, one beside the other.
  static inline void lay_values(const uint16_t* a, const uint16_t* b, int64_t from, uint16_t* to) {
    const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                           5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    __m512i x = a ? _mm512_loadu_si512(a + from) : _mm512_setzero_si512();
    __m512i y = b ? _mm512_loadu_si512(b + from) : _mm512_setzero_si512();
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(x, first, y));
    _mm512_storeu_si512(to + 32, _mm512_permutex2var_epi16(x, _mm512_add_epi16(first, _mm512_set1_epi16(16)), y));
  }
};
#endif

inline float get(const void* at, int64_t i, int32_t type) {
  return type == BFLOAT16 ? wide(static_cast<const uint16_t*>(at)[i]) : static_cast<const float*>(at)[i];
}

template <class T> struct Flash {
  using E = typename T::Element;
  const Attention& a;
  int64_t most, width, stride;  // keys of a head, rounded up; between tokens
  E *keys, *values;             // (items, heads, most, width) each, laid out
  int64_t* count;               // (items) keys that are not masked
  static constexpr int64_t gap = KEYS + 64 / sizeof(E);  // between rows of scores: whole lines, not a power of two

  // Keys as (most / tile, width / pair, tile, pair); values as (blocks, width / tile, keys / pair, tile, pair).
  void lay(int64_t item, int64_t head) const {
    E *k = keys + (item * a.heads + head) * most * width, *v = values + (item * a.heads + head) * most * width;
    const uint8_t* mask = a.mask ? a.mask + item * a.masked : nullptr;
    int64_t token = 0, from[16];
    constexpr int count = T::tile < 16 ? T::tile : 16;
    for (int64_t n = 0; n < most; n += count) {
      for (int i = 0; i < count; i++, token++) {
        while (mask && token < a.masked && !mask[token]) token++;
        from[i] = token < a.keys ? (item * a.keys + token) * stride + head * width : -1;
      }
      lay_some(k, v, n, from, count);
    }
  }

  void lay_some(E* k, E* v, int64_t n, const int64_t* from, int count) const {
    if constexpr (T::pair == 2) {
      const E *rows_k[16], *rows_v[16];
      for (int i = 0; i < 16; i++) {
        rows_k[i] = from[i] < 0 ? nullptr : static_cast<const E*>(a.k) + from[i];
        rows_v[i] = from[i] < 0 ? nullptr : static_cast<const E*>(a.v) + from[i];
      }
      for (int64_t j = 0; j < width; j += 32)
        T::lay_keys(rows_k, j, k + n / T::tile * T::tile * width + j * T::tile + n % T::tile * T::pair);
      int64_t block = n / KEYS, in_block = smaller(KEYS, most - block * KEYS), at = n - block * KEYS;
      for (int64_t t = 0; t < width / T::tile; t++)
        for (int i = 0; i < 16; i += 2)
          T::lay_values(rows_v[i], rows_v[i + 1], t * T::tile,
                        v + block * KEYS * width + t * in_block * T::tile + (at + i) * T::tile);
    } else {
      for (int i = 0; i < count; i++) place_key(k, n + i, from[i]), place_value(v, n + i, from[i]);
    }
  }

  void place_key(E* k, int64_t n, int64_t from) const {
    E* to = k + n / T::tile * T::tile * width + n % T::tile;
    for (int64_t j = 0; j < width; j++) to[j * T::tile] = from < 0 ? 0 : get(a.k, from + j, a.type);
  }

  void place_value(E* v, int64_t n, int64_t from) const {
    int64_t block = n / KEYS, in_block = smaller(KEYS, most - block * KEYS), at = n - block * KEYS;
    for (int64_t t = 0; t < width / T::tile; t++) {
      E* to = v + block * KEYS * width + t * in_block * T::tile + at * T::tile;
      for (int j = 0; j < T::tile; j++) to[j] = from < 0 ? 0 : get(a.v, from + t * T::tile + j, a.type);
    }
  }

  // The largest score of a row, with what it was so far.
  static float highest(const float* s, int64_t valid, float scale, float high) {
    float most = s[0];
#pragma omp simd reduction(max : most)
    for (int64_t j = 0; j < valid; j++) most = larger(most, s[j]);
    return larger(most * scale, high);
  }

  // Softmax of new scores of all rows: shares, and the largest scores and sums so far kept up; what there is in `out` is
  // made less by as much. Row by row each step waits for the one before, so all rows take a step together.
  void soften(const float* scores, E* shares, int64_t valid, int64_t n, bool first, float* high, float* sum, float* out) const {
    constexpr int R = T::rows;
    float scale = LOG2E / __builtin_sqrtf(float(width)), most[R];
    for (int r = 0; r < R; r++) most[r] = highest(scores + r * gap, valid, scale, high[r]);
    for (int r = 0; r < R; r++) {
      float fresh = T::shares(scores + r * gap, shares + r * gap, valid, scale, most[r]);
      for (int64_t j = valid; j < n; j++) shares[r * gap + j] = E(0);
      float shrink = first ? 0 : exp2_of(high[r] - most[r]);
      sum[r] = first ? fresh : sum[r] * shrink + fresh, high[r] = most[r];
      if (!first && shrink != 1)
        for (int64_t j = 0; j < width; j++) out[r * width + j] *= shrink;
    }
  }

  void answer(int64_t item, int64_t head, int64_t first) const {
    constexpr int R = T::rows;
    [[maybe_unused]] typename T::Shapes shapes;
    const E *k = keys + (item * a.heads + head) * most * width, *v = values + (item * a.heads + head) * most * width;
    E* q = static_cast<E*>(lt::scratch(2, R * width * sizeof(E)));
    float* scores = static_cast<float*>(lt::scratch(3, R * gap * 4));
    E* shares = static_cast<E*>(lt::scratch(4, R * gap * sizeof(E)));
    float* out = static_cast<float*>(lt::scratch(5, R * width * 4));
    float high[R], sum[R];
    for (int r = 0; r < R; r++) {
      int64_t from = (item * a.tokens + smaller(first + r, a.tokens - 1)) * stride + head * width;
      if constexpr (T::pair == 2) memcpy(q + r * width, static_cast<const E*>(a.q) + from, width * sizeof(E));
      else
        for (int64_t j = 0; j < width; j++) q[r * width + j] = get(a.q, from + j, a.type);
      high[r] = -1e30f, sum[r] = 0;
    }
    if (!count[item]) memset(out, 0, R * width * 4);
    for (int64_t begin = 0; begin < count[item]; begin += KEYS) {
      int64_t n = smaller(KEYS, most - begin), valid = smaller(n, count[item] - begin);
      for (int64_t t = 0; t < n; t += T::tile)
        T::template micro<true>(q, width, k + (begin + t) * width, width, scores + t, gap);
      soften(scores, shares, valid, n, begin == 0, high, sum, out);
      for (int64_t t = 0; t < width / T::tile; t++) {
        const E* part = v + begin * width + t * n * T::tile;
        if (begin) T::template micro<false>(shares, gap, part, n, out + t * T::tile, width);
        else T::template micro<true>(shares, gap, part, n, out + t * T::tile, width);
      }
    }
    for (int64_t r = 0; r < smaller(R, a.tokens - first); r++) {
      for (int64_t j = 0; j < width; j++) out[r * width + j] /= sum[r];
      Matrix to{a.out, a.items * a.tokens, width, stride, INT64_MAX, 0, a.type};
      to.data = static_cast<char*>(a.out) + head * width * (a.type == BFLOAT16 ? 2 : 4);
      store(to, item * a.tokens + first + r, out + r * width);
    }
  }

  void all() const {
    lt::parallel(a.items * a.heads, [&](int64_t i) { lay(i / a.heads, i % a.heads); });
    int64_t parts = (a.tokens + T::rows - 1) / T::rows;
    lt::parallel(a.items * a.heads * parts, [&](int64_t i) {
      int64_t head = i / parts;
      answer(head / a.heads, head % a.heads, i % parts * T::rows);
    });
  }
};

template <class T> void flash(const Attention& a) {
  using E = typename T::Element;
  int64_t most = (a.keys + T::tile - 1) / T::tile * T::tile;
  int64_t each = a.items * a.heads * most * a.width * int64_t(sizeof(E));
  char* room = static_cast<char*>(lt::scratch(6, 2 * ((each + 63) / 64 * 64)));
  int64_t* count = static_cast<int64_t*>(lt::scratch(7, a.items * 8));
  for (int64_t i = 0; i < a.items; i++) {
    count[i] = a.keys;
    for (int64_t t = 0; a.mask && t < a.masked; t++) count[i] -= !a.mask[i * a.masked + t];
  }
  Flash<T> pass{a, most, a.width, a.heads * a.width, reinterpret_cast<E*>(room),
                reinterpret_cast<E*>(room + (each + 63) / 64 * 64), count};
  pass.all();
}

void attend(const Attention& a) {
#if defined(__AVX512BF16__)
  if (a.type == BFLOAT16) return flash<Brain>(a);
#endif
  flash<Wide>(a);
}

}  // namespace
