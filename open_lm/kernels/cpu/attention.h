// Causal softmax attention, forward and backward, whose scores exist only as tiles that stay in a core's cache.
//
// Made for heads so narrow that the softmax, not the products, is most of the work. Threads own heads.
#pragma once

#include "tiles.h"

#include <vector>

namespace open_lm {
namespace {

constexpr int64_t TILE_SCORES = 1 << 17;  // of a forward tile, which is as wide as there are keys
constexpr int64_t KEYS = 64;              // of a backward tile
constexpr int64_t QUERIES = 256;          // of a backward tile

// One head of a (batch, positions, heads, width) tensor whose last stride is 1.
template <class Element>
struct Head {
  Element* data;
  int64_t stride;  // from position to position
  Head(const Tensor& x, int64_t b, int64_t h)
      : data(x.data_ptr<Element>() + b * x.stride(0) + h * x.stride(2)), stride(x.stride(1)) {}
  Element* at(int64_t position) const {
    return data + position * stride;
  }
};

// Writes exp(score - largest) of one row, 0 from `visible` on; returns log of the sum of e^(scale score), and 1 / sum.
template <class Element>
std::pair<float, float> softmax_row(float* scores, int64_t width, int64_t visible, float scale, Element* out) {
  std::fill(scores + visible, scores + width, -FAR);
  __m512 top[2] = {_mm512_set1_ps(-FAR), _mm512_set1_ps(-FAR)};
  for (int64_t c = 0; c < width; c += 2 * LANES) {
    top[0] = _mm512_max_ps(top[0], _mm512_loadu_ps(scores + c));
    top[1] = _mm512_max_ps(top[1], _mm512_loadu_ps(scores + c + LANES));
  }
  const float largest = _mm512_reduce_max_ps(_mm512_max_ps(top[0], top[1])) * scale;
  const __m512 factor = _mm512_set1_ps(scale * LOG2_E), offset = _mm512_set1_ps(largest * LOG2_E);
  __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t c = 0; c < width; c += 2 * LANES)
    for (int64_t i = 0; i < 2; i++) {
      const __m512 score = _mm512_loadu_ps(scores + c + i * LANES);
      const __m512 p = exp2_ps(_mm512_fmsub_ps(score, factor, offset));
      sum[i] = _mm512_add_ps(sum[i], p);
      store(out + c + i * LANES, p);
    }
  const float total = _mm512_reduce_add_ps(_mm512_add_ps(sum[0], sum[1]));
  return {largest + std::log(total), 1 / total};
}

template <class Element>
void forward_head(
    Head<Element> q, Head<Element> k, Head<Element> v, Head<Element> out, float* log_sum, int64_t n, int64_t dim,
    float scale) {
  const int64_t padded = rounded_up(n, STRIP);
  const int64_t rows = std::clamp(TILE_SCORES / padded / LANES * LANES, LANES, STRIP);
  Scratch<Element> keys(dim * row_stride(padded)), values(padded * dim), weights(rows * padded);
  Scratch<float> scores(rows * padded), mixed(rows * dim);
  pack_transposed(k.data, k.stride, n, dim, keys.data(), padded);
  pack(v.data, v.stride, n, dim, values.data(), padded);
  float inverse[STRIP];
  for (int64_t start = 0; start < n; start += rows) {
    const int64_t count = std::min(rows, n - start), width = rounded_up(start + count, STRIP);
    product(count, width, dim, q.at(start), q.stride, keys.data(), row_stride(padded), scores.data(), width, false);
    for (int64_t i = 0; i < count; i++)
      std::tie(log_sum[start + i], inverse[i]) =
          softmax_row(scores.data() + i * width, width, start + i + 1, scale, weights.data() + i * width);
    product(count, dim, width, weights.data(), width, values.data(), dim, mixed.data(), dim, false);
    for (int64_t i = 0; i < count; i++)
      for (int64_t d = 0; d < dim; d++) out.at(start + i)[d] = mixed.data()[i * dim + d] * inverse[i];
  }
}

// From scores and gradients of weights, both (keys x queries), to weights and gradients of scores: both as left sides,
// the latter also paired. p = exp(scale score - log sum), `log_sum` being in base 2; its gradient is scale p (dp - delta).
template <class Element>
void backward_tile(
    const float* scores, const float* grad_weights, int64_t keys, int64_t width, const float* log_sum,
    const float* delta, float scale, Element* weights, Element* left, Element* right) {
  const __m512 factor = _mm512_set1_ps(scale), to_power = _mm512_set1_ps(scale * LOG2_E);
  for (int64_t j = 0; j < keys; j += 2)
    for (int64_t c = 0; c < width; c += LANES) {
      const __m512 z = _mm512_loadu_ps(log_sum + c), mean = _mm512_loadu_ps(delta + c);
      __m512 grad[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
      for (int64_t i = 0; i < std::min<int64_t>(2, keys - j); i++) {
        const int64_t at = (j + i) * width + c;
        const __m512 p = exp2_ps(_mm512_fmsub_ps(_mm512_loadu_ps(scores + at), to_power, z));
        const __m512 above_mean = _mm512_sub_ps(_mm512_loadu_ps(grad_weights + at), mean);
        grad[i] = _mm512_mul_ps(_mm512_mul_ps(p, factor), above_mean);
        store(weights + at, p);
        store(left + at, grad[i]);
      }
      if constexpr (PAIR<Element> == 2) store_paired(right + j * width + 2 * c, grad[0], grad[1]);
    }
}

// Working memory of one thread's backward pass over one head after the other.
template <class Element>
struct Backward {
  int64_t n, dim, padded, apart;  // `apart`: row stride of what is (dim x padded)
  float scale;
  Scratch<Element> q_right, q_left, out_right, out_left, keys_left, weights, left, right;
  Scratch<float> scores, grad_weights, log_sum, delta, grad_q, grad_k, grad_v;

  Backward(int64_t n, int64_t dim, float scale)
      : n(n), dim(dim), padded(rounded_up(n, STRIP)), apart(row_stride(padded)), scale(scale), q_right(dim * apart),
        q_left(padded * dim), out_right(dim * apart), out_left(padded * dim), keys_left(dim * apart),
        weights(KEYS * QUERIES),
        left(KEYS * QUERIES), right(KEYS * QUERIES), scores(KEYS * QUERIES), grad_weights(KEYS * QUERIES),
        log_sum(padded), delta(padded), grad_q(dim * apart), grad_k(padded * dim), grad_v(padded * dim) {}

  void start_group(Head<Element> k) {
    std::fill_n(grad_k.data(), padded * dim, 0.f);
    std::fill_n(grad_v.data(), padded * dim, 0.f);
    std::fill_n(keys_left.data(), dim * apart, Element(0.f));
    transpose(k.data, k.stride, keys_left.data(), apart, n, dim);
  }

  void add_head(
      Head<Element> q, Head<Element> k, Head<Element> v, Head<Element> out, Head<Element> grad_out, const float* lse) {
    pack_transposed(q.data, q.stride, n, dim, q_right.data(), padded);
    pack(q.data, q.stride, n, dim, q_left.data(), padded);
    pack_transposed(grad_out.data, grad_out.stride, n, dim, out_right.data(), padded);
    pack(grad_out.data, grad_out.stride, n, dim, out_left.data(), padded);
    std::fill_n(grad_q.data(), dim * apart, 0.f);
    for (int64_t i = 0; i < padded; i++) {
      float total = 0;
      for (int64_t d = 0; i < n && d < dim; d++) total += float(out.at(i)[d]) * float(grad_out.at(i)[d]);
      delta.data()[i] = total;
      log_sum.data()[i] = i < n ? lse[i] * LOG2_E : FAR;  // queries that are padding weigh nothing
    }
    for (int64_t j = 0; j < n; j += KEYS)
      for (int64_t c = j; c < padded; c += QUERIES) tile(k, v, j, c);
  }

  // Keys from `j` and queries from `c` on.
  void tile(Head<Element> k, Head<Element> v, int64_t j, int64_t c) {
    constexpr int64_t pair = PAIR<Element>;
    const int64_t keys = std::min(KEYS, n - j), width = std::min(QUERIES, padded - c);
    product(keys, width, dim, k.at(j), k.stride, q_right.data() + c * pair, apart, scores.data(), width, false);
    product(
        keys, width, dim, v.at(j), v.stride, out_right.data() + c * pair, apart, grad_weights.data(), width, false);
    for (int64_t i = 1; c == j && i < keys; i++)  // queries before the key
      std::fill_n(scores.data() + i * width, std::min(i, width), -FAR);
    Element* as_right = pair == 2 ? right.data() : left.data();
    backward_tile(
        scores.data(), grad_weights.data(), keys, width, log_sum.data() + c, delta.data() + c, scale, weights.data(),
        left.data(), as_right);
    float *to_v = grad_v.data() + j * dim, *to_k = grad_k.data() + j * dim;
    product(keys, dim, width, weights.data(), width, out_left.data() + c * dim, dim, to_v, dim, true);
    product(keys, dim, width, left.data(), width, q_left.data() + c * dim, dim, to_k, dim, true);
    const int64_t depth = pair == 2 ? rounded_up(keys, 2) : keys;
    product(dim, width, depth, keys_left.data() + j, apart, as_right, width, grad_q.data() + c, apart, true);
  }

  void write_q(Head<Element> to) {
    for (int64_t i = 0; i < n; i++)
      for (int64_t d = 0; d < dim; d++) to.at(i)[d] = grad_q.data()[d * apart + i];
  }

  void write_kv(Head<Element> to_k, Head<Element> to_v) {
    for (int64_t i = 0; i < n; i++)
      for (int64_t d = 0; d < dim; d++) {
        to_k.at(i)[d] = grad_k.data()[i * dim + d];
        to_v.at(i)[d] = grad_v.data()[i * dim + d];
      }
  }
};

template <class Element>
void forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, float* log_sum, float scale) {
  const int64_t n = q.size(1), heads = q.size(2), repeats = heads / k.size(2);
  at::parallel_for(0, q.size(0) * heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t b = i / heads, h = i % heads, g = h / repeats;
      forward_head<Element>(
          {q, b, h}, {k, b, g}, {v, b, g}, {out, b, h}, log_sum + i * n, n, q.size(3), scale);
    }
    at::native::cpublas::brgemm_release();
  });
}

