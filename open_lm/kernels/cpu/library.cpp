// What computes torch.ops.open_lm.*, which ../operators.py declares.
#include <torch/library.h>

#include "attention.h"
#include "decode.h"
#include "skinny_matmul.h"
#include "linear_cross_entropy.h"

namespace open_lm {

TORCH_LIBRARY_IMPL(open_lm, CPU, m) {
  m.impl("linear_cross_entropy", linear_cross_entropy);
  m.impl("attention_forward", attention_forward);
  m.impl("attention_backward", attention_backward);
  m.impl("decode_attention", decode_attention);
  m.impl("few_rows_product", few_rows_product);
  m.impl("rms_norm", rms_norm);
}

}  // namespace open_lm
