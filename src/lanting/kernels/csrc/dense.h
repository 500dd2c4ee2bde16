// Products in bfloat16 with float32 sums, where the processor has them: the same tiles and panels as in `product.h`,
// without rounding anything. torch's are as fast on wide matrices; on narrow ones, and with what follows a product done
// at once, these are faster.
#pragma once
#include "wide.h"

namespace {

#if defined(__AVX512BF16__)
// Columns `begin` to `end` of 32 rows of a weight as a tile (columns / 2, 2, 16, 2).
inline void lay_tile(const Weight& w, int64_t first, int64_t begin, int64_t end, uint16_t* tile) {
  for (int side = 0; side < 2; side++)
    for (int64_t k = begin; k < end; k += 32) {
      __m512i v[16];
      int64_t there = smaller(32, w.columns - k);
      __mmask32 mask = there <= 0 ? 0 : there >= 32 ? 0xffffffffu : (1u << there) - 1;
      for (int r = 0; r < 16; r++) {
        int64_t row = smaller(first + side * 16 + r, w.rows - 1);
        v[r] = _mm512_maskz_loadu_epi16(mask, w.data + row * w.row_bytes + 2 * k);
      }
      turn_around(v);
      uint16_t* to = tile + ((k - begin) / 2 * 2 + side) * 32;
      for (int j = 0; j < 16; j++) _mm512_store_si512(to + j * 64, v[j]);
    }
}

#if defined(LT_AMX)
void product(const Codes&, const Weight&, const Result&);  // amx.h
void dense(const Codes&, const Weight&, const Result&);
#else
constexpr int64_t DEPTH = 4096;  // columns of a tile that are in L2 together

// acc (R, 32), rows `to` apart, = or += A times W (pairs, 2, 16, 2). Of A's pairs of numbers those of a row are `step`
// apart, and rows begin `row` apart: numbers that the compiler knows where rows lie in panels.
template <int R>
__attribute__((always_inline)) inline void multiply_pairs(const uint16_t* a, int64_t row, int64_t step, const uint16_t* w,
                                                          int64_t pairs, float* acc, int64_t to, bool fresh) {
  __m512 sum[R][2];
#pragma GCC unroll 14
  for (int r = 0; r < R; r++) {
    sum[r][0] = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(acc + r * to);
    sum[r][1] = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(acc + r * to + 16);
  }
  for (int64_t k = 0; k < pairs; k++, w += 64, a += step) {
    __m512bh w0 = (__m512bh)_mm512_load_si512(w), w1 = (__m512bh)_mm512_load_si512(w + 32);
#pragma GCC unroll 14
    for (int r = 0; r < R; r++) {
      int32_t two;
      memcpy(&two, a + r * row, 4);
      __m512bh x = (__m512bh)_mm512_set1_epi32(two);
      sum[r][0] = _mm512_dpbf16_ps(sum[r][0], w0, x);
      sum[r][1] = _mm512_dpbf16_ps(sum[r][1], w1, x);
    }
  }
#pragma GCC unroll 14
  for (int r = 0; r < R; r++) {
    _mm512_storeu_ps(acc + r * to, sum[r][0]);
    _mm512_storeu_ps(acc + r * to + 16, sum[r][1]);
  }
}

// The first R rows of a panel (pairs, PANEL, 2), or rows `stride` apart.
template <int R, bool in_rows>
void micro_dense(const uint16_t* a, int64_t stride, const uint16_t* w, int64_t pairs, float* acc, bool fresh) {
  multiply_pairs<R>(a, in_rows ? stride : 2, in_rows ? 2 : 2 * PANEL, w, pairs, acc, TILE, fresh);
}

using MicroDense = void (*)(const uint16_t*, int64_t, const uint16_t*, int64_t, float*, bool);

template <int R, bool in_rows> inline MicroDense dense_for(int rows) {
  if constexpr (R == 1) return micro_dense<1, in_rows>;
  else return rows == R ? micro_dense<R, in_rows> : dense_for<R - 1, in_rows>(rows);
}

struct Dense {
  const Codes& a;
  const Weight& w;
  const Result& r;
  int64_t columns, first, panels_begin, panels_end;

  void tile() const {
    int64_t panels = panels_end - panels_begin, depth = smaller(DEPTH, columns);
    uint16_t* laid = static_cast<uint16_t*>(lt::scratch(0, depth * TILE * 2));
    float* sums = static_cast<float*>(lt::scratch(3, (columns > DEPTH ? panels : 1) * PANEL * TILE * 4));
    for (int64_t begin = 0; begin < columns; begin += depth) {
      int64_t end = smaller(columns, begin + depth);
      lay_tile(w, first, begin, end, laid);
      for (int64_t p = panels_begin; p < panels_end; p++) {
        if (end == columns) ask_for(w, first + TILE * lt::threads(), p - panels_begin, panels);
        meet(p, laid, begin, end, sums + (columns > DEPTH ? (p - panels_begin) * PANEL * TILE : 0));
      }
    }
  }

  void meet(int64_t panel, const uint16_t* laid, int64_t begin, int64_t end, float* sums) const {
    int64_t from = panel_begin(a.rows, panel), rows = panel_begin(a.rows, panel + 1) - from;
    const uint16_t* x = reinterpret_cast<const uint16_t*>(a.data) + (a.stride ? from * a.stride + begin : (panel * columns + begin) * PANEL);
    int64_t last = smaller(end, (w.columns + 1) / 2 * 2);  // behind it are zeros
    MicroDense multiply = a.stride ? dense_for<PANEL, true>(int(rows)) : dense_for<PANEL, false>(int(rows));
    multiply(x, a.stride, laid, (last - begin) / 2, sums, begin == 0);
    if (end < columns) return;
    int64_t count = smaller(TILE, w.rows - first);
    float bias[TILE];
    for (int64_t j = 0; j < TILE; j++) bias[j] = r.bias && j < count ? r.bias[first + j] : 0;
    finish(r, from, rows, first, count, [&](int64_t i, int64_t j) {
      return vec::vector_at(sums + i * TILE + j) + vec::vector_at(bias + j);
    });
  }
};

void dense(const Codes& a, const Weight& w, const Result& r) {
  int64_t columns = padded(a.columns), panels = panel_count(a.rows);
  int64_t block = panels_together(panels, 2 * columns * PANEL);
  for (int64_t begin = 0; begin < panels; begin += block)
    lt::parallel((w.rows + TILE - 1) / TILE, [&](int64_t i) {
      Dense{a, w, r, columns, i * TILE, begin, smaller(panels, begin + block)}.tile();
    });
}
#endif
#elif !defined(LT_FLOATS)
void dense(const Codes&, const Weight&, const Result&) {}
#endif

void any_product(const Codes& a, const Weight& w, const Result& r) {
  if (a.type == BFLOAT16) dense(a, w, r);
  else product(a, w, r);
}

}  // namespace
