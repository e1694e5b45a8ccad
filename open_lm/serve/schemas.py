"""Bodies of requests: what OpenAI's and EasyLM's clients send, checked field by field."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    PlainValidator,
    model_validator,
)

from open_lm.generation.config import LEAST_PENALTY, MOST_PENALTY

MAX_SEED = 2**63 - 1
MAX_FIELDS = 64
"""A body is refused at its first faults: of the millions that one may have, a list would not fit in memory."""
MAX_STOPS, MAX_STOP_CHARACTERS = 16, 1000


class _FirstFault(FailFast):
    """FailFast as a part of a union, whose parts must be hashable."""

    def __hash__(self) -> int:
        return hash(type(self))


FIRST_FAULT = _FirstFault()


def _sendable(text: str) -> str:
    """A text that UTF-8 can hold: JSON may carry halves of characters, tokenizers take none."""
    text.encode()
    return text


Utf8Text = Annotated[str, AfterValidator(_sendable)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1), FIRST_FAULT]
Texts = Annotated[list[Utf8Text], Field(max_length=1024), FIRST_FAULT]


def _stops(value: Any) -> Any:
    """One stop string or a list of them, as it came."""
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(one, str) for one in strings):
        raise ValueError("give a string or a list of strings.")
    if len(strings) > MAX_STOPS:
        raise ValueError(f"{len(strings)} strings; at most {MAX_STOPS} are looked for.")
    for one in map(_sendable, strings):
        if not 1 <= len(one) <= MAX_STOP_CHARACTERS:
            raise ValueError(f"a string of {len(one)} characters; give 1 to {MAX_STOP_CHARACTERS}, or leave stop out.")
    return value


_Some = Field(min_length=1, max_length=1024)
PromptList = Annotated[list[Utf8Text], _Some, FIRST_FAULT] | Annotated[list[TokenIds], _Some, FIRST_FAULT]
EITHER = {
    "prompt": "give a text, token ids from 0 on, or a list of 1 to 1024 texts or of 1 to 1024 lists of token ids.",
    "content": "give a text, or a list of parts of the form {type: text, text: …}.",
}
"""Advice for fields that take more than one type, by name."""
Stops = Annotated[str | list[str], PlainValidator(_stops)]
Count = Annotated[int, BeforeValidator(lambda value: 1 if value is None else value), Field(ge=1, le=128)]


class Body(BaseModel):
    """A JSON object without unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _is_small(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > MAX_FIELDS:
            raise ValueError(f"{len(value)} fields; no request of this server has so many.")
        return value


class StreamOptions(Body):
    """`stream_options` of a streamed request."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class SamplingBody(Body):
    """Fields of both of OpenAI's routes. top_k, min_p, repetition_penalty are extensions that others have, too."""

    model: str | None = None
    n: Count = 1
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=LEAST_PENALTY, le=MOST_PENALTY)
    seed: int | None = Field(None, ge=-MAX_SEED - 1, le=MAX_SEED)
    stop: Stops | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, Any] | None = None
    user: str | None = None
    metadata: Annotated[dict[str, Any], Field(max_length=16)] | None = None
    store: bool | None = None
    service_tier: str | None = None

    @model_validator(mode="after")
    def _has_only_what_is_served(self) -> SamplingBody:
        for name in ("presence_penalty", "frequency_penalty", "logit_bias"):
            if getattr(self, name):
                raise ValueError(f"{name} is not supported by this server: leave it out, or 0.")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options belongs to stream: true.")
        return self

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the counts of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(SamplingBody):
    """POST /v1/completions"""

    prompt: Utf8Text | TokenIds | PromptList
    max_tokens: int | None = Field(None, ge=0, lt=2**31)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _completes(self) -> CompletionBody:
        if self.suffix:
            raise ValueError("suffix is not supported: these models write from left to right.")
        if self.best_of is not None and self.best_of != self.n:
            raise ValueError("best_of is not supported: ask for n texts and choose.")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, each a text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class Part(Body):
    """A part of a message's content; only text is taken."""

    type: Literal["text"]
    text: Utf8Text


Nothing = Annotated[list[Any], Field(max_length=0)] | None


class ChatMessage(Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Utf8Text | Annotated[list[Part], Field(min_length=1), FIRST_FAULT]
    name: str | None = None
    refusal: Any = None
    annotations: Nothing = None  # empty fields of answers, which clients send back as they came
    audio: Nothing = None
    function_call: Nothing = None
    tool_calls: Nothing = None

    def plain(self) -> dict[str, str]:
        """The message as chat templates take it."""
        role = "system" if self.role == "developer" else self.role
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": role, "content": text}


class ResponseFormat(Body):
    """`response_format`: plain text alone."""

    type: Literal["text"]


class ChatBody(SamplingBody):
    """POST /v1/chat/completions"""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=10_000), FIRST_FAULT]
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[Any] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _chats(self) -> ChatBody:
        if self.tools:
            raise ValueError("tools is not supported by this server: leave it out.")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs belongs to logprobs: true.")
        return self


class EasyBody(Body):
    """POST /generate, /greedy-until, /loglikelihood and /loglikelihood-rolling, as EasyLM's client sends them."""

    prefix_text: Texts | None = None
    text: Texts | None = None
    until: Annotated[list[Stops], Field(max_length=1024), FIRST_FAULT] | None = None
    temperature: float | None = Field(None, ge=0, le=100)


class EasyChatBody(Body):
    """POST /chat, as EasyLM's client sends it."""

    prompt: Utf8Text
    context: Utf8Text = ""
    temperature: float | None = Field(None, ge=0, le=100)
