"""Checks of every request before a route sees it: the host it names, a key, a JSON body of bounded size."""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import Any

import orjson

from open_lm.serve.config import is_loopback
from open_lm.serve.refused import Refused
from open_lm.serve.state import State

OPEN = {"/", "/page.js", "/page.css", "/health", "/ready"}
"""Paths that need no key: they tell nothing of models or texts."""


BODY_SECONDS = 60.0
"""Time for a body to come."""
DRAIN_BYTES, DRAIN_SECONDS = 64 << 20, 2.0
"""Of a refused body, what is read before the refusal is sent."""


class Limits:
    """ASGI middleware; it also counts requests."""

    def __init__(self, app: Any, state: State):
        self.app, self.state = app, state
        self.max_bytes = int(state.config.max_body_mb * 1e6)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        exchange = _Exchange(receive, send, self.max_bytes)
        try:
            self._check(scope)
            await self.app(scope, exchange.receive, exchange.send)
        except Refused as refused:
            await exchange.drain()
            await _answer(exchange.send, refused)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self.state.metrics.count("openlm_requests_total", route=route, status=str(exchange.status))
        return None

    def _check(self, scope: Any) -> None:
        headers = {name.decode("latin1").lower(): value.decode("latin1") for name, value in scope["headers"]}
        key = self.state.config.api_key
        if key is None and self.state.config.is_loopback and not is_loopback(_host(headers.get("host", ""))):
            raise Refused(403, "This server answers to localhost alone: another site may not send you here.")
        scheme, _, given = headers.get("authorization", "").partition(" ")
        given = given.strip() if scheme.lower() == "bearer" else ""
        if key and scope["path"] not in OPEN and not secrets.compare_digest(given.encode("latin1"), key.encode()):
            raise Refused(401, "Send the key of this server as `Authorization: Bearer KEY`.", code="invalid_api_key")
        if scope["method"] == "POST":
            kind = headers.get("content-type", "").split(";")[0].strip().lower()
            if kind != "application/json":
                raise Refused(415, f"Content-Type {kind[:100]!r}: send application/json.")
            length = headers.get("content-length", "0")
            if not length.isdigit() or int(length) > self.max_bytes:
                raise _too_large(self.max_bytes)


class _Exchange:
    """One request's body, counted while it comes, and the status of its answer."""

    def __init__(self, receive: Any, send: Any, max_bytes: int):
        self._receive, self._send, self.max_bytes = receive, send, max_bytes
        self.n_bytes, self.status, self.started, self.is_whole = 0, 0, time.monotonic(), False

    async def receive(self) -> Any:
        message = await self._next()
        self.is_whole = not message.get("more_body", False)
        self.n_bytes += len(message.get("body", b""))
        if self.n_bytes > self.max_bytes:
            raise _too_large(self.max_bytes)
        return message

    async def _next(self) -> Any:
        """The next part of the body; after its end, whether the client leaves, however long that takes."""
        if self.is_whole:
            return await self._receive()
        try:
            return await asyncio.wait_for(self._receive(), max(0.0, self.started + BODY_SECONDS - time.monotonic()))
        except (TimeoutError, asyncio.TimeoutError):  # two classes before Python 3.11
            raise Refused(408, f"The body did not come within {BODY_SECONDS:g} seconds.") from None

    async def drain(self) -> None:
        """Read what the client still sends, within bounds: a connection that is closed over unread bytes is reset, and
        the client never sees its answer."""
        n_bytes, end = 0, time.monotonic() + DRAIN_SECONDS
        while not self.is_whole and n_bytes < DRAIN_BYTES:
            try:
                message = await asyncio.wait_for(self._receive(), max(0.0, end - time.monotonic()))
            except (TimeoutError, asyncio.TimeoutError):  # two classes before Python 3.11
                return
            n_bytes += len(message.get("body", b""))
            self.is_whole = not message.get("more_body", False)

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)


def _too_large(max_bytes: int) -> Refused:
    return Refused(413, f"The body is too large: this server takes {max_bytes / 1e6:g} MB.")


def _host(value: str) -> str:
    """The name in a Host header, without the port."""
    return value[1 : value.find("]")] if value.startswith("[") else value.rsplit(":", 1)[0].lower()


async def _answer(send: Any, refused: Refused) -> None:
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    headers += [(name.lower().encode(), value.encode()) for name, value in refused.headers.items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": orjson.dumps(refused.body())})
