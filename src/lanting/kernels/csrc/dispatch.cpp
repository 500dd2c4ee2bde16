// What Python calls. Picks the best kernels that this processor runs.
#include <cstring>

#include "block.h"
#include "pool.h"
#include "table.h"
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(_WIN32)
extern "C" __declspec(dllimport) int __stdcall IsProcessorFeaturePresent(unsigned long);  // windows.h has an INT8, too
#elif defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace lt {
#define LT_DECLARE(name) extern const Table table_##name;
LT_EACH(LT_DECLARE)

namespace {

#if defined(__x86_64__)
// Tiles of bytes and of bfloat16. Linux gives their 8 KB of state to a process that asks, once for all its threads.
bool asked_for_tiles() {
#if defined(__linux__)
  constexpr unsigned needed = 1u << 22 | 1u << 24 | 1u << 25;  // AMX_BF16, AMX_TILE, AMX_INT8
  constexpr long ask = 0x1023, state = 18;                     // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & needed) == needed && !syscall(SYS_arch_prctl, ask, state);
#else
  return false;
#endif
}

bool has_tiles() {
  static const bool given = asked_for_tiles();
  return given;
}

// What the processor has and the system keeps for a process: not every compiler's library for Windows knows it.
struct Found {
  unsigned one = 0, low = 0, high = 0, more = 0, kept = 0;  // registers of cpuid, and of xgetbv

  Found() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid(1, &a, &b, &one, &d) || !(one & 1u << 27)) return;  // OSXSAVE
    __asm__ volatile("xgetbv" : "=a"(kept), "=d"(d) : "c"(0));
    __get_cpuid_count(7, 0, &a, &low, &high, &d);
    __get_cpuid_count(7, 1, &more, &b, &c, &d);
  }
  bool avx2() const { return (kept & 6) == 6 && low & 1u << 5 && one & 1u << 12 && one & 1u << 29; }  // with FMA, F16C
  bool avx512() const {  // F, DQ, BW, VL; VNNI
    constexpr unsigned all = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
    return (kept & 0xe6) == 0xe6 && (low & all) == all && high & 1u << 11;
  }
};
#endif

bool runs(const char* name) {
#if defined(__x86_64__)
  static const Found cpu;
  bool tiles = !strcmp(name, "amx");
  if (tiles || !strncmp(name, "avx512", 6)) {
    bool bfloat = strcmp(name, "avx512_vnni");
    return cpu.avx512() && (!bfloat || cpu.more & 1u << 5) && (!tiles || has_tiles());
  }
  if (!strcmp(name, "avx_vnni") && !(cpu.more & 1u << 4)) return false;
  if (!strncmp(name, "avx", 3)) return cpu.avx2();
#elif defined(__aarch64__) && defined(__linux__)
  if (!strcmp(name, "dotprod")) return getauxval(AT_HWCAP) & (1 << 20);  // HWCAP_ASIMDDP; a Raspberry Pi 4 lacks it
#elif defined(__aarch64__) && defined(_WIN32)
  if (!strcmp(name, "dotprod")) return IsProcessorFeaturePresent(43);  // PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE
#endif
  return true;  // Apple's all have it
}

#define LT_ADDRESS(name) &table_##name,
const Table* const all[] = {LT_EACH(LT_ADDRESS)};  // the best first

const Table* best() {
  for (const Table* each : all)
    if (runs(each->name)) return each;
  return all[sizeof(all) / sizeof(all[0]) - 1];
}

const Table* used = best();

template <class F> int guarded(F body) {
  try {
    body();
    return 0;
  } catch (...) {  // memory: nothing else is thrown
    return 1;
  }
}

}  // namespace
}  // namespace lt

using namespace lt;

#if defined(_WIN32)
#define LT_EXPORT extern "C" __declspec(dllexport)
#else
#define LT_EXPORT extern "C" __attribute__((visibility("default")))
#endif

LT_EXPORT int lt_abi() { return ABI; }
LT_EXPORT const char* lt_name() { return used->name; }
LT_EXPORT int64_t lt_codes_bytes(int64_t rows, int64_t columns, int dense) { return used->codes_bytes(rows, columns, dense); }
LT_EXPORT int lt_dense() { return used->dense; }
LT_EXPORT void lt_threads(int count) { set_threads(count); }

// The name of the i-th set of kernels that is compiled in and runs here, null behind the last.
LT_EXPORT const char* lt_known(int i) {
  for (const Table* each : all)
    if (runs(each->name) && i-- == 0) return each->name;
  return nullptr;
}

LT_EXPORT int lt_use(const char* name) {
  for (const Table* each : all)
    if (!strcmp(each->name, name) && runs(name)) return used = each, 0;
  return 1;
}

LT_EXPORT int lt_bounds(const Weight* w, float* out) { return guarded([&] { used->bounds(*w, out); }); }
LT_EXPORT int lt_expand(const Weight* w, int8_t* out) { return guarded([&] { used->expand(*w, out); }); }
LT_EXPORT int lt_quantize(const Matrix* m, const Codes* c) { return guarded([&] { used->quantize(*m, *c); }); }
LT_EXPORT int lt_norm(const Matrix* m, const PerRow* shift, const PerRow* scale, const Matrix* rows, const Codes* c) {
  return guarded([&] { used->norm(*m, *shift, *scale, rows, c); });
}
LT_EXPORT int lt_product(const Codes* c, const Weight* w, const Result* r) {
  return guarded([&] { used->product(*c, *w, *r); });
}
LT_EXPORT int lt_turn(const Turn* t) { return guarded([&] { used->turn(*t); }); }
LT_EXPORT int lt_attend(const Attention* a) { return guarded([&] { used->attend(*a); }); }
LT_EXPORT int lt_activate(const Matrix* m, const Result* r) { return guarded([&] { used->activate(*m, *r); }); }
LT_EXPORT int lt_norm_silu(const Matrix* m, const float* gamma, const Matrix* to, int silu) {
  return guarded([&] { used->norm_silu(*m, gamma, *to, silu); });
}
// Operations done, 0 where the set has no instructions for the type (limits.h), negative where it failed.
LT_EXPORT int64_t lt_spin(int32_t type, int64_t rounds, int64_t pieces) {
  int64_t done = 0;
  return guarded([&] { done = used->spin(type, rounds, pieces); }) ? -1 : done;
}
LT_EXPORT int lt_pass(const uint8_t* from, uint8_t* to, int64_t bytes) {
  return guarded([&] { used->pass(from, to, bytes); });
}
LT_EXPORT int lt_conv_bytes(int type) { return used->conv_bytes(type); }
LT_EXPORT int lt_conv_weight(const ConvWeight* w) { return guarded([&] { used->conv_weight(*w); }); }
LT_EXPORT int lt_convolve(const Conv* c) { return guarded([&] { used->convolve(*c); }); }
// The room a block needs, with this set of kernels.
LT_EXPORT int64_t lt_block_bytes(const Block* b) { return block_bytes(*used, *b); }
LT_EXPORT int lt_block(const Block* b) { return guarded([&] { run_block(*used, *b); }); }
