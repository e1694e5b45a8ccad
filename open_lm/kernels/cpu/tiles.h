// What the CPU kernels share: vectors of 16 floats, packing for matrix products, scratch memory.
//
// Element is the type that products are taken in: float, or BFloat16 with sums in float. The right side of a product in
// BFloat16 holds rows 2i and 2i + 1 interleaved ("paired" below), which is what AMX and AVX512-BF16 read.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

namespace open_lm {

using at::BFloat16;
using at::Tensor;

constexpr int64_t LANES = 16;  // floats of a vector
constexpr int64_t STRIP = 64;  // tile widths are multiples of this, so inner loops have no remainder
constexpr float FAR = 1e30f;   // as good as infinite, and finite

template <class Element>
constexpr int64_t PAIR = std::is_same_v<Element, BFloat16> ? 2 : 1;  // rows interleaved in a product's right side

inline int64_t rounded_up(int64_t n, int64_t step) {
  return (n + step - 1) / step * step;
}

constexpr float LOG2_E = 1.44269504f;

// Where the next row of a matrix of this width begins: no power of two further, or rows would evict each other from L1.
inline int64_t row_stride(int64_t width) {
  return width + LANES;
}

// 2^x, to about 2e-7; 0 for x far below 0.
inline __m512 exp2_ps(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 part = _mm512_sub_ps(x, whole);
  __m512 p = _mm512_set1_ps(0.00132647f);  // the polynomial with p(0) = 1 that is nearest to 2^part, |part| <= 1/2
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(0.00967151f));
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(0.05550734f));
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(0.24022242f));
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(0.69314698f));
  p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(1.f));
  return _mm512_scalef_ps(p, whole);
}

inline __m256i to_bf16(__m512 x) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(x);
#else
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#endif
}

inline void store(float* to, __m512 x) {
  _mm512_storeu_ps(to, x);
}

inline void store(BFloat16* to, __m512 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), to_bf16(x));
}

// Two rows of 16, interleaved.
inline void store_paired(BFloat16* to, __m512 even, __m512 odd) {
  const __m512i low = _mm512_cvtepu16_epi32(to_bf16(even)), high = _mm512_cvtepu16_epi32(to_bf16(odd));
  _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

// `to`[c][r] = `from`[r][c]; strides in Words. Blocked, so that the lines it reads stay cached until they are used up.
template <class Word>
void transpose(const Word* from, int64_t from_stride, Word* to, int64_t to_stride, int64_t rows, int64_t columns) {
  for (int64_t start = 0; start < rows; start += STRIP) {
    const int64_t end = std::min(start + STRIP, rows);
    for (int64_t c = 0; c < columns; c++)
      for (int64_t r = start; r < end; r++) to[c * to_stride + r] = from[r * from_stride + c];
  }
}

// The right side (columns x width) that is the transpose of `from` (rows x columns), paired; zeros beyond `rows`.
// Its rows are row_stride(width) apart.
template <class Element>
void pack_transposed(
    const Element* from, int64_t stride, int64_t rows, int64_t columns, Element* to, int64_t width) {
  const int64_t to_stride = row_stride(width);
  constexpr int64_t pair = PAIR<Element>;  // a pair lies in one 32-bit word of `from`
  auto* words = reinterpret_cast<uint32_t*>(to);
  transpose(reinterpret_cast<const uint32_t*>(from), stride / pair, words, to_stride, rows, columns / pair);
  for (int64_t c = 0; c < columns / pair; c++)
    std::fill(words + c * to_stride + rows, words + c * to_stride + width, 0u);
}

// The right side (height x columns) that is `from` (rows x columns), paired; zeros beyond `rows`. `height` is even.
template <class Element>
void pack(const Element* from, int64_t stride, int64_t rows, int64_t columns, Element* to, int64_t height) {
  if constexpr (PAIR<Element> == 1) {
    for (int64_t r = 0; r < rows; r++) std::copy_n(from + r * stride, columns, to + r * columns);
    std::fill(to + rows * columns, to + height * columns, 0.f);
  } else {
    const auto* bits = reinterpret_cast<const uint16_t*>(from);
    auto* words = reinterpret_cast<uint32_t*>(to);
    for (int64_t r = 0; r < height; r += 2) {
      const uint16_t *even = bits + r * stride, *odd = even + stride;
      uint32_t* word = words + r / 2 * columns;
      if (r + 1 < rows)
        for (int64_t c = 0; c < columns; c++) word[c] = even[c] | uint32_t(odd[c]) << 16;
      else
        for (int64_t c = 0; c < columns; c++) word[c] = r < rows ? even[c] : 0;
    }
  }
}

// C (m x n) = A (m x k) B (k x n), or C += A B. `right` is packed; k is even in BFloat16.
template <class Element>
void product(
    int64_t m, int64_t n, int64_t k, const Element* left, int64_t left_stride, const Element* right,
    int64_t right_stride, float* out, int64_t out_stride, bool add) {
  at::native::cpublas::brgemm(
      m, n, k, left_stride, right_stride, out_stride, add, left, right, out, PAIR<Element> == 2);
}

// Runs `work(thread)` once on each of n threads.
template <class Work>
void on_each_thread(int64_t n_threads, const Work& work) {
  at::parallel_for(0, n_threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; thread++) work(thread);
    at::native::cpublas::brgemm_release();
  });
}

// Uninitialised memory for `count` values.
template <class Element>
struct Scratch {
  Tensor memory;
  explicit Scratch(int64_t count) : memory(at::empty({count}, c10::CppTypeToScalarType<Element>::value)) {}
  Element* data() {
    return memory.data_ptr<Element>();
  }
};

}  // namespace open_lm
