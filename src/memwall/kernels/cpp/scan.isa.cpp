// Lanes run along channels in the convolution and along the state in the scan.
#include "scan.h"

#include <cmath>
#include <type_traits>

#include "exponential.h"
#include "vector.h"

namespace mw::MW_ISA {
namespace {

typedef std::int8_t Bytes __attribute__((vector_size(kWidth)));

MW_INLINE Vf silu(Vf v) { return v / (1.0f + exponential(-v)); }
MW_INLINE Vf load_as_float(const float* from) { return load<Vf>(from); }
MW_INLINE Vf load_as_float(const std::int8_t* from) { return to_float(__builtin_convertvector(load<Bytes>(from), Vi)); }
MW_INLINE Bytes to_bytes(Vf v) {
  return __builtin_convertvector(round_to_int(vmin(vmax(v, splat(-127.0f)), splat(127.0f))), Bytes);
}
MW_INLINE void store_float(float* to, Vf v) { store(to, v); }
MW_INLINE void store_float(std::int8_t* to, Vf v) { store(to, to_bytes(v)); }

// The first `count` of kWidth numbers; the rest are zero, and are not written.
template <class T>
MW_INLINE Vf load_some(const T* from, std::int64_t count) {
  if (count >= kWidth) return load_as_float(from);
  T held[kWidth] = {};
  for (std::int64_t i = 0; i < count; ++i) held[i] = from[i];
  return load_as_float(held);
}
template <class T>
MW_INLINE void store_some(T* to, Vf v, std::int64_t count) {
  if (count >= kWidth) return store_float(to, v);
  T held[kWidth];
  store_float(held, v);
  for (std::int64_t i = 0; i < count; ++i) to[i] = held[i];
}

template <class T>
void conv_of(const ConvTask& task, std::int64_t begin, std::int64_t end) {
  const int before = task.taps - 1;
  for (std::int64_t c = begin; c < end; c += kWidth) {
    const std::int64_t count = end - c < kWidth ? end - c : kWidth;
    Vf weight[kMaxTaps], past[kMaxTaps];
    for (int j = 0; j < task.taps; ++j) {
      float held[kWidth] = {};
      for (std::int64_t i = 0; i < count; ++i) held[i] = task.weight[(c + i) * task.taps + j];
      weight[j] = load<Vf>(held);
    }
    T* state = static_cast<T*>(task.state) + c;
    for (int j = 0; j < before; ++j) past[j] = load_some(state + j * task.channels, count);
    const Vf bias = task.bias ? load_some(task.bias + c, count) : Vf{};
    const Vf in_scale = task.in_scale ? load_some(task.in_scale + c, count) : splat(1.0f);
    const Vf inverse = task.out_inverse ? load_some(task.out_inverse + c, count) : splat(1.0f);
    const T* x = static_cast<const T*>(task.x) + c;
    T* out = static_cast<T*>(task.out) + c;
    for (std::int64_t t = 0; t < task.tokens; ++t) {
      past[before] = load_some(x + t * task.stride, count);
      Vf sum{};
      for (int j = 0; j < task.taps; ++j) sum += weight[j] * past[j];
      for (int j = 0; j < before; ++j) past[j] = past[j + 1];
      store_some(out + t * task.channels, silu(sum * in_scale + bias) * inverse, count);
    }
    for (int j = 0; j < before; ++j) store_some(state + j * task.channels, past[j], count);
  }
}

void conv(const ConvTask& task, std::int64_t begin, std::int64_t end) {
  if (task.in_scale) conv_of<std::int8_t>(task, begin, end);
  else conv_of<float>(task, begin, end);
}

MW_INLINE float softplus(float v) { return v > 20.0f ? v : std::log1p(std::exp(v)); }

// One token of `Rows` channels of a head: states [Rows, padded], all of which read the same b and c.
template <int Rows, bool VectorDecay>
MW_INLINE void step(float* h, std::int64_t padded, const float* x, float d, float decay, const float* decays, const float* b, const float* c,
                    float skip, float* y) {
  Vf sums[Rows] = {}, driven[Rows];
  for (int r = 0; r < Rows; ++r) driven[r] = splat(d * x[r]);
  for (std::int64_t n = 0; n < padded; n += kWidth) {
    const Vf held_b = load<Vf>(b + n), held_c = load<Vf>(c + n);
    Vf kept = splat(decay);
    if constexpr (VectorDecay) kept = exponential(load<Vf>(decays + n) * d);
    for (int r = 0; r < Rows; ++r) {
      const Vf next = load<Vf>(h + r * padded + n) * kept + driven[r] * held_b;
      store(h + r * padded + n, next);
      sums[r] += next * held_c;
    }
  }
  for (int r = 0; r < Rows; ++r) y[r] = sum_of(sums[r]) + skip * x[r];
}

template <bool VectorDecay>
MW_INLINE void head_step(float* h, std::int64_t size, std::int64_t padded, const float* x, float d, float decay, const float* decays,
                         const float* b, const float* c, float skip, float* y) {
  std::int64_t p = 0;
  for (; p + 4 <= size; p += 4) step<4, VectorDecay>(h + p * padded, padded, x + p, d, decay, decays, b, c, skip, y + p);
  for (; p < size; ++p) step<1, VectorDecay>(h + p * padded, padded, x + p, d, decay, decays, b, c, skip, y + p);
}

// Padded with zeros behind `count`.
template <class T>
MW_INLINE void unpack(const T* from, std::int64_t count, float scale, float* to, std::int64_t padded) {
  std::int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(to + i, load_as_float(from + i) * scale);
  for (; i < padded; ++i) to[i] = i < count ? static_cast<float>(from[i]) * scale : 0.0f;
}

template <class T>
void load_state(const ScanTask& task, std::int64_t head, float* h, std::int64_t padded) {
  const std::int64_t size = task.state_size;
  const T* from = static_cast<const T*>(task.state) + head * task.head_size * size;
  for (std::int64_t p = 0; p < task.head_size; ++p, from += size, h += padded) {
    unpack(from, size, 1.0f, h, padded);
    if constexpr (std::is_same_v<T, std::int8_t>) {
      const float* scale = task.state_scale + task.range[head * task.head_size + p] * size;
      for (std::int64_t n = 0; n < size; ++n) h[n] *= scale[n];
    }
  }
}

template <class T>
void keep_state(const ScanTask& task, std::int64_t head, const float* h, std::int64_t padded) {
  const std::int64_t size = task.state_size;
  T* to = static_cast<T*>(task.state) + head * task.head_size * size;
  for (std::int64_t p = 0; p < task.head_size; ++p, to += size, h += padded) {
    if constexpr (std::is_same_v<T, std::int8_t>) {
      const float* scale = task.state_scale + task.range[head * task.head_size + p] * size;
      for (std::int64_t n = 0; n < size; n += kWidth) store_some(to + n, load<Vf>(h + n) / load_some(scale + n, size - n), size - n);
    } else {
      for (std::int64_t n = 0; n < size; ++n) to[n] = h[n];
    }
  }
}

template <class In, class State, bool VectorDecay>
void scan_heads(const ScanTask& task, std::int64_t begin, std::int64_t end, float* scratch) {
  const std::int64_t size = task.state_size, padded = task.padded_state(), width = task.head_size;
  constexpr bool kCoded = std::is_same_v<In, std::int8_t>;
  const bool in_place = std::is_same_v<State, float> && padded == size;
  alignas(64) float b[kMaxState], c[kMaxState], decays[kMaxState];
  for (std::int64_t head = begin; head < end; ++head) {
    const std::int64_t group = head / (task.heads / task.groups), first = head * width;
    float* h = scratch;
    if (in_place) h = static_cast<float*>(task.state) + first * size;
    else load_state<State>(task, head, h, padded);
    if (VectorDecay) unpack(task.decay + head * size, size, 1.0f, decays, padded);
    const float b_scale = kCoded ? task.b_scale[group] : 1.0f, c_scale = kCoded ? task.c_scale[group] : 1.0f;
    for (std::int64_t t = 0; t < task.tokens; ++t) {
      const In* x = static_cast<const In*>(task.x) + t * task.x_stride + first;
      const std::int64_t at = t * task.bc_stride + group * size;
      unpack(static_cast<const In*>(task.b) + at, size, b_scale, b, padded);
      unpack(static_cast<const In*>(task.c) + at, size, c_scale, c, padded);
      const float raw = static_cast<float>(static_cast<const In*>(task.dt)[t * task.dt_stride + head]) * task.dt_scale;
      const float open = softplus(raw + task.dt_bias[head]);
      const float d = open < task.dt_low ? task.dt_low : open > task.dt_high ? task.dt_high : open;
      const float decay = VectorDecay ? 0.0f : std::exp(d * task.decay[head]);
      float* y = task.y + t * task.heads * width + first;
      if constexpr (kCoded) {
        float xs[64];
        for (std::int64_t p = 0; p < width; p += 64) {
          const std::int64_t count = width - p < 64 ? width - p : 64;
          for (std::int64_t i = 0; i < count; ++i) xs[i] = static_cast<float>(x[p + i]) * task.x_scale[task.range[first + p + i]];
          head_step<VectorDecay>(h + p * padded, count, padded, xs, d, decay, decays, b, c, task.skip[head], y + p);
        }
      } else {
        head_step<VectorDecay>(h, width, padded, x, d, decay, decays, b, c, task.skip[head], y);
      }
      if (task.peak)
        for (std::int64_t p = 0; p < width; ++p)
          for (std::int64_t n = 0; n < size; ++n) {
            float& most = task.peak[(first + p) * size + n];
            const float held = h[p * padded + n];
            if (held > most) most = held;
            if (-held > most) most = -held;
          }
    }
    if (!in_place) keep_state<State>(task, head, h, padded);
  }
}

void scan(const ScanTask& task, std::int64_t begin, std::int64_t end, float* scratch) {
  const bool coded = task.x_scale != nullptr, small = task.state_scale != nullptr;
  if (task.vector_decay) {
    if (coded && small) scan_heads<std::int8_t, std::int8_t, true>(task, begin, end, scratch);
    else if (coded) scan_heads<std::int8_t, float, true>(task, begin, end, scratch);
    else scan_heads<float, float, true>(task, begin, end, scratch);
  } else {
    if (coded && small) scan_heads<std::int8_t, std::int8_t, false>(task, begin, end, scratch);
    else if (coded) scan_heads<std::int8_t, float, false>(task, begin, end, scratch);
    else scan_heads<float, float, false>(task, begin, end, scratch);
  }
}

template <class T>
void gate_rows(const GateTask& task, std::int64_t begin, std::int64_t end) {
  const float scale = task.z_scale == 0.0f ? 1.0f : task.z_scale;
  const std::int64_t width = task.width / task.groups;
  for (std::int64_t t = begin; t < end; ++t)
    for (std::int64_t first = 0; first < task.width; first += width) {
      const float* y = task.y + t * task.width + first;
      const T* z = static_cast<const T*>(task.z) + t * task.stride + first;
      float* out = task.out + t * task.width + first;
      Vf squares{};
      for (std::int64_t i = 0; i < width; i += kWidth) {
        const Vf v = load_some(y + i, width - i) * silu(load_some(z + i, width - i) * scale);
        squares += v * v;
        store_some(out + i, v, width - i);
      }
      if (!task.weight) continue;
      const float factor = 1.0f / std::sqrt(sum_of(squares) / static_cast<float>(width) + task.eps);
      for (std::int64_t i = 0; i < width; i += kWidth)
        store_some(out + i, load_some(out + i, width - i) * factor * load_some(task.weight + first + i, width - i), width - i);
    }
}

void gate(const GateTask& task, std::int64_t begin, std::int64_t end) {
  if (task.z_scale == 0.0f) gate_rows<float>(task, begin, end);
  else gate_rows<std::int8_t>(task, begin, end);
}

// Butterflies over a power of two.
void butterflies(float* x, std::int64_t size) {
  for (std::int64_t half = 1; half < size; half *= 2)
    for (std::int64_t i = 0; i < size; i += 2 * half) {
      std::int64_t j = i;
      if (half >= kWidth)
        for (; j < i + half; j += kWidth) {
          const Vf a = load<Vf>(x + j), b = load<Vf>(x + j + half);
          store(x + j, a + b);
          store(x + j + half, a - b);
        }
      for (; j < i + half; ++j) {
        const float a = x[j], b = x[j + half];
        x[j] = a + b;
        x[j + half] = a - b;
      }
    }
}

// The small matrix over `mix` pieces of `size` numbers each: columns of kWidth numbers (or one) of all pieces together.
void mix_pieces(float* x, std::int64_t size, int mix, const std::int8_t* signs) {
  Vf held[kMaxMix];
  for (std::int64_t i = 0; i < size; i += kWidth) {
    const std::int64_t count = size - i;
    for (int k = 0; k < mix; ++k) held[k] = load_some(x + k * size + i, count);
    for (int r = 0; r < mix; ++r) {
      Vf sum{};
      for (int k = 0; k < mix; ++k) sum += held[k] * splat(static_cast<float>(signs[r * mix + k]));
      store_some(x + r * size + i, sum, count);
    }
  }
}

void hadamard(float* x, std::int64_t rows, std::int64_t width, int mix, const std::int8_t* signs) {
  const std::int64_t size = width / mix;
  const float factor = 1.0f / std::sqrt(static_cast<float>(width));
  for (std::int64_t row = 0; row < rows; ++row, x += width) {
    for (int k = 0; k < mix; ++k) butterflies(x + k * size, size);
    if (mix > 1) mix_pieces(x, size, mix, signs);
    for (std::int64_t i = 0; i < width; ++i) x[i] *= factor;
  }
}

void round_static(const float* x, std::int64_t count, float inverse, std::int8_t* out) {
  for (std::int64_t i = 0; i < count; i += kWidth) store_some(out + i, load_some(x + i, count - i) * inverse, count - i);
}

}  // namespace

extern const ScanKernels scan_kernels;
const ScanKernels scan_kernels = {conv, scan, gate, hadamard, round_static};

}  // namespace mw::MW_ISA
