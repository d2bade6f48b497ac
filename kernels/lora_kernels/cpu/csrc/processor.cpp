// The instruction sets that the processor has kernels for, and the one in use.
#include <dlfcn.h>

#include "operations.h"

#ifndef __aarch64__
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lorafleet {
namespace {

#ifndef __aarch64__
struct Leaf {
  unsigned a = 0, b = 0, c = 0, d = 0;

  explicit Leaf(unsigned part) { __get_cpuid_count(7, part, &a, &b, &c, &d); }
};

// Whether the processor multiplies bf16 in tile registers (AMX) and the system permits this process to use them.
bool may_use_tiles() {
  constexpr unsigned kBf16 = 1 << 22, kTile = 1 << 24;
  constexpr long kAskFor = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if ((Leaf(0).d & (kBf16 | kTile)) != (kBf16 | kTile)) return false;
  return syscall(SYS_arch_prctl, kAskFor, kTileData) == 0;
}
#endif

std::string in_use;

}  // namespace

#ifdef __aarch64__
const bool is_amd = false;
#else
const bool is_amd = (__builtin_cpu_init(), __builtin_cpu_is("amd"));
#endif

const Kernels* active = nullptr;

std::string isa() { return in_use; }

std::string isas() {
#ifdef __aarch64__
  return "neon";
#else
  __builtin_cpu_init();  // omits registers that the system does not save
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool avx512_vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  const bool avx512_bf16 = avx512_vnni && __builtin_cpu_supports("avx512bf16");
  constexpr unsigned kAvxVnni = 1 << 4;
  // Intel's processors take longer for a product of bf16 pairs than for the same products in fp32.
  const std::pair<const char*, bool> found[] = {
      {"amx_bf16", avx512_bf16 && may_use_tiles()},
      {"avx512_bf16", avx512_bf16 && is_amd},
      {"avx512_vnni", avx512_vnni},
      {"avx512_bf16", avx512_bf16 && !is_amd},
      {"avx512", avx512},
      {"avx2_vnni", avx2 && Leaf(1).a & kAvxVnni},
      {"avx2", avx2},
  };
  std::string names;
  for (const auto& [name, is_there] : found)
    if (is_there) names += (names.empty() ? "" : " ") + std::string(name);
  return names;
#endif
}

std::string use_isa(std::string_view name, std::string_view library) {
  void* const handle = dlopen(std::string(library).c_str(), RTLD_NOW | RTLD_LOCAL);  // stays open: kernels may run
  void* const kernels = handle ? dlsym(handle, "lorafleet_kernels") : nullptr;
  if (!kernels) return dlerror();
  active = reinterpret_cast<decltype(&lorafleet_kernels)>(kernels)();
  in_use = name;
  return "";
}

}  // namespace lorafleet
