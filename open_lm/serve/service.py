"""One model at work for many requests: its engine runs in a thread of its own, requests live on the event loop."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from open_lm.generation.cpu_decode import cpu_decode
from open_lm.generation.engine import Engine
from open_lm.generation.stream import TextStream
from open_lm.generation.text import Text, TokenScore
from open_lm.serve.metrics import Metrics
from open_lm.serve.refused import Refused

MAX_SCORES = 1 << 20
"""Log-probabilities of one request, at most; each takes about 100 bytes until it is sent."""
MAX_OPEN_SCORES = 4 * MAX_SCORES
"""Those of all requests at a time."""


@dataclass(frozen=True)
class TextProgress:
    """New output of a text since the last report: final characters, scores of tokens, and its end, if it ended."""

    piece: str
    scores: tuple[TokenScore, ...]
    finish: str | None


class Ticket:
    """Text number `index` of a request: written by the engine, followed on the event loop through `events`, a queue
    that the texts of a request share."""

    def __init__(self, text: Text, stream: TextStream, events: Events, index: int, *, is_streamed: bool):
        self.text, self.stream, self.events, self.index = text, stream, events, index
        self.is_streamed = is_streamed
        self.asked, self.first_token = time.monotonic(), math.nan
        self._n_shown = self._n_scores = 0
        if is_streamed or stream.has_stops:
            text.watch = lambda text: stream.take(text.tokens)

    def progress(self) -> TextProgress | None:
        """New output for the event loop; None while there is none. Called by the engine's thread."""
        if self.text.tokens and math.isnan(self.first_token):
            self.first_token = time.monotonic()
        if self.text.finish is not None:
            self.stream.finish(self.text.written())
        elif not self.is_streamed:
            return None
        piece = self.stream.text[self._n_shown : self.stream.n_certain]
        scores = tuple(self.text.scores[self._n_scores :])
        self._n_shown, self._n_scores = self.stream.n_certain, len(self.text.scores)
        return TextProgress(piece, scores, self.text.finish) if piece or scores or self.text.finish else None


Events: TypeAlias = "asyncio.Queue[tuple[Ticket, TextProgress]]"


