// Products of int8 rows with packed weights: C = rows * scale * (W * bound / 127)^T + bias.
//
// 32 rows of a weight are expanded into a tile that stays in L2 and meets all rows of the activations, so that the cost
// of expanding is shared by hundreds of rows. Every number of the result is made by one thread: how many there are
// changes nothing.
#pragma once
#include "pool.h"
#include "sets.h"
#include "vectors.h"

namespace {

inline int64_t padded(int64_t columns) { return (columns + CHUNK - 1) / CHUNK * CHUNK; }

#if defined(LT_VNNI)
// sum += products of four unsigned bytes with four signed ones
inline __m256i dot4(__m256i sum, __m256i u, __m256i s) {
#if defined(__AVXVNNI__)
  return _mm256_dpbusd_avx_epi32(sum, u, s);
#else
  __m256i even = _mm256_madd_epi16(_mm256_and_si256(u, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8));
  __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(u, 8), _mm256_srai_epi16(s, 8));
  return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
#endif
}
#endif

#if !defined(LT_AMX) && !defined(LT_SHORTS)
// acc (R, 32) = the first R rows of A (K4, PANEL, 4), or of rows `stride` apart, times W (K4, 2, 16, 4)
template <int R, bool in_rows>
void micro(const int8_t* a, [[maybe_unused]] int64_t stride, const int8_t* w, int64_t k4, int32_t* out) {
#if defined(__AVX512VNNI__)
  __m512i acc[R][2];
#pragma GCC unroll 14
  for (int r = 0; r < R; r++) acc[r][0] = acc[r][1] = _mm512_setzero_si512();
  const int64_t row = in_rows ? stride : 4, step = in_rows ? 4 : 4 * PANEL;
  for (int64_t k = 0; k < k4; k++, w += 128, a += step) {
    __m512i w0 = _mm512_load_si512(w), w1 = _mm512_load_si512(w + 64);
#pragma GCC unroll 14
    for (int r = 0; r < R; r++) {
      int32_t four;
      memcpy(&four, a + r * row, 4);
      __m512i x = _mm512_set1_epi32(four);
      acc[r][0] = _mm512_dpbusd_epi32(acc[r][0], w0, x);
      acc[r][1] = _mm512_dpbusd_epi32(acc[r][1], w1, x);
    }
  }
#pragma GCC unroll 14
  for (int r = 0; r < R; r++) {
    _mm512_store_si512(out + r * TILE, acc[r][0]);
    _mm512_store_si512(out + r * TILE + 16, acc[r][1]);
  }
#elif defined(LT_VNNI)
  for (int side = 0; side < 2; side++) {
    __m256i acc[R][2];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
    const int8_t *from = w + side * 64, *rows = a;
    for (int64_t k = 0; k < k4; k++, from += 128, rows += 4 * PANEL) {
      __m256i w0 = _mm256_load_si256(reinterpret_cast<const __m256i*>(from));
      __m256i w1 = _mm256_load_si256(reinterpret_cast<const __m256i*>(from + 32));
#pragma GCC unroll 6
      for (int r = 0; r < R; r++) {
        int32_t four;
        memcpy(&four, rows + 4 * r, 4);
        __m256i x = _mm256_set1_epi32(four);
        acc[r][0] = dot4(acc[r][0], w0, x);
        acc[r][1] = dot4(acc[r][1], w1, x);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(out + r * TILE + side * 16), acc[r][0]);
      _mm256_store_si256(reinterpret_cast<__m256i*>(out + r * TILE + side * 16 + 8), acc[r][1]);
    }
  }
#elif defined(__ARM_FEATURE_DOTPROD)
  for (int side = 0; side < 2; side++) {
    int32x4_t acc[R][4];
    for (int r = 0; r < R; r++)
      for (int i = 0; i < 4; i++) acc[r][i] = vdupq_n_s32(0);
    const int8_t *from = w + side * 64, *rows = a;
    for (int64_t k = 0; k < k4; k++, from += 128, rows += 4 * PANEL) {
      int8x16_t x = vld1q_s8(rows);
      for (int i = 0; i < 4; i++) {
        int8x16_t y = vld1q_s8(from + 16 * i);
        acc[0][i] = vdotq_laneq_s32(acc[0][i], y, x, 0);
        if constexpr (R > 1) acc[1][i] = vdotq_laneq_s32(acc[1][i], y, x, 1);
        if constexpr (R > 2) acc[2][i] = vdotq_laneq_s32(acc[2][i], y, x, 2);
        if constexpr (R > 3) acc[3][i] = vdotq_laneq_s32(acc[3][i], y, x, 3);
      }
    }
    for (int r = 0; r < R; r++)
      for (int i = 0; i < 4; i++) vst1q_s32(out + r * TILE + side * 16 + i * 4, acc[r][i]);
  }
#else
  for (int i = 0; i < R * TILE; i++) out[i] = 0;
  for (int64_t k = 0; k < k4; k++, w += 128, a += 4 * PANEL)
    for (int r = 0; r < R; r++)
      for (int n = 0; n < TILE; n++) {
        const int8_t *x = a + 4 * r, *y = w + 4 * n;
        out[r * TILE + n] += x[0] * y[0] + x[1] * y[1] + x[2] * y[2] + x[3] * y[3];
      }
#endif
}

