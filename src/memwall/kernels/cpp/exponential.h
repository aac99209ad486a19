// exp(x) on vectors of float.
#pragma once

#include "vector.h"

namespace mw::MW_ISA {

// exp(x) = 2^n * exp(r) with n the integer nearest x / ln 2 and |r| <= ln(2) / 2, where a polynomial of degree 6 (Taylor's, the
// error of which is below 2^-23 there) is enough. ln 2 is subtracted in two parts so that r keeps its low bits. Arguments are
// clamped to where the result is a normal number; relative error about 2e-7.
MW_INLINE Vf exponential(Vf x) {
  x = vmin(vmax(x, splat(-87.0f)), splat(88.0f));
  const Vi n = round_to_int(x * 1.44269504f);
  const Vf whole = to_float(n);
  const Vf r = x - whole * 0.693359375f - whole * -2.12194440e-4f;
  Vf sum = r * (1.0f / 720.0f) + 1.0f / 120.0f;
  sum = sum * r + 1.0f / 24.0f;
  sum = sum * r + 1.0f / 6.0f;
  sum = sum * r + 0.5f;
  sum = sum * r + 1.0f;
  sum = sum * r + 1.0f;
  return sum * (Vf)((n + 127) << 23);
}

}  // namespace mw::MW_ISA
