"""A model as requests see it: its tokenizer and chat template, and texts made of prompts and settings."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from open_lm.errors import ConfigError
from open_lm.generation.config import GenerateConfig
from open_lm.generation.prompts import check_prompt
from open_lm.generation.stream import TextStream
from open_lm.generation.text import Text, copy_numbers
from open_lm.serve.refused import Refused
from open_lm.serve.service import Events, Service, Ticket
from open_lm.serve.token_texts import TokenTexts

LONG_TEXT = 10_000
"""Characters of a request from which on they are encoded beside the event loop, so that other requests go on."""


@dataclass(frozen=True)
class TextSettings:
    """Settings of the texts of one request."""

    config: GenerateConfig
    max_tokens: int | None = None
    stops: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    n_top: int | None = None
    score_from: int | None = None
    is_streamed: bool = False


@dataclass
class Served:
    """One model that the server knows by `name`."""

    name: str
    service: Service
    tokenizer: Any
    template: Any
    created: int

    def warmed(self) -> Served:
        """This, with the chat template tried, so that one that is broken is known before anybody chats.

        Raises:
            ConfigError: it is no jinja.
        """
        with contextlib.suppress(Refused):
            self.chat_text([{"role": "user", "content": "a"}])
        _ = self.turn_end
        return self

    @property
    def context(self) -> int:
        """Positions that a prompt and what is written after it have together."""
        return self.service.max_len

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The ids of a prompt, with what the tokenizer puts before it (BOS); an empty one starts a text."""
        ids = self.tokenizer.encode_prompt(text) if special else self.tokenizer.encode(text)
        return ids or [self.tokenizer.eot_id]

    async def encoded(self, prompts: Sequence[str | list[int]], *, special: bool = True) -> list[list[int]]:
        """The ids of prompts, each given as text or as ids; long texts are encoded beside the event loop."""

        def work() -> list[list[int]]:
            return [self.encode(one, special=special) if isinstance(one, str) else one for one in prompts]

        n_characters = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
        return work() if n_characters < LONG_TEXT else await asyncio.to_thread(work)

    @cached_property
    def token_texts(self) -> TokenTexts:
        """Single tokens as clients see them."""
        return TokenTexts(self.tokenizer)

    def tickets(self, prompts: Sequence[Sequence[int]], asked: Sequence[TextSettings], n: int = 1) -> list[Ticket]:
        """`n` texts to be written after each prompt, as its `asked` says.

        Raises:
            Refused: the model cannot read a prompt, or there are too many texts.
        """
        self.service.require_room(len(prompts) * n)
        for prompt, one in zip(prompts, asked, strict=True):
            self.require_readable(prompt, one)
        events: Events = asyncio.Queue()
        jobs = [job for job in zip(prompts, asked, strict=True) for _ in range(n)]
        copies = copy_numbers([prompt for prompt, _ in jobs])
        return [
            self._ticket(*job, copy, events, index) for index, (job, copy) in enumerate(zip(jobs, copies, strict=True))
        ]

    def require_readable(self, prompt: Sequence[int], asked: TextSettings) -> None:
        """See that the model can read a prompt.

        Raises:
            Refused: it cannot.
        """
        only_read = asked.max_tokens == 0  # all of the context may be prompt, and one token more is only scored
        if only_read and len(prompt) > self.context + 1:
            words = f"prompt has {len(prompt)} tokens; the model's context of {self.context} is too short."
            raise Refused(400, words, "prompt", "context_length_exceeded")
        context = self.context + 2 if only_read else self.context
        try:
            check_prompt(prompt, self.service.model.config.vocab_size, context, "prompt")
        except ConfigError as error:
            code = "context_length_exceeded" if len(prompt) >= context else None
            raise Refused(400, str(error), "prompt", code) from None

    def _ticket(self, prompt: Sequence[int], asked: TextSettings, copy: int, events: Events, index: int) -> Ticket:
        """One text to be written."""
        wanted = asked.max_tokens
        room = max(0, self.context - len(prompt))
        n_new = room if wanted is None else min(wanted, room)
        stop_ids = {self.tokenizer.eot_id, *asked.stop_ids}
        text = Text(prompt, asked.config, n_new, stop_ids, None, copy, asked.n_top, asked.score_from)
        stream = TextStream(self.tokenizer, asked.stops, before=prompt)
        return Ticket(text, stream, events, index, is_streamed=asked.is_streamed)

    def chat_text(self, messages: Sequence[dict[str, str]]) -> str:
        """The text that the assistant's answer to `messages` follows.

        Raises:
            Refused: the template does not take these messages.
        """
        from open_lm.post_training.chat.template import TemplateRefusal

        try:
            return self.template.prompt(messages)
        except TemplateRefusal as error:
            raise Refused(400, f"The chat template does not take these messages: {error}", "messages") from None

    def chat_prompt(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The ids that the assistant's answer to `messages` follows.

        Raises:
            Refused: as `chat_text`.
        """
        return self.encode(self.chat_text(messages), special=False)

    @cached_property
    def turn_end(self) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """The ends of an answer beside the end of text: token ids, or strings where they are no tokens of their own."""
        from open_lm.post_training.chat.template import TemplateRefusal

        asked = [{"role": "user", "content": "a"}]
        try:
            before = self.template.prompt(asked)
            whole = self.template.render([*asked, {"role": "assistant", "content": "b"}]).text
        except (TemplateRefusal, ConfigError):
            return (), ()
        end = whole[len(before) + 1 :].strip() if whole.startswith(before + "b") else ""
        ids = self.tokenizer.encode(end) if end else []
        if len(ids) == 1:
            return (ids[0],), ()
        return (), (end,) if end else ()


def settings_of(
    *,
    temperature: float | None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int | None = None,
) -> GenerateConfig:
    """The settings of a request; what it leaves out is as with OpenAI: temperature 1, all tokens, any seed."""
    return GenerateConfig(
        temperature=1.0 if temperature is None else temperature,
        top_p=1.0 if top_p is None else top_p,
        top_k=max(0, top_k or 0),
        min_p=min_p or 0.0,
        repetition_penalty=1.0 if repetition_penalty is None else repetition_penalty,
        seed=secrets.randbits(63) if seed is None else seed,
    )
