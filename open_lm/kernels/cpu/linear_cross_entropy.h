// Output layer and cross-entropy: the logits exist only as tiles that stay in a core's cache.
//
// Tiles are (vocabulary x positions): logits^T = W h^T, so that statistics over the vocabulary are elementwise over
// vectors of positions. The first pass finds log Z of every position; the second computes each tile again and, from it,
// its share of both gradients. Threads own ranges of the vocabulary.
#pragma once

#include "tiles.h"

#include <ATen/ops/zeros.h>

namespace open_lm {
namespace {

constexpr int64_t WORDS = 256;       // vocabulary entries of a tile
constexpr int64_t POSITIONS = 256;   // positions of a tile
constexpr int64_t CHUNK = 2048;      // positions whose hidden gradients every thread sums up by itself

struct Problem {
  int64_t positions, dim, vocab;  // those of the chunk
  int64_t padded;                 // positions, rounded up
  const int64_t* targets;
};

// Per position, over the vocabulary that one thread has seen.
struct Statistics {
  Scratch<float> largest, sum;
  explicit Statistics(int64_t n) : largest(n), sum(n) {
    std::fill_n(largest.data(), n, -FAR);
    std::fill_n(sum.data(), n, 0.f);
  }
};

inline __m512 exp_of_difference(__m512 a, __m512 b) {
  return exp2_ps(_mm512_mul_ps(_mm512_sub_ps(a, b), _mm512_set1_ps(LOG2_E)));
}

// Adds a tile (words x width) to the largest logit and the sum of exponentials of its positions.
void add_statistics(const float* tile, int64_t words, int64_t width, float* largest, float* sum) {
  constexpr int64_t N = STRIP / LANES;
  for (int64_t c = 0; c < width; c += STRIP) {
    __m512 before[N], top[N], total[N];
    for (int64_t i = 0; i < N; i++) before[i] = top[i] = _mm512_loadu_ps(largest + c + i * LANES);
    for (int64_t w = 0; w < words; w++)
      for (int64_t i = 0; i < N; i++) top[i] = _mm512_max_ps(top[i], _mm512_loadu_ps(tile + w * width + c + i * LANES));
    for (int64_t i = 0; i < N; i++)
      total[i] = _mm512_mul_ps(_mm512_loadu_ps(sum + c + i * LANES), exp_of_difference(before[i], top[i]));
    for (int64_t w = 0; w < words; w++)
      for (int64_t i = 0; i < N; i++) {
        const __m512 logit = _mm512_loadu_ps(tile + w * width + c + i * LANES);
        total[i] = _mm512_add_ps(total[i], exp_of_difference(logit, top[i]));
      }
    for (int64_t i = 0; i < N; i++) {
      _mm512_storeu_ps(largest + c + i * LANES, top[i]);
      _mm512_storeu_ps(sum + c + i * LANES, total[i]);
    }
  }
}

// Turns a tile of logits into gradients: exp(logit - log Z) * weight, as left side and, paired, as right side.
template <class Element>
void to_gradients(
    const float* tile, int64_t words, int64_t width, const float* log_z, const float* weight, Element* left,
    Element* right) {
  for (int64_t w = 0; w < words; w += 2) {
    const bool has_odd = w + 1 < words;
    for (int64_t c = 0; c < width; c += LANES) {
      const __m512 z = _mm512_loadu_ps(log_z + c), scale = _mm512_loadu_ps(weight + c);
      const float* at = tile + w * width + c;
      const __m512 even = _mm512_mul_ps(exp_of_difference(_mm512_loadu_ps(at), z), scale);
      __m512 odd = _mm512_setzero_ps();
      store(left + w * width + c, even);
      if (has_odd) {
        odd = _mm512_mul_ps(exp_of_difference(_mm512_loadu_ps(at + width), z), scale);
        store(left + (w + 1) * width + c, odd);
      }
      if constexpr (PAIR<Element> == 2) store_paired(right + w * width + 2 * c, even, odd);
    }
  }
}

// Subtracts 1 where a tile holds the target of a position that counts (weight above 0).
template <class Element>
void subtract_targets(
    const float* tile, int64_t first_word, int64_t words, int64_t width, int64_t n, const int64_t* targets,
    const float* log_z, const float* weight, Element* left, Element* right) {
  for (int64_t c = 0; c < n; c++) {
    const int64_t w = targets[c] - first_word;
    if (w < 0 || w >= words) continue;
    const Element gradient = std::exp(tile[w * width + c] - log_z[c]) * weight[c] - 1.f;
    left[w * width + c] = gradient;
    if constexpr (PAIR<Element> == 2) right[w / 2 * 2 * width + 2 * c + w % 2] = gradient;
  }
}

template <class Element>
struct Chunk {
  Problem problem;
  const Element *hidden, *weight;
  Scratch<Element> hidden_transposed;  // right side (dim x padded)
  int64_t n_threads = at::get_num_threads();

