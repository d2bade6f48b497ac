// Matrix product with quantised weights. Included inside the instruction set's namespace.
//
// A panel's codes are widened a chunk of inputs at a time into the thread's scratch memory, where all rows use them:
// they come from memory once, packed. With bf16 products the codes stay integers, which bf16 holds exactly, and each
// group's sum is scaled in fp32; otherwise a code becomes its weight in fp32. Either way no weight is rounded to bf16.
#pragma once

constexpr int64_t kChunk = kLanes == 16 ? 256 : 128;  // inputs; their widened codes stay in the first-level cache
constexpr int64_t kQuantRows = 128;                   // rows that share a widened chunk
constexpr int64_t kQuantAhead = 4096;                 // bytes between what is widened and what is prefetched

// One chunk of a panel, widened.
struct Widened {
  void* codes;      // bf16 pairs [inputs / 2, kPanel, 2], or fp32 weights [inputs, kPanel]
  float* scales;    // [groups, kPanel], with bf16 products only
  float* addends;   // [groups, kPanel], with bf16 products and forms that have minima only
};

// Scales and addends of one group of 32 inputs; two scales where groups are of 16.
template <int F>
inline const uint8_t* load_scales(const uint8_t* at, const Vec* d, const Vec* d_min, int v, Vec* scale, Vec* addend) {
  constexpr QuantForm form = kQuantForms[F];
  if constexpr (!form.super) {
    scale[0] = load(reinterpret_cast<const f16*>(at) + v * kLanes);
    if (form.min) *addend = load(reinterpret_cast<const f16*>(at + 64) + v * kLanes);
  } else if constexpr (form.min) {
    scale[0] = mul(d[v], widen_u8(at + v * kLanes));
    *addend = sub(zero(), mul(d_min[v], widen_u8(at + 32 + v * kLanes)));
  } else {
    scale[0] = mul(d[v], widen_i8(at + v * kLanes));
    scale[1] = mul(d[v], widen_i8(at + 32 + v * kLanes));
  }
  return at + group_head_bytes(form);
}

#ifdef __AVX512BF16__
constexpr bool kBf16Products = true;

// The codes of 32 inputs as pairs of bf16 integers.
template <int F>
inline void widen_codes(const uint8_t* at, uint16_t* out) {
  constexpr QuantForm form = kQuantForms[F];
  if constexpr (form.bytes) {
    for (int pair = 0; pair < 16; ++pair) {
      for (int v = 0; v < 2; ++v) {
        const uint8_t* from = at + pair * 2 * kPanel + v * kLanes;
        const __m512i even = _mm512_castps_si512(widen_i8(from)), odd = _mm512_castps_si512(widen_i8(from + kPanel));
        // Small integers leave the lower half of an fp32 number zero.
        _mm512_storeu_si512(out + (pair * 2 + v) * 32, _mm512_or_si512(odd, _mm512_srli_epi32(even, 16)));
      }
    }
  } else {
    alignas(64) static constexpr auto kTable = nibble_table(form.offset);
    const __m512i table = _mm512_load_si512(kTable.bits);
    for (int quad = 0; quad < 4; ++quad) {
      for (int v = 0; v < 2; ++v) {
        __m512i words = _mm512_loadu_si512(at + (quad * 2 + v) * 64);
        for (int i = 0; i < 4; ++i) {
          _mm512_storeu_si512(out + ((quad * 4 + i) * 2 + v) * 32, _mm512_permutexvar_epi16(words, table));
          words = _mm512_srli_epi16(words, 4);
        }
      }
    }
  }
}
#else
constexpr bool kBf16Products = false;
#endif

