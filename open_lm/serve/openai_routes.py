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

from open_lm.serve.openai_format import chat_logprobs, completion_logprobs, usage
from open_lm.serve.refused import Refused
from open_lm.serve.schemas import ChatBody, CompletionBody, SamplingBody
from open_lm.serve.served import Served, TextSettings, settings_of
from open_lm.serve.service import TextProgress, Ticket
from open_lm.serve.state import State, state_of
from open_lm.serve.waiting import progress_of, until_written

router = APIRouter(prefix="/v1")
LONG_TEXT = 10_000
"""Characters from which on a text is encoded beside the event loop, so that other requests go on."""


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
    prompts = [await encoded(served, prompt, special=body.add_special_tokens) for prompt in body.prompts]
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


async def encoded(served: Served, prompt: str | list[int], *, special: bool = True) -> list[int]:
    """The ids of a prompt, given as text or as ids."""
    if not isinstance(prompt, str):
        return prompt
    if len(prompt) > LONG_TEXT:
        return await asyncio.to_thread(served.encode, prompt, special=special)
    return served.encode(prompt, special=special)


class _Completions:
    """The choices of /v1/completions."""

    object_name = streamed_name = "text_completion"
    id_prefix = "cmpl-"

    def __init__(self, served: Served, body: CompletionBody):
        self.decode, self.texts_of, self.body = served.tokenizer.decode, served.token_texts, body
        self.prompts = body.prompts

    def _prompt_text(self, ticket: Ticket) -> str:
        prompt = self.prompts[ticket.index // self.body.n]
        return prompt if isinstance(prompt, str) else self.decode(prompt)

    def whole(self, ticket: Ticket) -> dict[str, Any]:
        text, echoed = ticket.text, self._prompt_text(ticket) if self.body.echo else ""
        found = {"index": ticket.index, "text": echoed + ticket.stream.text, "finish_reason": text.finish}
        if self.body.logprobs is None:
            return {**found, "logprobs": None}
        tokens, scores = list(text.tokens), list(text.scores)
        if self.body.echo:
            tokens, scores = [*text.prompt, *tokens], [None, *text.prompt_scores, *scores]  # type: ignore[list-item]
        return {**found, "logprobs": completion_logprobs(scores, tokens, self.texts_of)}

    def first(self, ticket: Ticket) -> dict[str, Any] | None:
        if not self.body.echo:
            return None
        return {"index": ticket.index, "text": self._prompt_text(ticket), "logprobs": None, "finish_reason": None}

    def piece(self, ticket: Ticket, progress: TextProgress) -> dict[str, Any]:
        logprobs = None
        if self.body.logprobs is not None:
            scores = progress.scores
            logprobs = completion_logprobs(scores, [score.token for score in scores], self.texts_of)
        return {
            "index": ticket.index,
            "text": progress.piece,
            "logprobs": logprobs,
            "finish_reason": progress.finish,
        }


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
    await until_written(request, served.service, tickets, state.config.max_seconds)
    state.log_texts(served, tickets)
    choices = [form.whole(ticket) for ticket in tickets]
    answer = {**head, "object": form.object_name, "choices": choices, "usage": usage(tickets, body.n)}
    return Response(orjson.dumps(answer), media_type="application/json")


async def _parts(
    state: State, served: Served, tickets: list[Ticket], body: SamplingBody, form: Any, head: dict[str, Any]
) -> AsyncIterator[bytes]:
    """A streamed answer, one `data:` line after the other."""
    no_usage = {"usage": None} if body.wants_usage else {}
    try:
        for ticket in tickets:
            if (first := form.first(ticket)) is not None:
                yield _event({**head, "choices": [first], **no_usage})
        async for ticket, progress in progress_of(served.service, tickets, state.config.max_seconds):
            yield _event({**head, "choices": [form.piece(ticket, progress)], **no_usage})
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
