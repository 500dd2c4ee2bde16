// Products of plain weights, bfloat16 or float32, in float32: for processors that do not multiply bfloat16. There torch's
// products in bfloat16 take ten times as long as those in float32.
//
// 32 rows of a weight are widened into a tile, as in `product.h`; rows of activations are read where they lie. Sums run
// over columns in one order, whatever rows stand beside a row.
#pragma once
#include "rows.h"

namespace {

// acc (R, 2 vectors), rows `to` apart, = or += A (R, n), rows `row` apart, times W (n, 2 vectors)
template <int R>
__attribute__((always_inline)) inline void multiply_floats(const float* a, int64_t row, const float* w, int64_t n, float* acc,
                                                           int64_t to, bool fresh) {
  using vec::lanes, vec::put, vec::vector_at;
  vec::Vector sum[R][2];
#pragma GCC unroll 14
  for (int r = 0; r < R; r++) {
    sum[r][0] = fresh ? vec::Vector{} : vector_at(acc + r * to);
    sum[r][1] = fresh ? vec::Vector{} : vector_at(acc + r * to + lanes);
  }
  for (int64_t k = 0; k < n; k++, w += 2 * lanes) {
    vec::Vector w0 = vector_at(w), w1 = vector_at(w + lanes);
#pragma GCC unroll 14
    for (int r = 0; r < R; r++) {
      sum[r][0] += a[r * row + k] * w0;
      sum[r][1] += a[r * row + k] * w1;
    }
  }
#pragma GCC unroll 14
  for (int r = 0; r < R; r++) put(acc + r * to, sum[r][0]), put(acc + r * to + lanes, sum[r][1]);
}

#if defined(LT_FLOATS)
constexpr int ACROSS = 2 * vec::lanes;               // of a tile's rows that a micro-kernel takes at once
constexpr int ROWS = vec::lanes == 16 ? 14 : 6;      // of activations
constexpr int64_t DEEP = 1024;                       // columns of a tile that are in L2 together

inline __m256 eight_at(const Weight& w, int64_t row, int64_t k) {
  const uint8_t* at = w.data + row * w.row_bytes;
  if (w.kind == F32) return _mm256_loadu_ps(reinterpret_cast<const float*>(at) + k);
  __m128i brains = _mm_loadu_si128(reinterpret_cast<const __m128i*>(reinterpret_cast<const uint16_t*>(at) + k));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(brains), 16));
}

inline float one_of(const Weight& w, int64_t row, int64_t k) {
  const uint8_t* at = w.data + row * w.row_bytes;
  return w.kind == F32 ? reinterpret_cast<const float*>(at)[k] : wide(reinterpret_cast<const uint16_t*>(at)[k]);
}

// Eight columns of eight rows, columns becoming rows `ACROSS` apart.
inline void turn_eight(const __m256* v, float* to) {
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
    _mm256_storeu_ps(to + i * ACROSS, _mm256_permute2f128_ps(b[i], b[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * ACROSS, _mm256_permute2f128_ps(b[i], b[i + 4], 0x31));
  }
}

// Columns `begin` to `end` of 32 rows as a tile (32 / ACROSS, columns, ACROSS); rows behind the last repeat it.
inline void widen_tile(const Weight& w, int64_t first, int64_t begin, int64_t end, float* tile) {
  for (int from = 0; from < TILE; from += 8) {
    float* to = tile + from / ACROSS * (end - begin) * ACROSS + from % ACROSS;
    int64_t rows[8], k = begin;
    for (int r = 0; r < 8; r++) rows[r] = smaller(first + from + r, w.rows - 1);
    for (; k + 8 <= end; k += 8) {
      __m256 v[8];
      for (int r = 0; r < 8; r++) v[r] = eight_at(w, rows[r], k);
      turn_eight(v, to + (k - begin) * ACROSS);
    }
    for (; k < end; k++)
      for (int r = 0; r < 8; r++) to[(k - begin) * ACROSS + r] = one_of(w, rows[r], k);
  }
}

using Multiply = void (*)(const float*, int64_t, const float*, int64_t, float*, bool);

template <int R> void micro_floats(const float* a, int64_t row, const float* w, int64_t n, float* acc, bool fresh) {
  multiply_floats<R>(a, row, w, n, acc, TILE, fresh);
}

template <int R> inline Multiply floats_for(int64_t rows) {
  if constexpr (R == 1) return micro_floats<1>;
  else return rows == R ? micro_floats<R> : floats_for<R - 1>(rows);
}

// 32 rows of a weight meet groups `first_group` to `last_group` of rows.
struct Widened {
  const Codes& a;
  const Weight& w;
  const Result& r;
  int64_t first, groups, first_group, last_group;

  int64_t group_begin(int64_t group) const { return group * a.rows / groups; }

  void tile() const {
    int64_t together = last_group - first_group, columns = w.columns;
    float* laid = static_cast<float*>(lt::scratch(0, smaller(DEEP, columns) * TILE * 4));
    float* sums = static_cast<float*>(lt::scratch(3, (columns > DEEP ? together : 1) * ROWS * TILE * 4));
    for (int64_t begin = 0; begin < columns; begin += DEEP) {
      int64_t end = smaller(columns, begin + DEEP);
      widen_tile(w, first, begin, end, laid);
      for (int64_t g = first_group; g < last_group; g++) {
        if (end == columns) ask_for(w, first + TILE * lt::threads(), g - first_group, together);
        meet(g, laid, begin, end, sums + (columns > DEEP ? (g - first_group) * ROWS * TILE : 0));
      }
    }
  }

  void meet(int64_t group, const float* laid, int64_t begin, int64_t end, float* sums) const {
    int64_t from = group_begin(group), rows = group_begin(group + 1) - from, stride = row_stride(a);
    const float* x = reinterpret_cast<const float*>(a.data) + from * stride + begin;
    Multiply multiply = floats_for<ROWS>(rows);
    for (int64_t part = 0; part < TILE / ACROSS; part++)
      multiply(x, stride, laid + part * (end - begin) * ACROSS, end - begin, sums + part * ACROSS, begin == 0);
    if (end < w.columns) return;
    int64_t count = smaller(TILE, w.rows - first);
    float bias[TILE];
    for (int64_t j = 0; j < TILE; j++) bias[j] = r.bias && j < count ? r.bias[first + j] : 0;
    finish(r, from, rows, first, count, [&](int64_t i, int64_t j) {
      return vec::vector_at(sums + i * TILE + j) + vec::vector_at(bias + j);
    });
  }
};

void dense(const Codes& a, const Weight& w, const Result& r) {
  int64_t groups = (a.rows + ROWS - 1) / ROWS, block = panels_together(groups, 4 * w.columns * ROWS);
  for (int64_t begin = 0; begin < groups; begin += block)
    lt::parallel((w.rows + TILE - 1) / TILE, [&](int64_t i) {
      Widened{a, w, r, i * TILE, groups, begin, smaller(groups, begin + block)}.tile();
    });
}
#endif

}  // namespace
