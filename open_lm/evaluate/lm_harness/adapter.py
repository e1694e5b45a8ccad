"""`openlm`, our models in the harness, with the log-likelihoods of the native engine.

`python -m open_lm.evaluate.lm_harness --model openlm --model_args checkpoint=RUN …` is its command with this model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from open_lm.distributed import World
from open_lm.errors import ConfigError
from open_lm.evaluate.engine.encode import Choice, PromptEncoder, Question
from open_lm.evaluate.engine.generation import AnswerWriter, EncodedPrompt
from open_lm.evaluate.engine.icl import CPU_BATCH_TOKENS, GPU_BATCH_TOKENS
from open_lm.evaluate.engine.ranks import score_questions
from open_lm.evaluate.engine.scoring import Scorer
from open_lm.evaluate.eval_model import EvalModel, load_eval_model
from open_lm.precision import Precision
from open_lm.progress import progress

TokenPair = tuple[Sequence[int], Sequence[int]]


@register_model("openlm")
class OpenLMHarness(TemplateLM):
    """A checkpoint of ours as a model of the harness.

    `checkpoint` is a run folder or an epoch_K.pt, `architecture` (model=…, model_norm=…) what the file does not say.
    """

    def __init__(
        self,
        checkpoint: str | None = None,
        tokenizer: str | None = None,
        device: str | None = None,
        precision: str = "fp32",
        max_seq_len: int | None = None,
        batch_tokens: int | None = None,
        eval_model: EvalModel | None = None,
        world: World | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
        **architecture: Any,
    ):
        super().__init__()
        if eval_model is None:
            if not checkpoint:
                raise ConfigError("--model_args: no checkpoint=. Name a run folder or an epoch_K.pt.")
            has_gpu = torch.cuda.is_available()  # the harness asks for cuda:0 on its own
            where = torch.device((device or "cuda") if has_gpu else "cpu")
            eval_model = load_eval_model(str(checkpoint), tokenizer, architecture, where, torch.float32)
        self.eval_model = eval_model
        self._device = next(eval_model.model.parameters()).device
        self.world = world or World(device=self._device)
        self.max_seq_len = min(max_seq_len or eval_model.seq_len, eval_model.seq_len)
        self.encoder = PromptEncoder(eval_model.tokenizer)
        self.scorer = Scorer(eval_model.model, self._device, Precision(precision, self._device.type))
        default = GPU_BATCH_TOKENS if self._device.type == "cuda" else CPU_BATCH_TOKENS
        self.batch_tokens = batch_tokens or default
        self.truncated_contexts: set[tuple[int, ...]] = set()

    @property
    def rank(self) -> int:
        """0 on every rank: each gives the harness all answers, and gets all results."""
        return 0

    @property
    def world_size(self) -> int:
        """1, for the same reason."""
        return 1

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context: the begin of text, where the tokenizer has one."""
        tokenizer = self.eval_model.tokenizer
        ids = self.encoder.plain([tokenizer.special_tokens.get("bos_token", "")])[0]
        return ids[0] if len(ids) == 1 else tokenizer.eot_id

    @property
    def eot_token_id(self) -> int:
        return self.eval_model.tokenizer.eot_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **ignored: Any) -> list[int]:
        """The ids of a text; without special tokens unless they are asked for."""
        encode = self.encoder.with_special if add_special_tokens else self.encoder.plain
        return encode([string])[0]

    def _loglikelihood_tokens(self, requests: Any, **ignored: Any) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        return self._sums(pairs, [str(names) for names, _, _ in requests])

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows where they are longer than the context."""
        windows: list[TokenPair] = []
        counts = []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            parts = get_rolling_token_windows(ids, self.prefix_token_id, self.max_seq_len, 1)
            cut = [make_disjoint_window((list(context), list(predicted))) for context, predicted in parts]
            windows += cut
            counts.append(len(cut))
        sums = iter(self._sums(windows, ["a text"] * len(windows)))
        return [sum(next(sums)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """The greedy continuation of each context up to the first of its stop texts."""
        alike: dict[tuple[int, tuple[str, ...]], list[EncodedPrompt]] = {}
        for number, request in enumerate(requests):
            context, settings = request.args
            asked = normalize_gen_kwargs(dict(settings), 256)
            if asked["do_sample"]:
                raise ConfigError("openlm in the harness writes greedily: set do_sample: false in the task.")
            n_new = min(asked["max_gen_toks"], self.max_seq_len - 1)
            ids = tuple(self.tok_encode(context) or [self.prefix_token_id])[-(self.max_seq_len - n_new) :]
            stops = tuple(stop for stop in asked["until"] if stop)
            alike.setdefault((n_new, stops), []).append(EncodedPrompt(number, ids, False))
        texts = {}
        writer = AnswerWriter(self.scorer, self.encoder, self.world)
        with progress(total=len(requests), unit="request", shown=self.world.is_master and not disable_tqdm) as bar:
            for (n_new, stops), prompts in alike.items():
                one_by_one = [[prompt] for prompt in prompts]  # no text depends on others of its batch
                for number, text in writer.write(one_by_one, n_new, stops, bar.update).items():
                    texts[number] = min((text.split(stop)[0] for stop in stops), key=len, default=text)
        return [texts[number] for number in range(len(texts))]

    def _sums(self, pairs: Sequence[TokenPair], names: Sequence[str]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation and whether greedy decoding writes it; long contexts lose their start."""
        choices = [
            self._fitted(context, continuation, name)
            for (context, continuation), name in zip(pairs, names, strict=True)
        ]
        by_context: dict[tuple[int, ...], list[int]] = {}
        for index, choice in enumerate(choices):
            by_context.setdefault(choice.context, []).append(index)
        groups = list(by_context.values())
        questions = [Question(tuple(choices[index] for index in group), 0, False) for group in groups]
        sums: dict[int, tuple[float, bool]] = {}
        for (group, place), score in score_questions(self.scorer, self.world, questions, self.batch_tokens).items():
            index = groups[group][place]
            n_tokens = len(choices[index].continuation)
            sums[index] = (-score.cross_entropy * n_tokens, score.all_greedy)
        return [sums[index] for index in range(len(choices))]

    def _fitted(self, context: Sequence[int], continuation: Sequence[int], name: str) -> Choice:
        room = self.max_seq_len + 1 - len(continuation)  # the last token is only predicted
        if room < 1 or not continuation:
            raise ConfigError(f"{name[:80]}: {len(continuation)} tokens to score in a context of {self.max_seq_len}.")
        if len(context) > room:
            self.truncated_contexts.add(tuple(context))
        return Choice(tuple(context[-room:]), tuple(continuation))
