// One position after another: the attention of one new position over a cache, and the norm before it.
//
// At a few hundred numbers a row, what matters is how few operators there are, not how fast each is.
#pragma once

#include "tiles.h"

#include <optional>
#include <vector>

namespace open_lm {
namespace {

inline __m512 widened(const float* from) {
  return _mm512_loadu_ps(from);
}

inline __m512 widened(const BFloat16* from) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

// The first numbers of a vector, as many as `lanes` has bits; 0 in the others.
inline __m512 widened(const float* from, __mmask16 lanes) {
  return _mm512_maskz_loadu_ps(lanes, from);
}

inline __m512 widened(const BFloat16* from, __mmask16 lanes) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

// The lanes of a vector at `d` that are among `n` numbers.
inline __mmask16 among(int64_t d, int64_t n) {
  return n - d >= LANES ? 0xffff : (1u << (n - d)) - 1;
}

// What turns the channels of a head: no angles, or `half` of each, the same for all heads or one set per head, the same
// for all rows or one set per row.
struct Turn {
  const float *cos, *sin;
  int64_t half, per_head, per_row;  // strides from head to head and from row to row; 0 = shared
  bool in_pairs;
};

// One head of one row turned, rounded as the cache is, into `to`.
template <class Element>
void turn(const Element* from, const Turn& angles, int64_t row, int64_t head, int64_t dim, Element* to) {
  if (!angles.cos) return void(std::copy(from, from + dim, to));
  const int64_t at = row * angles.per_row + head * angles.per_head;
  const float *cos = angles.cos + at, *sin = angles.sin + at;
  for (int64_t i = 0; i < angles.half; i++) {
    const int64_t a = angles.in_pairs ? 2 * i : i, b = angles.in_pairs ? 2 * i + 1 : i + angles.half;
    const float first = from[a], second = from[b];
    to[a] = Element(first * cos[i] - second * sin[i]);
    to[b] = Element(second * cos[i] + first * sin[i]);
  }
}

// softmax of n scores, whose memory goes on to a multiple of LANES.
inline void softmax(float* scores, int64_t n) {
  const float largest = *std::max_element(scores, scores + n);
  std::fill(scores + n, scores + rounded_up(n, LANES), -FAR);
  __m512 total = _mm512_setzero_ps();
  for (int64_t s = 0; s < n; s += LANES) {
    const __m512 above = _mm512_sub_ps(_mm512_loadu_ps(scores + s), _mm512_set1_ps(largest));
    const __m512 p = exp2_ps(_mm512_mul_ps(above, _mm512_set1_ps(LOG2_E)));
    _mm512_storeu_ps(scores + s, p);
    total = _mm512_add_ps(total, p);
  }
  const float share = 1 / _mm512_reduce_add_ps(total);
  for (int64_t s = 0; s < n; s++) scores[s] *= share;
}

// softmax(q k') v of some heads, `shared` of them on each group of keys and values, over n positions; those with `real`
// false are not there. Position after position, as the caches lie.
template <class Element>
void attend(
    const Element* q, const Element* keys, const Element* values, int64_t stride, int64_t n, int64_t heads,
    int64_t shared, int64_t dim, const bool* real, float* mixed, Element* out) {
  const int64_t padded = rounded_up(n, LANES);
  const float scale = 1 / std::sqrt(float(dim));
  std::vector<float> scores(heads * padded);
  for (int64_t s = 0; s < n; s++)
    for (int64_t h = 0; h < heads; h++) {
      const Element *key = keys + s * stride + h / shared * dim, *own = q + h * dim;
      __m512 sum = _mm512_setzero_ps();
      for (int64_t d = 0; d < dim; d += LANES) {
        const __mmask16 lanes = among(d, dim);
        sum = _mm512_fmadd_ps(widened(key + d, lanes), widened(own + d, lanes), sum);
      }
      scores[h * padded + s] = real && !real[s] ? -FAR : _mm512_reduce_add_ps(sum) * scale;
    }
  for (int64_t h = 0; h < heads; h++) softmax(scores.data() + h * padded, n);
  std::fill(mixed, mixed + heads * dim, 0.f);
  for (int64_t s = 0; s < n; s++)
    for (int64_t h = 0; h < heads; h++) {
      const Element* value = values + s * stride + h / shared * dim;
      const __m512 share = _mm512_set1_ps(scores[h * padded + s]);
      for (int64_t d = 0; d < dim; d += LANES) {
        const __mmask16 lanes = among(d, dim);
        float* at = mixed + h * dim + d;
        const __m512 sum = _mm512_fmadd_ps(share, widened(value + d, lanes), widened(at, lanes));
        _mm512_mask_storeu_ps(at, lanes, sum);
      }
    }
  int64_t d = 0;
  for (; d + LANES <= heads * dim; d += LANES) store(out + d, _mm512_loadu_ps(mixed + d));
  for (; d < heads * dim; d++) out[d] = Element(mixed[d]);
}

template <class Element>
Tensor decode_attention_of(
    const Tensor& q, const Tensor& k, const Tensor& v, const Turn& angles, Tensor& keys, Tensor& values,
    const int64_t* slots, const int64_t* lengths, int64_t window, const bool* real) {
  const int64_t batch = q.size(0), groups = keys.size(2), dim = keys.size(3), heads = q.size(1) / dim;
  const int64_t row = keys.stride(0), stride = keys.stride(1), shared = heads / groups;
  Tensor out = at::empty({batch, heads * dim}, q.options());
  const Element *q_at = q.data_ptr<Element>(), *k_at = k.data_ptr<Element>(), *v_at = v.data_ptr<Element>();
  Element *key_at = keys.data_ptr<Element>(), *value_at = values.data_ptr<Element>(), *to = out.data_ptr<Element>();
  const int64_t parts = batch == 1 ? std::min<int64_t>(groups, at::get_num_threads()) : 1;
  at::parallel_for(0, batch * parts, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> mixed(heads * dim);
    std::vector<Element> turned(heads * dim);
    for (int64_t i = begin; i < end; i++) {
      const int64_t b = i / parts, first = i % parts * groups / parts, last = (i % parts + 1) * groups / parts;
      const int64_t length = lengths[b], n = length + 1, unseen = window && n > window ? n - window : 0;
      Element *own_keys = key_at + slots[b] * row, *own_values = value_at + slots[b] * row;
      for (int64_t g = first; g < last; g++) {
        turn(k_at + b * k.stride(0) + g * dim, angles, b, g, dim, own_keys + length * stride + g * dim);
        std::copy_n(v_at + b * v.stride(0) + g * dim, dim, own_values + length * stride + g * dim);
      }
      const int64_t own_heads = (last - first) * shared, head = first * shared;
      for (int64_t h = 0; h < own_heads; h++)
        turn(q_at + b * q.stride(0) + (head + h) * dim, angles, b, head + h, dim, turned.data() + h * dim);
      const int64_t start = unseen * stride + first * dim;
      attend(turned.data(), own_keys + start, own_values + start, stride, n - unseen, own_heads, shared, dim,
             real ? real + b * n + unseen : nullptr, mixed.data(), to + (b * heads + head) * dim);
    }
  });
  return out;
}

template <class Element>
void normed(const Tensor& x, const Tensor& weight, double eps, Tensor& out) {
  const int64_t dim = weight.size(0), rows = x.numel() / dim;
  const Element *from = x.data_ptr<Element>(), *w = weight.data_ptr<Element>();
  Element* to = out.data_ptr<Element>();
  for (int64_t r = 0; r < rows; r++, from += dim, to += dim) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t d = 0; d < dim; d += LANES) sum = _mm512_fmadd_ps(widened(from + d), widened(from + d), sum);
    const __m512 factor = _mm512_set1_ps(1 / std::sqrt(_mm512_reduce_add_ps(sum) / dim + float(eps)));
    for (int64_t d = 0; d < dim; d += LANES) {
      store(to + d, _mm512_mul_ps(widened(from + d), factor));  // rounded before the weight, as the module does
      store(to + d, _mm512_mul_ps(widened(to + d), widened(w + d)));
    }
  }
}

}  // namespace

