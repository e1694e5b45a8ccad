"""Requests that wait for their texts: until all are written, the client leaves, or time is up."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from open_lm.serve.refused import Refused
from open_lm.serve.service import Progress, Service, Ticket


class ClientGone(Exception):
    """Nobody reads the answer any more."""


@contextlib.contextmanager
def submitted(service: Service, tickets: Sequence[Ticket]) -> Any:
    """Texts at work until the block ends; what is unfinished then is cancelled."""
    service.submit(tickets)
    try:
        yield
    finally:
        service.cancel([ticket for ticket in tickets if ticket.text.finish is None])


async def until_written(request: Any, service: Service, tickets: Sequence[Ticket], seconds: float) -> None:
    """Wait until every text has ended.

    Raises:
        ClientGone: the client has left.
        Refused: time is up, or the engine failed.
    """
    with submitted(service, tickets):
        work = asyncio.ensure_future(_all_written(tickets))
        gone = asyncio.ensure_future(_client_leaves(request))
        try:
            await asyncio.wait({work, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
            elif gone.done():
                raise ClientGone
            else:
                raise too_long(seconds)
        finally:
            work.cancel()
            gone.cancel()


async def pieces(service: Service, ticket: Ticket, deadline: float, seconds: float) -> AsyncIterator[Progress]:
    """What comes to one text, until it has ended.

    Raises:
        Refused: time is up, or the engine failed.
    """
    while True:
        try:
            progress = await asyncio.wait_for(ticket.events.get(), deadline - time.monotonic())
        except asyncio.TimeoutError:
            raise too_long(seconds) from None
        _check(progress)
        yield progress
        if progress.finish is not None:
            return


def too_long(seconds: float) -> Refused:
    """The error of a request that takes too long."""
    return Refused(504, f"The request took longer than {seconds:g} seconds: ask for fewer tokens.", code="timeout")


async def _all_written(tickets: Sequence[Ticket]) -> None:
    for ticket in tickets:
        while True:
            progress = await ticket.events.get()
            _check(progress)
            if progress.finish is not None:
                break


def _check(progress: Progress) -> None:
    if progress.finish in ("error", "cancelled"):
        raise Refused(500, "The model failed on this request; the server's log says why.")


async def _client_leaves(request: Any) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
