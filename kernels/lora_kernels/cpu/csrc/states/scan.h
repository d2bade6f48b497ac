// Selective scan: each lane is a channel, so that nothing is summed across lanes, and a task is some channels of all
// tokens, whose states stay in the first-level cache. Included inside the instruction set's namespace, after
// pointwise.h.
#pragma once

constexpr int64_t kScanChannels = 32;  // per task: a cache line of bf16 per token

// log(1 + exp(x)), without overflow: max(x, 0) + log1p(exp(-|x|)).
inline Vec softplus(Vec x) {
  const Vec y = exp(min(x, sub(zero(), x)));
  // log1p(y) = 2 artanh(s) with s = y / (2 + y) <= 1/3: an odd series, accurate to a few ulp.
  const Vec s = div(y, add(y, set1(2.0f))), square = mul(s, s);
  constexpr float kSeries[] = {1.0f / 11, 1.0f / 9, 1.0f / 7, 1.0f / 5, 1.0f / 3, 1.0f};
  Vec p = set1(1.0f / 13);
  for (const float c : kSeries) p = fma(p, square, set1(c));
  return fma(mul(s, set1(2.0f)), p, max(x, zero()));
}

template <typename T>
inline void scan_channels(const ScanArgs& args, int64_t first, int64_t n) {
  float* state = args.state + first;
  const float* a = args.a + first;
  const Vec skip = args.skip ? load_n(args.skip + first, n) : zero();
  const Vec bias = args.bias ? load_n(args.bias + first, n) : zero();
  float *h = scratch(2 * args.states * kLanes), *decay = h + args.states * kLanes;
  for (int64_t s = 0; s < args.states; ++s) {
    store(h + s * kLanes, load_n(state + s * args.channels, n));
    store(decay + s * kLanes, load_n(a + s * args.channels, n));
  }
  for (int64_t t = 0; t < args.tokens; ++t) {
    const Vec x = load_n(static_cast<const T*>(args.x.data) + t * args.x.stride + first, n);
    Vec dt = add(load_n(args.dt + t * args.channels + first, n), bias);
    if (args.softplus) dt = softplus(dt);
    const Vec dx = mul(dt, x);
    const float *b = args.b + t * args.states, *c = args.c + t * args.states;
    Vec y = mul(skip, x);
    for (int64_t s = 0; s < args.states; ++s) {
      const Vec kept = mul(exp(mul(dt, load(decay + s * kLanes))), load(h + s * kLanes));
      const Vec now = fma(dx, set1(b[s]), kept);
      store(h + s * kLanes, now);
      y = fma(now, set1(c[s]), y);
    }
    if (args.gate.data) {
      const Vec gate = load_n(static_cast<const T*>(args.gate.data) + t * args.gate.stride + first, n);
      y = mul(y, activate(gate, Activation::kSilu));
    }
    store_n(static_cast<T*>(args.out.data) + t * args.out.stride + first, y, n);
  }
  for (int64_t s = 0; s < args.states; ++s) store_n(state + s * args.channels, load(h + s * kLanes), n);
}

void scan(const ScanArgs& args) {
  run(ceil_div(args.channels, kScanChannels), [&](int64_t i) {
    const int64_t end = min(args.channels, (i + 1) * kScanChannels);
    for (int64_t first = i * kScanChannels; first < end; first += kLanes)
      with_dtype(args.dtype, [&]<typename T>() { scan_channels<T>(args, first, min(kLanes, end - first)); });
  });
}