class Service:
    """A queue of texts before one engine.

    `submit`, `cancel` and what reads tickets belong to the event loop; the engine belongs to the thread.
    """

    def __init__(self, name: str, model: Any, n_slots: int, max_queue: int, metrics: Metrics):
        self.name, self.model, self.n_slots, self.max_queue, self.metrics = name, model, n_slots, max_queue, metrics
        self.max_len = int(model.config.seq_len)
        self._inbox: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self._tickets: dict[Text, Ticket] = {}
        self._n_open = self._n_open_scores = 0
        self._seconds = 1.0  # a text's, on a running average
        self._thread = threading.Thread(target=self._work, name=f"engine of {name}", daemon=True)
        self._loop: asyncio.AbstractEventLoop
        self.alive, self.is_over = True, False

    def start(self) -> None:
        """Begin to work for the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End the thread, whatever it is at; call it when no request is left."""
        self.alive = False
        self._inbox.put(None)
        self._thread.join(timeout=30)

    def end_texts(self) -> None:
        """End what is being written, and take nothing more."""
        self.is_over = True

    def check(self) -> None:
        """See that the engine's thread is at work.

        Raises:
            Refused: it is not.
        """
        if self.is_over or not self.alive or not self._thread.is_alive():
            raise Refused(503, f"{self.name} is not served any more.")

    def require_room(self, n_texts: int) -> None:
        """See that a request of so many texts could ever be taken, before anything is made of it.

        Raises:
            Refused: it could not.
        """
        room = self.n_slots + self.max_queue
        if n_texts > room:
            raise Refused(400, f"{n_texts} texts in one request; this server takes {room} at once. Send fewer.", "n")

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Let texts wait for their turn.

        Raises:
            Refused: the queue is full, or could never take so many.
        """
        self.require_room(len(tickets))
        n_scores = sum(ticket.text.n_wanted_scores for ticket in tickets)
        if n_scores > MAX_SCORES:
            words = f"{n_scores} log-probabilities in one request; this server gives {MAX_SCORES}. Ask for fewer."
            raise Refused(400, words, "logprobs")
        room = self.n_slots + self.max_queue
        if self._n_open + len(tickets) > room or self._n_open_scores + n_scores > MAX_OPEN_SCORES:
            wait = math.ceil(self._seconds * max(1, self._n_open - self.n_slots + 1) / self.n_slots)
            raise Refused(
                429, "The server is busy: too many texts wait. Try again later.", retry_after=str(max(1, wait))
            )
        self.check()
        self._n_open += len(tickets)
        self._n_open_scores += n_scores
        for ticket in tickets:
            self._inbox.put(ticket)

    def cancel(self, tickets: Sequence[Ticket]) -> None:
        """Stop writing texts that nobody waits for; those that have ended are left as they are."""
        for ticket in tickets:
            ticket.text.cancelled = ticket.text.finish is None

    def _work(self) -> None:
        with torch.inference_mode(), cpu_decode(self.model):
            engine = Engine(self.model, self.n_slots, self.max_len)
            while self.alive:
                self._take(engine)
                for text in self._tickets if self.is_over else ():
                    text.cancelled = True
                if engine.busy:
                    self._tell(engine, self._step(engine))

    def _take(self, engine: Engine) -> None:
        """Hand new texts to the engine; waits for one while it has nothing to do."""
        block = not engine.busy
        while True:
            try:
                ticket = self._inbox.get(block=block)
            except queue.Empty:
                return
            if ticket is None:
                return
            block = False
            self._tickets[ticket.text] = ticket
            engine.add(ticket.text)

    def _step(self, engine: Engine) -> list[Text]:
        try:
            return engine.step()
        except Exception:  # out of memory, a broken model: the requests at work fail, the server goes on
            logging.exception("%s: the engine failed; its %d texts end", self.name, len(self._tickets))
            engine.abandon()
            for text in self._tickets:  # those, too, that ended in the step that failed
                text.finish = text.finish or "error"
            return list(self._tickets)

    def _tell(self, engine: Engine, changed: Sequence[Text]) -> None:
        """Send what is new to the event loop, all at once."""
        news = []
        for text in changed:
            ticket = self._tickets[text]
            progress = ticket.progress()
            if progress is not None:
                news.append((ticket, progress))
            if text.finish is not None:
                del self._tickets[text]
        if news:
            self._loop.call_soon_threadsafe(self._deliver, news)
        self.metrics.gauge("openlm_texts_running", len(engine.reading) + len(engine.writing), model=self.name)
        self.metrics.gauge("openlm_texts_waiting", len(engine.waiting), model=self.name)

    def _deliver(self, news: Sequence[tuple[Ticket, TextProgress]]) -> None:
        for ticket, progress in news:
            ticket.events.put_nowait((ticket, progress))
            if progress.finish is not None:
                self._n_open -= 1
                self._n_open_scores -= ticket.text.n_wanted_scores
                self._count(ticket, progress.finish)

    def _count(self, ticket: Ticket, finish: str) -> None:
        text, seconds, model = ticket.text, time.monotonic() - ticket.asked, self.name
        self.metrics.count("openlm_texts_total", model=model, reason=finish)
        self.metrics.count("openlm_prompt_tokens_total", text.n_read - text.n_shared, model=model, kind="computed")
        self.metrics.count("openlm_prompt_tokens_total", text.n_shared, model=model, kind="shared")
        self.metrics.count("openlm_generated_tokens_total", len(text.tokens), model=model)
        if finish != "cancelled":
            self._seconds += 0.1 * (seconds - self._seconds)
            self.metrics.observe("openlm_text_seconds", seconds, model=model)
        if not math.isnan(ticket.first_token):
            self.metrics.observe("openlm_first_token_seconds", ticket.first_token - ticket.asked, model=model)


def _free_memory() -> int:
    """Bytes of memory that may still be taken, caches of files included where the system tells."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def slot_bytes(model: Any) -> int:
    """Size of a slot of the cache; 0 for a Mamba, whose state is small, and for caches that grow as they are used."""
    config, weight = model.config, next(model.parameters())
    if not hasattr(config, "kv_heads"):
        return 0
    return 2 * config.n_layers * config.seq_len * config.kv_heads * config.head_dim * weight.element_size()


def slots_that_fit(model: Any, wanted: int, promised: int = 0) -> int:
    """`wanted`, or as many slots as fit half of the memory that is free where the model is.

    `promised` is what the caches of other models will take of it, in bytes.
    """
    size, weight = slot_bytes(model), next(model.parameters())
    if size == 0:
        return wanted
    if weight.is_cuda:
        free = torch.cuda.mem_get_info(weight.device)[0]
    else:
        free = _free_memory()
    n_slots = max(1, min(wanted, (free // 2 - promised) // size))
    if n_slots < wanted:
        logging.warning(
            "--slots %d: %d fit half of the free memory (%.1f GB)%s",
            wanted, n_slots, free / 1e9, " beside the other models" if promised else "",
        )  # fmt: skip
    return n_slots
