// What happens to single rows between the products: rounding to int8, norms, rotary turns.
#pragma once
#include "product.h"

namespace {

// `count` bytes of a row from byte k on, into their places of a panel.
inline void lay_bytes(const void* from, int64_t k, int64_t count, int64_t place, int8_t* panel) {
  const int8_t* line = static_cast<const int8_t*>(from);
  for (int64_t j = 0; j < count; j += TOGETHER) memcpy(panel + in_panel(place, k + j), line + j, TOGETHER);
}

inline void narrow_row(const float* x, const Codes& to, int64_t panel, int64_t place) {
  int64_t columns = padded(to.columns);
  int8_t* out = to.data + 2 * panel * PANEL * columns;
  for (int64_t k = 0; k < columns; k += CHUNK) {
    uint16_t line[CHUNK];
    int64_t count = smaller(CHUNK, to.columns - k);
    if (count == CHUNK) {
      for (int64_t j = 0; j < CHUNK; j++) line[j] = narrow(x[k + j]);
    } else {
      for (int64_t j = 0; j < CHUNK; j++) line[j] = j < count ? narrow(x[k + j]) : 0;
    }
    lay_bytes(line, 2 * k, 2 * CHUNK, place, out);
  }
}

// Round a row to int8, or to bfloat16, and lay it into its place of a panel.
inline void round_row(const float* x, const Codes& to, int64_t panel, int64_t row) {
  int64_t columns = padded(to.columns), place = row - panel_begin(to.rows, panel);
  if (to.type == BFLOAT16) return narrow_row(x, to, panel, place);
  int32_t bits = 0;  // of the largest: sizes are ordered as their bits are, and NaN is above all, so that it stays NaN
#pragma omp simd reduction(max : bits)
  for (int64_t k = 0; k < to.columns; k++) {
    int32_t size = int32_t(as_bits(x[k]) & 0x7fffffff);
    bits = bits > size ? bits : size;
  }
  float most = as_float(uint32_t(bits)), per = most > 1e-30f ? 127 / most : 0;  // 127 / most must be a number
  int32_t sum = 0;
  int8_t* out = to.data + panel * PANEL * columns;
  for (int64_t k = 0; k < columns; k += CHUNK) {
    int8_t q[CHUNK];
    int64_t count = smaller(CHUNK, to.columns - k);
    if (count == CHUNK) {
      for (int64_t j = 0; j < CHUNK; j++) q[j] = int8_t(nearest(x[k + j] * per));
    } else {
      for (int64_t j = 0; j < CHUNK; j++) q[j] = j < count ? int8_t(nearest(x[k + j] * per)) : 0;
    }
    for (int64_t j = 0; j < CHUNK; j++) sum += q[j];
    lay_bytes(q, k, CHUNK, place, out);
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
      finish(r, row, 0, from.columns, x);
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