// The weights of 32 inputs in fp32.
template <int F>
inline void widen_weights(const uint8_t* at, int v, const Vec* scale, Vec addend, float* out) {
  constexpr QuantForm form = kQuantForms[F];
  const auto put = [&](int64_t k, Vec code) {
    const Vec s = form.group == 16 && k >= 16 ? scale[1] : scale[0];
    store(out + k * kPanel, form.min ? fma(s, code, addend) : mul(s, code));
  };
  if constexpr (form.bytes) {
    for (int k = 0; k < 32; ++k) put(k, widen_i8(at + k * kPanel + v * kLanes));
  } else {
    const Vec offset = set1(form.offset);
    for (int quad = 0; quad < 4; ++quad) {
      const uint8_t* words = at + quad * 128 + v * kLanes * 4;
      for (int i = 0; i < 4; ++i) {
        put(quad * 8 + i * 2, sub(widen_nibble(words, i * 4), offset));
        put(quad * 8 + i * 2 + 1, sub(widen_nibble(words, i * 4 + 16), offset));
      }
    }
  }
}

// Widens `inputs` of a panel and returns where the next ones lie.
template <int F>
const uint8_t* widen_chunk(const uint8_t* at, int64_t first, int64_t inputs, bool integers, const Widened& out) {
  constexpr QuantForm form = kQuantForms[F];
  constexpr int kGroups = 32 / form.group;
  Vec d[kPanelVecs], d_min[kPanelVecs], scale[2], addend = zero();
  for (int64_t k = 0; k < inputs; k += 32) {
    if constexpr (form.super) {
      const int64_t in_super = (first + k) % kSuperInputs;
      const uint8_t* head = in_super ? at - super_offset(form, in_super) : at;
      if (in_super == 0) at += super_head_bytes(form);
      if (in_super == 0 || k == 0) {
        for (int v = 0; v < kPanelVecs; ++v) {
          d[v] = load(reinterpret_cast<const f16*>(head) + v * kLanes);
          if (form.min) d_min[v] = load(reinterpret_cast<const f16*>(head + 64) + v * kLanes);
        }
      }
    }
    prefetch_ahead<group_bytes(form)>(at + kQuantAhead);
    const uint8_t* codes = at + group_head_bytes(form);
    for (int v = 0; v < kPanelVecs; ++v) {
      load_scales<F>(at, d, d_min, v, scale, &addend);
      if (!kBf16Products || !integers) {
        widen_weights<F>(codes, v, scale, addend, static_cast<float*>(out.codes) + k * kPanel + v * kLanes);
        continue;
      }
      for (int g = 0; g < kGroups; ++g) store(out.scales + (k / form.group + g) * kPanel + v * kLanes, scale[g]);
      if (form.min) store(out.addends + k / 32 * kPanel + v * kLanes, addend);
    }
#ifdef __AVX512BF16__
    if (integers) widen_codes<F>(codes, static_cast<uint16_t*>(out.codes) + k * kPanel);
#endif
    at = codes + code_bytes(form);
  }
  return at;
}

using WidenChunk = const uint8_t* (*)(const uint8_t*, int64_t, int64_t, bool, const Widened&);
constexpr WidenChunk kWidenChunk[] = {widen_chunk<0>, widen_chunk<1>, widen_chunk<2>, widen_chunk<3>,
                                      widen_chunk<4>, widen_chunk<5>, widen_chunk<6>};
static_assert(sizeof(kWidenChunk) / sizeof(WidenChunk) == kNumQuantForms);

// sums[i] += x[i] . weights in fp32.
template <int Rows>
inline void float_tile(const float* x, int64_t x_stride, int64_t inputs, const float* weights, float* sums) {
  Vec acc[Rows][kPanelVecs];
  for (int i = 0; i < Rows; ++i)
    for (int v = 0; v < kPanelVecs; ++v) acc[i][v] = load(sums + i * kPanel + v * kLanes);
  for (int64_t k = 0; k < inputs; ++k) {
    Vec w[kPanelVecs];
    for (int v = 0; v < kPanelVecs; ++v) w[v] = load(weights + k * kPanel + v * kLanes);
    for (int i = 0; i < Rows; ++i) {
      const Vec xv = set1(x[i * x_stride + k]);
      for (int v = 0; v < kPanelVecs; ++v) acc[i][v] = fma(xv, w[v], acc[i][v]);
    }
  }
  for (int i = 0; i < Rows; ++i)
    for (int v = 0; v < kPanelVecs; ++v) store(sums + i * kPanel + v * kLanes, acc[i][v]);
}
constexpr int kFloatRows = kLanes == 16 ? 12 : 2;

