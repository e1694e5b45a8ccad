"""A run's parts on fake CUDA tensors: device mix-ups and shape errors of the GPU path, found without a GPU.

    make trace-cuda

It needs a CUDA build of torch (`make trace-cuda` installs one), but no device. Traced: the forward passes of every
variant, every task's loss, the optimizers and their state, a checkpoint's snapshot, generation, context and tensor
parallelism. Not traced: backward passes, which need a device's context; kernels that launch by themselves
(flex_attention, Triton), for which their stand-ins are; and experts without limits, which loop over counts that fake
tensors do not know. tests/gpu has those.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import sys
from dataclasses import replace
from types import SimpleNamespace

import torch
from fake_cuda import CUDA, fake, fake_batch, fake_model, fake_ranks, trace, without_values

from open_lm.checkpoint.snapshot import live, take
from open_lm.checkpoint.tree import tensors_of
from open_lm.generation import generate
from open_lm.mesh import MeshShape
from open_lm.model.context import SequencePart
from open_lm.post_training.config import PREFERENCE_LOSSES, PreferenceConfig, RLConfig
from open_lm.post_training.policy import PolicyGradient
from open_lm.post_training.preferences import KL, KahnemanTversky, Preferences
from open_lm.post_training.reward_model import RewardModelling, add_value_head
from open_lm.post_training.sft import FineTuning
from open_lm.train.averagers import parse_averagers
from open_lm.train.averaging import WeightAverage
from open_lm.train.config import OptimizerConfig
from open_lm.train.optim import build_optimizers
from open_lm.train.parallel import clip_grad_norm
from open_lm.train.tasks import Distillation, NextToken
from open_lm.train.tensor_parallel import apply_tensor_parallel

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
OPTIMIZERS = ("adamw", "muon", "lion", "adafactor")


def loss_of(task, model, batch):
    """The loss of `task` under autocast, as a step computes it: on the GPU, one figure for each name."""
    with torch.autocast("cuda", torch.bfloat16):
        losses = task.loss_sums(model.train(), batch)
    assert losses.total.device == losses.parts.device == task.count(batch).device == CUDA
    assert losses.parts.shape == (len(task.names),), losses.parts.shape


def training(model, config, mode, documents=False, part=None):
    """Pretraining; with `part` as a rank of two that share out the sequence, the other's keys stood in for."""
    batch = fake_batch(config, mode)
    batch = batch.with_documents(0) if documents else batch
    experts = config.moe_freq > 0
    task = NextToken(1e-4, 0.1 if experts else None, True, 4 if experts else 0)
    loss_of(task, model, batch if part is None else batch.of_part(part))


def fine_tuning(model, config, mode):
    """Answers of conversations."""
    batch = fake_batch(config, mode)
    extras = {"n_real": fake(mode, 2, dtype=torch.long)}
    loss_of(FineTuning(NextToken(1e-4)), model, replace(batch, extras=extras).with_documents(0))


def distillation(model, config, mode):
    """A teacher's distribution."""
    teacher = fake_model(config, mode).eval().requires_grad_(False)
    loss_of(Distillation(teacher, next_token=NextToken(1e-4)), model, fake_batch(config, mode))


def preferences(model, config, mode, loss):
    """Chosen answers over rejected ones."""
    kind = KahnemanTversky if loss == "kto" else Preferences
    extras = {KL: fake(mode, 4)} if loss == "kto" else {}
    loss_of(kind(loss, PreferenceConfig(), None), model, replace(fake_batch(config, mode, 4), group=2, extras=extras))


def reward(model, config, mode):
    """A reward model."""
    add_value_head(model, alone=True)
    loss_of(RewardModelling(0.1), model, replace(fake_batch(config, mode, 4), group=2))


def policy(model, config, mode, kind):
    """Stored answers and their advantages."""
    batch = fake_batch(config, mode)
    if kind == "ppo":
        add_value_head(model)
    extras = {name: fake(mode, *batch.inputs_BT.shape) for name in ("old", "advantage", "reference", "value", "return")}
    extras |= {name: fake(mode, 2) for name in ("reward", "finished")}
    loss_of(PolicyGradient(kind, RLConfig(kl_coefficient=0.1)), model, replace(batch, extras=extras))


