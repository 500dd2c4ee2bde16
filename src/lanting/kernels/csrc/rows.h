// What happens to single rows between the products: rounding to int8, norms, rotary turns.
#pragma once
#include "product.h"

namespace {

// Whether rows of codes lie one after the other whatever their width: those of `wide.h`.
constexpr bool rows_alone(bool dense) { return dense ? DENSE == 4 : SHORTS; }

// Numbers from row to row of such codes. A step that is no power of two keeps rows apart in the cache.
inline int64_t row_stride(const Codes& c) { return c.stride ? c.stride : padded(c.columns) + (c.type == BFLOAT16 ? 16 : 32); }

int64_t codes_bytes(int64_t rows, int64_t columns, int dense) {
  int64_t size = dense ? DENSE : SHORTS ? 2 : 1;
  if (rows_alone(dense)) return rows * (padded(columns) * size + 64);
  return panel_count(rows) * PANEL * padded(columns) * size;
}

// Where a row of codes lies: its bytes one after the other, or in pieces of a panel.
struct Place {
  int8_t* data;
  int64_t place = -1;  // in a panel

  Place(const Codes& to, int64_t panel, int64_t row) : data(to.data) {
    bool dense = to.type == BFLOAT16;
    int64_t size = dense ? DENSE : SHORTS ? 2 : 1;
    if (rows_alone(dense)) data += row * row_stride(to) * size;
    else if (IN_ROWS && to.stride) data += row * to.stride * size;
    else data += size * panel * PANEL * padded(to.columns), place = row - panel_begin(to.rows, panel);
  }

  // Where to write CHUNK numbers from byte k on, for `lay` to bring to their places: there, if bytes lie together.
  template <class T> T* at(T* line, int64_t k) const { return place < 0 && !(SHORTS && sizeof(T) == 1) ? reinterpret_cast<T*>(data + k) : line; }

  template <class T> void lay(const T* from, int64_t k) const {
    if constexpr (SHORTS && sizeof(T) == 1) {
      for (int64_t j = 0; j < CHUNK; j++) reinterpret_cast<int16_t*>(data)[k + j] = from[j];
      return;
    }
    const int8_t* line = reinterpret_cast<const int8_t*>(from);
    if (place >= 0)
      for (int64_t j = 0; j < CHUNK * int64_t(sizeof(T)); j += TOGETHER) memcpy(data + in_panel(place, k + j), line + j, TOGETHER);
  }
};

inline void dense_row(const float* x, const Codes& to, const Place& place) {
  if constexpr (DENSE == 4) {
    memcpy(place.data, x, to.columns * 4);
    return;
  }
  for (int64_t k = 0; k < padded(to.columns); k += CHUNK) {
    alignas(64) uint16_t there[CHUNK], *line = place.at(there, 2 * k);
    int64_t count = smaller(CHUNK, to.columns - k);
    if (count == CHUNK) {
      for (int64_t j = 0; j < CHUNK; j++) line[j] = narrow(x[k + j]);
    } else {
      for (int64_t j = 0; j < CHUNK; j++) line[j] = j < count ? narrow(x[k + j]) : 0;
    }
    place.lay(line, 2 * k);
  }
}

// q = x * per, rounded, with zeros behind `count`; returns the sum.
inline int32_t round_some(const float* x, float per, int64_t count, int8_t* q) {
#if defined(__AVX512VNNI__)
  __m512i sum = _mm512_setzero_si512();
  for (int64_t j = 0; j < CHUNK; j += 16) {
    __mmask16 there = count - j >= 16 ? 0xffff : count <= j ? 0 : (1 << (count - j)) - 1;
    __m512i each = _mm512_maskz_cvtps_epi32(there, _mm512_maskz_loadu_ps(there, x + j) * _mm512_set1_ps(per));
    sum = _mm512_add_epi32(sum, each);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + j), _mm512_cvtepi32_epi8(each));
  }
  return _mm512_reduce_add_epi32(sum);
