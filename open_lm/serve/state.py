"""State shared by all routes: the models by name, the flags, the figures."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from open_lm.serve.config import ServeConfig
from open_lm.serve.metrics import Metrics
from open_lm.serve.refused import Refused
from open_lm.serve.served import Served
from open_lm.serve.service import Ticket


@dataclass
class State:
    """One server."""

    config: ServeConfig
    models: dict[str, Served]
    metrics: Metrics
    is_ending: bool = False

    @property
    def first(self) -> Served:
        """The model of requests that name none."""
        return next(iter(self.models.values()))

    def model(self, name: str | None) -> Served:
        """The model that a request names.

        Raises:
            Refused: there is none of this name.
        """
        if name is None:
            return self.first
        if name not in self.models:
            known = ", ".join(self.models)
            raise Refused(404, f"No model {name[:200]!r} here: this server has {known}.", "model", "model_not_found")
        return self.models[name]

    def end_texts(self) -> None:
        """End every text that is still being written: the time to finish is over."""
        for served in self.models.values():
            served.service.end_texts()

    def log_prompts(self, served: Served, tickets: Sequence[Ticket]) -> None:
        """Write prompts to the log, with --log-prompts."""
        for ticket in tickets if self.config.log_prompts else ():
            logging.info("%s: prompt %r", served.name, served.tokenizer.decode(ticket.text.prompt))

    def log_texts(self, served: Served, tickets: Sequence[Ticket]) -> None:
        """Write texts to the log, with --log-prompts."""
        for ticket in tickets if self.config.log_prompts else ():
            logging.info("%s: wrote %r (%s)", served.name, ticket.stream.text, ticket.text.finish)


def state_of(request: Any) -> State:
    """The state of the server that handles `request`."""
    return request.app.state.serving