  Chunk(Problem p, const Element* h, const Element* w)
      : problem(p), hidden(h), weight(w), hidden_transposed(p.dim * row_stride(p.padded)) {
    pack_transposed(hidden, p.dim, p.positions, p.dim, hidden_transposed.data(), p.padded);
  }

  // Calls `use(first word, words, first position, width)` for every tile of a thread, its logits being in `tile`.
  template <class NewWords, class Use>
  void over_tiles(int64_t thread, float* tile, const NewWords& new_words, const Use& use) {
    const int64_t tiles = (problem.vocab + WORDS - 1) / WORDS;
    for (int64_t t = tiles * thread / n_threads; t < tiles * (thread + 1) / n_threads; t++) {
      const int64_t v = t * WORDS, words = std::min(WORDS, problem.vocab - v);
      new_words(v, words);
      for (int64_t r = 0; r < problem.padded; r += POSITIONS) {
        const int64_t width = std::min(POSITIONS, problem.padded - r);
        product(
            words, width, problem.dim, weight + v * problem.dim, problem.dim,
            hidden_transposed.data() + r * PAIR<Element>, row_stride(problem.padded), tile, width, false);
        use(v, words, r, width);
      }
    }
  }

  // log Z of every position, and the logit of its target where it has one.
  void statistics(float* log_z, float* target_logit) {
    std::vector<Statistics> of_thread;
    for (int64_t thread = 0; thread < n_threads; thread++) of_thread.emplace_back(problem.padded);
    on_each_thread(n_threads, [&](int64_t thread) {
      Scratch<float> tile(WORDS * POSITIONS);
      float *largest = of_thread[thread].largest.data(), *sum = of_thread[thread].sum.data();
      over_tiles(thread, tile.data(), [](int64_t, int64_t) {}, [&](int64_t v, int64_t words, int64_t r, int64_t width) {
        add_statistics(tile.data(), words, width, largest + r, sum + r);
        for (int64_t c = 0; c < std::min(width, problem.positions - r); c++) {
          const int64_t w = problem.targets[r + c] - v;
          if (w >= 0 && w < words) target_logit[r + c] = tile.data()[w * width + c];
        }
      });
    });
    for (int64_t i = 0; i < problem.padded; i++) {
      float top = -FAR, total = 0;
      for (auto& s : of_thread) top = std::max(top, s.largest.data()[i]);
      for (auto& s : of_thread) total += s.sum.data()[i] * std::exp(s.largest.data()[i] - top);
      log_z[i] = top + std::log(total);
    }
  }

  // Gradients of the sum: `grad_hidden` of the chunk is set, `grad_weight` set or added to.
  void gradients(const float* log_z, const float* weights, Element* grad_hidden, float* grad_weight, bool add) {
    const int64_t dim = problem.dim, padded = problem.padded, apart = row_stride(padded);
    Scratch<Element> hidden_paired(padded * dim);
    pack(hidden, dim, problem.positions, dim, hidden_paired.data(), padded);
    Scratch<float> partial(n_threads * dim * apart);  // (dim x padded) of each thread, its rows `apart`
    on_each_thread(n_threads, [&](int64_t thread) {
      Scratch<float> tile(WORDS * POSITIONS);
      Scratch<Element> left(WORDS * POSITIONS), right(WORDS * POSITIONS), words_transposed(dim * WORDS);
      float* own = partial.data() + thread * dim * apart;
      std::fill_n(own, dim * apart, 0.f);
      const auto transpose_words = [&](int64_t v, int64_t words) {
        const int64_t height = rounded_up(words, 2);
        transpose(weight + v * dim, dim, words_transposed.data(), height, words, dim);
        for (int64_t k = 0; words < height && k < dim; k++) words_transposed.data()[k * height + words] = 0.f;
      };
      over_tiles(thread, tile.data(), transpose_words, [&](int64_t v, int64_t words, int64_t r, int64_t width) {
        Element* as_right = PAIR<Element> == 2 ? right.data() : left.data();
        to_gradients(tile.data(), words, width, log_z + r, weights + r, left.data(), as_right);
        subtract_targets(
            tile.data(), v, words, width, std::min(width, problem.positions - r), problem.targets + r, log_z + r,
            weights + r, left.data(), as_right);
        const int64_t height = PAIR<Element> == 2 ? rounded_up(words, 2) : words;
        product(
            words, dim, width, left.data(), width, hidden_paired.data() + r * dim, dim, grad_weight + v * dim, dim,
            add || r > 0);
        product(
            dim, width, height, words_transposed.data(), rounded_up(words, 2), as_right, width, own + r, apart, true);
      });
    });
    at::parallel_for(0, problem.positions, STRIP, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++)
        for (int64_t k = 0; k < dim; k++) {
          float total = 0;
          for (int64_t t = 0; t < n_threads; t++) total += partial.data()[(t * dim + k) * apart + i];
          grad_hidden[i * dim + k] = total;
        }
    });
  }
};