// What integer products of a tile of rows read, but for the rows' number.
struct IntegerTile {
  const uint16_t* x;
  int64_t x_stride;
  const float* x_sums;  // of each row's groups of 32 inputs, where there are addends
  int64_t x_sums_stride;
  int group;
  bool has_addends;
  Widened widened;
  float* sums;
};

// sums[i] += the integer products of groups [g, g + Groups), each scaled. Groups are added one after the other, and the
// products within one too, so that a row's sum depends neither on Groups nor on the rows beside it.
template <int Rows, int Groups>
inline void integer_groups(const IntegerTile& t, int64_t g) {
  const auto* codes = static_cast<const uint16_t*>(t.widened.codes);
  const int pairs = t.group / 2;
  Vec acc[Groups][Rows][kPanelVecs];
  for (int s = 0; s < Groups; ++s)
    for (int i = 0; i < Rows; ++i)
      for (int v = 0; v < kPanelVecs; ++v) acc[s][i][v] = zero();
  for (int p = 0; p < pairs; ++p) {
#pragma GCC unroll 4
    for (int s = 0; s < Groups; ++s) {
      Pairs codes_v[kPanelVecs];
      for (int v = 0; v < kPanelVecs; ++v)
        codes_v[v] = load_pairs(codes + (((g + s) * pairs + p) * kPanelVecs + v) * 2 * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) {
        int pair;
        __builtin_memcpy(&pair, t.x + i * t.x_stride + (g + s) * t.group + p * 2, 4);
        const Pairs xv = set1_pair(pair);
#pragma GCC unroll 4
        for (int v = 0; v < kPanelVecs; ++v) acc[s][i][v] = dot_pairs(acc[s][i][v], codes_v[v], xv);
      }
    }
  }
  for (int i = 0; i < Rows; ++i) {
    for (int v = 0; v < kPanelVecs; ++v) {
      Vec total = load(t.sums + i * kPanel + v * kLanes);
      for (int s = 0; s < Groups; ++s) {
        const int64_t at = (g + s) * kPanel + v * kLanes;
        total = fma(load(t.widened.scales + at), acc[s][i][v], total);
        if (t.has_addends)
          total = fma(load(t.widened.addends + at), set1(t.x_sums[i * t.x_sums_stride + g + s]), total);
      }
      store(t.sums + i * kPanel + v * kLanes, total);
    }
  }
}

// sums[i] += the integer products of `inputs` inputs. Few rows compute several groups at once: a sum would wait for
// itself.
template <int Rows>
inline void integer_tile(const IntegerTile& t, int64_t inputs) {
  constexpr int kGroups = Rows <= 2 ? 4 : Rows <= 6 ? 2 : 1;
  const int64_t groups = inputs / t.group;
  int64_t g = 0;
  for (; g + kGroups <= groups; g += kGroups) integer_groups<Rows, kGroups>(t, g);
  for (; g < groups; ++g) integer_groups<Rows, 1>(t, g);
}
constexpr int kIntegerRows = kBf16Products ? 14 : 1;  // 28 accumulators, 2 vectors of codes, 1 of inputs

template <typename T>
inline void store_panel(const QuantArgs& args, const float* sums, int64_t row, int64_t rows, int64_t col, int64_t width) {
  for (int64_t i = 0; i < rows; ++i) {
    T* to = static_cast<T*>(args.out.data) + (row + i) * args.out.stride + col;
    for (int64_t j = 0; j < width; j += kLanes) {
      const int64_t n = min(kLanes, width - j);
      const Vec b = args.bias ? load_n(static_cast<const T*>(args.bias) + col + j, n) : zero();
      store_n(to + j, add(load(sums + i * kPanel + j), b), n);
    }
  }
}

