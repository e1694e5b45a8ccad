"""Requests that wait for their texts: until all are written, the client leaves, or time is up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from open_lm.serve.refused import Refused
from open_lm.serve.service import Service, TextProgress, Ticket


class ClientGone(Exception):
    """Nobody reads the answer any more."""


async def until_written(request: Any, service: Service, tickets: Sequence[Ticket], seconds: float) -> None:
    """Let `service` write every text and wait for the last; texts that are unfinished on an error are cancelled.

    Raises:
        ClientGone: the client has left.
        Refused: the queue is full, time is up, or the engine failed.
    """
    service.submit(tickets)
    work = asyncio.ensure_future(_all_written(service, tickets, seconds))
    gone = asyncio.ensure_future(_client_leaves(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientGone
        work.result()
    finally:
        work.cancel()
        gone.cancel()
        service.cancel(tickets)


async def progress_of(
    service: Service, tickets: Sequence[Ticket], seconds: float
) -> AsyncIterator[tuple[Ticket, TextProgress]]:
    """What comes to texts that have been submitted, until all have ended; whoever stops listening cancels them.

    Raises:
        Refused: time is up, or the engine failed.
    """
    events, n_open = tickets[0].events, len(tickets)
    deadline = time.monotonic() + seconds
    try:
        while n_open:
            try:
                ticket, progress = await asyncio.wait_for(events.get(), deadline - time.monotonic())
            except asyncio.TimeoutError:
                raise Refused(
                    504, f"The request took longer than {seconds:g} seconds: ask for fewer tokens.", code="timeout"
                ) from None
            if progress.finish in ("error", "cancelled"):
                raise Refused(500, "The model failed on this request; the server's log says why.")
            n_open -= progress.finish is not None
            yield ticket, progress
    finally:
        service.cancel(tickets)


async def _all_written(service: Service, tickets: Sequence[Ticket], seconds: float) -> None:
    async for _ in progress_of(service, tickets, seconds):
        pass


async def _client_leaves(request: Any) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