#else
  int32_t sum = 0;
  if (count == CHUNK) {
    for (int64_t j = 0; j < CHUNK; j++) q[j] = int8_t(nearest(x[j] * per));
  } else {
    for (int64_t j = 0; j < CHUNK; j++) q[j] = j < count ? int8_t(nearest(x[j] * per)) : 0;
  }
  for (int64_t j = 0; j < CHUNK; j++) sum += q[j];
  return sum;
#endif
}

// Round a row to int8, or to the numbers of dense rows, and lay it into its place.
inline void round_row(const float* x, const Codes& to, int64_t panel, int64_t row) {
  Place place(to, panel, row);
  if (to.type == BFLOAT16) return dense_row(x, to, place);
  int32_t bits = 0;  // of the largest: sizes are ordered as their bits are, and NaN is above all, so that it stays NaN
#pragma omp simd reduction(max : bits)
  for (int64_t k = 0; k < to.columns; k++) {
    int32_t size = int32_t(as_bits(x[k]) & 0x7fffffff);
    bits = bits > size ? bits : size;
  }
  float most = as_float(uint32_t(bits)), per = most > 1e-30f ? 127 / most : 0;  // 127 / most must be a number
  int32_t sum = 0;
  for (int64_t k = 0; k < padded(to.columns); k += CHUNK) {
    alignas(64) int8_t there[CHUNK], *q = place.at(there, k);
    sum += round_some(x + k, per, smaller(CHUNK, to.columns - k), q);
    place.lay(q, k);
  }
  to.scale[row] = most / 127;
  to.sum[row] = most <= 3.4e38f ? sum : 0;  // beyond, all codes are 0, and sums are not theirs
}

void quantize(const Matrix& from, const Codes& to) {
  lt::parallel(panel_count(from.rows), [&](int64_t panel) {
    float* x = static_cast<float*>(lt::scratch(1, from.columns * 4));
    for (int64_t row = panel_begin(from.rows, panel); row < panel_begin(from.rows, panel + 1); row++) {
      load(from, row, x);
      round_row(x, to, panel, row);
    }
  });
}

inline void norm_row(float* x, int64_t columns, const float* shift, const float* scale) {
  float mean = vec::total(x, columns, [](auto v) { return v; }) / columns;
  float square = vec::total(x, columns, [mean](auto v) { return (v - mean) * (v - mean); });
  float per = 1 / __builtin_sqrtf(square / columns + 1e-6f);
  for (int64_t k = 0; k < columns; k++) x[k] = (x[k] - mean) * per * (1 + scale[k]) + shift[k];
}

// Layer norm, then x * (1 + scale) + shift: as rows, or rounded to int8 at once.
void norm(const Matrix& from, const PerRow& shift, const PerRow& scale, const Matrix* rows, const Codes* codes) {
  lt::parallel(panel_count(from.rows), [&](int64_t panel) {
    float* x = static_cast<float*>(lt::scratch(1, from.columns * 4));
    for (int64_t row = panel_begin(from.rows, panel); row < panel_begin(from.rows, panel + 1); row++) {
      load(from, row, x);
      norm_row(x, from.columns, vector_of(shift, row), vector_of(scale, row));
      if (codes) round_row(x, *codes, panel, row);
      if (rows) store(*rows, row, x);
    }
  });
}

// What a token's heads are multiplied with, and their swapped neighbours: the norm's weight and the turn in one.
struct Angle {
  float own[512], other[512];

  void set(const float* weight, const float* cos, const float* sin, int64_t width) {
    for (int64_t j = 0; j < width / 2; j++) {
      own[2 * j] = weight[2 * j] * cos[j], own[2 * j + 1] = weight[2 * j + 1] * cos[j];
      other[2 * j] = -weight[2 * j + 1] * sin[j], other[2 * j + 1] = weight[2 * j] * sin[j];
    }
  }
};