// Rows [row, row + rows) times one panel. width: columns of the panel that there are.
inline void quant_panel(const QuantArgs& args, const QuantPart& part, const uint8_t* panel, int64_t row, int64_t rows,
                        int64_t col, int64_t width) {
  const QuantForm& form = kQuantForms[part.form];
  const bool integers = kBf16Products && args.x32 == nullptr;
  float* memory = scratch(kChunk * kPanel + kChunk / 16 * kPanel * 2 + kQuantRows * kPanel);
  const Widened widened = {memory, memory + kChunk * kPanel, memory + kChunk * kPanel + kChunk / 16 * kPanel};
  float* sums = widened.addends + kChunk / 16 * kPanel;
  for (int64_t i = 0; i < rows * kPanel; i += kLanes) store(sums + i, zero());
  for (int64_t first = 0; first < args.in_features; first += kChunk) {
    const int64_t inputs = min(kChunk, args.in_features - first);
    panel = kWidenChunk[part.form](panel, first, inputs, integers, widened);
    const int64_t most = integers ? kIntegerRows : kFloatRows, tiles = ceil_div(rows, most);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t begin = rows * tile / tiles, num = rows * (tile + 1) / tiles - begin, at = row + begin;
      if (integers) {
        const auto* x = static_cast<const uint16_t*>(args.x.data) + at * args.x.stride + first;
        const float* x_sums = args.x_sums ? args.x_sums + at * (args.in_features / 32) + first / 32 : nullptr;
        with_size<kIntegerRows>(num, [&]<int Rows>() {
          const IntegerTile t = {x, args.x.stride, x_sums, args.in_features / 32, form.group, form.min, widened,
                                 sums + begin * kPanel};
          integer_tile<Rows>(t, inputs);
        });
      } else {
        with_size<kFloatRows>(num, [&]<int Rows>() {
          float_tile<Rows>(args.x32 + at * args.x32_stride + first, args.x32_stride, inputs,
                           static_cast<const float*>(widened.codes), sums + begin * kPanel);
        });
      }
    }
  }
  with_dtype(args.dtype, [&]<typename T>() { store_panel<T>(args, sums, row, rows, col, width); });
}

// What the tasks read of the inputs besides these: themselves in fp32, or the sums of their groups.
void quant_prepare(const QuantArgs& args, float* x32, float* x_sums) {
  if (!x32 && !x_sums) return;
  const auto row = [&]<typename T>(int64_t i) {
    const T* x = static_cast<const T*>(args.x.data) + i * args.x.stride;
    for (int64_t k = 0; k < args.in_features; k += 32) {
      Vec total = zero();
      for (int64_t j = k; j < k + 32; j += kLanes) {
        const Vec part = load(x + j);
        if (x32) store(x32 + i * args.x32_stride + j, part);
        total = add(total, part);
      }
      if (x_sums) x_sums[i * (args.in_features / 32) + k / 32] = sum(total);
    }
  };
  with_dtype(args.dtype, [&]<typename T>() {
    if (args.rows < 8)
      for (int64_t i = 0; i < args.rows; ++i) row.template operator()<T>(i);
    else
      run(args.rows, [&](int64_t i) { row.template operator()<T>(i); });
  });
}

bool quant_uses_integers(Dtype dtype) { return kBf16Products && dtype == Dtype::kBf16; }

void quant_linear(const QuantArgs& args) {
  if (args.rows == 0) return;
  int64_t panels = 0;
  for (int64_t p = 0; p < args.num_parts; ++p) panels += ceil_div(args.parts[p].out_features, kPanel);
  run(ceil_div(args.rows, kQuantRows) * panels, [&](int64_t task) {
    const int64_t row = task / panels * kQuantRows;
    int64_t panel = task % panels, first_col = 0;
    const QuantPart* part = args.parts;
    for (; panel >= ceil_div(part->out_features, kPanel); ++part) {
      panel -= ceil_div(part->out_features, kPanel);
      first_col += part->out_features;
    }
    const uint8_t* from = part->panels + panel * panel_bytes(kQuantForms[part->form], args.in_features);
    quant_panel(args, *part, from, row, min(kQuantRows, args.rows - row), first_col + panel * kPanel,
                min(kPanel, part->out_features - panel * kPanel));
  });
}