using Micro = void (*)(const int8_t*, int64_t, const int8_t*, int64_t, int32_t*);

template <int R, bool in_rows> inline Micro micro_for(int rows) {
  if constexpr (R == 1) return micro<1, in_rows>;
  else return rows == R ? micro<R, in_rows> : micro_for<R - 1, in_rows>(rows);
}
#endif

// Rows are shared out evenly over panels, so that no panel computes much that nobody asked for.
inline int64_t panel_count(int64_t rows) { return (rows + PANEL - 1) / PANEL; }
#if defined(LT_AMX)
inline int64_t panel_begin(int64_t rows, int64_t panel) { return smaller(rows, panel * PANEL); }  // 16 cost as much as one
#else
inline int64_t panel_begin(int64_t rows, int64_t panel) { return panel * rows / panel_count(rows); }
#endif

// Where a byte of a row lies that has `place` in its panel.
inline int64_t in_panel(int64_t place, int64_t byte) {
  return byte / TOGETHER * TOGETHER * PANEL + place * TOGETHER + byte % TOGETHER;
}

// How many panels of so many bytes weights pass by at once: what BLOCK holds, in shares as even as can be.
inline int64_t panels_together(int64_t panels, int64_t bytes) {
  int64_t fit = BLOCK / bytes > 1 ? BLOCK / bytes : 1, blocks = (panels + fit - 1) / fit;
  return blocks ? (panels + blocks - 1) / blocks : 1;
}

#if defined(LT_BYTES)
// 64 values of a row from column k on; what lies behind the row's end is 0.
template <int kind> inline Bytes bytes_of(const Weight& w, int64_t row, int64_t k, float per) {
  int64_t there = w.columns - k;
  if (there >= CHUNK) return fill<kind>(w, row, k, per);
  if (w.columns >= CHUNK && row + 1 < w.rows) return first_of(fill<kind>(w, row, k, per), there);  // the rest is the next row
  alignas(64) int8_t last[CHUNK];
  fill_plain(w, row, k, per, last);
  return load64(last);
}
#endif

// 64 columns of 16 rows, from `first` on, as (16, 16, 4), 128 bytes from one 16 to the next.
template <int kind> inline void expand_some(const Weight& w, int64_t first, int64_t k, const float* per, int8_t* to) {
  auto row_of = [&](int r) { return smaller(first + r, w.rows - 1); };
#if defined(__AVX512VNNI__)
  __m512i v[16];
  for (int r = 0; r < 16; r++) v[r] = xor64(bytes_of<kind>(w, row_of(r), k, per[r]), int8_t(ZERO));
  turn_around(v);
  for (int j = 0; j < 16; j++) _mm512_store_si512(to + j * 128, v[j]);
#elif defined(LT_BYTES)
  for (int from = 0; from < 16; from += 8) {
    __m256 low[8], high[8];
    for (int r = 0; r < 8; r++) {
      Bytes x = xor64(bytes_of<kind>(w, row_of(from + r), k, per[from + r]), int8_t(ZERO));
      low[r] = _mm256_castsi256_ps(x.a), high[r] = _mm256_castsi256_ps(x.b);
    }
    float* out = reinterpret_cast<float*>(to + 4 * from);
    turn_eight(low, out, 32), turn_eight(high, out + 8 * 32, 32);
  }
#else
  for (int r = 0; r < 16; r++) {
    int8_t line[CHUNK];
    fill_plain(w, row_of(r), k, per[r], line);
    for (int j = 0; j < 16; j++) memcpy(to + j * 128 + r * 4, line + 4 * j, 4);
  }
#endif
}

