"""Marks of tokens: what a sample says of each of its tokens beside the id.

On disk a marked sample is an npy vector with two fields, `ids` and `marks` (bits). In memory both are one int32: the id
in the low 28 bits, the marks above, so that marked samples travel through readers and workers as plain ones do, and
both kinds can be mixed in one batch. A plain token has no mark: it is trained on and continues its document.
"""

from __future__ import annotations

import numpy as np

FIELDS = ("ids", "marks")

UNTRAINED, START, PADDING = 1, 2, 4
"""Marks: not a target; the first token of a document; filler behind the documents, no target either."""

ID_BITS = 28
IDS = (1 << ID_BITS) - 1


def marked_dtype(ids: np.dtype) -> np.dtype:
    """The type of one token on disk, its id stored as `ids`."""
    return np.dtype([("ids", ids), ("marks", "u1")])


def joined(ids: np.ndarray, marks: np.ndarray) -> np.ndarray:
    """Ids and marks in one int32 each; ValueError when a mark is unknown."""
    if marks.size and int(marks.max()) > UNTRAINED | START | PADDING:
        raise ValueError(f"the mark {int(marks.max())} of a token is none of this version")
    return ids.astype(np.int32) | marks.astype(np.int32) << ID_BITS
