"""Many texts written at once: they join and leave the running batch at any step (continuous batching).

Shapes: B rows, T positions, D model width, V vocabulary.

What a text becomes does not depend on the others. Each prompt is read alone, in blocks that end at multiples of
`block`, so that a block copied from another text is the one that would have been computed; each text has its own
length, settings and random stream; and where the C++ kernels run, the sums of a decoding step do not depend on how many
rows it has.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from open_lm.generation.memory import memory_of
from open_lm.generation.prefixes import Prefixes, block_keys
from open_lm.generation.sampling import next_tokens, penalised
from open_lm.generation.text import Text, TokenScore
from open_lm.kernels.skinny_matmul import linear

PREFILL_BLOCK = {"cpu": 64, "cuda": 256}
"""Tokens of a prompt that are read at once, by device."""
PREFILL_PER_STEP = 256
"""Tokens of prompts read, about, between two decoding steps: texts that are being written do not wait long."""


class Engine:
    """Writes texts with one model, at most `n_slots` at a time; call it under `torch.inference_mode`."""

    def __init__(self, model: Any, n_slots: int, max_len: int, *, use_cache: bool = True, block: int | None = None):
        self.model = model
        self.device = next(model.parameters()).device
        self.memory = memory_of(model, n_slots, max_len, use_cache)
        self.block = (block or PREFILL_BLOCK.get(self.device.type, 64)) if self.memory.in_blocks else max_len
        self.waiting: deque[Text] = deque()
        self.reading: list[Text] = []
        self.writing: list[Text] = []
        self._free = deque(range(n_slots))  # the longest unused first
        self._prefixes = Prefixes()
        self._keys: dict[Text, list[bytes]] = {}
        self.n_prompt_tokens = self.n_shared_tokens = 0

    @property
    def busy(self) -> bool:
        """Whether any text is not finished."""
        return bool(self.waiting or self.reading or self.writing)

    def add(self, text: Text) -> None:
        """Let a text wait for its turn."""
        self.waiting.append(text)

    def step(self) -> list[Text]:
        """Read some of the prompts, give each text that is being written a token; returns the texts that changed."""
        changed = self._drop_cancelled()
        self._admit()
        changed += self._read()
        changed += self._write(changed)
        return changed

    def abandon(self) -> list[Text]:
        """Take out every text, as after an error; returns them."""
        texts = [*self.waiting, *self.reading, *self.writing]
        self.waiting.clear()
        for text in texts:
            text.finish = text.finish or "error"
        self._leave([*self.reading, *self.writing])
        for slot in self._free:
            self._prefixes.take(slot)
        return texts

    def _drop_cancelled(self) -> list[Text]:
        """End the texts that other threads have cancelled: `cancelled` is read once, the rest goes by `finish`."""
        gone = [text for text in (*self.waiting, *self.reading, *self.writing) if text.cancelled]
        for text in gone:
            text.finish = "cancelled"
        if gone:
            self.waiting = deque(text for text in self.waiting if text.finish is None)
            self._leave(gone)
        return gone

    def _admit(self) -> None:
        while self.waiting and self._free:
            text = self.waiting.popleft()
            text.slot = self._free.popleft()
            self.memory.clear(text.slot)
            keys = self._keys[text] = block_keys(text.prompt, self.block) if self.memory.shares else []
            n_kept = self._prefixes.take(text.slot, keys[: self._n_sharable(text)])
            self._take_blocks(text, text.slot, n_kept)
            self.reading.append(text)

    def _n_sharable(self, text: Text) -> int:
        """Number of blocks that may come from another text: the last position, and those to be scored, are computed."""
        last = len(text.prompt) - 1 if text.score_from is None else min(text.score_from, len(text.prompt)) - 1
        return last // self.block

    def _take_blocks(self, text: Text, source: int, n_blocks: int) -> None:
        """Give a text the first blocks of slot `source`."""
        n = n_blocks * self.block
        if n > text.n_read:
            self.memory.copy(source, text.slot, n)
            self.n_shared_tokens += n - text.n_read
            text.n_shared += n - text.n_read
            text.n_read = n

    def _leave(self, texts: Sequence[Text]) -> None:
        for text in texts:
            if text in self._keys:
                del self._keys[text]
                self._free.append(text.slot)
        self.reading = [text for text in self.reading if text.finish is None]
        self.writing = [text for text in self.writing if text.finish is None]

    def _read(self) -> list[Text]:
        """Blocks of prompts, one text after the other; those that have been read to the end get their first token."""
        changed, n_tokens = [], 0
        for text in list(self.reading):
            while n_tokens < PREFILL_PER_STEP and text.n_read < text.n_to_read:
                n_tokens += 0 if self._shared(text) else self._read_block(text)
            if text.n_read == text.n_to_read:
                text.finish = "length" if text.n_new == 0 else text.finish
                changed.append(text)
        self.reading = [text for text in self.reading if text.n_read < text.n_to_read and text.finish is None]
        self._leave([text for text in changed if text.finish is not None])
        self.writing += [text for text in changed if text.finish is None]
        return changed

    def _shared(self, text: Text) -> bool:
        """Whether the next blocks were taken from another text."""
        keys, done = self._keys[text], text.n_read // self.block
        for number in range(min(len(keys), self._n_sharable(text)), done, -1):
            source = self._prefixes.find(keys[number - 1])
            if source is not None:
                self._take_blocks(text, source, number)
                for key in keys[done:number]:
                    self._prefixes.add(text.slot, key)
                if source in self._free:  # used again: the last to be taken
                    self._free.remove(source)
                    self._free.append(source)
                return True
        return False

    def _read_block(self, text: Text) -> int:
        """Read one block of a prompt; the end of the prompt gives the first token. Returns how many tokens it has."""
        start = text.n_read
        end = min(text.n_to_read, (start // self.block + 1) * self.block)
        ids_BT = torch.tensor([text.prompt[start:end]], device=self.device)
        hidden_TD, weight_VD = self.memory.run([text.slot], ids_BT, _hidden_of_one)
        text.n_read = end
        self.n_prompt_tokens += end - start
        keys = self._keys[text]
        if end % self.block == 0 and keys:
            self._prefixes.add(text.slot, keys[end // self.block - 1])
        if text.score_from is not None and end >= text.score_from:
            self._score_prompt(text, hidden_TD, weight_VD, start, end)
        if end == text.n_to_read and text.n_new > 0:
            self._choose([text], linear(weight_VD, hidden_TD[-1:], exact=True))
        return end - start

    def _score_prompt(self, text: Text, hidden_TD: Tensor, weight_VD: Tensor, start: int, end: int) -> None:
        """Log-probabilities of the prompt's tokens that positions `start` to `end` predict."""
        assert text.score_from is not None
        first, last = max(start, text.score_from - 1), min(end, len(text.prompt) - 1)
        if first < last:
            logits_TV = linear(weight_VD, hidden_TD[first - start : last - start], exact=True)
            text.prompt_scores += scores_of(logits_TV, text.prompt[first + 1 : last + 1], text.n_top or 0)

    def _write(self, just_read: Sequence[Text]) -> list[Text]:
        """One token more for every text that is being written, but those that just got their first."""
        rows = [text for text in self.writing if text not in just_read]
        if not rows:
            return []
        rows.sort(key=lambda text: text.slot)
        ids_BT = torch.tensor([[text.tokens[-1]] for text in rows], device=self.device)
        logits_BV = self.memory.run([text.slot for text in rows], ids_BT, _last_logits)
        self._choose(rows, logits_BV)
        self._leave([text for text in rows if text.finish is not None])
        return rows

    def _choose(self, texts: Sequence[Text], logits_BV: Tensor) -> None:
        """Give each text its next token."""
        weighed_BV = logits_BV
        for row, text in enumerate(texts):
            if text.config.repetition_penalty != 1:
                weighed_BV = weighed_BV.clone() if weighed_BV is logits_BV else weighed_BV
                ids = [*text.prompt, *text.tokens]
                weighed_BV[row] = penalised(logits_BV[row], ids, text.config.repetition_penalty)
        uniforms = [text.uniform() if text.config.temperature > 0 else 0.0 for text in texts]
        tokens = next_tokens(weighed_BV, [text.config for text in texts], uniforms)
        broken = _with_nan(logits_BV, tokens, [text.config.temperature > 0 for text in texts])
        for row, (text, token) in enumerate(zip(texts, tokens, strict=True)):
            if broken[row]:
                text.finish = "error"
                continue
            wanted = text.n_top is not None
            score = scores_of(logits_BV[row : row + 1], [token], text.n_top or 0)[0] if wanted else None
            text.append(token, score)


