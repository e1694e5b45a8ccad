"""Preloaded workers: the process that workers are forked from imports this module, and loads the job's encoder first.

It has one thread when it forks, so that its copies are sound; loading is done once, not by each worker.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
from collections.abc import Iterator
from multiprocessing import forkserver

from open_lm.preprocess.job import Job
from open_lm.preprocess.tokenize import document_encoder

_VARIABLE = "OPEN_LM_PRELOAD"
_ONE_THREAD = {
    "TOKENIZERS_PARALLELISM": "false",
    "RAYON_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


def preload(job: Job, folder: str, encoder: str) -> None:
    """Start the process that this one's workers are forked from, and have it load the encoder of the job in `folder`.

    One that runs already, from an earlier job, stays: its workers load for themselves.
    """
    arguments = [folder, job.tokenizer, job.eot_token, encoder, job.dtype.str]
    multiprocessing.set_forkserver_preload([__name__])
    with _environment({**_ONE_THREAD, _VARIABLE: json.dumps(arguments)}):
        forkserver.ensure_running()


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """These variables are set while it lasts: a process that is started inherits them."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


if _VARIABLE in os.environ:  # in the process that forks
    with contextlib.suppress(Exception):  # a worker then says what is wrong
        document_encoder(*json.loads(os.environ.pop(_VARIABLE)))
