"""One training step of each contestant of train_step.py: a function that takes a step and returns its loss.

Peers get the architecture (width, depth, heads, vocabulary, context) and the same optimizer, torch's fused AdamW; their
loss is their own or, where they have none, torch's. Nothing of a peer is imported before it is asked for.
"""

import importlib.util
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

LR, CLIP = 1e-3, 1.0
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def shape_of(model):
    """The architecture by name, and the width of its feed-forward layers."""
    from open_lm.model.config import ModelFlags, resolve_architecture

    config = resolve_architecture(ModelFlags(model=model))
    return config, 256 * -(-int(8 * config.hidden_dim / 3) // 256)


def ours(model, precision, compiled, kernels):
    """The project's own step, built by the parts that build a run."""
    from open_lm.data.batch import Batch
    from open_lm.distributed import World
    from open_lm.model import create_model
    from open_lm.precision import Precision
    from open_lm.train.backends import prepare_backends
    from open_lm.train.config import OptimizerConfig, ParallelConfig
    from open_lm.train.optim import build_optimizers
    from open_lm.train.parallel import wrap
    from open_lm.train.run_length import RunLength
    from open_lm.train.state import TrainState
    from open_lm.train.step import train_step
    from open_lm.train.tasks import NextToken
    from open_lm.train.timing import Timing

    config, world = shape_of(model)[0], World(device=DEVICE)
    flags = ParallelConfig(torchcompile=compiled, cpu_kernels=kernels, precision=precision)
    prepare_backends(flags, world.device, config.seq_len, config.vocab_size)
    wrapped = wrap(create_model(config).to(DEVICE), world, flags)
    state = TrainState(
        model=wrapped,
        optimizers=build_optimizers(wrapped, OptimizerConfig(wd=0.1), LR),
        precision=Precision(precision, DEVICE.type),
        lr_at=lambda step: LR,
        run_length=RunLength((10**6,), config.seq_len),
        task=NextToken(),
        world=world,
    )
    timing = Timing(world.device)

    def step(samples):
        batch = Batch.from_samples(samples).to(DEVICE)
        return train_step(state, batch, accum=1, clip=CLIP, timing=timing).loss.item()

    return step


def plain(model, loss_of, precision):
    """A step as it is usually written around a model."""
    model.to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    amp = precision in ("amp", "amp_bf16")

    def step(samples):
        samples = samples.to(DEVICE)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=amp):
            loss = loss_of(samples[:, :-1], samples[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def cross_entropy(logits, targets):
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def transformers_llama(name, precision, compiled):
    from transformers import LlamaConfig, LlamaForCausalLM

    c, width = shape_of(name)
    settings = LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_dim, intermediate_size=width, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, max_position_embeddings=c.seq_len, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(settings)
    run = torch.compile(model) if compiled else model
    return plain(model, lambda x, y: run(input_ids=x, labels=y, shift_labels=y, use_cache=False).loss, precision)


def litgpt(name, precision, compiled):
    from litgpt.config import Config
    from litgpt.model import GPT

    c, width = shape_of(name)
    model = GPT(
        Config(
            block_size=c.seq_len, vocab_size=c.vocab_size, padded_vocab_size=c.vocab_size, n_layer=c.n_layers,
            n_head=c.n_heads, n_embd=c.hidden_dim, rotary_percentage=1.0, parallel_residual=False, bias=False,
            norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", intermediate_size=width,
        )
    )  # fmt: skip
    run = torch.compile(model) if compiled else model
    return plain(model, lambda x, y: cross_entropy(run(x), y), precision)


def torchtitan(name, precision, compiled):
    from torchtitan.models.llama3.model.args import TransformerModelArgs
    from torchtitan.models.llama3.model.model import Transformer

    c, _ = shape_of(name)
    model = Transformer(
        TransformerModelArgs(
            dim=c.hidden_dim, n_layers=c.n_layers, n_heads=c.n_heads, vocab_size=c.vocab_size, multiple_of=256,
            max_seq_len=c.seq_len,
        )
    )  # fmt: skip
    with torch.no_grad():
        model.init_weights()
    run = torch.compile(model) if compiled else model
    return plain(model, lambda x, y: cross_entropy(run(x), y), precision)


def nanogpt(name, precision, compiled, folder):
    """nanoGPT's model.py in `folder`."""
    path = Path(folder) / "model.py"
    spec = importlib.util.spec_from_file_location("nanogpt", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt"] = module
    spec.loader.exec_module(module)
    c, _ = shape_of(name)
    model = module.GPT(
        module.GPTConfig(
            block_size=c.seq_len, vocab_size=c.vocab_size, n_layer=c.n_layers, n_head=c.n_heads, n_embd=c.hidden_dim,
            dropout=0.0, bias=False,
        )
    )  # fmt: skip
    run = torch.compile(model) if compiled else model
    return plain(model, lambda x, y: run(x, y.contiguous())[1], precision)


OURS = {
    "open_lm": (False, "auto"),
    "open_lm --torchcompile": (True, "auto"),
    "open_lm --cpu-kernels off": (False, "off"),
    "open_lm --cpu-kernels off --torchcompile": (True, "off"),
}
PEERS = {"transformers": transformers_llama, "litgpt": litgpt, "torchtitan": torchtitan, "nanogpt": nanogpt}
NAMES = (*OURS, *PEERS, *(f"{name} compiled" for name in PEERS))


def build(contestant, model, precision, nanogpt_folder=None):
    """The step function of a contestant."""
    if contestant in OURS:
        return ours(model, precision, *OURS[contestant])
    name, _, compiled = contestant.partition(" ")
    extra = [nanogpt_folder] if name == "nanogpt" else []
    return PEERS[name](model, precision, bool(compiled), *extra)
