// Products without instructions that multiply four bytes, or two numbers of bfloat16, at once: of plain weights, bfloat16
// or float32, in float32 (torch's in bfloat16 take ten times as long there), and of packed ones in pairs of 16 bits.
//
// 32 rows of a weight are widened into a tile, as in `product.h`; rows of activations are read where they lie. What a
// micro-kernel multiplies at once are 32 bits of a row, a step: one float32, or two integers. Sums run over columns in
// one order, whatever rows stand beside a row.
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
constexpr int ACROSS = 2 * vec::lanes;           // of a tile's rows that a micro-kernel takes at once
constexpr int ROWS = vec::lanes == 16 ? 14 : 6;  // of activations

// Plain weights.
struct Plain {
  using Step = float;
  using Sum = float;
  static constexpr int64_t columns = 1;  // of a step

  static __m256 eight_at(const Weight& w, int64_t row, int64_t k) {
    const uint8_t* at = w.data + row * w.row_bytes;
    if (w.kind == F32) return _mm256_loadu_ps(reinterpret_cast<const float*>(at) + k);
    __m128i brains = _mm_loadu_si128(reinterpret_cast<const __m128i*>(reinterpret_cast<const uint16_t*>(at) + k));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(brains), 16));
  }

  static float one_at(const Weight& w, int64_t row, int64_t k) {
    const uint8_t* at = w.data + row * w.row_bytes;
    return w.kind == F32 ? reinterpret_cast<const float*>(at)[k] : wide(reinterpret_cast<const uint16_t*>(at)[k]);
  }

  // Columns `begin` to `end` of 32 rows as a tile (32 / ACROSS, steps, ACROSS); rows behind the last repeat it.
  static void lay(const Weight& w, int64_t first, int64_t begin, int64_t end, float* tile) {
    for (int from = 0; from < TILE; from += 8) {
      float* to = tile + from / ACROSS * (end - begin) * ACROSS + from % ACROSS;
      int64_t rows[8], k = begin;
      for (int r = 0; r < 8; r++) rows[r] = smaller(first + from + r, w.rows - 1);
      for (; k + 8 <= end; k += 8) {
        __m256 v[8];
        for (int r = 0; r < 8; r++) v[r] = eight_at(w, rows[r], k);
        turn_eight(v, to + (k - begin) * ACROSS, ACROSS);
      }
      for (; k < end; k++)
        for (int r = 0; r < 8; r++) to[(k - begin) * ACROSS + r] = one_at(w, rows[r], k);
    }
  }

  template <int R> static void multiply(const float* a, int64_t row, const float* w, int64_t n, float* acc, bool fresh) {
    multiply_floats<R>(a, row, w, n, acc, TILE, fresh);
  }

  static vec::Vector finished(const Codes&, const Weight&, int64_t, const float* sums, const float*) {
    return vec::vector_at(sums);
  }

  static float scale(const Weight&, int64_t) { return 1; }
};

#if defined(LT_SHORTS)
// Packed weights, as bytes at first.
struct Pairs {
  using Step = int32_t;
  using Sum = int32_t;
  static constexpr int64_t columns = 2;

