"""Connections on which nothing is asked: closed after a while, for each of them holds a file of the server."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

SILENT_SECONDS = 75.0
"""Longer than clients keep a connection that they may use again: else a request would meet one just closed."""


class Silence:
    """The time since each connection of uvicorn was last asked something: none, or the head of a request, is silence.

    uvicorn's own limit begins with the first answer, and ends with the first byte of the next request.
    """

    def __init__(self) -> None:
        self._last: dict[Any, tuple[Any, float]] = {}

    def end(self, connections: Iterable[Any]) -> None:
        """Close those of the open `connections` that have been silent for too long. Call it about once a second."""
        now, before = time.monotonic(), self._last
        self._last = {}  # those that are closed are let go
        for connection in list(connections):
            exchange = getattr(connection, "cycle", None)
            last, since = before.get(connection, (None, now))
            if exchange is not last or (exchange is not None and not exchange.response_complete):
                since = now
            self._last[connection] = exchange, since
            if now - since > SILENT_SECONDS:
                connection.transport.close()