def _with_nan(logits_BV: Tensor, tokens: Sequence[int], drawn: Sequence[bool]) -> list[bool]:
    """Rows that hold NaN: where the likeliest was taken, that is it; where one was drawn, all are looked at."""
    chosen_B1 = logits_BV.gather(1, torch.tensor(tokens, device=logits_BV.device)[:, None])
    return ((logits_BV.amax(-1) if any(drawn) else chosen_B1[:, 0]).isnan()).tolist()


def scores_of(logits_TV: Tensor, tokens: Sequence[int], n_top: int) -> list[TokenScore]:
    """The log-probability of each of `tokens`, one a row, with those of the `n_top` likeliest."""
    log_p_TV = logits_TV.log_softmax(-1)
    ids_T1 = torch.tensor(tokens, device=logits_TV.device)[:, None]
    own = log_p_TV.gather(1, ids_T1)[:, 0].tolist()
    greedy = logits_TV.argmax(-1).tolist()
    best = log_p_TV.topk(min(n_top, logits_TV.shape[-1]), dim=-1)
    tops = [tuple(zip(i, v, strict=True)) for i, v in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
    return [
        TokenScore(token, p, token == likeliest, top)
        for token, p, likeliest, top in zip(tokens, own, greedy, tops, strict=True)
    ]


def _hidden_of_one(hidden_BTD: Tensor, weight_VD: Tensor, **_: Any) -> Any:
    return hidden_BTD[0], weight_VD


def _last_logits(hidden_BTD: Tensor, weight_VD: Tensor, **_: Any) -> Tensor:
    return linear(weight_VD, hidden_BTD[:, -1], exact=True)
