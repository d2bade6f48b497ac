// Reads packed codes (quant_forms.h): as integers in bf16, which holds them exactly, or as weights in fp32. Included
// inside the instruction set's namespace.
#pragma once

constexpr int64_t kChunk = kLanes == 16 ? 256 : 128;  // inputs; their widened codes stay in the first-level cache

// Calls f.template operator()<I>() for I in [0, N), unrolled.
template <int N, typename F>
__attribute__((always_inline)) inline void repeat(const F& f) {
  if constexpr (N > 0) {
    repeat<N - 1>(f);
    f.template operator()<N - 1>();
  }
}

// Touches the pages kPagesAhead after the chunk at `at`: kLinesAhead is too near for address translation.
template <int F>
inline void touch_ahead(const uint8_t* at) {
  touch_pages(at + kPagesAhead, panel_bytes(kQuantForms[F], kChunk));
}

// The fp16 scales and minima of a super-block's columns.
struct SuperScales {
  Vec d[kPanelVecs], min[kPanelVecs];
};

template <int F>
inline void load_super(const uint8_t* head, SuperScales* super) {
  constexpr QuantForm form = kQuantForms[F];
  for (int v = 0; v < kPanelVecs; ++v) {
    super->d[v] = load(reinterpret_cast<const f16*>(head) + v * kLanes);
    if (form.min) super->min[v] = load(reinterpret_cast<const f16*>(head + 64) + v * kLanes);
  }
}

// The scale of half `half` of a group of 32 inputs; if form.group is 32, both halves share it.
template <int F>
inline Vec load_scale(const uint8_t* group, const SuperScales& super, int half, int v) {
  constexpr QuantForm form = kQuantForms[F];
  if constexpr (!form.super) {
    return load(reinterpret_cast<const f16*>(group) + v * kLanes);
  } else if constexpr (form.min) {
    return mul(super.d[v], widen_u8(group + v * kLanes));
  } else {
    return mul(super.d[v], widen_i8(group + half * 32 + v * kLanes));
  }
}

template <int F>
inline Vec load_addend(const uint8_t* group, const SuperScales& super, int v) {
  constexpr QuantForm form = kQuantForms[F];
  if constexpr (!form.super) {
    return load(reinterpret_cast<const f16*>(group + 64) + v * kLanes);
  } else {
    return sub(zero(), mul(super.min[v], widen_u8(group + 32 + v * kLanes)));
  }
}

// The weights of 32 inputs in fp32: writes vectors v of [32, kPanel].
template <int F>
inline void widen_weights(const uint8_t* group, const SuperScales& super, int v, float* out) {
  constexpr QuantForm form = kQuantForms[F];
  const uint8_t* codes = group + group_head_bytes(form);
  const Vec scale[2] = {load_scale<F>(group, super, 0, v), load_scale<F>(group, super, 1, v)};
  Vec addend = zero();
  if constexpr (form.min) addend = load_addend<F>(group, super, v);
  const auto put = [&](int64_t k, Vec code) {
    const Vec s = scale[k / 16];
    store(out + k * kPanel + v * kLanes, form.min ? fma(s, code, addend) : mul(s, code));
  };
  if constexpr (form.bits == 8) {
    for (int k = 0; k < 32; ++k) put(k, widen_i8(codes + k * kPanel + v * kLanes));
  } else {
    const Vec offset = set1(form.offset), sixteen = set1(16);
    for (int pair = 0; pair < 16; ++pair) {
      for (int odd = 0; odd < 2; ++odd) {
        const int64_t column = v * kLanes * 4;
        Vec code = widen_bits(codes + pair / 4 * 128 + column, pair % 4 * 4 + odd * 16, 15);
        if (form.bits == 6) {
          const uint8_t* upper = codes + 512 + pair / 8 * 128 + column;
          code = fma(widen_bits(upper, upper_place(pair % 8) + odd * 16, 3), sixteen, code);
        }
        put(pair * 2 + odd, sub(code, offset));
      }
    }
  }
}

// Widens `inputs` inputs of a panel to fp32 weights [inputs, kPanel]; returns the position of the next ones. first:
// index of the first input.
template <int F>
const uint8_t* widen_chunk(const uint8_t* at, int64_t first, int64_t inputs, float* out) {
  constexpr QuantForm form = kQuantForms[F];
  SuperScales super;
  touch_ahead<F>(at);
  for (int64_t k = 0; k < inputs; k += 32, at += group_bytes(form)) {
    if constexpr (form.super) {
      const int64_t in_super = (first + k) % kSuperInputs;
      if (in_super == 0 || k == 0) load_super<F>(in_super ? at - super_offset(form, in_super) : at, &super);
      if (in_super == 0) at += super_head_bytes(form);
    }
    prefetch_once<group_bytes(form)>(at + kLinesAhead);
    for (int v = 0; v < kPanelVecs; ++v) widen_weights<F>(at, super, v, out + k * kPanel);
  }
  return at;
}