template <class Element>
void run(
    const Tensor& hidden, const Tensor& weight, const Tensor& targets, double z_loss, double* sums, Tensor& grad_hidden,
    Tensor& grad_weight) {
  const int64_t n = hidden.size(0), dim = hidden.size(1);
  for (int64_t start = 0; start < n; start += CHUNK) {
    const int64_t positions = std::min(CHUNK, n - start), padded = rounded_up(positions, STRIP);
    const Problem problem{positions, dim, weight.size(0), padded, targets.data_ptr<int64_t>() + start};
    Chunk<Element> chunk(problem, hidden.data_ptr<Element>() + start * dim, weight.data_ptr<Element>());
    Scratch<float> log_z(padded), target_logit(padded), weights(padded);
    chunk.statistics(log_z.data(), target_logit.data());
    for (int64_t i = 0; i < padded; i++) {
      const bool counts = i < positions && problem.targets[i] >= 0;
      const double z = log_z.data()[i];
      sums[0] += counts ? z - target_logit.data()[i] : 0;
      sums[1] += counts ? z * z : 0;
      weights.data()[i] = counts ? 1 + 2 * z_loss * z : 0;
    }
    if (grad_hidden.defined())
      chunk.gradients(
          log_z.data(), weights.data(), grad_hidden.data_ptr<Element>() + start * dim, grad_weight.data_ptr<float>(),
          start > 0);
  }
}

}  // namespace

// (sums, gradient of the hidden states, gradient of the weight in fp32); `sums` are those of the cross-entropy and of
// squared log Z over the positions whose target is not negative. Without `needs_grad` both gradients are empty.
std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy(
    const Tensor& hidden, const Tensor& weight, const Tensor& targets, double z_loss, bool needs_grad) {
  TORCH_CHECK(hidden.dim() == 2 && hidden.is_contiguous() && weight.is_contiguous() && targets.is_contiguous());
  TORCH_CHECK(hidden.size(1) == weight.size(1) && hidden.size(1) % 2 == 0 && hidden.size(0) == targets.size(0));
  TORCH_CHECK(hidden.scalar_type() == weight.scalar_type() && targets.scalar_type() == at::kLong);
  const auto in_fp32 = hidden.options().dtype(at::kFloat);
  Tensor grad_hidden, grad_weight;
  if (needs_grad) {
    grad_hidden = at::empty(hidden.sizes(), hidden.options());
    grad_weight = at::empty(weight.sizes(), in_fp32);
  }
  double sums[2] = {0, 0};
  if (hidden.scalar_type() == at::kFloat)
    run<float>(hidden, weight, targets, z_loss, sums, grad_hidden, grad_weight);
  else
    run<BFloat16>(hidden, weight, targets, z_loss, sums, grad_hidden, grad_weight);
  Tensor summed = at::empty({2}, in_fp32);
  summed.data_ptr<float>()[0] = sums[0];
  summed.data_ptr<float>()[1] = sums[1];
  if (!needs_grad) return {summed, at::empty({0}, in_fp32), at::empty({0}, in_fp32)};
  return {summed, grad_hidden, grad_weight};
}

}  // namespace open_lm
