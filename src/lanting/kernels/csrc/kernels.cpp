// All kernels for one instruction set: compiled several times, with other flags and another LT_NAME.
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "attention.h"
#include "limits.h"
#include "table.h"
#include "vae.h"

#define LT_TEXT(x) LT_TEXT_OF(x)
#define LT_TEXT_OF(x) #x
#define LT_JOIN(a, b) LT_JOIN_OF(a, b)
#define LT_JOIN_OF(a, b) a##b

namespace lt {
extern const Table LT_JOIN(table_, LT_NAME);
const Table LT_JOIN(table_, LT_NAME) = {LT_TEXT(LT_NAME), codes_bytes, DENSE,     IN_ROWS, bounds,   expand_all, quantize,
                                        norm,             any_product, turn,    attend,  activate, norm_silu,  spin,
                                        pass,             conv::bytes, conv::lay, conv::run};
}  // namespace lt