template <class Element>
void backward(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& grad_out, const float* log_sum,
    float scale, const Tensor& grad_q, const Tensor& grad_k, const Tensor& grad_v) {
  const int64_t n = q.size(1), heads = q.size(2), groups = k.size(2), repeats = heads / groups;
  at::parallel_for(0, q.size(0) * groups, 1, [&](int64_t begin, int64_t end) {
    Backward<Element> memory(n, q.size(3), scale);
    for (int64_t i = begin; i < end; i++) {
      const int64_t b = i / groups, g = i % groups;
      memory.start_group({k, b, g});
      for (int64_t h = g * repeats; h < (g + 1) * repeats; h++) {
        memory.add_head({q, b, h}, {k, b, g}, {v, b, g}, {out, b, h}, {grad_out, b, h}, log_sum + (b * heads + h) * n);
        memory.write_q({grad_q, b, h});
      }
      memory.write_kv({grad_k, b, g}, {grad_v, b, g});
    }
    at::native::cpublas::brgemm_release();
  });
}

void check(const Tensor& x, const Tensor& q) {
  TORCH_CHECK(x.dim() == 4 && x.stride(3) == 1 && x.stride(1) % 2 == 0 && x.scalar_type() == q.scalar_type());
  TORCH_CHECK(x.size(0) == q.size(0) && x.size(1) == q.size(1) && x.size(3) == q.size(3) && x.size(3) % 2 == 0);
  TORCH_CHECK(q.size(2) % x.size(2) == 0);
}

}  // namespace

