"""Requests that wait for their texts: until all are written, the client leaves, or time is up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from open_lm.serve.refused import Refused
from open_lm.serve.service import Service, TextProgress, Ticket

T = TypeVar("T")
R = TypeVar("R")
RETRY_SECONDS = 0.05
"""Between two attempts of a request that has begun to find room for its next texts."""


class ClientGone(Exception):
    """Nobody reads the answer any more."""


class TimeLimit:
    """The time that a request has, from now on."""

    def __init__(self, seconds: float):
        self.seconds, self._end = seconds, time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds until the end; below 0 after it."""
        return self._end - time.monotonic()

    def refusal(self) -> Refused:
        """The answer to a request that takes longer."""
        return Refused(504, f"The request took longer than {self.seconds:g} seconds: ask for less.", code="timeout")


async def in_turns(
    request: Any,
    service: Service,
    jobs: Sequence[T],
    ticket_of: Callable[[T], Ticket],
    result_of: Callable[[Ticket], R],
    limit: TimeLimit,
) -> list[R]:
    """Let `service` write the texts of any number of jobs, each as soon as one before it has ended, no more at a time
    than it has slots; gives the result of each.

    Raises:
        ClientGone, Refused: as `until_written`; the queue is full for the first job alone, others wait.
    """
    numbered, results = iter(enumerate(jobs)), {}

    async def work() -> None:
        for index, job in numbered:
            ticket = ticket_of(job)
            await _all_written(service, [ticket], limit, waits_for_room=index > 0)
            results[index] = result_of(ticket)

    async def all_work() -> None:
        tasks = [asyncio.ensure_future(work()) for _ in range(min(service.n_slots, len(jobs)))]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    await _unless_client_leaves(request, all_work())
    return [results[index] for index in range(len(jobs))]


async def until_written(request: Any, service: Service, tickets: Sequence[Ticket], limit: TimeLimit) -> None:
    """Let `service` write every text and wait for the last; texts that are unfinished on an error are cancelled.

    Raises:
        ClientGone: the client has left.
        Refused: the queue is full, time is up, or the engine failed.
    """
    await _unless_client_leaves(request, _all_written(service, tickets, limit))


async def _unless_client_leaves(request: Any, awaited: Awaitable[None]) -> None:
    """Wait for `awaited`; when the client leaves, it is cancelled and ClientGone raised."""
    work = asyncio.ensure_future(awaited)
    gone = asyncio.ensure_future(_client_leaves(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientGone
        work.result()
    finally:
        work.cancel()
        gone.cancel()


async def progress_of(
    service: Service, tickets: Sequence[Ticket], limit: TimeLimit
) -> AsyncIterator[tuple[Ticket, TextProgress]]:
    """Progress of submitted texts, until all have ended; whoever stops listening cancels them.

    Raises:
        Refused: time is up, or the engine failed.
    """
    events, n_open = tickets[0].events, len(tickets)
    try:
        while n_open:
            try:
                ticket, progress = await asyncio.wait_for(events.get(), limit.left)
            except asyncio.TimeoutError:
                raise limit.refusal() from None
            if progress.finish == "cancelled":
                raise Refused(503, "The server shut down before this was written.")
            if progress.finish == "error":
                raise Refused(500, "The model failed on this request; the server's log says why.")
            n_open -= progress.finish is not None
            yield ticket, progress
    finally:
        service.cancel(tickets)


async def _all_written(
    service: Service, tickets: Sequence[Ticket], limit: TimeLimit, waits_for_room: bool = False
) -> None:
    while not _submitted(service, tickets, waits_for_room):
        if limit.left < 0:
            raise limit.refusal()
        await asyncio.sleep(RETRY_SECONDS)
    async for _ in progress_of(service, tickets, limit):
        pass


def _submitted(service: Service, tickets: Sequence[Ticket], waits_for_room: bool) -> bool:
    try:
        service.submit(tickets)
    except Refused as refused:
        if waits_for_room and refused.status == 429:
            return False
        raise
    return True


async def _client_leaves(request: Any) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