#ifdef __AVX512BF16__
constexpr bool kBf16Products = true;

// The codes of 8 inputs and 16 columns.
template <int F>
struct PackedQuad {
  static constexpr QuantForm form = kQuantForms[F];
  alignas(64) static constexpr CodeTable kTable = code_table(form.bits == 8 ? 4 : form.bits, form.offset);

  const uint8_t* bytes;
  __m512i words, upper;

  PackedQuad(const uint8_t* codes, int quad, int v) : bytes(codes + quad * 8 * kPanel + v * kLanes) {
    if constexpr (form.bits < 8) words = _mm512_loadu_si512(codes + (quad * 2 + v) * 64);
    if constexpr (form.bits == 6) upper = _mm512_loadu_si512(codes + 512 + (quad / 2 * 2 + v) * 64);
  }

  // Inputs 2 I and 2 I + 1 as integers. Odd: whether the quad is the second in its run of 16 inputs.
  template <int I, bool Odd>
  Pairs pair() const {
    if constexpr (form.bits == 8) {
      const uint8_t* from = bytes + I * 2 * kPanel;
      const __m512i even = _mm512_castps_si512(widen_i8(from)), odd = _mm512_castps_si512(widen_i8(from + kPanel));
      // Small integers leave the lower half of an fp32 number zero.
      return _mm512_or_si512(odd, _mm512_srli_epi32(even, 16));
    } else {
      const __m512i codes = I ? _mm512_srli_epi16(words, 4 * I) : words, table = _mm512_load_si512(kTable.bits);
      if constexpr (form.bits == 4) return _mm512_permutexvar_epi16(codes, table);
      constexpr int place = upper_place(Odd * 4 + I);
      const __m512i bits = place < 4 ? _mm512_slli_epi16(upper, 4 - place) : _mm512_srli_epi16(upper, place - 4);
      // 0xca: mask ? codes : bits, bit by bit.
      const __m512i index = _mm512_ternarylogic_epi32(_mm512_set1_epi16(15), codes, bits, 0xca);
      return _mm512_permutex2var_epi16(table, index, _mm512_load_si512(kTable.bits + 32));
    }
  }

  // The same in fp32, inputs 2 I apart from inputs 2 I + 1.
  template <int I, bool Odd>
  void codes(Vec& even, Vec& odd) const {
    if constexpr (form.bits == 8) {
      const uint8_t* from = bytes + I * 2 * kPanel;
      even = widen_i8(from), odd = widen_i8(from + kPanel);
    } else {
      const Pairs both = pair<I, Odd>();
      even = even_half(both), odd = odd_half(both);
    }
  }
};

// A chunk of a panel whose codes are read in place. Its parts are the groups of inputs that share a scale.
template <int F>
struct PackedChunk {
  static constexpr QuantForm form = kQuantForms[F];
  static constexpr int kGroup = form.group;
  static constexpr bool kHasAddends = form.min;

  const uint8_t* groups;
  SuperScales super;

  // at: start of the chunk, whose first input is the first of a super-block.
  explicit PackedChunk(const uint8_t* at) : groups(at + super_head_bytes(form)) {
    touch_ahead<F>(at);
    if constexpr (form.super) {
      load_super<F>(at, &super);
      prefetch_once<super_head_bytes(form)>(at + kLinesAhead);
    }
  }
  const uint8_t* group(int64_t part) const { return groups + part * kGroup / 32 * group_bytes(form); }
  // Prefetches the memory kLinesAhead after quad Q of a part. Prefetching all lines of a part at once would make them
  // delay each other.
  template <int Q>
  void prefetch(int64_t part) const {
    constexpr int64_t bytes = group_bytes(form) * kGroup / 32, lines = (bytes + 63) / 64, quads = kGroup / 8;
    constexpr int64_t begin = lines * Q / quads, end = lines * (Q + 1) / quads;
    prefetch_once<(end - begin) * 64>(groups + part * bytes + begin * 64 + kLinesAhead);
  }
  PackedQuad<F> quad(int64_t part, int q, int v) const {
    return {group(part) + group_head_bytes(form), static_cast<int>(part * kGroup % 32) / 8 + q, v};
  }
  Vec scale(int64_t part, int v) const {
    return load_scale<F>(group(part), super, static_cast<int>(part * kGroup % 32) / 16, v);
  }
  Vec addend(int64_t part, int v) const { return load_addend<F>(group(part), super, v); }
};

#else
constexpr bool kBf16Products = false;
#endif