// One new position of each row, its q (B, H K), k and v (B, G K): turned, k and v put at `lengths` (B) of the rows
// `slots` (B) of the caches (N, S, G, K), and attention over the last `window` (0: all) positions up to there; (B, H K).
// Angles are (K/2), (H, K/2), or (B, 1, 1, K/2). `real` (B, n), for rows of one length n - 1, is false on padding.
inline Tensor decode_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& cos,
    const std::optional<Tensor>& sin, bool in_pairs, Tensor& keys, Tensor& values, const Tensor& slots,
    const Tensor& lengths, int64_t window, const std::optional<Tensor>& real) {
  Turn angles{nullptr, nullptr, keys.size(3) / 2, 0, 0, in_pairs};
  if (cos) {
    angles.cos = cos->data_ptr<float>();
    angles.sin = sin->data_ptr<float>();
    const bool several = cos->numel() > angles.half;
    angles.per_row = several && cos->dim() == 4 ? angles.half : 0;
    angles.per_head = several && cos->dim() != 4 ? angles.half : 0;
  }
  const bool* there = real ? real->data_ptr<bool>() : nullptr;
  const int64_t *at = slots.data_ptr<int64_t>(), *ends = lengths.data_ptr<int64_t>();
  if (q.scalar_type() == at::kFloat)
    return decode_attention_of<float>(q, k, v, angles, keys, values, at, ends, window, there);
  return decode_attention_of<BFloat16>(q, k, v, angles, keys, values, at, ends, window, there);
}

// x / rms(x), rounded, times weight; the last dimension is a multiple of 16.
inline Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  Tensor out = at::empty(x.sizes(), x.options());
  x.scalar_type() == at::kFloat ? normed<float>(x, weight, eps, out) : normed<BFloat16>(x, weight, eps, out);
  return out;
}

}  // namespace open_lm