  static void lay(const Weight& w, int64_t first, int64_t begin, int64_t end, int32_t* tile) {
    int8_t* bytes = static_cast<int8_t*>(lt::scratch(2, (end - begin) * TILE));
    expand_tile(w, first, begin, end, bytes);  // (columns / 4, 2, 16, 4)
    for (int side = 0; side < 2; side++) {
      int32_t* to = tile + side * (end - begin) / 2 * ACROSS;
      for (int64_t k = 0; k < (end - begin) / 4; k++, to += 2 * ACROSS)
        for (int part = 0; part < 2; part++) {  // eight rows: four bytes each become two steps
          __m256i x = _mm256_load_si256(reinterpret_cast<const __m256i*>(bytes + (k * 2 + side) * 64 + part * 32));
          __m256i low = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(x));
          __m256i high = _mm256_cvtepi8_epi16(_mm256_extracti128_si256(x, 1));
          __m256 a = _mm256_castsi256_ps(low), b = _mm256_castsi256_ps(high);
          auto in_order = [](__m256 y) { return _mm256_permute4x64_epi64(_mm256_castps_si256(y), 0xd8); };
          __m256i* out = reinterpret_cast<__m256i*>(to + part * 8);
          _mm256_store_si256(out, in_order(_mm256_shuffle_ps(a, b, 0x88)));
          _mm256_store_si256(out + ACROSS / 8, in_order(_mm256_shuffle_ps(a, b, 0xdd)));
        }
    }
  }

  template <int R> static void multiply(const int32_t* a, int64_t row, const int32_t* w, int64_t n, int32_t* acc, bool fresh) {
    __m256i sum[R][2];
    auto at = [&](int r, int i) { return reinterpret_cast<__m256i*>(acc + r * TILE + 8 * i); };
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
      for (int i = 0; i < 2; i++) sum[r][i] = fresh ? _mm256_setzero_si256() : _mm256_load_si256(at(r, i));
    for (int64_t k = 0; k < n; k++, w += ACROSS) {
      __m256i w0 = _mm256_load_si256(reinterpret_cast<const __m256i*>(w));
      __m256i w1 = _mm256_load_si256(reinterpret_cast<const __m256i*>(w + 8));
#pragma GCC unroll 6
      for (int r = 0; r < R; r++) {
        __m256i x = _mm256_set1_epi32(a[r * row + k]);
        sum[r][0] = _mm256_add_epi32(sum[r][0], _mm256_madd_epi16(w0, x));
        sum[r][1] = _mm256_add_epi32(sum[r][1], _mm256_madd_epi16(w1, x));
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
      for (int i = 0; i < 2; i++) _mm256_store_si256(at(r, i), sum[r][i]);
  }

  static vec::Vector finished(const Codes& a, const Weight&, int64_t row, const int32_t* sums, const float* scale) {
    return vec::from_integers(sums, 0) * a.scale[row] * vec::vector_at(scale);
  }

  static float scale(const Weight& w, int64_t row) { return w.bound[row] / 127; }
};
#endif

// 32 rows of a weight meet groups `first_group` to `last_group` of rows.
template <class T> struct Widened {
  using Step = typename T::Step;
  using Sum = typename T::Sum;
  using Multiply = void (*)(const Step*, int64_t, const Step*, int64_t, Sum*, bool);
  static constexpr int64_t deep = 1024 * T::columns;  // columns of a tile that are in L2 together

  const Codes& a;
  const Weight& w;
  const Result& r;
  int64_t first, columns, groups, first_group, last_group;

  template <int R> static Multiply multiply_for(int64_t rows) {
    if constexpr (R == 1) return T::template multiply<1>;
    else return rows == R ? T::template multiply<R> : multiply_for<R - 1>(rows);
  }

  int64_t group_begin(int64_t group) const { return group * a.rows / groups; }

  void tile() const {
    int64_t together = last_group - first_group, depth = smaller(deep, columns);
    Step* laid = static_cast<Step*>(lt::scratch(0, depth / T::columns * TILE * 4));
    Sum* sums = static_cast<Sum*>(lt::scratch(3, (columns > deep ? together : 1) * ROWS * TILE * 4));
    for (int64_t begin = 0; begin < columns; begin += deep) {
      int64_t end = smaller(columns, begin + deep);
      T::lay(w, first, begin, end, laid);
      for (int64_t g = first_group; g < last_group; g++) {
        if (end == columns) ask_for(w, first + TILE * lt::threads(), g - first_group, together);
        meet(g, laid, begin, end, sums + (columns > deep ? (g - first_group) * ROWS * TILE : 0));
      }
    }
  }

  void meet(int64_t group, const Step* laid, int64_t begin, int64_t end, Sum* sums) const {
    int64_t from = group_begin(group), rows = group_begin(group + 1) - from;
    int64_t stride = row_stride(a) / T::columns, steps = (end - begin) / T::columns;
    const Step* x = reinterpret_cast<const Step*>(a.data) + from * stride + begin / T::columns;
    Multiply multiply = multiply_for<ROWS>(rows);
    for (int64_t part = 0; part < TILE / ACROSS; part++)
      multiply(x, stride, laid + part * steps * ACROSS, steps, sums + part * ACROSS, begin == 0);
    if (end == columns) end_rows(from, rows, sums);
  }

  void end_rows(int64_t from, int64_t rows, const Sum* sums) const {
    int64_t count = smaller(TILE, w.rows - first);
    float bias[TILE], scale[TILE];
    for (int64_t j = 0; j < TILE; j++) {
      bias[j] = r.bias && j < count ? r.bias[first + j] : 0;
      scale[j] = j < count ? T::scale(w, first + j) : 0;
    }
    finish(r, from, rows, first, count, [&](int64_t i, int64_t j) {
      return T::finished(a, w, from + i, sums + i * TILE + j, scale + j) + vec::vector_at(bias + j);
    });
  }
};

template <class T> void widened(const Codes& a, const Weight& w, const Result& r) {
  int64_t columns = T::columns > 1 ? padded(w.columns) : w.columns, groups = (a.rows + ROWS - 1) / ROWS;
  int64_t block = panels_together(groups, 4 / T::columns * columns * ROWS);
  for (int64_t begin = 0; begin < groups; begin += block)
    lt::parallel((w.rows + TILE - 1) / TILE, [&](int64_t i) {
      Widened<T>{a, w, r, i * TILE, columns, groups, begin, smaller(groups, begin + block)}.tile();
    });
}

void dense(const Codes& a, const Weight& w, const Result& r) { widened<Plain>(a, w, r); }
#if defined(LT_SHORTS)
void product(const Codes& a, const Weight& w, const Result& r) { widened<Pairs>(a, w, r); }
#endif
#endif

}  // namespace
