#include "dispatch.h"

#include <atomic>
#include <stdexcept>
#include <string>

#if defined(MW_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mw {
namespace {

#if defined(MW_AMX)
// Whether the processor has a matrix unit for bytes and the system lets this process use it, which it must be asked for.
bool may_use_matrix_unit() {
  unsigned a, b, c, d;
  constexpr unsigned kTiles = 1u << 24, kBytes = 1u << 25;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTiles) == 0 || (d & kBytes) == 0) return false;
  constexpr long kAskForState = 0x1023, kTileData = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
  return syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
}
#endif

bool has(Isa isa) {
  if (isa == Isa::portable) return true;
#if defined(MW_X86)
  __builtin_cpu_init();
  if (isa == Isa::avx2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
           __builtin_cpu_supports("bmi2");
  if (isa == Isa::amx) {
#if defined(MW_AMX)
    static const bool may = has(Isa::avx512) && may_use_matrix_unit();
    return may;
#else
    return false;
#endif
  }
  return has(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
         __builtin_cpu_supports("avx512vpopcntdq");
#else
  return false;
#endif
}

std::atomic<int> g_active{-1};

}  // namespace

Isa best_isa() {
  if (has(Isa::amx)) return Isa::amx;
  if (has(Isa::avx512)) return Isa::avx512;
  if (has(Isa::avx2)) return Isa::avx2;
  return Isa::portable;
}

Isa active_isa() {
  int isa = g_active.load(std::memory_order_relaxed);
  if (isa < 0) {
    isa = static_cast<int>(best_isa());
    g_active.store(isa, std::memory_order_relaxed);
  }
  return static_cast<Isa>(isa);
}

void force_isa(Isa isa) {
  if (!has(isa)) throw std::invalid_argument(std::string("this processor or build lacks ") + isa_name(isa));
  g_active.store(static_cast<int>(isa), std::memory_order_relaxed);
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::amx: return "amx";
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "portable";
  }
}

}  // namespace mw