// Columns `begin` to `end` of 32 rows of a weight from row `first` on as a tile (columns / 4, 2, 16, 4); rows behind the
// last repeat it.
template <int kind> void expand(const Weight& w, int64_t first, int64_t begin, int64_t end, int8_t* tile) {
  float per[TILE];
  for (int r = 0; r < TILE; r++) {
    float bound = w.bound[smaller(first + r, w.rows - 1)];
    per[r] = bound > 0 ? 127 / bound : 0;
  }
  for (int side = 0; side < 2; side++)
    for (int64_t k = begin; k < end; k += CHUNK)
      expand_some<kind>(w, first + side * 16, k, per + side * 16, tile + ((k - begin) / 4 * 2 + side) * 64);
}

void expand_tile(const Weight& w, int64_t first, int64_t begin, int64_t end, int8_t* tile) {
  switch (w.kind) {
    case INT8: return expand<INT8>(w, first, begin, end, tile);
    case INT4: return expand<INT4>(w, first, begin, end, tile);
    case Q4_0: return expand<Q4_0>(w, first, begin, end, tile);
    case Q8_0: return expand<Q8_0>(w, first, begin, end, tile);
    case Q4_K: return expand<Q4_K>(w, first, begin, end, tile);
    default: return expand<Q6_K>(w, first, begin, end, tile);
  }
}

// What becomes of up to `lanes` finished sums.
template <int mode, class E> inline vec::Vector finished(vec::Vector x, const E* to, const float* gate) {
  if constexpr (mode == GELU) return vec::gelu_of<sizeof(E) == 2>(x);
  if constexpr (mode == ADD) return vec::vector_at(to) + vec::vector_at(gate) * x;
  return x;
}

// The columns of a row behind whole vectors.
template <int mode, class E> inline void finish_last(E* to, const float* gate, int64_t count, vec::Vector x) {
  float last[vec::lanes], gates[vec::lanes] = {};
  E there[vec::lanes] = {};
  if constexpr (mode == ADD)
    for (int64_t i = 0; i < count; i++) gates[i] = gate[i], there[i] = to[i];
  vec::put(last, finished<mode>(x, there, gates));
  for (int64_t i = 0; i < count; i++) vec::put_one(to + i, last[i]);
}

// `rows` and `count` columns of a result, from a row and a column on. `sums(i, j)` are `lanes` of them, from row i's
// column j on; it may be asked for some behind the last.
template <int mode, class E, class S>
void finish_as(const Result& r, int64_t row, int64_t rows, int64_t column, int64_t count, const S& sums) {
  using vec::lanes;
  for (int64_t i = 0; i < rows; i++) {
    E* to = static_cast<E*>(r.to.data) + offset(r.to, row + i) + column;
    const float* gate = mode == ADD ? vector_of(r.gate, row + i) + column : nullptr;
    if (count == TILE) {  // a length that the compiler knows
#pragma GCC unroll 8
      for (int64_t j = 0; j < TILE; j += lanes) vec::put(to + j, finished<mode>(sums(i, j), to + j, gate + j));
      continue;
    }
    int64_t j = 0;
    for (; j + lanes <= count; j += lanes) vec::put(to + j, finished<mode>(sums(i, j), to + j, gate + j));
    if (j < count) finish_last<mode>(to + j, gate + j, count - j, sums(i, j));
  }
}

template <class S> inline void finish(const Result& r, int64_t row, int64_t rows, int64_t column, int64_t count, const S& sums) {
  bool brain = r.to.type == BFLOAT16;
  if (r.mode == GELU) (brain ? finish_as<GELU, uint16_t, S> : finish_as<GELU, float, S>)(r, row, rows, column, count, sums);
  else if (r.mode == ADD) (brain ? finish_as<ADD, uint16_t, S> : finish_as<ADD, float, S>)(r, row, rows, column, count, sums);
  else (brain ? finish_as<STORE, uint16_t, S> : finish_as<STORE, float, S>)(r, row, rows, column, count, sums);
}

