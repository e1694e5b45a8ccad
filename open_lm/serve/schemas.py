"""Bodies of requests: what OpenAI's and EasyLM's clients send, checked field by field."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

MAX_SEED = 2**63 - 1


def _sendable(text: str) -> str:
    """A text that UTF-8 can hold: JSON may carry halves of characters, tokenizers take none."""
    text.encode()
    return text


Utf8Text = Annotated[str, AfterValidator(_sendable)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
Stop = Annotated[Utf8Text, Field(min_length=1, max_length=1000)]


class Body(BaseModel):
    """A JSON object without unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    """`stream_options` of a streamed request."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class SamplingBody(Body):
    """What both of OpenAI's routes share. top_k, min_p, repetition_penalty are extensions that others have, too."""

    model: str | None = None
    n: int = Field(1, ge=1, le=128)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=1000)
    seed: int | None = Field(None, ge=-MAX_SEED - 1, le=MAX_SEED)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
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

    prompt: Utf8Text | TokenIds | Annotated[list[Utf8Text] | list[TokenIds], Field(min_length=1, max_length=1024)]
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
    content: Utf8Text | Annotated[list[Part], Field(min_length=1)]
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

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=10_000)]
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[Any] | None = Field(None, max_length=0)
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _chats(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs belongs to logprobs: true.")
        return self


class EasyBody(Body):
    """POST /generate, /greedy-until, /loglikelihood and /loglikelihood-rolling, as EasyLM's client sends them."""

    prefix_text: Annotated[list[Utf8Text], Field(max_length=1024)] | None = None
    text: Annotated[list[Utf8Text], Field(max_length=1024)] | None = None
    until: Annotated[list[Stop | Annotated[list[Stop], Field(max_length=16)]], Field(max_length=1024)] | None = None
    temperature: float | None = Field(None, ge=0, le=100)


class EasyChatBody(Body):
    """POST /chat, as EasyLM's client sends it."""

    prompt: Utf8Text
    context: Utf8Text = ""
    temperature: float | None = Field(None, ge=0, le=100)
