// Packed weights, read as they lie in their files, become int8 that share one scale per row:
//     q = round(value / bound * 127)
//
// Rounding to 8 bits once more costs little beside 4 bits, and lets a product run over all of a row in integers. The
// bound of a row (a tensor of its own, see `row_bound`) is the largest value its codes could stand for.
#pragma once
#include "bytes.h"

#if defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AMX_BF16__)
#define LT_AMX  // see amx.h
#endif

namespace {

constexpr int64_t CHUNK = 64;  // values that are expanded together
constexpr int TILE = 32;       // columns of a product (rows of a weight) that share a tile

inline float number(const void* at, int64_t i, int32_t type) {
  if (type == FLOAT32) return static_cast<const float*>(at)[i];
  uint16_t x = static_cast<const uint16_t*>(at)[i];
  return type == BFLOAT16 ? wide(x) : half(x);
}

inline float half_at(const uint8_t* at) {
  uint16_t x;
  memcpy(&x, at, 2);
  return half(x);
}

inline float absolute(float x) { return x < 0 ? -x : x; }
inline float larger(float a, float b) { return a > b ? a : b; }
inline float largest(float a, float b) { return a > b || a != a ? a : b; }  // NaN stays: a spoilt row must show it
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Scale and minimum of the j-th 32 values of a Q4_K block: 6 bits each, packed in 12 bytes.
inline void six_bits(const uint8_t* s, int j, int& scale, int& least) {
  if (j < 4) {
    scale = s[j] & 63, least = s[j + 4] & 63;
  } else {
    scale = (s[j + 4] & 15) | (s[j - 4] >> 6) << 4;
    least = (s[j + 4] >> 4) | (s[j] >> 6) << 4;
  }
}

// Whether a group of INT8 or INT4 is all zeros. Quantizers give those any scale, 1 say, beside which a row would vanish.
inline bool vacant(const Weight& w, int64_t row, int64_t group) {
  int64_t bytes = w.kind == INT8 ? w.group : w.group / 2;
  const uint8_t *at = w.data + row * w.row_bytes + group * bytes, zero = w.kind == INT8 ? 0 : 0x88;
  for (int64_t i = 0; i < bytes; i++)
    if (at[i] != zero) return false;
  return true;
}

inline float row_bound(const Weight& w, int64_t row) {
  const uint8_t* at = w.data + row * w.row_bytes;
  float most = 0;
  if (w.kind == INT8 || w.kind == INT4) {
    int64_t groups = w.columns / w.group;
    for (int64_t g = 0; g < groups; g++) {
      float scale = absolute(number(w.scale, row * groups + g, w.scale_type));
      if (!(scale <= most) && !vacant(w, row, g)) most = largest(most, scale);
    }
    return most * (w.kind == INT8 ? 127 : 8);
  }
  if (w.kind == Q4_0 || w.kind == Q8_0) {
    int step = w.kind == Q4_0 ? 18 : 34;
    for (int64_t b = 0; b < w.columns / 32; b++) most = largest(most, absolute(half_at(at + b * step)));
    return most * (w.kind == Q4_0 ? 8 : 127);
  }
  for (int64_t b = 0; b < w.columns / 256; b++) {
    if (w.kind == Q4_K) {
      const uint8_t* block = at + b * 144;
      float d = half_at(block), dmin = half_at(block + 2);
      for (int j = 0; j < 8; j++) {
        int scale, least;
        six_bits(block + 4, j, scale, least);
        most = largest(most, largest(absolute(15 * d * scale - dmin * least), absolute(dmin * least)));
      }
    } else {
      const uint8_t* block = at + b * 210;
      float d = half_at(block + 208);
      for (int j = 0; j < 16; j++) most = largest(most, absolute(32 * d * int8_t(block[192 + j])));
    }
  }
  return most;
}

inline int8_t to_int8(float x) {
  int32_t q = nearest(x);
  return int8_t(q < -127 ? -127 : q > 127 ? 127 : q);
}

// 64 values of a row from column k on, k a multiple of 64; what lies behind the row's end is 0.
inline void fill_plain(const Weight& w, int64_t row, int64_t k, float per, int8_t* out) {
  const uint8_t* at = w.data + row * w.row_bytes;
  int64_t count = smaller(CHUNK, w.columns - k), groups = w.group ? w.columns / w.group : 0;
  for (int64_t i = 0; i < CHUNK; i++) out[i] = 0;
  for (int64_t i = 0; i < count; i++) {
    int64_t c = k + i;
    float x = 0;
    if (w.kind == INT8) {
      if (groups == 1) {
        out[i] = int8_t(at[c]) == -128 ? -127 : int8_t(at[c]);
        continue;
      }
      x = int8_t(at[c]) * number(w.scale, row * groups + c / w.group, w.scale_type);
    } else if (w.kind == INT4) {
      int64_t g = c / w.group, j = c % w.group, half_group = w.group / 2;
      uint8_t byte = at[g * half_group + j % half_group];
      x = ((j < half_group ? byte & 15 : byte >> 4) - 8) * number(w.scale, row * groups + g, w.scale_type);
    } else if (w.kind == Q4_0) {
      const uint8_t* block = at + c / 32 * 18;
      int j = c % 32;
      x = half_at(block) * ((j < 16 ? block[2 + j] & 15 : block[2 + j - 16] >> 4) - 8);
    } else if (w.kind == Q8_0) {
      const uint8_t* block = at + c / 32 * 34;
      x = half_at(block) * int8_t(block[2 + c % 32]);
    } else if (w.kind == Q4_K) {
      const uint8_t* block = at + c / 256 * 144;
      int j = c % 256 / 32, scale, least;
      six_bits(block + 4, j, scale, least);
      uint8_t byte = block[16 + j / 2 * 32 + c % 32];
      x = half_at(block) * scale * (j % 2 ? byte >> 4 : byte & 15) - half_at(block + 2) * least;
    } else {
      const uint8_t* block = at + c / 256 * 210;
      int j = c % 256, l = j % 128, part = l / 32, side = j / 128;
      uint8_t low = block[side * 64 + (part % 2) * 32 + l % 32], high = block[128 + side * 32 + l % 32];
      int q = ((part < 2 ? low & 15 : low >> 4) | ((high >> (2 * part)) & 3) << 4) - 32;
      x = half_at(block + 208) * int8_t(block[192 + j / 16]) * q;
    }
    out[i] = to_int8(x * per);
  }
}

#if defined(LT_BYTES)

inline __m128i sixteen_at(const uint8_t* at) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)); }
inline __m256i thirty_two_at(const uint8_t* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }

