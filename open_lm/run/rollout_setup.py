"""Setup of reinforcement learning in a run: its prompts, the length of the run, and what answers and scores them."""

from __future__ import annotations

from open_lm.data.tokenizer import load_tokenizer
from open_lm.distributed import World
from open_lm.errors import ConfigError
from open_lm.model.config import ModelConfig
from open_lm.params import RunConfig
from open_lm.post_training.prompts import Prompts
from open_lm.post_training.reference import build_reference
from open_lm.post_training.rewards import build_rewards
from open_lm.post_training.rollout_log import RolloutLog, ShowTable
from open_lm.post_training.rollouts import Rollouts
from open_lm.post_training.tasks import TaskParts
from open_lm.train.run_length import RunLength, run_length_of
from open_lm.train.state import TrainState


def build_prompts(config: RunConfig, architecture: ModelConfig, world: World) -> tuple[Prompts, RunLength]:
    """The prompts of --prompts, and the steps to take.

    Raises:
        ConfigError: there are none, the length is not given, or the answers do not divide.
    """
    flags = config.rl
    if flags.prompts is None:
        raise ConfigError(f"--task {config.task.task} answers prompts: give --prompts and --reward.")
    if config.train.train_steps is None:
        raise ConfigError("--train-steps: say for how many optimizer steps to train.")
    rows = flags.rollout_prompts * flags.group_size // flags.rl_minibatches
    share = world.size * config.train.accum_freq
    if flags.rollout_prompts % world.size or rows % share:
        raise ConfigError(
            f"--rollout-prompts {flags.rollout_prompts} x --group-size {flags.group_size} in {flags.rl_minibatches} "
            f"minibatches do not divide among {world.size} ranks x --accum-freq {config.train.accum_freq}."
        )
    per = flags.steps_per_iteration
    run_length = run_length_of(config.train, rows * architecture.seq_len, None, architecture.seq_len)
    if run_length.total_steps % per or run_length.last_step % per:
        raise ConfigError(
            f"--train-steps {run_length.total_steps}: an iteration takes {per} steps (--rl-epochs x --rl-minibatches): "
            "train and stop after a multiple of it."
        )
    prompts = Prompts(
        flags.prompts, seed=config.train.seed, per_iteration=flags.rollout_prompts, steps_per_iteration=per
    )
    return prompts, run_length


def build_rollouts(
    config: RunConfig,
    architecture: ModelConfig,
    state: TrainState,
    prompts: Prompts,
    folder: str,
    table: ShowTable | None = None,
) -> Rollouts:
    """The source of batches in reinforcement learning; `table` logs sampled answers with the metrics.

    Raises:
        ConfigError: the tokenizer, a reward or the reference is not there or not the model's.
    """
    tokenizer = load_tokenizer(prompts.tokenizer_name(config.data.tokenizer))
    if tokenizer.vocab_size > architecture.vocab_size:
        raise ConfigError(
            f"--prompts: made with {tokenizer.name} of {tokenizer.vocab_size} tokens, the model has "
            f"{architecture.vocab_size}."
        )
    parts = TaskParts(config, state.model, state.task, state.world, state.precision)
    return Rollouts(
        kind=config.task.task,
        config=config.rl,
        state=state,
        prompts=prompts,
        tokenizer=tokenizer,
        scores=build_rewards(config.rl.reward, tokenizer, str(state.world.device), state.precision.weight_dtype),
        reference=build_reference(parts) if config.rl.kl_coefficient else None,
        log=RolloutLog(folder, config.rl.show_rollouts_every, tokenizer, state.world, table),
        accum=config.train.accum_freq,
    )
