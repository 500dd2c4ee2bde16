// What happens to single rows between the products: rounding to int8, norms, rotary turns.
#pragma once
#include "product.h"

namespace {

// Where a row of codes lies: its bytes one after the other, or in pieces of a panel.
struct Place {
  int8_t* data;
  int64_t place = -1;  // in a panel

  Place(const Codes& to, int64_t panel, int64_t row) : data(to.data) {
    int64_t size = to.type == BFLOAT16 ? 2 : 1;
    if (IN_ROWS && to.stride) data += row * to.stride * size;
    else data += size * panel * PANEL * padded(to.columns), place = row - panel_begin(to.rows, panel);
  }

  // CHUNK numbers of a row from byte k on.
  template <class T> void lay(const T* from, int64_t k) const {
    constexpr int64_t count = CHUNK * int64_t(sizeof(T));
    const int8_t* line = reinterpret_cast<const int8_t*>(from);
    if (place < 0) memcpy(data + k, line, count);
    else
      for (int64_t j = 0; j < count; j += TOGETHER) memcpy(data + in_panel(place, k + j), line + j, TOGETHER);
  }
};

inline void narrow_row(const float* x, const Codes& to, const Place& place) {
  for (int64_t k = 0; k < padded(to.columns); k += CHUNK) {
    alignas(64) uint16_t line[CHUNK];
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
    _mm_store_si128(reinterpret_cast<__m128i*>(q + j), _mm512_cvtepi32_epi8(each));
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

// Round a row to int8, or to bfloat16, and lay it into its place.
inline void round_row(const float* x, const Codes& to, int64_t panel, int64_t row) {
  Place place(to, panel, row);
  if (to.type == BFLOAT16) return narrow_row(x, to, place);
  int32_t bits = 0;  // of the largest: sizes are ordered as their bits are, and NaN is above all, so that it stays NaN
#pragma omp simd reduction(max : bits)
  for (int64_t k = 0; k < to.columns; k++) {
    int32_t size = int32_t(as_bits(x[k]) & 0x7fffffff);
    bits = bits > size ? bits : size;
  }
  float most = as_float(uint32_t(bits)), per = most > 1e-30f ? 127 / most : 0;  // 127 / most must be a number
  int32_t sum = 0;
  for (int64_t k = 0; k < padded(to.columns); k += CHUNK) {
    alignas(64) int8_t q[CHUNK];
    sum += round_some(x + k, per, smaller(CHUNK, to.columns - k), q);
    place.lay(q, k);
  }
  to.scale[row] = most / 127;
  to.sum[row] = sum;
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
  float sum = 0, square = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < columns; k++) sum += x[k];
  float mean = sum / columns;
#pragma omp simd reduction(+ : square)
  for (int64_t k = 0; k < columns; k++) square += (x[k] - mean) * (x[k] - mean);
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

inline void turn_head(float* x, int64_t width, float eps, const float* weight, const float* cos, const float* sin) {
  float square = 0;
#pragma omp simd reduction(+ : square)
  for (int64_t j = 0; j < width; j++) square += x[j] * x[j];
  float per = 1 / __builtin_sqrtf(square / width + eps);
  for (int64_t j = 0; j < width / 2; j++) {
    float a = x[2 * j] * per * weight[2 * j], b = x[2 * j + 1] * per * weight[2 * j + 1];
    x[2 * j] = a * cos[j] - b * sin[j];
    x[2 * j + 1] = a * sin[j] + b * cos[j];
  }
}

void turn(const Turn& t) {
  lt::parallel((t.items * t.tokens + 15) / 16, [&](int64_t part) {
    float x[512];
    for (int64_t i = part * 16; i < smaller(t.items * t.tokens, part * 16 + 16); i++) {
      int64_t token = i % t.tokens;
      bool first = token < t.first;
      for (int which = 0; which < 2; which++) {
        const float* weight = which ? (first ? t.first_k : t.rest_k) : (first ? t.first_q : t.rest_q);
        Matrix m{which ? t.k : t.q, t.items * t.tokens * t.heads, t.width, t.width, INT64_MAX, 0, t.type};
        for (int64_t h = 0; h < t.heads; h++) {
          load(m, i * t.heads + h, x);
          turn_head(x, t.width, t.eps, weight, t.cos + token * t.width / 2, t.sin + token * t.width / 2);
          store(m, i * t.heads + h, x);
        }
      }
    }
  });
}

// What products end with, for results that came from elsewhere: rows + bias, GELU, gate.
void activate(const Matrix& from, const Result& r) {
  lt::parallel((from.rows + 7) / 8, [&](int64_t part) {
    float* x = static_cast<float*>(lt::scratch(1, from.columns * 4));
    for (int64_t row = part * 8; row < smaller(from.rows, part * 8 + 8); row++) {
      load(from, row, x);
      if (r.bias)
        for (int64_t j = 0; j < from.columns; j++) x[j] += r.bias[j];
      if (r.mode == STORE) store(r.to, row, x);  // exactly, also numbers near zero
      else finish(r, row, 1, 0, from.columns, x, 0);
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
