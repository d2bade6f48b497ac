// Shrink and expand of every site of one input, fused. Included inside the instruction set's namespace.
//
// A task is a tile: up to 16 rows of one adapter. Its rank products stay in the thread's scratch memory, so there is
// no barrier between shrink and expand and no buffer shared by threads.
#pragma once

template <typename T>
inline void add_to(T* out, const float* delta, int64_t n) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) store(out + j, add(load(out + j), load(delta + j)));
  if (j < n) store_n(out + j, add(load_n(out + j, n - j), load_n(delta + j, n - j)), n - j);
}

template <typename T>
void lora_tile(const LoraArgs& args, int64_t tile) {
  const int64_t slot = args.tiles[3 * tile], first = args.tiles[3 * tile + 1], count = args.tiles[3 * tile + 2];
  const T* x[kPageRows];
  for (int64_t i = 0; i < count; ++i)
    x[i] = static_cast<const T*>(args.x.data) + args.rows[first + i] * args.x.stride;
  for (int64_t s = 0; s < args.num_sites; ++s) {
    const LoraSiteArgs& site = args.sites[s];
    const int64_t rank = args.ranks[slot * args.table_sites + site.index];
    if (rank == 0) continue;
    const float scale = args.scales[slot * args.table_sites + site.index];
    const int32_t* pages = args.pages + (slot * args.groups + site.group) * args.max_pages;
    const auto* a_rows = static_cast<const T*>(site.a_rows);
    const auto* b_rows = static_cast<const T*>(site.b_rows);

    float* hidden = scratch(count * rank);  // [count, rank]
    for (int64_t j = 0; j < rank; j += kPageRows) {
      const T* a = a_rows + pages[j / kPageRows] * kPageRows * args.in_features;
      dots(x, count, a, args.in_features, min(kPageRows, rank - j), args.in_features, hidden + j, rank);
    }
    for (int64_t i = 0; i < count; ++i) {
      const float row_scale = args.row_scales ? scale * args.row_scales[first + i] : scale;
      for (int64_t j = 0; j < rank; ++j) hidden[i * rank + j] *= row_scale;
    }
    float delta[kPageRows * kTileCols];
    for (int64_t col = 0; col < site.width; col += kTileCols) {
      const int64_t cols = min(kTileCols, site.width - col);
      for (int64_t i = 0; i < count * kTileCols; i += kLanes) store(delta + i, zero());
      for (int64_t j = 0; j < rank; j += kPageRows) {
        const T* b = b_rows + pages[j / kPageRows] * kPageRows * site.width + col;
        update(hidden + j, rank, b, site.width, delta, kTileCols, count, min(kPageRows, rank - j), cols);
      }
      for (int64_t i = 0; i < count; ++i) {
        T* out = static_cast<T*>(site.out.data) + args.rows[first + i] * site.out.stride + col;
        add_to(out, delta + i * kTileCols, cols);
      }
    }
  }
}

void lora_add(const LoraArgs& args) {
  run(args.num_tiles, [&](int64_t tile) {
    with_dtype(args.dtype, [&]<typename T>() { lora_tile<T>(args, tile); });
  });
}