def saved(model, config, mode, optimizer):
    """Clipping, a step, its state on the GPU, averages, and the snapshot a checkpoint is written from, on the host."""
    optimizers = build_optimizers(model, OptimizerConfig(optimizer=optimizer), 1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    assert clip_grad_norm(model, 1.0).device == CUDA
    for one in optimizers:
        one.step()
        moments = [t for state in one.state.values() for t in state.values() if torch.is_tensor(t) and t.ndim]
        assert moments and all(moment.device == CUDA for moment in moments)
    averages = {spec.name: WeightAverage(spec, model) for spec in parse_averagers("ema_0.9_1")}
    for average in averages.values():
        average.update(1)
    state = SimpleNamespace(model=model, optimizers=optimizers, extra_state=averages)
    tree = take(live(state), sharded=False, is_master=True, staging=None)
    held = list(tensors_of(tree))
    assert len(held) > 2 * len(list(model.parameters())) and all(t.device.type == "cpu" for t in held)


def writing(model, config, mode, **settings):
    """Prompts of two lengths and the tokens after them, with a cache."""
    texts = generate(model.eval(), [[1, 2, 3], [4]], max_gen_len=3, **settings)
    assert [len(text) for text in texts] == [3, 3]


def decoding(model, config, mode):
    """A prompt and one token with a cache, padded."""
    batch = fake_batch(config, mode)
    model.eval()
    with torch.no_grad():
        cache = model.new_cache(2, 32)
        real = torch.ones((2, 16), dtype=torch.bool, device=CUDA)
        model(batch.inputs_BT[:, :16], cache, True, real)
        logits = model(batch.inputs_BT[:, :1], cache, True)[0]
    assert logits.device == CUDA and logits.shape == (2, 1, config.vocab_size)


def divided(model, config, mode, world):
    """Tensor parallelism: a rank's part of every matrix, the loss over its part of the vocabulary, evaluation."""
    apply_tensor_parallel(model, world.meshes.tensor)  # FSDP, which comes around it in a run, needs streams of a device
    training(model, config, mode)
    if config.moe_freq:  # evaluation is without limits
        return
    with torch.no_grad():
        assert model.eval()(fake_batch(config, mode).inputs_BT)[0].device == CUDA


def traces():
    """Everything, one after the other: whether it passed."""
    for name, changes in VARIANTS.items():
        yield trace(f"training, {name}", changes, training)
        if name != "experts":
            yield trace(f"decoding, {name}", changes, decoding)
    for name in ("dense", "window", "custom"):
        yield trace(f"documents, {name}", VARIANTS[name], training, documents=True)
    for name in ("dense", "shared keys", "window"):
        half = SequencePart(1, 2, lambda x: torch.cat((x, x), 1))
        yield trace(f"context parallel, {name}", VARIANTS[name], training, part=half)
    for name, work in {"fine-tuning": fine_tuning, "distillation": distillation, "reward model": reward}.items():
        yield trace(name, {}, work)
    for loss in (*PREFERENCE_LOSSES, "kto"):
        yield trace(f"preferences, {loss}", {}, preferences, loss=loss)
    for kind in ("grpo", "rloo", "ppo"):
        yield trace(f"policy, {kind}", {}, policy, kind=kind)
    for optimizer in OPTIMIZERS:
        yield trace(f"step and snapshot, {optimizer}", {}, saved, optimizer=optimizer)
    for settings in ({"temperature": 0}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 0, "num_beams": 2}):
        yield trace(f"generation, {settings}", {}, writing, **settings)
    with fake_ranks(2, MeshShape(tp=2)) as world:
        for name in ("dense", "shared keys", "qk norm", "tied", "gelu", "gemma_geglu", "experts"):
            changes = {"n_heads": 12, "vocab_size": 50432, **VARIANTS[name]}
            yield trace(f"tensor parallel, {name}", changes, divided, world=world)


def main() -> int:
    """Trace everything; the exit status."""
    torch.zeros(0)  # the CPU works
    without_values()
    results = list(traces())
    print(f"{sum(results)} of {len(results)} pass")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
