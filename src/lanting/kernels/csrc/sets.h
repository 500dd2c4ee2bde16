// What an instruction set means for products: how rows of activations lie, how many a micro-kernel takes, in which numbers.
#pragma once
#include "weights.h"

namespace {

#if defined(__AVX2__) && !defined(__AVX512F__) && (defined(__AVXVNNI__) || defined(LT_PRETEND_VNNI))
#define LT_VNNI               // products of four bytes in registers of 32; tests may pretend to have them (`dot4`)
#endif
#if defined(LT_AMX)
constexpr int PANEL = 32;
constexpr int ZERO = 0;       // both sides are signed
#elif defined(__AVX512VNNI__)
constexpr int PANEL = 14;     // 28 of 32 registers hold sums
constexpr int ZERO = 128;     // vpdpbusd wants one unsigned side: weights are shifted, and sums corrected
#elif defined(LT_VNNI)
constexpr int PANEL = 6;      // 12 of 16 registers hold sums
constexpr int ZERO = 128;
#elif defined(__AVX2__)
#define LT_SHORTS             // bytes are widened to 16 bits, see wide.h
constexpr int PANEL = 6;
constexpr int ZERO = 0;
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr int PANEL = 4;
constexpr int ZERO = 0;
#else
constexpr int PANEL = 4;
constexpr int ZERO = 0;
#endif
#if defined(__AVX512VNNI__) && !defined(LT_AMX)
constexpr bool IN_ROWS = true;
#else
constexpr bool IN_ROWS = false;
#endif
#if defined(__AVX512BF16__)
constexpr int DENSE = 2;      // bytes of a number of dense rows, which meet plain weights: 0 where torch multiplies those
#elif defined(__AVX2__)
#define LT_FLOATS             // in float32, see wide.h
constexpr int DENSE = 4;
#else
constexpr int DENSE = 0;
#endif
#if defined(LT_SHORTS)
constexpr bool SHORTS = true;
#else
constexpr bool SHORTS = false;
#endif
#if defined(LT_AMX)
constexpr int64_t TOGETHER = 64;     // bytes of a row that lie together
constexpr int64_t BLOCK = 32 << 20;  // bytes of activations that weights pass by at once: a share of the last cache
#else
constexpr int64_t TOGETHER = 4;
constexpr int64_t BLOCK = 6 << 20;   // bytes of activations that are kept in the last cache while weights pass by
#endif

}  // namespace
