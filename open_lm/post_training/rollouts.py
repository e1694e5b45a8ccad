"""Rollouts: prompts answered by the current model, scored, and handed to the step as batches.

An iteration is one set of answers and the `rl_epochs` x `rl_minibatches` optimizer steps on it. All that is drawn is a
function of seed, iteration and prompt, so that a run that starts again at an iteration's beginning repeats it bit for
bit. Shapes: B answers, T positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from open_lm.data.batch import IGNORED, Batch
from open_lm.data.permutations import key
from open_lm.data.tokenizer import Tokenizer
from open_lm.errors import ConfigError
from open_lm.generation.config import GenerateConfig
from open_lm.generation.cpu_decode import cpu_decode
from open_lm.generation.decode import evaluating
from open_lm.generation.engine import Engine
from open_lm.generation.padded import PaddedTexts
from open_lm.generation.sampling import next_tokens
from open_lm.generation.text import Text
from open_lm.model.config import ModelConfig
from open_lm.post_training.advantages import generalised, group_relative, leave_one_out
from open_lm.post_training.config import RLConfig
from open_lm.post_training.log_probs import token_log_probs
from open_lm.post_training.prompts import Prompts
from open_lm.post_training.reference import Reference
from open_lm.post_training.reward_model import values_of
from open_lm.post_training.rewards import Answer, Reward, batch_of_answers, total
from open_lm.post_training.rollout_log import RolloutLog

TOGETHER = 256
"""Answers written at once."""


@dataclass
class Rollouts:
    """The sampler and scorer of answers; `state` is the training state, whose model and step are read."""

    kind: str
    config: RLConfig
    state: Any
    prompts: Prompts
    tokenizer: Tokenizer
    scores: Sequence[Reward]
    reference: Reference | None
    log: RolloutLog
    accum: int

    def batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        """This rank's batches of the steps from `start_step` on.

        Raises:
            ConfigError: `start_step` or `stop_step` is inside an iteration.
        """
        per = self.config.steps_per_iteration
        if start_step % per or stop_step % per:
            raise ConfigError(
                f"an iteration takes {per} steps (--rl-epochs x --rl-minibatches): a run starts and ends after a "
                f"multiple of them, not at {start_step} and {stop_step}."
            )
        self.log.rewind(start_step // per)
        for iteration in range(start_step // per, stop_step // per):
            rollout = self.iterate(iteration)
            for epoch in range(self.config.rl_epochs):
                order = torch.from_numpy(
                    _order(len(rollout), self.prompts.seed, iteration, epoch, self.state.world.rank)
                )
                shuffled = rollout.rows(order)
                yield from shuffled.split(self.config.rl_minibatches)

    def iterate(self, iteration: int) -> Batch:
        """This rank's answers of one iteration, with all that the loss needs to know of them."""
        answers = self._answers(iteration)
        rewards = total(self.scores, answers)
        self.log.show(iteration, iteration * self.config.steps_per_iteration, answers, rewards)
        batch = batch_of_answers(answers)
        rewards_B = torch.tensor(rewards, dtype=torch.float64)
        finished_B = torch.tensor([float(answer.finished) for answer in answers])
        with evaluating(self.state.model), torch.no_grad(), self.state.precision.autocast():
            found = self._known(batch)
        advantage_BT, more = self._advantages(batch, rewards_B, found)
        extras = {**found, **more, "advantage": advantage_BT, "reward": rewards_B, "finished": finished_B}
        return replace(batch, extras={name: extra.float() for name, extra in extras.items()})

    def _answers(self, iteration: int) -> list[Answer]:
        world, group = self.state.world, self.config.group_size
        rows = self.prompts.of_iteration(iteration)
        share = len(rows) // world.size
        mine = range(world.rank * share, (world.rank + 1) * share)
        seed = int(key("rollout", self.prompts.seed, iteration)) >> 33
        settings = GenerateConfig(
            max_gen_len=self.config.rollout_tokens, temperature=self.config.rollout_temperature, top_p=1.0, seed=seed
        )
        stop_ids = self.prompts.stop_ids(self.tokenizer.eot_id)
        texts = [
            Text(rows[k]["prompt_ids"], settings, self._room(rows[k]), stop_ids, copy=k * group + j)
            for k in mine
            for j in range(group)
        ]
        self._write(texts)
        return [
            Answer(text.prompt, text.tokens, self.tokenizer.decode(text.written()), rows[k], text.finish == "stop")
            for text, k in zip(texts, (k for k in mine for _ in range(group)), strict=True)
        ]

    def _room(self, row: dict[str, Any]) -> int:
        room = self._plain.config.seq_len - len(row["prompt_ids"])
        if room < 1:
            raise ConfigError(
                f"--prompts: one of {len(row['prompt_ids'])} tokens leaves no room for an answer in the model's "
                f"{self._plain.config.seq_len}. Make them with a smaller --seqlen."
            )
        return min(room, self.config.rollout_tokens)

    @property
    def _plain(self) -> Any:
        return getattr(self.state.model, "module", self.state.model)

    @torch.inference_mode()
    def _write(self, texts: list[Text]) -> None:
        """Let the current model write all texts."""
        with evaluating(self._plain), cpu_decode(self._plain), self.state.precision.autocast():
            if isinstance(self._plain.config, ModelConfig):
                for start in range(0, len(texts), TOGETHER):
                    write_together(self._plain, texts[start : start + TOGETHER])
                return
            longest = max(len(text.prompt) + text.n_new for text in texts)
            engine = Engine(self._plain, min(len(texts), 64), longest)
            for text in texts:
                engine.add(text)
            while engine.busy:
                engine.step()

    def _known(self, batch: Batch) -> dict[str, Tensor]:
        """Log-probabilities under the model and the reference, and values, as they are now."""
        temperature = self.config.rollout_temperature
        size = max(1, len(batch) // (self.config.rl_minibatches * self.accum))
        parts: dict[str, list[Tensor]] = {}
        for host in batch.split(len(batch) // size):
            part = host.to(self.state.world.device)
            parts.setdefault("old", []).append(token_log_probs(self._plain, part, temperature).cpu())
            if self.reference is not None:
                parts.setdefault("reference", []).append(self.reference(self._plain, part, temperature).cpu())
            if self.kind == "ppo":
                parts.setdefault("value", []).append(values_of(self._plain, part).cpu())
        return {name: torch.cat(found) for name, found in parts.items()}

    def _advantages(
        self, batch: Batch, rewards_B: Tensor, found: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The advantage of each token, and with PPO the returns that its value head learns."""
        is_target_BT, config = batch.targets_BT != IGNORED, self.config
        penalty_BT = torch.zeros_like(found["old"], dtype=torch.float64)
        if config.kl_in == "reward" and config.kl_coefficient and "reference" in found:
            penalty_BT = config.kl_coefficient * (found["old"] - found["reference"]).double() * is_target_BT
        if self.kind != "ppo":
            rewards_B = rewards_B - penalty_BT.sum(1)
            if self.kind == "rloo":
                advantage_B = leave_one_out(rewards_B, config.group_size)
            else:
                advantage_B = group_relative(rewards_B, config.group_size, by_std=config.advantage_std)
            return advantage_B[:, None] * is_target_BT, {}
        rewards_BT = -penalty_BT
        last_B1 = is_target_BT.shape[1] - 1 - is_target_BT.flip(1).int().argmax(1, keepdim=True)
        rewards_BT.scatter_add_(1, last_B1, rewards_B[:, None])
        values_BT = found["value"].double() * is_target_BT
        advantage_BT, returns_BT = generalised(rewards_BT, values_BT, is_target_BT, config.gae_gamma, config.gae_lambda)
        return self._whitened(advantage_BT, is_target_BT), {"return": returns_BT}

    def _whitened(self, advantage_BT: Tensor, is_target_BT: Tensor) -> Tensor:
        """Advantages of mean 0 and variance 1 over all ranks' tokens."""
        world = self.state.world
        kept = advantage_BT[is_target_BT]
        n, sum_, squares = world.sum(torch.tensor([kept.numel(), kept.sum(), kept.square().sum()])).double().tolist()
        mean = sum_ / max(n, 1)
        std = max(squares / max(n, 1) - mean**2, 0.0) ** 0.5
        return (advantage_BT - mean) / (std + 1e-8) * is_target_BT


def write_together(model: Any, texts: Sequence[Text]) -> None:
    """Write short answers to many prompts as one batch, padded on the left; each draws from its own random stream."""
    padded = PaddedTexts(model, [text.prompt for text in texts], texts[0].config, max(text.n_new for text in texts))
    configs = [text.config for text in texts]
    while not all(text.finish for text in texts):
        logits_BV = padded.next_logits()
        tokens = next_tokens(logits_BV, configs, [0.0 if text.finish else text.uniform() for text in texts])
        for text, token in zip(texts, tokens, strict=True):
            if text.finish is None:
                text.append(token, None)
        padded.append(torch.tensor(tokens, device=logits_BV.device))


def _order(n: int, seed: int, iteration: int, epoch: int, rank: int) -> Any:
    import numpy as np

    generator = np.random.Generator(np.random.Philox(key=int(key("minibatches", seed, iteration, epoch, rank))))
    return generator.permutation(n)
