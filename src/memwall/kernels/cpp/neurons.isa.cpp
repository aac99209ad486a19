// A neuron's first weights are multiplied with all tokens while they are in the cache; its last ones are read only where it is active.
#include "neurons.h"

#include "vector.h"

namespace mw::MW_ISA {
namespace {

constexpr int kSums = 4;    // that grow apart, so that additions need not wait for each other
constexpr int kTokens = 4;  // that weights are multiplied with at once: each is decoded once for them

// products[t] of weights with Tokens rows of x
template <class T, int Tokens>
MW_INLINE void products(const typename T::Element* weights, const float* x, std::int64_t width, float* products) {
  constexpr int kApart = Tokens == 1 ? kSums : 1;
  Vf sum[Tokens][kApart] = {};
  std::int64_t col = 0;
  const auto add = [&](std::int64_t at, int which) {
    const Vf w = T::vector(weights + at);
    static_for<Tokens>([&](auto t) { sum[t.value][which] += w * load<Vf>(x + t.value * width + at); });
  };
  for (; col + kApart * kWidth <= width; col += kApart * kWidth) static_for<kApart>([&](auto i) { add(col + i.value * kWidth, i.value); });
  for (; col + kWidth <= width; col += kWidth) add(col, 0);
  static_for<Tokens>([&](auto t) {
    Vf all = sum[t.value][0];
    for (int i = 1; i < kApart; ++i) all += sum[t.value][i];
    float total = sum_of(all);
    for (std::int64_t rest = col; rest < width; ++rest) total += T::scalar(weights[rest]) * x[t.value * width + rest];
    products[t.value] = total;
  });
}

template <class T, int Tokens>
MW_INLINE void activate_tokens(const NeuronTask& task, const typename T::Element* weights, const float* bias, std::int64_t row, std::int64_t token) {
  const float* x = task.x + token * task.width;
  float values[Tokens], ups[Tokens];
  products<T, Tokens>(weights, x, task.width, values);
  bool any = false;
  for (float& value : values) {
    value += bias ? bias[0] : 0.0f;
    if (value <= task.threshold) value = 0.0f;  // what is no number goes on
    any |= value != 0.0f;
  }
  if (task.gated && any) {
    products<T, Tokens>(weights + task.width, x, task.width, ups);
    for (int t = 0; t < Tokens; ++t)
      if (values[t] != 0.0f) values[t] *= ups[t] + (bias ? bias[1] : 0.0f);
  }
  for (int t = 0; t < Tokens; ++t) task.active[(token + t) * task.num_rows + row] = values[t];
}

template <class T>
void activate_form(const NeuronTask& task, std::int64_t begin, std::int64_t end) {
  const int parts = task.gated ? 2 : 1;
  for (std::int64_t r = begin; r < end; ++r) {
    const auto* weights = reinterpret_cast<const typename T::Element*>(task.rows + r * task.row_bytes);
    const float* bias = task.biases ? task.biases + r * parts : nullptr;
    std::int64_t t = 0;
    for (; t + kTokens <= task.num_tokens; t += kTokens) activate_tokens<T, kTokens>(task, weights, bias, r, t);
    for (; t < task.num_tokens; ++t) activate_tokens<T, 1>(task, weights, bias, r, t);
  }
}

template <class T>
void add_form(const NeuronTask& task, std::int64_t begin, std::int64_t end) {
  const std::int64_t skipped = (task.gated ? 2 : 1) * task.width;
  for (std::int64_t r = 0; r < task.num_rows; ++r) {
    const auto* weights = reinterpret_cast<const typename T::Element*>(task.rows + r * task.row_bytes) + skipped;
    for (std::int64_t t = 0; t < task.num_tokens; ++t) {
      const float value = task.active[t * task.num_rows + r];
      if (value == 0.0f) continue;
      float* out = task.out + t * task.width;
      std::int64_t col = begin;
      for (; col + kWidth <= end; col += kWidth) store(out + col, load<Vf>(out + col) + T::vector(weights + col) * value);
      for (; col < end; ++col) out[col] += T::scalar(weights[col]) * value;
    }
  }
}

void activate(const NeuronTask& task, std::int64_t begin, std::int64_t end) {
  switch (task.form) {
    case NeuronForm::float32: return activate_form<Float32>(task, begin, end);
    case NeuronForm::float16: return activate_form<Float16>(task, begin, end);
    case NeuronForm::bfloat16: return activate_form<BFloat16>(task, begin, end);
    case NeuronForm::count: return;
  }
}

void add(const NeuronTask& task, std::int64_t begin, std::int64_t end) {
  switch (task.form) {
    case NeuronForm::float32: return add_form<Float32>(task, begin, end);
    case NeuronForm::float16: return add_form<Float16>(task, begin, end);
    case NeuronForm::bfloat16: return add_form<BFloat16>(task, begin, end);
    case NeuronForm::count: return;
  }
}

}  // namespace

extern const NeuronKernels neuron_kernels;
const NeuronKernels neuron_kernels = {activate, add};

}  // namespace mw::MW_ISA
