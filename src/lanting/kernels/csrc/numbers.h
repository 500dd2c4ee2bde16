// Loops over numbers that every compiler turns into vectors: no calls, no branches, rounding by bits.
#pragma once
#include <cstdint>
#include <cstring>

#include "abi.h"

namespace {

inline float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

inline float wide(uint16_t x) { return as_float(uint32_t(x) << 16); }

inline uint16_t narrow(float x) {  // to nearest, ties to even
  uint32_t bits = as_bits(x);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float half(uint16_t x) {
  uint32_t sign = uint32_t(x & 0x8000) << 16, rest = x & 0x7fff;
  float scaled = as_float(rest << 13) * as_float(0x77800000);  // 2^112 undoes the other exponent, also of subnormals
  uint32_t bits = rest >= 0x7c00 ? (rest << 13) | 0x7f800000 : as_bits(scaled);
  return as_float(bits | sign);
}

inline int32_t nearest(float x) {  // |x| below 2^22, ties to even
  return int32_t(as_bits(x + 12582912.f)) - 0x4b400000;
}

inline float exp2_of(float x) {  // within 2e-7, for -126 to 126
  x = x < -126.f ? -126.f : x > 126.f ? 126.f : x;
  int32_t whole = nearest(x);
  float r = x - float(whole);
  float p = 1.5403530e-4f;
  p = p * r + 1.3333558e-3f;
  p = p * r + 9.6181291e-3f;
  p = p * r + 5.5504109e-2f;
  p = p * r + 2.4022651e-1f;
  p = p * r + 6.9314718e-1f;
  p = p * r + 1.f;
  return p * as_float(uint32_t(whole + 127) << 23);
}

constexpr float LOG2E = 1.4426950408889634f;

inline float gelu(float x) {  // tanh approximation: x * sigmoid(2u)
  float u = 0.7978845608f * (x + 0.044715f * x * x * x);
  return x / (1.f + exp2_of(-2.f * LOG2E * u));
}

inline float silu(float x) { return x / (1.f + exp2_of(-LOG2E * x)); }

// Dividing takes as long as finishing a row of a narrow product, and mostly there is one item.
inline int64_t offset(const Matrix& m, int64_t row) {
  if (row < m.period) return row * m.stride;
  return row / m.period * m.item_stride + row % m.period * m.stride;
}

inline const float* vector_of(const PerRow& p, int64_t row) {
  int64_t item = row < p.period ? 0 : row / p.period;
  int64_t which = p.each > 1 && row - item * p.period >= p.split;
  return p.data + (item * p.each + which) * p.stride;
}

inline void load(const Matrix& m, int64_t row, float* to) {
  if (m.type == BFLOAT16) {
    const uint16_t* from = static_cast<const uint16_t*>(m.data) + offset(m, row);
    for (int64_t j = 0; j < m.columns; j++) to[j] = wide(from[j]);
  } else {
    memcpy(to, static_cast<const float*>(m.data) + offset(m, row), m.columns * 4);
  }
}

inline void store(const Matrix& m, int64_t row, const float* from) {
  if (m.type == BFLOAT16) {
    uint16_t* to = static_cast<uint16_t*>(m.data) + offset(m, row);
    for (int64_t j = 0; j < m.columns; j++) to[j] = narrow(from[j]);
  } else {
    memcpy(static_cast<float*>(m.data) + offset(m, row), from, m.columns * 4);
  }
}

}  // namespace