inline Bytes nibbles(const uint8_t* at) {  // low bits of 32 bytes, then their high bits
  __m256i bytes = thirty_two_at(at);
  return and64(halves(bytes, _mm256_srli_epi16(bytes, 4)), 15);
}

inline __m256i nibbles_of_16(__m128i bytes) {
  return _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(bytes, 4), bytes), _mm256_set1_epi8(15));
}

inline Bytes twice(__m128i a, __m128i b) { return halves(_mm256_broadcastsi128_si256(a), _mm256_broadcastsi128_si256(b)); }

// 64 signed bytes, 16 in a row times a factor each, at most 1 (`shift` 0) or 4 (`shift` 3) in size, to nearest.
inline Bytes scaled(Bytes q, const float* factors, int shift) {
  int16_t f[4];
  for (int i = 0; i < 4; i++) {
    int32_t x = nearest(factors[i] * float(32768 >> shift));
    f[i] = int16_t(x > 32767 ? 32767 : x < -32767 ? -32767 : x);
  }
  return at_least(times(q, f, shift), -127);  // -128 times 1, which our quantizers never write
}

// 64 values of INT4 from column k on.
inline Bytes fill_int4(const Weight& w, int64_t row, int64_t k, float per) {
  const uint8_t* at = w.data + row * w.row_bytes;
  const int shift = __builtin_ctzll(w.group);  // dividing would take as long as all the rest
  int64_t groups = w.columns >> shift, g = k >> shift;
  auto table = [&](int64_t i) {
    float step = per * number(w.scale, row * groups + i, w.scale_type);
    return sixteen(step, -8 * step);
  };
  if (w.group == 64) return look_up(same(table(g)), nibbles(at + g * 32));
  if (w.group == 128) {  // low bits of 64 bytes, or their high bits
    Bytes q = load64(at + g * 64);
    return look_up(same(table(g)), and64(k % 128 ? bits_down(q) : q, 15));
  }
  if (w.group == 32) {
    __m256i first = nibbles_of_16(sixteen_at(at + g * 16)), second = nibbles_of_16(sixteen_at(at + g * 16 + 16));
    return look_up(twice(table(g), table(g + 1)), halves(first, second));
  }
  auto pair = [&](int64_t i) {  // of groups of 16
    auto eight = [&](int64_t j) {
      __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at + j * 8));
      return _mm_and_si128(_mm_unpacklo_epi64(bytes, _mm_srli_epi16(bytes, 4)), _mm_set1_epi8(15));
    };
    return _mm256_set_m128i(eight(i + 1), eight(i));
  };
  auto tables = [&](int64_t i) { return _mm256_set_m128i(table(i + 1), table(i)); };
  return look_up(halves(tables(g), tables(g + 2)), halves(pair(g), pair(g + 2)));
}

