"""Training flags: length, learning rate, precision and parallelism."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass, fields

from open_lm.errors import ConfigError
from open_lm.flags import Registry, flag
from open_lm.mesh import MeshShape, parse_mesh, shape_for
from open_lm.train.averagers import parse_averagers
from open_lm.train.schedule import SCHEDULES

OPTIMIZERS = Registry(
    "optimizer",
    {
        "adamw": "open_lm.train.optim:build_adamw",
        "muon": "open_lm.train.optim:build_muon",
        "lion": "open_lm.train.optim:build_lion",
        "adafactor": "open_lm.train.optim:build_adafactor",
    },
)
USED_BY = {
    "adamw": {"beta1", "beta2", "eps"},
    "muon": {"beta1", "beta2", "eps", "muon_momentum", "muon_ns_steps", "muon_ns_precision"},
    "lion": {"beta1", "beta2"},
    "adafactor": set(),
}
"""The options of each optimizer; the others it ignores, with a warning. One without a line here may read all."""
OPTIONS = set().union(*USED_BY.values())
IGNORED = (
    "fsdp_backward_prefetch",
    "fsdp_limit_all_gathers",
    "fsdp_use_orig_params",
    "fsdp_checkpoint",
    "use_bn_sync",
    "torchscript",
    "trace",
    "use_bnb_linear",
)
NEED_FSDP = ("fsdp_amp", "fsdp_pure_bf16", "fsdp_cpu_offload", "fsdp_hybrid", "fsdp_hybrid_o2",
             "fsdp_forward_prefetch", "fsdp_whole_gradients", "experimental_meta_device")  # fmt: skip
RECOMPUTED = r"full|selective|every-[1-9][0-9]*"
DECAY_RULES = ("matrices", "all-but-embedding", "all")
PRECISIONS = ("amp", "amp_bf16", "amp_bfloat16", "bf16", "fp16", "fp32")


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer"""

    optimizer: str = flag("adamw", "Rule that updates the weights.", choices=OPTIMIZERS)
    beta1: float = flag(0.9, "Decay of the running mean of the gradients.")
    beta2: float = flag(0.95, "Decay of the running mean of the squared gradients.")
    eps: float = flag(1.0e-8, "Added to the root of the squared-gradient mean.", above=0)
    muon_momentum: float = flag(0.95, "Decay of Muon's running mean of the gradients.")
    muon_ns_steps: int = flag(5, "Newton-Schulz iterations with which Muon orthogonalises a matrix.", least=1)
    muon_ns_precision: str = flag("bf16", "Number format of these iterations.", choices=("bf16", "fp32"))
    wd: float = flag(0.2, "Weight decay (decoupled, times the learning rate) of what --wd-rule says.", least=0)
    wd_rule: str = flag(
        "matrices",
        "Parameters that weight decay acts on: matrices (no embeddings, norms or biases); all-but-embedding, as in "
        "OLMo-core; or all.",
        choices=DECAY_RULES,
    )
    wd_all: bool = flag(False, "The same as --wd-rule all, as OpenLM did.")
    grad_clip_norm: float | None = flag(
        None, "Largest global gradient norm; a larger one is scaled down. None: no clipping.", above=0
    )

    skip_step_sigma: float | None = flag(
        None,
        "Leave out steps whose loss or gradient norm is this many standard deviations above the last 128; costs one "
        "wait for the device a step. None: take every step.",
        above=0,
    )
    averagers: str | None = flag(
        None,
        "Running averages of the weights, saved as NAME_K.pt: METHOD_PARAMETER_STEPS with commas between, such as "
        "ema_0.999_1,poly_8_1,cosine_1000_1.",
    )
    log_avg_model_training_loss: int = flag(
        0, "Steps between two measurements of the averages' loss on the batch just trained on; 0 is off.", least=0
    )

    def __post_init__(self) -> None:
        if self.log_avg_model_training_loss and not parse_averagers(self.averagers):
            raise ConfigError("--log-avg-model-training-loss measures averages of the weights: name some, --averagers.")
        if self.wd_all and self.wd_rule == "all-but-embedding":
            raise ConfigError("--wd-all and --wd-rule all-but-embedding contradict each other: leave one out.")
        self._warn_of_ignored()
        for name in ("beta1", "beta2", "muon_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)} is not in [0, 1).")

    def _warn_of_ignored(self) -> None:
        default = {f.name: f.default for f in fields(self)}
        for name in OPTIONS - USED_BY.get(self.optimizer, OPTIONS):
            if getattr(self, name) != default[name]:
                logging.warning(
                    "--%s is ignored: --optimizer %s has no such option.", name.replace("_", "-"), self.optimizer
                )


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning-rate schedule"""

    lr: float = flag(5.0e-4, "Peak learning rate.", above=0)
    warmup: int = flag(10_000, "Optimizer steps of linear warm-up from 0 to --lr.", least=0)
    warmup_tokens: int | None = flag(None, "Warm-up in tokens, not rounded to steps; wins over --warmup.", least=0)
    lr_scheduler: str = flag("cosine", "Shape of the learning rate after warm-up.", choices=SCHEDULES)
    lr_cooldown_end: float = flag(0.0, "Learning rate that the schedule comes down to when the run ends.", least=0)
    lr_cooldown_power: float = flag(
        1.0, "Exponent of the decay of const-cooldown, wsd and wsd-s; 1 is linear.", above=0
    )
    lr_decay_fraction: float = flag(
        0.1, "Share of the run that wsd decays over, or of each period of wsd-s; --lr-decay-tokens wins.", above=0
    )
    lr_decay_tokens: int | None = flag(None, "Tokens that wsd, or each period of wsd-s, decays over.", least=1)
    lr_period_tokens: tuple[int, ...] = flag(
        (), "Tokens in each period of wsd-s, in order; the last reaches to the end. None: the checkpoint intervals."
    )
    lr_read_at: str = flag(
        "start",
        "Point of a step at which the decay is read: start, so that the last step stays one short of "
        "--lr-cooldown-end, as in OpenLM; end, so that it reaches it, as in OLMo-core.",
        choices=("start", "end"),
    )
    epochs_cooldown: int | None = flag(
        None, "Checkpoint intervals that const-cooldown decays over, counted from the end.", least=1
    )
    force_min_lr: float = flag(0.0, "Floor under the learning rate after warm-up.", least=0)
    skip_scheduler: bool = flag(False, "Keep --lr at every step, without warm-up.")

    def __post_init__(self) -> None:
        if self.lr_cooldown_end > self.lr:
            raise ConfigError(
                f"--lr-cooldown-end {self.lr_cooldown_end} is above --lr {self.lr}: the schedule only decays."
            )
        if self.lr_scheduler == "const-cooldown" and self.epochs_cooldown is None:
            raise ConfigError("--lr-scheduler const-cooldown needs --epochs-cooldown: the intervals to decay over.")
        if self.lr_decay_fraction > 1:
            raise ConfigError(f"--lr-decay-fraction {self.lr_decay_fraction} is a share of the run: at most 1.")
        if self.lr_period_tokens and self.lr_scheduler != "wsd-s":
            raise ConfigError(f"--lr-period-tokens are periods of wsd-s, not of --lr-scheduler {self.lr_scheduler}.")
        if any(tokens < 1 for tokens in self.lr_period_tokens):
            raise ConfigError(f"--lr-period-tokens {self.lr_period_tokens}: every period needs at least one token.")


@dataclass(frozen=True)
class TrainConfig:
    """Training length and batch"""

    global_batch_size: int = flag(64, "Sequences per optimizer step over all ranks.", least=1)
    batch_size: int | None = flag(None, "Sequences per optimizer step on each rank; sets --global-batch-size.", least=1)
    accum_freq: int = flag(1, "Micro-batches that each rank's share of a batch is computed in.", least=1)
    train_tokens: int | None = flag(None, "Tokens to train on in all; rounded down to whole batches.", least=1)
    train_steps: int | None = flag(None, "Optimizer steps to train for in all, instead of --train-tokens.", least=1)
    num_checkpoints: int | None = flag(
        None, "Checkpoints to write over the run, evenly spaced; with --train-tokens or --train-steps.", least=1
    )
    stop_at_step: int | None = flag(
        None, "Save and end after this many steps, with the learning rates of the whole run; --resume goes on.", least=1
    )
    stop_at_tokens: int | None = flag(None, "As --stop-at-step, in tokens; rounded up to a whole batch.", least=1)
    train_num_samples: int | None = flag(
        None, "TOKENS (not samples) in one checkpoint interval; None: one pass over the data.", least=1
    )
    epochs: int = flag(32, "Checkpoint intervals (not passes over the data) to train for.", least=1)
    time_limit_minutes: float | None = flag(
        None, "Save and end, as after SIGTERM (exit 85), while this much time of the program has room for it.", above=0
    )
    z_loss_coefficient: float = flag(
        0.0, "Weight of the mean squared log-normaliser of the output (PaLM, 2022); 0 is off.", least=0
    )
    seed: int = flag(0, "Seed of the weights at the start and of the order of the data.", least=0)

    def __post_init__(self) -> None:
        if self.train_tokens is not None and self.train_num_samples is not None:
            raise ConfigError(
                "--train-tokens (of the whole run) and --train-num-samples (of one interval) exclude each other."
            )
        if self.train_steps is not None and (self.train_tokens or self.train_num_samples):
            raise ConfigError("--train-steps excludes --train-tokens and --train-num-samples: say the length once.")
        if self.stop_at_step is not None and self.stop_at_tokens is not None:
            raise ConfigError("--stop-at-step and --stop-at-tokens exclude each other.")
        if self.seed >= 1 << 63:
            raise ConfigError(f"--seed {self.seed} must be below 2^63.")
        if self.num_checkpoints is not None and self.train_tokens is None and self.train_steps is None:
            raise ConfigError(
                "--num-checkpoints divides --train-tokens (or --train-steps): give one, or use --train-num-samples "
                "and --epochs."
            )


@dataclass(frozen=True)
class DistillationConfig:
    """Distillation"""

    distill_model: str | None = flag(None, "Architecture of the teacher, where its file does not state it.")
    distill_pretrained: str | None = flag(
        None, "Weights of a teacher to learn from: anything that --pretrained takes. None: no teacher."
    )
    distill_weight: float = flag(0.5, "Share of the teacher's divergence in the loss; the rest is cross-entropy.")
    distill_temperature: float = flag(1.0, "Temperature of both distributions in the divergence.", above=0)

    def __post_init__(self) -> None:
        if not 0 <= self.distill_weight <= 1:
            raise ConfigError(f"--distill-weight {self.distill_weight} is not in [0, 1].")
        if self.distill_model and not self.distill_pretrained:
            raise ConfigError("--distill-model names a teacher without weights: give --distill-pretrained too.")


@dataclass(frozen=True)
class ParallelConfig:
    """Precision, devices and ranks"""

    precision: str = flag(
        "amp",
        "Number formats: amp = fp16 autocast with loss scaling on a GPU, bf16 autocast on a CPU; "
        "amp_bf16 = bf16 autocast; bf16 = weights and moments too (updates below 1/256 of a weight, weight decay among "
        "them, are rounded away); fp16 = fp16 autocast; fp32.",
        choices=PRECISIONS,
    )
    float8: str | None = flag(
        None,
        "Multiply matrices of the blocks in 8 bits (torchao; from Ada and Hopper on; with --torchcompile): rowwise = a "
        "scale for each row, tensorwise = one for a matrix: faster, less exact. Checkpoints stay the same. None: off.",
        choices=("rowwise", "tensorwise"),
    )
    device: str = flag("auto", "Where to compute; auto takes a GPU when there is one.", choices=("auto", "cpu", "cuda"))
    grad_checkpointing: bool = flag(
        False, "Recompute each block in the backward pass instead of keeping its activations."
    )
    grad_checkpointing_mode: str | None = flag(
        None,
        "What --grad-checkpointing recomputes, and switches it on: full = every block; every-K = every K-th block; "
        "selective = in every block all but matrix products and attention, whose results are kept. None: full.",
        metavar="full|every-K|selective",
    )
    cpu_kernels: str = flag(
        "auto",
        "On a CPU: auto computes attention and loss of all but tiny models with C++ kernels, compiled at their first "
        "use on a machine (10 seconds, needs g++ and AVX-512; without them plain torch is used); off never does.",
        choices=("auto", "off"),
    )
    torchcompile: bool = flag(False, "Compile each block with torch.compile; the keys of checkpoints do not change.")
    mesh: str | None = flag(
        None,
        "Ranks along each axis: dp (copies), fsdp (shards of all weights), tp (parts of each matrix and of the "
        "activations), cp (parts of each sequence), ep (parts of the experts); -1 is the rest. What no axis takes goes "
        "to dp, or with --fsdp to fsdp. None: dp alone, or as --fsdp and --fsdp-hybrid say. See docs/parallelism.md.",
        metavar="dp=N,fsdp=N,tp=N,cp=N,ep=N",
    )
    fsdp: bool = flag(
        False, "Shard weights, gradients and optimizer over the ranks (FSDP2) instead of copying them (DDP)."
    )
    fsdp_amp: bool = flag(False, "With --fsdp: gather weights in bf16 and reduce gradients in fp32.")
    fsdp_pure_bf16: bool = flag(False, "With --fsdp: gather weights and reduce gradients in bf16.")
    fsdp_cpu_offload: bool = flag(False, "With --fsdp: keep weights, gradients and optimizer in host memory.")
    fsdp_hybrid: bool = flag(False, "With --fsdp: shard within groups of --fsdp-group-size ranks, copy across groups.")
    fsdp_hybrid_o2: bool = flag(
        False, "As --fsdp-hybrid, and keep whole weights from the forward to the backward pass."
    )
    fsdp_group_size: int | None = flag(
        None, "Ranks that share one copy under --fsdp-hybrid; None: those of one node.", least=1
    )
    fsdp_forward_prefetch: int = flag(
        0,
        "With --fsdp: blocks gathered ahead of the one that computes; 0 leaves it to FSDP2, which gathers one.",
        least=0,
    )
    fsdp_whole_gradients: bool = flag(
        False,
        "With --fsdp and --accum-freq above 1: keep whole gradients on every rank and reduce them once a step, instead "
        "of after each micro-batch: less communication for the memory of all gradients in fp32.",
    )
    experimental_meta_device: bool = flag(
        False,
        "With --fsdp: build the model without memory and fill it part by part, each rank keeping its share only; the "
        "weights are those of --seed all the same.",
    )
    fsdp_backward_prefetch: bool = flag(False, "No meaning under FSDP2, which always prefetches; accepted.")
    fsdp_limit_all_gathers: bool = flag(False, "No meaning under FSDP2, whose memory is bounded anyway; accepted.")
    fsdp_use_orig_params: bool = flag(
        False, "No meaning under FSDP2, which keeps the parameters as they are; accepted."
    )
    fsdp_checkpoint: bool = flag(False, "No meaning: checkpoints are the same for every parallel mode; accepted.")
    use_bn_sync: bool = flag(False, "No meaning: no model here has batch norm; accepted.")
    torchscript: bool = flag(False, "No meaning: use --torchcompile; accepted.")
    trace: bool = flag(False, "No meaning: it traced for torchscript; see --trace-steps and --profile-steps; accepted.")
    use_bnb_linear: str | None = flag(None, "No meaning: there is no 8-bit linear layer here; accepted.")
    ddp_static_graph: bool = flag(False, "Tell DDP that every step uses the same parameters.")
    dist_url: str = flag("env://", "Where ranks meet, as torch.distributed's init_method.")
    dist_backend: str | None = flag(None, "Communication between ranks; None: nccl for GPUs, gloo for CPUs.")
    dist_timeout: float = flag(600.0, "Seconds a rank waits for the others before the run fails.", above=0)
    hang_timeout: float | None = flag(
        None,
        "Seconds without a finished step after which every rank writes its stacks to the run; after as many again "
        "it ends. None: 0.8 of --dist-timeout, so that the stacks are there before the ranks give up on each other.",
        above=0,
    )
    no_set_device_rank: bool = flag(False, "Every rank uses GPU 0 of those it sees (the launcher hides the others).")
    preset_world_size: int | None = flag(
        None,
        "Ranks that --dry-run plans for. A run itself has those its launcher starts, and warns where they differ.",
        least=1,
    )
    force_distributed: bool = flag(False, "Make a process group even for one rank.")

    def __post_init__(self) -> None:
        if self.fsdp_amp and self.fsdp_pure_bf16:
            raise ConfigError(
                "--fsdp-amp and --fsdp-pure-bf16 exclude each other: gradients are reduced in fp32 or in bf16."
            )
        if self.float8 and self.precision not in ("amp_bf16", "amp_bfloat16", "bf16"):
            raise ConfigError(f"--float8 {self.float8} computes the rest in bf16: give --precision amp_bf16 or bf16.")
        if self.grad_checkpointing_mode and not re.fullmatch(RECOMPUTED, self.grad_checkpointing_mode):
            found = self.grad_checkpointing_mode
            raise ConfigError(f"--grad-checkpointing-mode {found}: give full, selective, or every-K as in every-2.")
        sizes = parse_mesh(self.mesh) if self.mesh else {}
        if self.mesh and (self.fsdp_hybrid or self.fsdp_hybrid_o2 or self.fsdp_group_size):
            raise ConfigError(
                f"--mesh {self.mesh} says what --fsdp-hybrid and --fsdp-group-size say: give dp=…,fsdp=…."
            )
        for name in NEED_FSDP:
            if getattr(self, name) and not (self.fsdp or set(sizes) - {"dp"}):
                raise ConfigError(f"--{name.replace('_', '-')} says how --fsdp works: give that too.")
        for name in IGNORED:
            if getattr(self, name):
                logging.warning("--%s has no meaning any more and is ignored.", name.replace("_", "-"))


def mesh_shape(config: ParallelConfig, world_size: int) -> MeshShape:
    """The mesh of --mesh, or of the flags that stand for one, on `world_size` ranks.

    Raises:
        ConfigError: the ranks do not divide that way.
    """
    if config.mesh:
        return shape_for(parse_mesh(config.mesh), world_size, rest="fsdp" if config.fsdp else "dp")
    if not (config.fsdp_hybrid or config.fsdp_hybrid_o2):
        return MeshShape(fsdp=world_size) if config.fsdp else MeshShape(dp=world_size)
    group = config.fsdp_group_size or int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if world_size % group:
        raise ConfigError(f"--fsdp-group-size {group} does not divide {world_size} ranks.")
    return MeshShape(dp=world_size // group, fsdp=group)