// Ask for a part of the weight's rows that will be expanded next, while the present ones compute.
inline void ask_for(const Weight& w, int64_t first, int64_t part, int64_t parts) {
  if (first >= w.rows) return;
  int64_t size = smaller(TILE, w.rows - first) * w.row_bytes;
  const uint8_t* at = w.data + first * w.row_bytes;
  for (int64_t i = size * part / parts / 64 * 64; i < size * (part + 1) / parts; i += 64) __builtin_prefetch(at + i, 0, 2);
}

#if !defined(LT_AMX) && !defined(LT_SHORTS)
// 32 rows of a weight, ready to meet rows of activations.
struct Tile {
  int64_t first, count;
  int8_t* data;
  float scale[TILE], bias[TILE];
};

inline void meet(const Codes& a, const Tile& t, const Result& r, int64_t panel) {
  alignas(64) int32_t sums[PANEL * TILE];
  int64_t columns = padded(a.columns), begin = panel_begin(a.rows, panel), rows = panel_begin(a.rows, panel + 1) - begin;
  Micro multiply = IN_ROWS && a.stride ? micro_for<PANEL, IN_ROWS>(int(rows)) : micro_for<PANEL, false>(int(rows));
  const int8_t* from = a.data + (a.stride ? begin * a.stride : panel * PANEL * columns);
  multiply(from, a.stride, t.data, (a.columns + 3) / 4, sums);  // zeros follow
  finish(r, begin, rows, t.first, t.count, [&](int64_t i, int64_t j) {
    vec::Vector x = vec::from_integers(sums + i * TILE + j, ZERO * a.sum[begin + i]);
    return x * a.scale[begin + i] * vec::vector_at(t.scale + j) + vec::vector_at(t.bias + j);
  });
}

inline void ready_tile(const Weight& w, const Result& r, Tile& t) {
  expand_tile(w, t.first, 0, padded(w.columns), t.data);
  for (int64_t j = 0; j < TILE; j++) {
    bool there = j < t.count;
    t.scale[j] = there ? w.bound[t.first + j] / 127 : 0;
    t.bias[j] = there && r.bias ? r.bias[t.first + j] : 0;
  }
}

void product(const Codes& a, const Weight& w, const Result& r) {
  int64_t columns = padded(a.columns), panels = panel_count(a.rows), tiles = (w.rows + TILE - 1) / TILE;
  int64_t block = panels_together(panels, columns * PANEL);
  for (int64_t begin = 0; begin < panels; begin += block)
    lt::parallel(tiles, [&](int64_t i) {
      Tile t;
      t.first = i * TILE, t.count = smaller(TILE, w.rows - t.first);
      t.data = static_cast<int8_t*>(lt::scratch(0, columns * TILE));
      ready_tile(w, r, t);
      int64_t end = smaller(panels, begin + block), next = t.first + TILE * lt::threads();
      for (int64_t p = begin; p < end; p++) {
        ask_for(w, next, p - begin, end - begin);
        meet(a, t, r, p);
      }
    });
}
#endif

void bounds(const Weight& w, float* out) {
  lt::parallel(w.rows, [&](int64_t row) { out[row] = row_bound(w, row); });
}

void expand_all(const Weight& w, int8_t* out) {
  int64_t columns = padded(w.columns);
  lt::parallel((w.rows + TILE - 1) / TILE, [&](int64_t t) {
    int8_t* tile = static_cast<int8_t*>(lt::scratch(0, columns * TILE));
    expand_tile(w, t * TILE, 0, columns, tile);
    for (int64_t n = 0; n < smaller(TILE, w.rows - t * TILE); n++)
      for (int64_t k = 0; k < w.columns; k++)
        out[(t * TILE + n) * w.columns + k] = int8_t(tile[(k / 4 * 2 + n / 16) * 64 + n % 16 * 4 + k % 4] ^ ZERO);
  });
}

}  // namespace