// (mixed, log of the sums of exponentials): queries (B, T, H, K) over keys and values (B, T, G, K).
std::tuple<Tensor, Tensor> attention_forward(const Tensor& q, const Tensor& k, const Tensor& v) {
  for (const Tensor& x : {q, k, v}) check(x, q);
  Tensor out = at::empty(q.sizes(), q.options());
  Tensor log_sum = at::empty({q.size(0), q.size(2), q.size(1)}, q.options().dtype(at::kFloat));
  const float scale = 1 / std::sqrt(float(q.size(3)));
  if (q.scalar_type() == at::kFloat)
    forward<float>(q, k, v, out, log_sum.data_ptr<float>(), scale);
  else
    forward<BFloat16>(q, k, v, out, log_sum.data_ptr<float>(), scale);
  return {out, log_sum};
}

// Gradients of queries, keys and values.
std::tuple<Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
    const Tensor& log_sum) {
  for (const Tensor& x : {q, k, v, out, grad_out}) check(x, q);
  Tensor grad_q = at::empty(q.sizes(), q.options()), grad_k = at::empty(k.sizes(), k.options());
  Tensor grad_v = at::empty(v.sizes(), v.options());
  const float scale = 1 / std::sqrt(float(q.size(3)));
  const float* lse = log_sum.data_ptr<float>();
  if (q.scalar_type() == at::kFloat)
    backward<float>(q, k, v, out, grad_out, lse, scale, grad_q, grad_k, grad_v);
  else
    backward<BFloat16>(q, k, v, out, grad_out, lse, scale, grad_q, grad_k, grad_v);
  return {grad_q, grad_k, grad_v};
}

}  // namespace open_lm
