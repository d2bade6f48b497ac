// Common code for vectors of eight lanes, using memory and the compiler's own vector types. vec_avx2.h and vec_neon.h
// include it after their `load`, `store` and `store_codes`.
#pragma once

template <typename T>
inline Vec load_n(const T* p, int64_t n) {
  if (n == kLanes) return load(p);  // nearly always: copying n entries takes a call
  T lanes[kLanes] = {};
  __builtin_memcpy(lanes, p, n * sizeof(T));
  return load(lanes);
}

template <typename T>
inline void store_n(T* p, Vec v, int64_t n) {
  if (n == kLanes) return store(p, v);
  T lanes[kLanes];
  store(lanes, v);
  __builtin_memcpy(p, lanes, n * sizeof(T));
}

// Codes of weights in the layout of integer products: bytes, four inputs for each of kLanes columns.
typedef uint16_t Words __attribute__((vector_size(32)));
// mask ? a : b, bit by bit.
inline Words select(uint16_t mask, Words a, Words b) { return (a & mask) | (b & static_cast<uint16_t>(~mask)); }
// From rows of bytes [columns], reads the first, second, fifth and sixth: 0, 4, 1, 5 of each column.
inline void load_fours(const uint8_t* rows, Words (&out)[1]) {
  typedef uint8_t Bytes __attribute__((vector_size(16)));
  typedef int64_t Long __attribute__((vector_size(16)));
  const auto eight = [](const uint8_t* from) {  // directly into a register, not through memory
    int64_t bytes;
    __builtin_memcpy(&bytes, from, 8);
    return reinterpret_cast<Bytes>(Long{bytes, 0});
  };
  const Bytes x = eight(rows), y = eight(rows + 4 * kPanel), z = eight(rows + kPanel), w = eight(rows + 5 * kPanel);
  const Bytes xy = __builtin_shufflevector(x, y, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const Bytes zw = __builtin_shufflevector(z, w, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const Words pairs = reinterpret_cast<Words>(__builtin_shufflevector(
      xy, zw, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28,
      29, 30, 31));
  out[0] = __builtin_shufflevector(pairs, pairs, 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
  if constexpr (kUnsignedBytes) out[0] ^= 0x8080;
}
// Writes what load_fours reads, for all columns of a panel at once: [kPanel, 4].
inline void spread_fours(const uint8_t* rows, uint8_t* to) {
  typedef uint8_t Bytes __attribute__((vector_size(32)));
  Bytes of[4];  // rows 0, 4, 1, 5
  for (int i = 0; i < 4; ++i) {
    __builtin_memcpy(&of[i], rows + (i % 2 * 4 + i / 2) * kPanel, sizeof(Bytes));
    if constexpr (kUnsignedBytes) of[i] ^= 0x80;
  }
  // Each half of a register is interleaved by itself: columns 0 to 7 and 16 to 23 become pairs, then the others do. Fours
  // begin with columns 0 to 3 and 16 to 19.
  const auto low = [](Bytes a, Bytes b) {
    return reinterpret_cast<Words>(__builtin_shufflevector(a, b, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39,
                                                           16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55));
  };
  const auto high = [](Bytes a, Bytes b) {
    return reinterpret_cast<Words>(__builtin_shufflevector(a, b, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15,
                                                           47, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63));
  };
  const Words pairs[2][2] = {{low(of[0], of[1]), low(of[2], of[3])}, {high(of[0], of[1]), high(of[2], of[3])}};
  for (int i = 0; i < 2; ++i) {
    const Words a = pairs[i][0], b = pairs[i][1];
    const Words fours[2] = {
        __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 8, 24, 9, 25, 10, 26, 11, 27),
        __builtin_shufflevector(a, b, 4, 20, 5, 21, 6, 22, 7, 23, 12, 28, 13, 29, 14, 30, 15, 31),
    };
    for (int j = 0; j < 2; ++j)
      for (int half = 0; half < 2; ++half)
        __builtin_memcpy(to + (half * 16 + i * 8 + j * 4) * 4, reinterpret_cast<const char*>(&fours[j]) + half * 16, 16);
  }
}
// Writes 32 integers as int8 codes, every eight in the order 0, 4, 1, 5, 2, 6, 3, 7.
inline void store_eights(int8_t* p, const Vec (&integers)[4]) {
  constexpr int kOrder[] = {0, 4, 1, 5, 2, 6, 3, 7};
  int8_t codes[kLanes];
  for (int v = 0; v < 4; ++v) {
    store_codes(codes, integers[v], kLanes);
    for (int i = 0; i < kLanes; ++i) p[v * kLanes + i] = codes[kOrder[i]];
  }
}
