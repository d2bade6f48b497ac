// Which of the instruction sets' kernels are in use: the best ones that the processor has, unless another is chosen.
#include "operations.h"

#ifndef __aarch64__
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lorafleet {
namespace {

#ifndef __aarch64__
// Whether the processor multiplies bf16 in tile registers (AMX) and the system lets this process use them.
bool may_use_tiles() {
  constexpr unsigned kBf16 = 1 << 22, kTile = 1 << 24;
  constexpr long kAskFor = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kBf16 | kTile)) != (kBf16 | kTile)) return false;
  return syscall(SYS_arch_prctl, kAskFor, kTileData) == 0;
}
#endif

const Kernels* find_kernels(std::string_view isa) {
#ifdef __aarch64__
  if (isa == "neon") return &neon_kernels();
#else
  __builtin_cpu_init();
  if (isa == "avx2" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &avx2_kernels();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (isa == "avx512" && avx512) return &avx512_kernels();
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  if (isa == "avx512_bf16" && avx512_bf16) return &avx512_bf16_kernels();
  if (isa == "amx_bf16" && avx512_bf16 && may_use_tiles()) return &amx_bf16_kernels();
#endif
  return nullptr;
}

const Kernels* best_kernels() {
  for (const char* isa : {"amx_bf16", "avx512_bf16", "avx512", "avx2", "neon"})
    if (const Kernels* found = find_kernels(isa)) return found;
  return nullptr;
}

}  // namespace

#ifdef __aarch64__
const bool is_amd = false;
#else
const bool is_amd = (__builtin_cpu_init(), __builtin_cpu_is("amd"));
#endif

const Kernels* active = best_kernels();

std::string isa() { return active ? active->name : ""; }

bool set_isa(std::string_view name) {
  const Kernels* found = find_kernels(name);
  if (found) active = found;
  return found;
}

}  // namespace lorafleet
