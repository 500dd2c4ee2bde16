// What this processor can do at best: loops of nothing but the instructions that products are made of, on numbers that
// never leave the registers, and passes over more memory than any cache holds. Measured, because makers state neither
// the clock under load nor what a machine's memory really gives.
#pragma once
#include "pool.h"
#include "weights.h"

namespace {

enum Peak : int32_t { PEAK_FLOAT32 = 0, PEAK_BFLOAT16 = 1, PEAK_INT8 = 2 };

#if defined(__AVX512F__)
constexpr int REGISTER = 64, CHAINS = 24;  // sums that don't wait for one another: latency times ports, and some
#define LT_OPAQUE(x) asm volatile("" : "+v"(x))
#elif defined(__AVX2__)
constexpr int REGISTER = 32, CHAINS = 12;
#define LT_OPAQUE(x) asm volatile("" : "+x"(x))
#elif defined(__SSE2__)
constexpr int REGISTER = 16, CHAINS = 12;
#define LT_OPAQUE(x) asm volatile("" : "+x"(x))
#elif defined(__ARM_NEON)
constexpr int REGISTER = 16, CHAINS = 24;
#define LT_OPAQUE(x) asm volatile("" : "+w"(x))
#else
constexpr int REGISTER = 16, CHAINS = 4;
#define LT_OPAQUE(x) asm volatile("" : "+m"(x))
#endif

typedef float Floats __attribute__((vector_size(REGISTER)));
typedef int32_t Ints __attribute__((vector_size(REGISTER), aligned(4), may_alias));

// `rounds` times one step of every chain; returns operations, a multiplication and an addition being two.
template <class V, class F> inline int64_t chains(int64_t rounds, int64_t each, F step) {
  V sum[CHAINS];
#pragma GCC unroll 24
  for (int i = 0; i < CHAINS; i++) {
    sum[i] = V{};
    LT_OPAQUE(sum[i]);  // else chains that begin alike would be computed once
  }
  for (int64_t round = 0; round < rounds; round++) {
#pragma GCC unroll 24
    for (int i = 0; i < CHAINS; i++) step(sum[i]);
  }
#pragma GCC unroll 24
  for (int i = 0; i < CHAINS; i++) LT_OPAQUE(sum[i]);  // somebody might look
  return rounds * CHAINS * each;
}

inline int64_t spin_floats(int64_t rounds) {
  Floats x = Floats{} + .99f, y = Floats{} + 1.f;  // towards 100: neither infinite nor next to nothing
  LT_OPAQUE(x);
  LT_OPAQUE(y);
  return chains<Floats>(rounds, REGISTER / 4 * 2, [&](Floats& sum) { sum = sum * x + y; });
}

#if defined(LT_AMX)
// Four sums of tiles, as products have them.
template <bool brain> int64_t spin_tiles(int64_t rounds) {
  Shapes shapes;
  _tile_zero(0);  // zeros cost what other numbers do
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (int64_t round = 0; round < rounds; round++) {
    if constexpr (brain) {
      _tile_dpbf16ps(0, 6, 4);
      _tile_dpbf16ps(1, 6, 5);
      _tile_dpbf16ps(2, 7, 4);
      _tile_dpbf16ps(3, 7, 5);
    } else {
      _tile_dpbssd(0, 6, 4);
      _tile_dpbssd(1, 6, 5);
      _tile_dpbssd(2, 7, 4);
      _tile_dpbssd(3, 7, 5);
    }
  }
  return rounds * 4 * 16 * 16 * (brain ? 64 : 128);
}
#endif

inline int64_t spin_brains(int64_t rounds) {
#if defined(LT_AMX)
  return spin_tiles<true>(rounds);
#elif defined(__AVX512BF16__)
  __m512i bits = _mm512_set1_epi16(0x3f80);  // ones
  LT_OPAQUE(bits);
  __m512bh x = (__m512bh)bits;
  return chains<__m512>(rounds, 64, [&](__m512& sum) { sum = _mm512_dpbf16_ps(sum, x, x); });
#else
  (void)rounds;
  return 0;  // widened to float32 here
#endif
}

// What `micro` of product.h does for 8-bit integers, without its loads.
inline int64_t spin_bytes(int64_t rounds) {
#if defined(LT_AMX)
  return spin_tiles<false>(rounds);
#elif defined(__AVX512VNNI__)
  __m512i x = _mm512_set1_epi8(3);
  LT_OPAQUE(x);
  return chains<__m512i>(rounds, 128, [&](__m512i& sum) { sum = _mm512_dpbusd_epi32(sum, x, x); });
#elif defined(__AVXVNNI__)
  __m256i x = _mm256_set1_epi8(3);
  LT_OPAQUE(x);
  return chains<__m256i>(rounds, 64, [&](__m256i& sum) { sum = _mm256_dpbusd_avx_epi32(sum, x, x); });
#elif defined(__AVX2__)
  __m256i x = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
  LT_OPAQUE(ones);
  return chains<__m256i>(rounds, 64, [&](__m256i& sum) {
    LT_OPAQUE(x);  // else the product would be computed once
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(x, x), ones));
  });
#elif defined(__ARM_FEATURE_DOTPROD)
  int8x16_t x = vdupq_n_s8(3);
  LT_OPAQUE(x);
  return chains<int32x4_t>(rounds, 32, [&](int32x4_t& sum) { sum = vdotq_s32(sum, x, x); });
#elif defined(__SSE2__)
  __m128i x = _mm_set1_epi16(3);
  return chains<__m128i>(rounds, 16, [&](__m128i& sum) {
    LT_OPAQUE(x);
    sum = _mm_add_epi32(sum, _mm_madd_epi16(x, x));
  });
#elif defined(__ARM_NEON)
  int8x8_t x = vdup_n_s8(3);
  return chains<int32x4_t>(rounds, 16, [&](int32x4_t& sum) {
    LT_OPAQUE(x);
    sum = vpadalq_s16(sum, vmull_s8(x, x));
  });
#else
  (void)rounds;
  return 0;
#endif
}

// All threads at once; more pieces than threads, so that one that wakes late does less and none waits.
int64_t spin(int32_t type, int64_t rounds, int64_t pieces) {
  int64_t done = 0;
  auto work = [&](int64_t n) { return type == PEAK_INT8 ? spin_bytes(n) : type ? spin_brains(n) : spin_floats(n); };
  lt::parallel(pieces, [&](int64_t) { __atomic_fetch_add(&done, work(rounds), __ATOMIC_RELAXED); });
  return done;
}

// Read `bytes`, or copy them where `to` is not null.
void pass(const uint8_t* from, uint8_t* to, int64_t bytes) {
  constexpr int64_t PIECE = 1 << 20;
  lt::parallel((bytes + PIECE - 1) / PIECE, [&](int64_t piece) {
    int64_t begin = piece * PIECE, size = smaller(PIECE, bytes - begin);
    if (to) {
      memcpy(to + begin, from + begin, size);
      return;
    }
    Ints sum[8] = {};
    for (int64_t at = begin; at + 8 * REGISTER <= begin + size; at += 8 * REGISTER)
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) sum[i] ^= *reinterpret_cast<const Ints*>(from + at + i * REGISTER);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) LT_OPAQUE(sum[i]);
  });
}

}  // namespace
