"""Exit of a command: one line for an expected error, a traceback only for a bug."""

import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from open_lm.errors import ConfigError, OpenLMError, Preempted


def run(main: Callable[[], Any]) -> NoReturn:
    """Call `main` and leave the process: 0 when it returns, the error's own code, or 130 after Ctrl-C."""
    try:
        main()
    except OpenLMError as error:
        sys.exit(report(error))
    except KeyboardInterrupt:
        print("interrupted.", file=sys.stderr, flush=True)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output (head, less) has left
        sys.stderr.close()
        sys.exit(1)
    sys.exit(0)


def report(error: OpenLMError) -> int:
    """Print an expected error in one line: the exit code that belongs to it."""
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        print(f"error: {error}", file=sys.stderr, flush=True)
    elif not isinstance(error, ConfigError | Preempted):  # those are the same on all ranks, rank 0 says them
        print(f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
    return error.exit_code
