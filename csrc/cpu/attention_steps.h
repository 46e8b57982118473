// The steps that attention is made of, for the instruction set of this compilation.
#pragma once

#include "arguments.h"
#include "common/philox.h"
#include "matmul.h"
#include "parts.h"

namespace dsnet::cpu::DSNET_CPU_ARCH {

// Mean and 1 / √(variance + eps) of a token.
template <typename Acc>
struct Moments {
  Acc mean, rstd;
};

// Of R tokens, computed side by side since each sum waits for itself.
template <typename V, int R, typename T, typename Acc = typename V::Acc>
inline void moments_of(const T* x, int64_t stride, int64_t width, Acc eps, Moments<Acc>* moments) {
  V sums[R];
  for (int i = 0; i < R; ++i) sums[i] = V::zero();
  for_each_register<V>(width, [&](int64_t c, int64_t n) {
    for (int i = 0; i < R; ++i) sums[i] = sums[i] + load_part<V>(x + i * stride + c, n);
  });
  V mean[R];
  for (int i = 0; i < R; ++i) {
    moments[i].mean = sum_of(sums[i]) / static_cast<Acc>(width);
    mean[i] = V::fill(moments[i].mean);
    sums[i] = V::zero();
  }
  const int64_t whole = width / V::size * V::size;
  for (int64_t c = 0; c < whole; c += V::size) {
    for (int i = 0; i < R; ++i) {
      const V d = V::load(x + i * stride + c) - mean[i];
      sums[i] = fma(d, d, sums[i]);
    }
  }
  if (whole < width) {
    for (int i = 0; i < R; ++i) {
      // Zero behind the last channel, as what is loaded there.
      Acc means[V::size];
      mean[i].store(means);
      const V d = V::load(x + i * stride + whole, width - whole) - V::load(means, width - whole);
      sums[i] = fma(d, d, sums[i]);
    }
  }
  for (int i = 0; i < R; ++i) {
    const Acc variance = sum_of(sums[i]) / static_cast<Acc>(width);
    moments[i].rstd = Acc{1} / square_root(variance + eps);
  }
}

// y = (x − mean)·rstd·weight + bias for a token; zero behind the last channel.
template <typename V, typename T, typename Acc = typename V::Acc>
inline void normalise(const T* x, int64_t width, int64_t padded, Moments<Acc> moments,
    const Acc* weight, const Acc* bias, Acc* y) {
  const V mean = V::fill(moments.mean), rstd = V::fill(moments.rstd);
  for_each_register<V>(width, [&](int64_t c, int64_t n) {
    const V centred = load_part<V>(x + c, n) - mean;
    // Weight and bias are zero behind the last channel.
    fma(centred * rstd, V::load(weight + c), V::load(bias + c)).store(y + c);
  });
  for (int64_t c = (width + V::size - 1) / V::size * V::size; c < padded; ++c) y[c] = 0;
}

// The same for `count` tokens of memory, with their moments where `kept` is not null.
template <typename V, typename T, typename Acc = typename V::Acc>
inline void normalise_rows(const T* x, int64_t count, int64_t width, int64_t padded_width, Acc eps,
    const Acc* weight, const Acc* bias, Acc* y, Moments<Acc>* kept = nullptr) {
  const auto rows = [&](auto R, int64_t i) {
    Moments<Acc> moments[decltype(R)::value];
    moments_of<V, decltype(R)::value>(x + i * width, width, width, eps, moments);
    for (int r = 0; r < decltype(R)::value; ++r) {
      normalise<V>(x + (i + r) * width, width, padded_width, moments[r], weight, bias,
          y + (i + r) * padded_width);
      if (kept != nullptr) kept[i + r] = moments[r];
    }
  };
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) rows(Constant<4>{}, i);
  for (; i < count; ++i) rows(Constant<1>{}, i);
}

// The gradient of a token through LayerNorm and past it: grad_x = grad + LNᵀ(grad_y); adds the
// token's share to the gradients of weight and bias. All but x and the gradients of x padded with
// 0.
template <typename V, typename T, typename Acc = typename V::Acc>
inline void normalise_gradient(const T* x, const T* grad, int64_t width, Moments<Acc> moments,
    const Acc* weight, const Acc* grad_y, Acc* grad_weight, Acc* grad_bias, T* grad_x) {
  const V centre = V::fill(moments.mean), inverse = V::fill(moments.rstd);
  V sum = V::zero(), product = V::zero();
  for_each_register<V>(width, [&](int64_t c, int64_t n) {
    const V normal = (load_part<V>(x + c, n) - centre) * inverse;
    const V in = V::load(grad_y + c), scaled = in * V::load(weight + c);
    sum = sum + scaled;
    product = fma(scaled, normal, product);
    fma(in, normal, V::load(grad_weight + c)).store(grad_weight + c);
    (in + V::load(grad_bias + c)).store(grad_bias + c);
  });
  const V mean_sum = V::fill(sum_of(sum) / static_cast<Acc>(width));
  const V mean_product = V::fill(-sum_of(product) / static_cast<Acc>(width));
  for_each_register<V>(width, [&](int64_t c, int64_t n) {
    const V normal = (load_part<V>(x + c, n) - centre) * inverse;
    const V scaled = V::load(grad_y + c) * V::load(weight + c) - mean_sum;
    const V branch = fma(normal, mean_product, scaled);
    store_part(fma(branch, inverse, load_part<V>(grad + c, n)), grad_x + c, n);
  });
}

// Writes `value` to elements [count, columns) of a row, less than 16 and in whole registers.
template <typename V, typename Acc = typename V::Acc>
inline void fill_rest(Acc* row, int64_t count, int64_t columns, Acc value) {
  for (int64_t j = count / V::size * V::size; j < columns; j += V::size) {
    // A register at once: a load would wait for narrower stores.
    const int64_t n = count > j ? count - j : 0;
    V::load(row + j).with_rest(n, V::fill(value)).store(row + j);
  }
}

template <typename T>
inline void prefetch(const T* p, int64_t count) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += line) __builtin_prefetch(p + i);
}

// Maximum of n values.
template <typename V, typename Acc = typename V::Acc>
inline Acc row_maximum(const Acc* row, int64_t n) {
  V largest = V::load(row);
  for (int64_t c = V::size; c < n; c += V::size) largest = larger(largest, V::load(row + c));
  return largest_of(largest);
}

// Multiplies attention weights of keys [first, first + count) by 0 where they are dropped.
template <typename Acc>
inline void drop(const AttentionDropout& dropout, int64_t image, int64_t head, int64_t query,
    int64_t first, int64_t count, Acc* weights) {
  const uint32_t threshold = dropout_threshold(dropout.p);
  for (int64_t j = 0; j < count; j += 4) {
    const PhiloxWords words = philox(dropout.seed, static_cast<uint32_t>((first + j) / 4),
        static_cast<uint32_t>(query), static_cast<uint32_t>(head), static_cast<uint32_t>(image));
    for (int64_t i = 0; i < smaller(4, count - j); ++i) {
      if (words.word[i] < threshold) weights[j + i] = 0;
    }
  }
}

}  // namespace dsnet::cpu::DSNET_CPU_ARCH