// 64 values of Q6_K from column k on.
inline Bytes fill_q6(const Weight& w, int64_t row, int64_t k, float per) {
  const uint8_t* block = w.data + row * w.row_bytes + k / 256 * 210;
  int side = k % 256 / 128, part = k % 128 / 64;
  Bytes low = load64(block + side * 64);
  __m256i high = thirty_two_at(block + 128 + side * 32);
  if (part) low = bits_down(low), high = _mm256_srli_epi16(high, 4);
  Bytes two = bits_up(and64(halves(high, _mm256_srli_epi16(high, 2)), 3));
  float d = per * half_at(block + 208), f[4];
  for (int i = 0; i < 4; i++) f[i] = d * int8_t(block[192 + side * 8 + part * 4 + i]);
  return scaled(less(or64(and64(low, 15), two), 32), f, 3);
}

template <int kind> inline Bytes fill(const Weight& w, int64_t row, int64_t k, float per) {
  const uint8_t* at = w.data + row * w.row_bytes;
  if constexpr (kind == INT8) {
    Bytes q = load64(at + k);
    if (w.group == w.columns) return at_least(q, -127);
    int64_t groups = w.columns / w.group;
    float f[4];
    for (int i = 0; i < 4; i++) f[i] = per * number(w.scale, row * groups + (k + 16 * i) / w.group, w.scale_type);
    return scaled(q, f, 0);
  } else if constexpr (kind == INT4) {
    return fill_int4(w, row, k, per);
  } else if constexpr (kind == Q4_0) {
    const uint8_t *block = at + k / 32 * 18, *next = block + 18;
    float a = per * half_at(block), b = per * half_at(next);
    Bytes codes = halves(nibbles_of_16(sixteen_at(block + 2)), nibbles_of_16(sixteen_at(next + 2)));
    return look_up(twice(sixteen(a, -8 * a), sixteen(b, -8 * b)), codes);
  } else if constexpr (kind == Q8_0) {
    const uint8_t* block = at + k / 32 * 34;
    float a = per * half_at(block), b = per * half_at(block + 34), f[4] = {a, a, b, b};
    return scaled(halves(thirty_two_at(block + 2), thirty_two_at(block + 36)), f, 0);
  } else if constexpr (kind == Q4_K) {
    const uint8_t* block = at + k / 256 * 144;
    int j = k % 256 / 64, scale, least;
    float d = per * half_at(block), dmin = per * half_at(block + 2);
    six_bits(block + 4, 2 * j, scale, least);
    __m128i first = sixteen(d * scale, -dmin * least);
    six_bits(block + 4, 2 * j + 1, scale, least);
    return look_up(twice(first, sixteen(d * scale, -dmin * least)), nibbles(block + 16 + j * 32));
  } else {
    return fill_q6(w, row, k, per);
  }
}
#endif

}  // namespace
