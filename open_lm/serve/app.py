"""The server as an application: its routes, what every request must carry, and what clients see of errors."""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from open_lm.serve import easylm_routes, openai_routes
from open_lm.serve.limits import Limits
from open_lm.serve.refused import Refused
from open_lm.serve.schemas import EITHER
from open_lm.serve.state import State, state_of
from open_lm.serve.waiting import ClientGone

PAGE = Path(__file__).parent / "page"
PAGE_FILES = {"": "index.html", "page.js": "page.js", "page.css": "page.css"}
CONTENT_POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:"
"""The page loads nothing from elsewhere and runs no script but its own."""


def create_app(state: State) -> FastAPI:
    """The application over models that are ready."""
    app = FastAPI(title="OpenLM", lifespan=_lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    app.state.serving = state
    _add_plain_routes(app)
    for router in (openai_routes.router, easylm_routes.router, app.router):
        _let_ask_for_heads(router)
    app.include_router(openai_routes.router)
    app.include_router(easylm_routes.router)
    _add_error_handlers(app)
    app.add_middleware(Limits, state=state)
    return app


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    state: State = app.state.serving
    for served in state.models.values():
        served.service.start()
        state.metrics.gauge("openlm_slots", served.service.n_slots, model=served.name)
    try:
        yield
    finally:
        for served in state.models.values():
            served.service.stop()


def _add_plain_routes(app: FastAPI) -> None:
    @app.get("/health")
    async def health(request: Request) -> Any:
        """Whether the server takes requests."""
        state = state_of(request)
        if state.is_ending:
            raise Refused(503, "The server is shutting down.")
        for served in state.models.values():
            served.service.check()
        return {"status": "ok", "models": list(state.models)}

    @app.get("/metrics")
    async def metrics(request: Request) -> PlainTextResponse:
        """Figures for Prometheus."""
        return PlainTextResponse(state_of(request).metrics.text(), media_type="text/plain; version=0.0.4")

    async def page(request: Request) -> FileResponse:
        name = PAGE_FILES[request.url.path.strip("/")]
        headers = {"Content-Security-Policy": CONTENT_POLICY, "X-Content-Type-Options": "nosniff"}
        return FileResponse(PAGE / name, headers=headers)

    for path in PAGE_FILES:
        app.add_api_route(f"/{path}", page, methods=["GET"])


def _let_ask_for_heads(router: APIRouter) -> None:
    """HEAD wherever GET is: what monitors ask to see whether a server lives."""
    for route in router.routes:
        methods: set[str] = getattr(route, "methods", None) or set()
        if "GET" in methods:
            methods.add("HEAD")


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return _json(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return _json(_refusal_of(error))

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> Response:
        if isinstance(error.__cause__, Refused):  # raised while the body was read
            return _json(error.__cause__)
        if isinstance(error.__cause__, (RecursionError, ValueError)):  # raised by the JSON reader
            return _json(Refused(400, f"The body cannot be read as JSON: {str(error.__cause__)[:200]}."))
        return _json(Refused(error.status_code, f"{error.detail}: {request.method} {request.url.path[:200]}"))

    @app.exception_handler(ClientGone)
    async def gone(request: Request, error: ClientGone) -> Response:
        return Response(status_code=499)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        mark = secrets.token_hex(4)
        logging.error("error %s in %r", mark, request.url.path, exc_info=error)
        return _json(Refused(500, f"The server failed; its log says why under {mark}."))


def _refusal_of(error: RequestValidationError) -> Refused:
    """The refusal of an invalid body: its first fault, with the field it is in."""
    found = error.errors()[0]
    where = [str(part) for part in found["loc"] if part != "body"]
    fields = [part for part in where if part.isdigit() or (part.replace("_", "").isalpha() and part == part.lower())]
    message = found["msg"].removeprefix("Value error, ")
    if found["type"] == "json_invalid":
        return Refused(400, f"The body is not JSON: {found.get('ctx', {}).get('error', message)}.")
    if found["type"] == "missing" and not where:
        return Refused(400, "The body is empty: send a JSON object.")
    if found["type"] == "extra_forbidden":
        return Refused(400, f"Unknown field {where[-1][:100]!r}.", where[-1][:100])
    name = ".".join(fields)[:100]
    if fields and fields[-1] in EITHER and found["type"] != "missing" and len(error.errors()) > 1:
        message = EITHER[fields[-1]]
    return Refused(400, f"{name}: {message}" if name else message, name or None)


def _json(refused: Refused) -> Response:
    body = orjson.dumps(refused.body())
    return Response(body, refused.status, headers=refused.headers, media_type="application/json")
