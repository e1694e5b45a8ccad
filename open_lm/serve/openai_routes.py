"""OpenAI's routes: /v1/models, /v1/completions, /v1/chat/completions."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from open_lm.generation.text import TokenScore
from open_lm.serve.openai_format import chat_logprobs, completion_logprobs, usage
from open_lm.serve.refused import Refused
from open_lm.serve.schemas import ChatBody, CompletionBody, SamplingBody
from open_lm.serve.served import Served, TextSettings, settings_of
from open_lm.serve.service import TextProgress, Ticket
from open_lm.serve.state import State, state_of
from open_lm.serve.waiting import TimeLimit, progress_of, until_written

router = APIRouter(prefix="/v1")
MANY_SCORES = 5_000
"""Log-probabilities from which on an answer is put together beside the event loop."""


@router.get("/models")
async def models(request: Request) -> Any:
    """The models that are served."""
    return {"object": "list", "data": [_described(served) for served in state_of(request).models.values()]}


@router.get("/models/{name:path}")
async def model(name: str, request: Request) -> Any:
    """One of them."""
    return _described(state_of(request).model(name))


def _described(served: Served) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "open_lm",
        "max_model_len": served.context,
    }


@router.post("/completions")
async def completions(body: CompletionBody, request: Request) -> Response:
    """Continue one prompt or several."""
    state = state_of(request)
    served = state.model(body.model)
    prompts = await served.encoded(body.prompts, special=body.add_special_tokens)
    n_top, score_from = body.logprobs, 1 if body.echo and body.logprobs is not None else None
    asked = _asked(body, 16 if body.max_tokens is None else body.max_tokens, n_top, score_from)
    tickets = served.tickets(prompts, [asked] * len(prompts), body.n)
    state.log_prompts(served, tickets)
    return await _answer(state, served, tickets, body, request, _Completions(served, body))


@router.post("/chat/completions")
async def chat_completions(body: ChatBody, request: Request) -> Response:
    """Answer a conversation."""
    state = state_of(request)
    served = state.model(body.model)
    prompt = await asyncio.to_thread(served.chat_prompt, [message.plain() for message in body.messages])
    end_ids, end_strings = served.turn_end
    n_top = (body.top_logprobs or 0) if body.logprobs else None
    asked = _asked(body, body.max_completion_tokens or body.max_tokens, n_top, None, end_ids, end_strings)
    tickets = served.tickets([prompt], [asked], body.n)
    state.log_prompts(served, tickets)
    return await _answer(state, served, tickets, body, request, _Chat(served))


def _asked(
    body: SamplingBody,
    max_tokens: int | None,
    n_top: int | None,
    score_from: int | None,
    stop_ids: Sequence[int] = (),
    stops: Sequence[str] = (),
) -> TextSettings:
    config = settings_of(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        seed=body.seed,
    )
    return TextSettings(
        config, max_tokens, (*body.stops, *stops), tuple(stop_ids), n_top, score_from, is_streamed=bool(body.stream)
    )


class _Completions:
    """The choices of /v1/completions."""

    object_name = streamed_name = "text_completion"
    id_prefix = "cmpl-"

    def __init__(self, served: Served, body: CompletionBody):
        self.decode, self.texts_of, self.body = served.tokenizer.decode, served.token_texts, body
        self.prompts = body.prompts
        self._offsets: dict[int, int] = {}  # of what has been told of each text, characters

    def whole(self, ticket: Ticket) -> dict[str, Any]:
        return self._choice(ticket, ticket.stream.text, ticket.text.scores, ticket.text.finish)

    def first(self, ticket: Ticket) -> None:
        return None

    def piece(self, ticket: Ticket, progress: TextProgress) -> dict[str, Any]:
        return self._choice(ticket, progress.piece, progress.scores, progress.finish)

    def _choice(self, ticket: Ticket, text: str, scores: Sequence[TokenScore], finish: str | None) -> dict[str, Any]:
        """The new piece of a text; with `echo` the prompt comes before the first one."""
        begins, logprobs = self.body.echo and ticket.index not in self._offsets, None
        echoed = self._prompt_text(ticket) if begins else ""
        offset = self._offsets.setdefault(ticket.index, 0)
        if self.body.logprobs is not None:
            found: list[tuple[int, TokenScore | None]] = [(score.token, score) for score in scores]
            if begins:
                prompt = ticket.text.prompt
                found = [*zip(prompt, [None, *ticket.text.prompt_scores], strict=True), *found]
                offset = len(echoed) - self.texts_of.n_characters(prompt)  # below 0 by what is not in the text (BOS)
            logprobs = completion_logprobs(found, self.texts_of, offset)
            self._offsets[ticket.index] = offset + self.texts_of.n_characters([token for token, _ in found])
        return {"index": ticket.index, "text": echoed + text, "logprobs": logprobs, "finish_reason": finish}

    def _prompt_text(self, ticket: Ticket) -> str:
        prompt = self.prompts[ticket.index // self.body.n]
        return prompt if isinstance(prompt, str) else self.decode(prompt)


class _Chat:
    """The choices of /v1/chat/completions."""

    object_name, streamed_name, id_prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def __init__(self, served: Served):
        self.texts_of = served.token_texts

    def _logprobs(self, ticket: Ticket, scores: Sequence[Any]) -> dict[str, Any] | None:
        return None if ticket.text.n_top is None else chat_logprobs(scores, self.texts_of)

    def whole(self, ticket: Ticket) -> dict[str, Any]:
        message = {"role": "assistant", "content": ticket.stream.text, "refusal": None}
        logprobs = self._logprobs(ticket, ticket.text.scores)
        return {"index": ticket.index, "message": message, "logprobs": logprobs, "finish_reason": ticket.text.finish}

    def first(self, ticket: Ticket) -> dict[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return {"index": ticket.index, "delta": delta, "logprobs": None, "finish_reason": None}

    def piece(self, ticket: Ticket, progress: TextProgress) -> dict[str, Any]:
        return {
            "index": ticket.index,
            "delta": {"content": progress.piece} if progress.piece else {},
            "logprobs": self._logprobs(ticket, progress.scores),
            "finish_reason": progress.finish,
        }


async def _answer(
    state: State, served: Served, tickets: list[Ticket], body: SamplingBody, request: Request, form: Any
) -> Response:
    head = {"id": form.id_prefix + secrets.token_hex(12), "created": int(time.time()), "model": served.name}
    if body.stream:
        served.service.submit(tickets)
        parts = _parts(state, served, tickets, body, form, {**head, "object": form.streamed_name})
        return StreamingResponse(
            parts, media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
    await until_written(request, served.service, tickets, TimeLimit(state.config.max_seconds))
    state.log_texts(served, tickets)

    def answer() -> bytes:
        choices = [form.whole(ticket) for ticket in tickets]
        return orjson.dumps({**head, "object": form.object_name, "choices": choices, "usage": usage(tickets, body.n)})

    is_long = sum(ticket.text.n_wanted_scores for ticket in tickets) >= MANY_SCORES
    return Response(await asyncio.to_thread(answer) if is_long else answer(), media_type="application/json")


async def _parts(
    state: State, served: Served, tickets: list[Ticket], body: SamplingBody, form: Any, head: dict[str, Any]
) -> AsyncIterator[bytes]:
    """A streamed answer, one `data:` line after the other."""
    no_usage = {"usage": None} if body.wants_usage else {}
    try:
        for ticket in tickets:
            if (first := form.first(ticket)) is not None:
                yield _event({**head, "choices": [first], **no_usage})
        async for ticket, progress in progress_of(served.service, tickets, TimeLimit(state.config.max_seconds)):
            is_long = len(ticket.text.prompt_scores) * (1 + (ticket.text.n_top or 0)) >= MANY_SCORES
            piece = await asyncio.to_thread(form.piece, ticket, progress) if is_long else form.piece(ticket, progress)
            yield _event({**head, "choices": [piece], **no_usage})
        if body.wants_usage:
            yield _event({**head, "choices": [], "usage": usage(tickets, body.n)})
        state.log_texts(served, tickets)
    except Refused as refused:
        yield _event(refused.body())
    finally:
        served.service.cancel(tickets)
    yield b"data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"
