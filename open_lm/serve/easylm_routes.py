"""EasyLM's routes, for its clients: /loglikelihood, /loglikelihood-rolling, /generate, /greedy-until, /chat, /ready."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse

from open_lm.serve.refused import Refused
from open_lm.serve.schemas import EasyBody, EasyChatBody
from open_lm.serve.served import Served, TextSettings, settings_of
from open_lm.serve.service import Ticket
from open_lm.serve.state import state_of
from open_lm.serve.waiting import TimeLimit, in_turns, until_written

router = APIRouter()
GREEDY = settings_of(temperature=0, seed=0)


@router.get("/ready")
async def ready() -> PlainTextResponse:
    """Whether requests are served."""
    return PlainTextResponse("Ready!\n")


@router.post("/loglikelihood")
async def loglikelihood(body: EasyBody, request: Request) -> Any:
    """The log-likelihood of each text after its prefix, and whether greedy decoding would write it."""
    served = state_of(request).first
    prefixes, texts = body.prefix_text or [], _given(body.text, "text")
    if body.prefix_text is not None and len(prefixes) != len(texts):
        raise Refused(400, f"{len(prefixes)} prefix_text and {len(texts)} text: give one each.", "prefix_text")
    before = await served.encoded(prefixes or [""] * len(texts))
    after = await _encoded_texts(served, texts)
    pairs = [_fitted(served, *pair) for pair in zip(before, after, strict=True)]
    sums = await _sums(request, served, pairs)
    return {
        "prefix_text": body.prefix_text,
        "text": texts,
        "log_likelihood": [total for total, _ in sums],
        "is_greedy": [is_greedy for _, is_greedy in sums],
    }


@router.post("/loglikelihood-rolling")
async def loglikelihood_rolling(body: EasyBody, request: Request) -> Any:
    """The log-likelihood of whole texts, in windows where they are longer than the context."""
    served = state_of(request).first
    texts = _given(body.text, "text")
    windows = [rolling_windows(ids, served.encode(""), served.context) for ids in await _encoded_texts(served, texts)]
    sums = iter(await _sums(request, served, [pair for parts in windows for pair in parts]))
    rows = [[next(sums) for _ in parts] for parts in windows]
    return {
        "text": texts,
        "log_likelihood": [sum(total for total, _ in row) for row in rows],
        "is_greedy": [all(is_greedy for _, is_greedy in row) for row in rows],
    }


@router.post("/generate")
async def generate(body: EasyBody, request: Request) -> Any:
    """The continuation of each prefix, to the end of the text or of the context."""
    served = state_of(request).first
    prefixes = _given(body.prefix_text, "prefix_text")
    temperature = 1.0 if body.temperature is None else body.temperature
    asked = [TextSettings(settings_of(temperature=temperature)) for _ in prefixes]
    return {
        "prefix_text": prefixes,
        "output_text": await _written(request, served, prefixes, asked),
        "temperature": temperature,
    }


@router.post("/greedy-until")
async def greedy_until(body: EasyBody, request: Request) -> Any:
    """The greedy continuation of each prefix up to the first of its stop strings."""
    served = state_of(request).first
    prefixes, until = _given(body.prefix_text, "prefix_text"), _given(body.until, "until")
    if len(prefixes) != len(until):
        raise Refused(400, f"{len(prefixes)} prefix_text and {len(until)} until: give one each.", "until")
    asked = [TextSettings(GREEDY, stops=(one,) if isinstance(one, str) else tuple(one)) for one in until]
    texts = await _written(request, served, prefixes, asked)
    return {"prefix_text": prefixes, "until": until, "output_text": texts}


@router.post("/chat")
async def chat(body: EasyChatBody, request: Request) -> Any:
    """The answer to a prompt, and the conversation so far: pass it on as `context`."""
    state = state_of(request)
    served = state.first
    temperature = 1.0 if body.temperature is None else body.temperature
    asked_text = await asyncio.to_thread(served.chat_text, [{"role": "user", "content": body.prompt}])
    begin = served.template.tokens.get("bos_token")
    if body.context and begin and asked_text.startswith(begin):
        asked_text = asked_text[len(begin) :]
    context = body.context + asked_text
    end_ids, end_strings = served.turn_end
    asked = TextSettings(settings_of(temperature=temperature), None, end_strings, end_ids)
    tickets = served.tickets(await served.encoded([context], special=False), [asked])
    state.log_prompts(served, tickets)
    await until_written(request, served.service, tickets, TimeLimit(state.config.max_seconds))
    state.log_texts(served, tickets)
    response = tickets[0].stream.text
    end = end_strings[0] if end_strings else served.tokenizer.decode(end_ids)
    return {"response": response, "context": f"{context}{response}{end}\n", "temperature": temperature}


def _given(value: list[Any] | None, name: str) -> list[Any]:
    if not value:
        raise Refused(400, f"{name} is missing: give a list of at least one.", name)
    return value


async def _encoded_texts(served: Served, texts: Sequence[str]) -> list[list[int]]:
    """The ids of texts that are scored: nothing stands before them, and an empty one has none."""
    encoded = await served.encoded(texts, special=False)
    return [ids if text else [] for ids, text in zip(encoded, texts, strict=True)]


def _fitted(served: Served, before: Sequence[int], after: Sequence[int]) -> tuple[list[int], list[int]]:
    """A prefix and a text, the beginning of the prefix cut off where both are too long together."""
    room = served.context + 1 - len(after)  # the last token is only predicted
    if room < 1:
        raise Refused(
            400, f"a text of {len(after)} tokens in a context of {served.context}: use a shorter one.", "text"
        )
    return list(before[-room:]), list(after)


def rolling_windows(ids: Sequence[int], start: Sequence[int], context: int) -> list[tuple[list[int], list[int]]]:
    """A long text as pairs of a prefix and tokens to predict, each predicted once, after as much text as fits.

    The first window begins with `start`; as lm-eval cuts them.
    """
    n = context - 1  # positions of a window, so that its last token is one that was read
    windows = []
    for begin in range(0, len(ids), n):
        predicted = list(ids[begin : begin + n])
        end = begin + len(predicted)
        before = list(start[-1:]) if begin == 0 else list(ids[max(0, end - n - 1) : begin])
        windows.append((before, predicted))
    return windows


async def _sums(
    request: Request, served: Served, pairs: Sequence[tuple[list[int], list[int]]]
) -> list[tuple[float, bool]]:
    """Log-likelihood of each second part after the first, and whether greedy decoding writes it."""
    limit = TimeLimit(state_of(request).config.max_seconds)
    scored = [index for index, (_, after) in enumerate(pairs) if after]

    def ticket_of(index: int) -> Ticket:
        before, after = pairs[index]
        asked = TextSettings(GREEDY, max_tokens=0, score_from=len(before))
        return served.tickets([[*before, *after]], [asked])[0]

    found = await in_turns(request, served.service, scored, ticket_of, _sum, limit)
    of_index = dict(zip(scored, found, strict=True))
    return [of_index.get(index, (0.0, True)) for index in range(len(pairs))]


def _sum(ticket: Ticket) -> tuple[float, bool]:
    scores = ticket.text.prompt_scores
    return sum(score.log_probability for score in scores), all(score.is_greedy for score in scores)


async def _written(
    request: Request, served: Served, prefixes: Sequence[str], asked: Sequence[TextSettings]
) -> list[str]:
    state = state_of(request)
    prompts = list(zip(await served.encoded(prefixes), asked, strict=True))
    for prompt, one in prompts:  # before the first is written
        served.require_readable(prompt, one)

    def ticket_of(job: tuple[list[int], TextSettings]) -> Ticket:
        tickets = served.tickets([job[0]], [job[1]])
        state.log_prompts(served, tickets)
        return tickets[0]

    def text_of(ticket: Ticket) -> str:
        state.log_texts(served, [ticket])
        return ticket.stream.text

    return await in_turns(request, served.service, prompts, ticket_of, text_of, TimeLimit(state.config.max_seconds))
