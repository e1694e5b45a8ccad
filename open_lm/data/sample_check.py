"""Checks of one member of a shard: it is the one asked for, its ids are sound. ValueError says what is wrong."""

from __future__ import annotations

import zlib

import numpy as np

from open_lm.data.flat import FLAT_KEYS
from open_lm.data.manifest import Shard
from open_lm.data.shards import ShardIndex, check_ids, checksum, decode_member
from open_lm.data.tar import BLOCK, check_header, name_of, stored_checksum


def checked_sample(content: bytes, shard: Shard, index: ShardIndex, at: int, vocab_size: int) -> np.ndarray:
    """The ids of sample `at`, from its header and payload; those of a flat array have no header."""
    if index.key in FLAT_KEYS:
        return check_ids(np.frombuffer(content, FLAT_KEYS[index.key]), vocab_size)
    header, payload = content[:BLOCK], content[BLOCK:]
    if len(index.header_sums):
        name = name_of(header)
        if zlib.crc32(header) != int(index.header_sums[at]):
            raise ValueError(f"the header of member {name!r:.80} is not the one found when the shard was indexed")
    else:
        name = check_header(header, len(payload), index.key)
    if shard.first_number is not None and name != f"{shard.first_number + at:012d}.{index.key}":
        raise ValueError(f"found member {name!r:.80} where number {shard.first_number + at} should be")
    stored = stored_checksum(header)
    if stored is not None and stored != checksum(payload, index.key):
        raise ValueError(f"member {name}: its bytes are not those that were written (checksum)")
    try:
        return check_ids(decode_member(payload, index.key), vocab_size)
    except ValueError as error:
        raise ValueError(f"member {name}: {error}") from None


def header_place(header: bytes, key: str) -> bool:
    """Whether a header is that of a member with extension `key`."""
    return name_of(header).endswith(f".{key}") or header[99:100] != b"\0"