template <class E> inline void turn_head(E* x, int64_t width, float eps, const Angle& by) {
  using vec::lanes;
  int64_t j = 0, in_vectors = width / lanes * lanes;
  vec::Vector squares{};
  for (; j < in_vectors; j += lanes) squares += vec::vector_at(x + j) * vec::vector_at(x + j);
  float square = vec::sum_of(squares), rest[lanes];
  for (; j < width; j++) rest[j - in_vectors] = vec::one_at(x + j), square += rest[j - in_vectors] * rest[j - in_vectors];
  float per = 1 / __builtin_sqrtf(square / width + eps);
  for (j = 0; j < in_vectors; j += lanes) {
    vec::Vector each = vec::vector_at(x + j) * per;
    vec::put(x + j, each * vec::vector_at(by.own + j) + vec::swapped(each) * vec::vector_at(by.other + j));
  }
  for (; j < width; j++)
    vec::put_one(x + j, per * (rest[j - in_vectors] * by.own[j] + rest[(j - in_vectors) ^ 1] * by.other[j]));
}

template <class E> void turn_as(const Turn& t) {
  lt::parallel((t.items * t.tokens + 15) / 16, [&](int64_t part) {
    Angle by;
    for (int64_t i = part * 16; i < smaller(t.items * t.tokens, part * 16 + 16); i++) {
      int64_t token = i % t.tokens, at = token * t.width / 2;
      for (int which = 0; which < 2; which++) {
        const float *first = which ? t.first_k : t.first_q, *rest = which ? t.rest_k : t.rest_q;
        by.set(token < t.first ? first : rest, t.cos + at, t.sin + at, t.width);
        E* x = static_cast<E*>(which ? t.k : t.q) + i * t.heads * t.width;
        for (int64_t h = 0; h < t.heads; h++) turn_head(x + h * t.width, t.width, t.eps, by);
      }
    }
  });
}

void turn(const Turn& t) {
  if (t.type == BFLOAT16) turn_as<uint16_t>(t);
  else turn_as<float>(t);
}

// What products end with, for results that came from elsewhere: rows + bias, GELU, gate.
void activate(const Matrix& from, const Result& r) {
  lt::parallel((from.rows + 7) / 8, [&](int64_t part) {
    float* x = static_cast<float*>(lt::scratch(1, from.columns * 4 + 64));
    for (int64_t row = part * 8; row < smaller(from.rows, part * 8 + 8); row++) {
      load(from, row, x);
      if (r.bias)
        for (int64_t j = 0; j < from.columns; j++) x[j] += r.bias[j];
      if (r.mode == STORE) store(r.to, row, x);  // exactly, also numbers near zero
      else finish(r, row, 1, 0, from.columns, [&](int64_t, int64_t j) { return vec::vector_at(x + j); });
    }
  });
}

// The autoencoder's norm over channels that lie together: x / |x| * gamma, then SiLU.
void norm_silu(const Matrix& from, const float* gamma, const Matrix& to, int with_silu) {
  lt::parallel((from.rows + 63) / 64, [&](int64_t part) {
    float* x = static_cast<float*>(lt::scratch(1, from.columns * 4));
    for (int64_t row = part * 64; row < smaller(from.rows, part * 64 + 64); row++) {
      load(from, row, x);
      float square = 0;
#pragma omp simd reduction(+ : square)
      for (int64_t j = 0; j < from.columns; j++) square += x[j] * x[j];
      float per = 1 / larger(__builtin_sqrtf(square), 1e-12f);
      if (with_silu)
        for (int64_t j = 0; j < from.columns; j++) x[j] = silu(x[j] * per * gamma[j]);
      else
        for (int64_t j = 0; j < from.columns; j++) x[j] = x[j] * per * gamma[j];
      store(to, row, x);
    }
  });
}

}  // namespace
