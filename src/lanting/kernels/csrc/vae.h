// The autoencoder's 3x3 convolutions of pictures with channels last, and in the same pass what comes before them (norm
// and SiLU, doubling) and after (bias, what is added).
//
// Winograd's F(2x2, 3x3): 2x2 pixels of the result are made from 4x4 of the picture with 16 products for every pair of
// channels instead of 36. A doubled picture repeats its pixels, so that of those 16 only 9 differ from zero, made from
// 3x3 pixels of the small one. Products are bfloat16 with float32 sums where the processor has them and the picture is
// bfloat16, else float32; all else is float32. Rejected: F(4x4, 3x3), whose rounding bfloat16 does not bear and whose
// weights in float32 are four times as large.
#pragma once
#include "pool.h"
#include "vectors.h"
#include "weights.h"

namespace {
namespace conv {

using vec::lanes, vec::put, vec::put_one, vec::silu_of, vec::Vector, vec::vector_at;

constexpr int64_t LANES = 16;  // channels are rounded up to, whatever the processor
constexpr int64_t BAND = 16, PARTS = 64;  // rows of tiles that a thread takes in one go; parts there should be

struct Single {  // what products are made of, `pair` of them at once
  using Element = float;
  static constexpr int pair = 1;
};
struct Brain {
  using Element = uint16_t;
  static constexpr int pair = 2;
};

template <int V> constexpr int rows_of() {  // of the micro-kernel, with V vectors of the result
  return lanes == 16 ? (V == 1 ? 16 : 8) : 4;
}

// out (rows, V vectors) = a (rows, n), `stride` apart, times w (n, V vectors)
template <class T, int V, class E = typename T::Element>
inline void multiply(const E* a, int64_t stride, const E* w, int64_t n, float* out) {
  constexpr int R = rows_of<V>();
#if defined(__AVX512BF16__)
  if constexpr (T::pair == 2) {
    __m512 sum[R][V];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 3
      for (int v = 0; v < V; v++) sum[r][v] = _mm512_setzero_ps();
    for (int64_t k = 0; k < n; k += 2, w += 32 * V) {
      __m512bh each[V];
#pragma GCC unroll 3
      for (int v = 0; v < V; v++) each[v] = (__m512bh)_mm512_loadu_si512(w + 32 * v);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        int32_t two;
        memcpy(&two, a + r * stride + k, 4);
        __m512bh x = (__m512bh)_mm512_set1_epi32(two);
#pragma GCC unroll 3
        for (int v = 0; v < V; v++) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], each[v], x);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 3
      for (int v = 0; v < V; v++) _mm512_store_ps(out + (r * V + v) * 16, sum[r][v]);
    return;
  }
#endif
  if constexpr (T::pair == 1) {
    Vector sum[R][V] = {};
    for (int64_t k = 0; k < n; k++, w += lanes * V) {
      Vector each[V];
#pragma GCC unroll 3
      for (int v = 0; v < V; v++) each[v] = vector_at(w + v * lanes);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++)
#pragma GCC unroll 3
        for (int v = 0; v < V; v++) sum[r][v] += a[r * stride + k] * each[v];
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 3
      for (int v = 0; v < V; v++) put(out + (r * V + v) * lanes, sum[r][v]);
  }
}

inline int64_t rounded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Where a weight of the result's channel `o` and the picture's channel `k` lies for product `p` of `all`.
template <class T> inline int64_t place(int64_t o, int64_t k, int64_t p, int64_t all, int64_t in, int64_t wide) {
  int64_t block = o / wide;
  return (((block * all + p) * (in / T::pair) + k / T::pair) * wide + o % wide) * T::pair + k % T::pair;
}

// Vectors of the result that are made together: as many as divide them.
inline int64_t together(int64_t vectors) { return vectors % 3 == 0 ? 3 : vectors % 2 == 0 ? 2 : 1; }

template <class T> void lay_weight(const ConvWeight& w) {
  using E = typename T::Element;
  static const float plain[4][3] = {{1, 0, 0}, {.5f, .5f, .5f}, {.5f, -.5f, .5f}, {0, 0, 1}};
  static const float doubled[3][3] = {{1, 0, 0}, {1, 1, 1}, {0, 0, 1}};
  const float(*g)[3] = w.grow ? doubled : plain;
  int64_t points = w.grow ? 3 : 4, in = rounded(w.in, LANES), out = rounded(w.out, LANES);
  int64_t wide = together(out / lanes) * lanes;
  lt::parallel(out, [&](int64_t o) {
    for (int64_t k = 0; k < in; k++) {
      const float* kernel = w.from + (o * w.in + k) * 9;
      bool there = o < w.out && k < w.in;
      float half[4][3] = {};
      for (int i = 0; there && i < points; i++)
        for (int x = 0; x < 3; x++)
          for (int y = 0; y < 3; y++) half[i][x] += g[i][y] * kernel[3 * y + x];
      for (int i = 0; i < points; i++)
        for (int j = 0; j < points; j++) {
          float sum = g[j][0] * half[i][0] + g[j][1] * half[i][1] + g[j][2] * half[i][2];
          put_one(static_cast<E*>(w.to) + place<T>(o, k, i * points + j, points * points, in, wide), sum);
        }
    }
  });
}

template <class T, bool grow> struct Winograd {
  using E = typename T::Element;
  static constexpr int points = grow ? 3 : 4, step = grow ? 1 : 2, all = points * points;
  const Conv& c;
  int64_t in, out, across, band;  // channels rounded up; tiles of a strip; rows of tiles of a band

  int64_t columns() const { return across * step + 2; }

  // A row of the strip from column `left` on as float32, after norm and SiLU; zeros outside of the picture.
  void read(int64_t item, int64_t y, int64_t left, float* line) const {
    int64_t n = columns();
    if (y < 0 || y >= c.height) {
      memset(line, 0, n * in * 4);
      return;
    }
    for (int64_t i = 0; i < n; i++, line += in) {
      int64_t x = left + i;
      if (x < 0 || x >= c.width) memset(line, 0, in * 4);
      else read_pixel((item * c.height + y) * c.width + x, line);
    }
  }

  // A pixel in float32, rounded up to whole vectors, after norm and SiLU.
  void read_pixel(int64_t pixel, float* to) const {
    Vector square = {};
    for (int64_t j = 0; j < in; j += lanes) {
      Vector x = piece(pixel * c.in + j, smaller(lanes, c.in - j));
      square += x * x;
      put(to + j, x);
    }
    if (!c.gamma) return;
    float sum = 0;
    for (int j = 0; j < lanes; j++) sum += square[j];
    float per = 1 / larger(__builtin_sqrtf(sum), 1e-12f);
    for (int64_t j = 0; j < in; j += lanes)
      put(to + j, silu_of(vector_at(to + j) * per * vector_at(c.gamma + j)));
  }

  // `count` channels of the picture, zeros behind them.
  inline Vector piece(int64_t at, int64_t count) const {
    const uint16_t* brain = static_cast<const uint16_t*>(c.x) + at;
    const float* single = static_cast<const float*>(c.x) + at;
    if (count >= lanes) return c.type == BFLOAT16 ? vector_at(brain) : vector_at(single);
    Vector x = {};
    for (int64_t j = 0; j < count; j++) x[j] = c.type == BFLOAT16 ? wide(brain[j]) : single[j];
    return x;
  }

  static inline void spread(const Vector* d, int by, Vector* v) {
    if constexpr (grow) {
      v[0] = d[0] - d[by], v[by] = d[by], v[2 * by] = d[by] - d[2 * by];
    } else {
      v[0] = d[0] - d[2 * by], v[by] = d[by] + d[2 * by], v[2 * by] = d[2 * by] - d[by], v[3 * by] = d[by] - d[3 * by];
    }
  }

  // The lines under a row of tiles -> (all, tiles, in)
  void transform(const float* const* line, int64_t tiles, E* to) const {
    for (int64_t t = 0; t < tiles; t++)
      for (int64_t k = 0; k < in; k += lanes) {
        Vector d[all], u[all], v[all];
#pragma GCC unroll 4
        for (int i = 0; i < points; i++)
#pragma GCC unroll 4
          for (int j = 0; j < points; j++) d[i * points + j] = vector_at(line[i] + (t * step + j) * in + k);
#pragma GCC unroll 4
        for (int j = 0; j < points; j++) spread(d + j, points, u + j);
#pragma GCC unroll 4
        for (int i = 0; i < points; i++) spread(u + i * points, 1, v + i * points);
#pragma GCC unroll 16
        for (int p = 0; p < all; p++) put(to + (p * across + t) * in + k, v[p]);
      }
  }

  static inline void gather(const Vector* m, int by, Vector& first, Vector& second) {
    if constexpr (grow) first = m[0] + m[by], second = m[by] - m[2 * by];
    else first = m[0] + m[by] + m[2 * by], second = m[by] - m[2 * by] - m[3 * by];
  }

  // `count` channels of a pixel of the result, `at` from the start.
  void finish(int64_t at, int64_t count, Vector x) const {
    if (c.type == BFLOAT16) {
      uint16_t* to = static_cast<uint16_t*>(c.out) + at;
      const uint16_t* add = static_cast<const uint16_t*>(c.add) + at;
      if (count == lanes) {
        put(to, c.add ? x + vector_at(add) : x);
      } else {
        for (int64_t j = 0; j < count; j++) to[j] = narrow(x[j] + (c.add ? wide(add[j]) : 0));
      }
    } else {
      float* to = static_cast<float*>(c.out) + at;
      const float* add = static_cast<const float*>(c.add) + at;
      if (count == lanes) put(to, c.add ? x + vector_at(add) : x);
      else
        for (int64_t j = 0; j < count; j++) to[j] = x[j] + (c.add ? add[j] : 0);
    }
  }

  // (all, tiles, wide) sums of products -> channels from `first` on of the tiles' pixels
  void write(const float* sums, int64_t first, int64_t vectors, int64_t tiles, const int64_t (&at)[3]) const {
    int64_t high = c.height * 2 / step, broad = c.width * 2 / step, size = vectors * lanes;
    for (int64_t t = 0; t < tiles; t++)
      for (int64_t v = 0; v < vectors; v++) {
        int64_t o = first + v * lanes, count = smaller(lanes, c.outs - o);
        if (count <= 0) continue;
        Vector m[all], s[2][points], y[2][2], bias = vector_at(c.bias + o);
#pragma GCC unroll 16
        for (int p = 0; p < all; p++) m[p] = vector_at(sums + (p * across + t) * size + v * lanes);
#pragma GCC unroll 4
        for (int j = 0; j < points; j++) gather(m + j, points, s[0][j], s[1][j]);
        for (int i = 0; i < 2; i++) gather(s[i], 1, y[i][0], y[i][1]);
        for (int i = 0; i < 2; i++)
          for (int j = 0; j < 2; j++) {
            int64_t row = at[1] * 2 + i, column = (at[2] + t) * 2 + j;
            if (row < high && column < broad)
              finish(((at[0] * high + row) * broad + column) * c.outs + o, count, y[i][j] + bias);
          }
      }
  }

  template <int V> void products(const E* pictures, float* sums, int64_t tiles, const int64_t (&at)[3]) const {
    constexpr int R = rows_of<V>();
    constexpr int64_t size = V * lanes;
    for (int64_t first = 0; first < out; first += size) {
      const E* w = static_cast<const E*>(c.weight) + first * all * in;
      for (int64_t p = 0; p < all; p++, w += size * in)
        for (int64_t t = 0; t < tiles; t += R)
          multiply<T, V>(pictures + (p * across + t) * in, in, w, in, sums + (p * across + t) * size);
      write(sums, first, V, tiles, at);
    }
  }

  void strip(int64_t item, int64_t top, int64_t left) const {
    int64_t rows = (c.height + step - 1) / step, tiles = smaller(across, (c.width + step - 1) / step - left);
    int64_t line = columns() * in, vectors = together(out / lanes);
    float* lines = static_cast<float*>(lt::scratch(0, 4 * line * 4));
    E* pictures = static_cast<E*>(lt::scratch(1, all * across * in * sizeof(E)));
    float* sums = static_cast<float*>(lt::scratch(2, all * across * vectors * lanes * 4));
    int64_t next = top * step - 1;
    for (int64_t row = top; row < smaller(rows, top + band); row++) {
      for (; next < row * step - 1 + points; next++) read(item, next, left * step - 1, lines + (next + 1) % 4 * line);
      const float* under[points];
      for (int i = 0; i < points; i++) under[i] = lines + (row * step + i) % 4 * line;
      transform(under, tiles, pictures);
      const int64_t at[3] = {item, row, left};
      if (vectors == 3) products<3>(pictures, sums, tiles, at);
      else if (vectors == 2) products<2>(pictures, sums, tiles, at);
      else products<1>(pictures, sums, tiles, at);
    }
  }

  void run() {
    int64_t rows = (c.height + step - 1) / step, strips = ((c.width + step - 1) / step + across - 1) / across;
    int64_t fair = c.items * strips * rows / PARTS;
    band = fair < 2 ? 2 : smaller(fair, BAND);
    int64_t bands = (rows + band - 1) / band;
    lt::parallel(c.items * bands * strips, [&](int64_t i) {
      strip(i / (bands * strips), i / strips % bands * band, i % strips * across);
    });
  }
};

template <class T> void run_as(const Conv& c) {
  int64_t in = rounded(c.in, LANES), out = rounded(c.outs, LANES);
  int64_t across = in < 256 ? 16 : 32;  // what a strip needs stays in L2, and large weights serve more tiles
  if (c.grow) Winograd<T, true>{c, in, out, across, 0}.run();
  else Winograd<T, false>{c, in, out, across, 0}.run();
}

void run(const Conv& c) {
#if defined(__AVX512BF16__)
  if (c.type == BFLOAT16) return run_as<Brain>(c);
#endif
  run_as<Single>(c);
}

// Bytes of a number of a convolution's weight for pictures of a type.
int bytes(int32_t type) {
#if defined(__AVX512BF16__)
  if (type == BFLOAT16) return 2;
#endif
  (void)type;
  return 4;
}

void lay(const ConvWeight& w) {
#if defined(__AVX512BF16__)
  if (w.type == BFLOAT16) return lay_weight<Brain>(w);
#endif
  lay_weight<Single>(w);
}

}  // namespace conv
}  // namespace
