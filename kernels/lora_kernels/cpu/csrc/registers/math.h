// Elementary functions on vectors, accurate to a few fp32 ulp. Included inside the instruction set's namespace.
#pragma once

inline Vec exp(Vec x) {
  // exp(x) = 2^n * exp(r), |r| <= ln2 / 2; a Taylor polynomial of degree 7 leaves an error of 2e-9. Infinite from 88.73
  // on. Zero below -86: denormal numbers take a processor a hundred times as long.
  constexpr float kLeast = -86.0f;
  const Vec kept = max(min(x, set1(89.0f)), set1(kLeast));
  const Vec n = round(mul(kept, set1(1.44269504f)));
  Vec r = fma(n, set1(-0.693359375f), kept);
  r = fma(n, set1(2.12194440e-4f), r);
  constexpr float kTaylor[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  Vec p = set1(1.0f / 5040);
  for (const float c : kTaylor) p = fma(p, r, set1(c));
  return zero_below(times_pow2(p, n), x, kLeast);
}

inline Vec tanh(Vec x) {
  const Vec e = exp(add(x, x));
  return sub(set1(1.0f), div(set1(2.0f), add(e, set1(1.0f))));
}

inline Vec erf(Vec x) {
  // Abramowitz and Stegun 7.1.26, absolute error 1.5e-7.
  const Vec a = max(x, sub(zero(), x));
  const Vec t = div(set1(1.0f), fma(set1(0.3275911f), a, set1(1.0f)));
  constexpr float kTerms[] = {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f};
  Vec p = set1(1.061405429f);
  for (const float c : kTerms) p = fma(p, t, set1(c));
  return copysign(sub(set1(1.0f), mul(mul(p, t), exp(sub(zero(), mul(a, a))))), x);
}
