"""One piece of work beside the training loop: begun, waited for, and how it ended."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """Runs one piece of work at a time in a thread. The program does not end before it has, but by os._exit."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def has_result(self) -> bool:
        """Whether work was begun that `finish` has not been asked about, and it has ended."""
        return self._thread is not None and not self._thread.is_alive()

    @property
    def is_open(self) -> bool:
        """Whether work was begun that `finish` has not been asked about."""
        return self._thread is not None

    def begin(self, work: Callable[[], None], *, beside: bool) -> None:
        """Do `work` in a thread if `beside`, else here and now; the work before must have been finished."""
        assert self._thread is None, "one save at a time"

        def noting() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=noting, name="checkpoint")
        if beside:
            self._thread.start()
        else:
            self._thread.run()

    def wait(self, seconds: float | None = None) -> bool:
        """Return when nothing is being done, or after `seconds`: whether nothing is."""
        if self._thread is not None and self._thread.is_alive():
            self._thread.join(seconds)
        return self._thread is None or not self._thread.is_alive()

    def finish(self) -> BaseException | None:
        """Wait for the work and return what it raised, if anything."""
        self.wait()
        error, self._error, self._thread = self._error, None, None
        return error
