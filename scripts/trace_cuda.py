"""Forward passes on fake CUDA tensors: device mix-ups and shape errors of the GPU path, found without a GPU.

    make trace-cuda

It needs a CUDA build of torch (`make trace-cuda` installs one into .venv-cuda), but no device: fake tensors carry a
device and a shape, and no memory. Kernels that launch by themselves (flex_attention, Triton) are left to tests/gpu; the
forms that stand in for them are traced. Not traced: backward passes and fused optimizers, which need a device's
context, and experts without limits, which loop over counts that fake tensors do not know.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import dataclasses
import sys
import traceback
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from open_lm.data.batch import Batch
from open_lm.kernels import linear_cross_entropy as loss
from open_lm.kernels.linear_divergence import linear_divergence
from open_lm.model import attend_masked
from open_lm.model.config import ModelFlags, resolve_architecture
from open_lm.model.context import SequencePart
from open_lm.model.mask import Mask
from open_lm.model.transformer import Transformer
from open_lm.train.optim import Lion
from open_lm.train.tasks import NextToken

CUDA = torch.device("cuda", 0)
BASE = dataclasses.replace(resolve_architecture(ModelFlags(model="open_lm_11m")), seq_len=128)
CUSTOM = {"attn_name": "custom_attn", "attn_activation": "relu_squared"}
EXPERTS = {"moe_freq": 2, "moe_num_experts": 4, "moe_top_k": 2}
VARIANTS = {
    "dense": {},
    "shared keys": {"n_kv_heads": 2},
    "qk norm": {"qk_norm": True},
    "window": {"sliding_window": 40},
    "tied": {"weight_tying": True},
    **{
        name: {"model_norm": name}
        for name in ("rms_norm", "gain_only_lp_layer_norm", "lp_layer_norm", "no_wb_layer_norm")
    },
    **{name: {"ffn_type": name} for name in ("gelu", "gemma_geglu", "swiglu_torch")},
    **{name: {"positional_embedding_type": name} for name in ("head_rotary", "llama_rotary", "none")},
    "custom": CUSTOM,
    "custom, scaled": {**CUSTOM, "attn_seq_scalar": "max", "attn_seq_scalar_alpha": 1.0},
    "experts": EXPERTS,
}


def fake_model(config, mode):
    """A Transformer whose parameters are fake CUDA tensors."""
    with torch.device("meta"):
        model = Transformer(config)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(FakeTensor(mode, parameter.data, CUDA))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = FakeTensor(mode, buffer, CUDA)
    model.tie_weights()
    return model


def training(model, config, batch):
    """The loss of pretraining under autocast, as a step computes it."""
    experts = config.moe_freq > 0
    task = NextToken(1e-4, 0.1 if experts else None, True, 4 if experts else 0)
    with torch.autocast("cuda", torch.bfloat16):
        losses = task.loss_sums(model.train(), batch)
    assert losses.total.device == losses.parts.device == CUDA


def divergence(model, config, batch):
    """Distillation's loss."""

    def head(hidden, weight, **_):
        flat, counted = hidden.flatten(0, 1), batch.targets_BT.flatten() >= 0
        return linear_divergence(flat, weight, flat.detach(), weight.detach(), counted)

    assert model(batch.inputs_BT, head=head).device == CUDA


def decoding(model, config, batch):
    """A prompt and one token with a cache, padded."""
    model.eval()
    with torch.no_grad():
        cache = model.new_cache(2, 32)
        real = torch.ones((2, 16), dtype=torch.bool, device=CUDA)
        model(batch.inputs_BT[:, :16], cache, True, real)
        logits = model(batch.inputs_BT[:, :1], cache, True)[0]
    assert logits.device == CUDA and logits.shape == (2, 1, config.vocab_size)


def part(model, config, batch):
    """Context parallelism, the other rank's keys and values standing in for by this one's."""
    training(model, config, batch.of_part(SequencePart(1, 2, lambda x: torch.cat((x, x), 1))))


def lion(model, config, batch):
    """An optimizer of ours: its state is where the weights are."""
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    optimizer = Lion(model.parameters(), lr=1e-3)
    optimizer.step()
    assert all(m.device == CUDA for state in optimizer.state.values() for m in state.values())


def trace(name, changes, work, documents=False):
    """Whether one pass goes through; what went wrong is printed."""
    config, mode = dataclasses.replace(BASE, **changes), FakeTensorMode(allow_non_fake_inputs=True)
    try:
        model = fake_model(config, mode)
        with mode:
            samples = FakeTensor(mode, torch.empty(2, config.seq_len + 1, dtype=torch.long, device="meta"), CUDA)
            batch = Batch.from_samples(samples)
            work(model, config, batch.with_documents(0) if documents else batch)
    except Exception as error:
        frames = [f"{f.filename.rpartition('/')[2]}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
        print(f"{name}: {type(error).__name__}: {str(error)[:200]}\n    {' '.join(frames[-5:])}")
        return False
    print(f"{name}: ok")
    return True


def main() -> int:
    """Trace everything; the exit status."""
    torch.zeros(0)  # the CPU works
    attend_masked.MIN_FLEX_QUERIES = sys.maxsize
    setattr(loss, "_fused_chunk", lambda: None)  # noqa: B010
    setattr(Mask, "_document_start", lambda self, position: 0)  # noqa: B010  (fake tensors have no values)
    results = [trace(f"training, {name}", changes, training) for name, changes in VARIANTS.items()]
    results += [trace(f"documents, {n}", VARIANTS[n], training, documents=True) for n in ("dense", "window", "custom")]
    results += [trace(f"decoding, {n}", VARIANTS[n], decoding) for n in VARIANTS if n != "experts"]
    results += [trace(f"context parallel, {n}", VARIANTS[n], part) for n in ("dense", "shared keys", "window")]
    results += [trace("divergence", {}, divergence), trace("Lion", {}, lion)]
    print(f"{sum(results)} of {len(results)} pass")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
