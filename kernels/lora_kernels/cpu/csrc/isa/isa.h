// The base of an instruction set's kernels: the compiler's flags determine the instructions. Each file in this folder
// includes this first, then its kernels in the same namespaces.
#pragma once

#ifdef __x86_64__
#include <immintrin.h>
#else
#include <arm_neon.h>
#endif

#include "../kernels.h"

namespace lorafleet {

// Each enters its part of the kernels into the table.
void put_attention(Kernels& kernels);
void put_products(Kernels& kernels);
void put_quantised(Kernels& kernels);
void put_rows(Kernels& kernels);

namespace {

// Whether codes of eight bits are multiplied as unsigned bytes, 128 larger: the only ones that VNNI takes.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr bool kUnsignedBytes = true;
#else
constexpr bool kUnsignedBytes = false;
#endif

// Whether sums of products of codes of so many bits have 16 bits at first, which saves one of three x86 instructions:
// 32 products of at most 15 times 128, half of them in each sum, do not overflow.
#ifdef __x86_64__
template <int Bits>
constexpr bool kSumsAreSmall = Bits == 4 && !kUnsignedBytes;
#else
template <int>
constexpr bool kSumsAreSmall = false;
#endif

#if defined(__aarch64__)
#include "../registers/vec_neon.h"
#elif defined(__AVX512F__)
#include "../registers/vec_avx512.h"
#else
#include "../registers/vec_avx2.h"
#endif

template <typename F>
inline void with_dtype(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kF32:
      return f.template operator()<float>();
    case Dtype::kBf16:
      return f.template operator()<bf16>();
    case Dtype::kF16:
      return f.template operator()<f16>();
  }
}

#include "../registers/math.h"
#include "../registers/tiles.h"

}  // namespace
}  // namespace lorafleet
