// x W' for a handful of rows of x, as decoding has them: W is read once, as it lies, at the speed of the memory.
#pragma once

#include "tiles.h"

namespace open_lm {
namespace {

constexpr int64_t ROWS_AT_ONCE = 8;      // of x, whose sums fit the registers
constexpr int64_t SLAB_BYTES = 1 << 16;  // of W that stay cached until all rows of x have met them
constexpr int64_t STEPS_AHEAD = 6;       // vectors of a row of W
constexpr int64_t PARTS = 24;            // rows of a slab are a multiple of it, and so of every block's

// How many elements a vector has.
template <class Element>
constexpr int64_t STEP = std::is_same_v<Element, float> ? LANES : 2 * LANES;

inline __m512 loaded(const float* from) {
  return _mm512_loadu_ps(from);
}

inline __m512i loaded(const BFloat16* from) {
  return _mm512_loadu_si512(from);
}

inline __m512 multiplied(__m512 w, __m512 x, __m512 sum) {
  return _mm512_fmadd_ps(w, x, sum);
}

inline __m512 multiplied(__m512i w, __m512i x, __m512 sum) {
#ifdef __AVX512BF16__
  return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x);
#else
  const __m512i high = _mm512_set1_epi32(0xffff0000);
  const auto even = [](__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); };
  const auto odd = [&](__m512i pairs) { return _mm512_castsi512_ps(_mm512_and_si512(pairs, high)); };
  return _mm512_fmadd_ps(odd(w), odd(x), _mm512_fmadd_ps(even(w), even(x), sum));
#endif
}

// The sums of four vectors; each is added up in the same order, wherever it stands among the four.
inline void add_up(const __m512* from, float* sums) {
  const auto halved = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  };
  const __m512d first = _mm512_castps_pd(halved(from[0], from[1])), second = _mm512_castps_pd(halved(from[2], from[3]));
  const __m512 lanes = _mm512_add_ps(
      _mm512_castpd_ps(_mm512_unpacklo_pd(first, second)), _mm512_castpd_ps(_mm512_unpackhi_pd(first, second)));
  const __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(lanes), 1));
  const __m256 pairs = _mm256_add_ps(_mm512_castps512_ps256(lanes), upper);
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
}

// out[r][j] for R rows of x and J rows of W.
template <class Element, int R, int J, class Out>
void block(const Element* x, const Element* w, int64_t dim, Out* out, int64_t out_stride) {
  constexpr int N = (J * R + 3) / 4 * 4;
  __m512 sum[N];
  for (int i = 0; i < N; i++) sum[i] = _mm512_setzero_ps();
  for (int64_t d = 0; d < dim; d += STEP<Element>) {
    decltype(loaded(w)) part[J];
    for (int j = 0; j < J; j++) {
      const Element* from = w + j * dim + d;
      // Blocks ahead to the second cache: in the first, which holds x, there is room for a few steps ahead.
      _mm_prefetch(reinterpret_cast<const char*>(from + 2 * J * dim), _MM_HINT_T1);
      _mm_prefetch(reinterpret_cast<const char*>(from + STEPS_AHEAD * STEP<Element>), _MM_HINT_T0);
      part[j] = loaded(from);
    }
    for (int r = 0; r < R; r++) {
      const auto factor = loaded(x + r * dim + d);
      for (int j = 0; j < J; j++) sum[j * R + r] = multiplied(part[j], factor, sum[j * R + r]);
    }
  }
  float sums[N];
  for (int i = 0; i < N; i += 4) add_up(sum + i, sums + i);
  for (int r = 0; r < R; r++)
    for (int j = 0; j < J; j++) out[r * out_stride + j] = sums[j * R + r];
}

template <class Element, int R, class Out>
void columns(const Element* x, const Element* w, int64_t dim, int64_t begin, int64_t end, Out* out, int64_t stride) {
  constexpr int J = R <= 3 ? 8 : PARTS / R;  // J R sums and J + 1 factors fit the 32 registers
  int64_t o = begin;
  for (; o + J <= end; o += J) block<Element, R, J>(x, w + o * dim, dim, out + o, stride);
  for (; o < end; o++) block<Element, R, 1>(x, w + o * dim, dim, out + o, stride);
}

template <class Element, class Out>
void some_rows(
    int64_t n, const Element* x, const Element* w, int64_t dim, int64_t begin, int64_t end, Out* out, int64_t stride) {
  switch (n) {
    case 1: return columns<Element, 1>(x, w, dim, begin, end, out, stride);
    case 2: return columns<Element, 2>(x, w, dim, begin, end, out, stride);
    case 3: return columns<Element, 3>(x, w, dim, begin, end, out, stride);
    case 4: return columns<Element, 4>(x, w, dim, begin, end, out, stride);
    case 5: return columns<Element, 5>(x, w, dim, begin, end, out, stride);
    case 6: return columns<Element, 6>(x, w, dim, begin, end, out, stride);
    case 7: return columns<Element, 7>(x, w, dim, begin, end, out, stride);
    default: return columns<Element, 8>(x, w, dim, begin, end, out, stride);
  }
}

template <class Element, class Out>
Tensor few_rows_of(const Tensor& x, const Tensor& weight, Tensor result) {
  const int64_t n = x.size(0), dim = weight.size(1), width = weight.size(0);
  const Element *from = x.data_ptr<Element>(), *w = weight.data_ptr<Element>();
  Out* out = result.data_ptr<Out>();
  const int64_t slab = rounded_up(std::max<int64_t>(1, SLAB_BYTES / (dim * int64_t(sizeof(Element)))), PARTS);
  at::parallel_for(0, (width + slab - 1) / slab, 1, [&](int64_t first, int64_t last) {
    for (int64_t at = first * slab; at < std::min(last * slab, width); at += slab)
      for (int64_t r = 0; r < n; r += ROWS_AT_ONCE)
        some_rows(std::min(ROWS_AT_ONCE, n - r), from + r * dim, w, dim, at, std::min(at + slab, width),
                  out + r * width, width);
  });
  return result;
}

}  // namespace

// x (N, D), weight (V, D), D a multiple of 32; (N, V), in float where `exact`, else in the type of x.
inline Tensor few_rows_product(const Tensor& x, const Tensor& weight, bool exact) {
  const bool plain = x.scalar_type() == at::kFloat;
  Tensor out = at::empty({x.size(0), weight.size(0)}, exact ? x.options().dtype(at::kFloat) : x.options());
  if (plain) return few_rows_of<float, float>(x, weight, out);
  return exact ? few_rows_of<BFloat16, float>(x, weight, out) : few_rows_of<BFloat16, BFloat16>(x, weight, out);
}

}  // namespace open_lm
