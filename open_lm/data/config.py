"""Data flags of the trainer. Imports nothing heavy."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

from open_lm.errors import ConfigError
from open_lm.flags import Registry, flag

SAMPLE_FORMATS = Registry(
    "sample format",
    {
        "npy": "open_lm.data.formats:NPY",
        "txt": "open_lm.data.formats:TXT",
        "json": "open_lm.data.formats:JSON",
        "json.gz": "open_lm.data.formats:JSON_GZ",
    },
)
"""Formats of the token ids of one sample: the extension of its member in the tar."""

DATASET_TYPES = ("auto", "webdataset", "npy", "synthetic")

ENCODERS = ("auto", "fastokens", "tokenizers")
"""Encoders of preprocessing, from text to ids; auto is the fastest that proves itself exact."""


@dataclass(frozen=True)
class DataConfig:
    """Data"""

    train_data: tuple[str, ...] = flag(
        (),
        "Training shards: paths or urls of tars with {000..123} braces or * globs, joined by `::`. "
        "Each value is one source of the mixture.",
    )
    dataset_manifest: tuple[str, ...] = flag(
        (), "Manifests (manifest.jsonl) of training shards; each is one source of the mixture. Instead of --train-data."
    )
    train_data_mix_weights: tuple[float, ...] = flag(
        (),
        "Share of each source in every batch; any scale. None: all sequences are pooled, "
        "so each source counts by its size.",
    )
    train_data_upsampling_factors: str | None = flag(
        None,
        "One factor for each `::` part of --train-data, as `1::2::0.5`: sampling multiplier relative to its size.",
    )
    dataset_type: str = flag(
        "auto",
        "Kind of training data; auto: webdataset, or npy where all files end in .npy. npy: flat token arrays of OLMo. "
        "synthetic: random ids, no files.",
        choices=DATASET_TYPES,
    )
    dataset_resampled: bool = flag(
        False, "Draw whole shards at random with replacement, for ever, instead of reading every sequence once a pass."
    )
    data_key: str = flag(
        "auto",
        "Extension of the members that hold token ids. auto: the one the shard has.",
        choices=("auto", *SAMPLE_FORMATS),
    )
    multiple_data_passes: bool = flag(
        False,
        "Start another pass, newly shuffled, when all data has been used. Without it too little data is an error.",
    )
    workers: int = flag(1, "Processes that read and decode data, per rank. 0: in the training process.")
    disable_buffer: bool = flag(
        False, "Do not shuffle inside shards; only shard order and stripe offsets are shuffled."
    )
    shuffle_lanes: int = flag(
        0, "Stripes of the data that are read side by side. 0: chosen from the batch and the size of the data."
    )
    shuffle_window: int = flag(0, "Sequences permuted together inside a stripe. 0: chosen from the size of the data.")
    skip_steps: tuple[str, ...] = flag(
        (), "Ranges `a-b` of batches, counted from 0, that are left out (after a loss spike); later ones move up."
    )
    target_mask_left: int | None = flag(
        None,
        "Do not train on targets up to and including the last token with this id; sequences without it are whole.",
    )
    squash_mask_left: bool = flag(
        False,
        "Take the --target-mask-left tokens out of the sequence, and fill it up on the right with "
        "--target-mask-individual.",
    )
    target_mask_individual: int | None = flag(None, "Do not train on targets with this id, for example padding.")
    doc_mask: bool = flag(
        False, "Attention does not cross the ends of documents inside a sequence; in training and validation."
    )
    doc_mask_token: int | None = flag(
        None,
        "With --doc-mask: the id documents end with. None: the one the manifests name; else 0, as OpenLM's shards.",
    )
    ignore_parse_errors: bool = flag(
        False, "Go on when a sequence cannot be read: it is masked, logged and counted. Without it, the run stops."
    )
    data_tolerate_error_p: float = flag(
        0.09, "Accepted for old scripts and ignored: no step is ever short of data here. See --ignore-parse-errors."
    )
    data_tolerate_num_ckpts: int = flag(0, "Accepted for old scripts and ignored, as --data-tolerate-error-p.")
    data_cache: str | None = flag(
        None,
        "Local folder for blocks (4 MiB) of remote shards, shared by all processes of a machine and kept. "
        "None: a temporary folder, removed when the run ends.",
    )
    data_cache_gb: float = flag(
        100.0, "Most the --data-cache holds, in GB; least recently used blocks are evicted first."
    )
    tokenizer: str | None = flag(
        None,
        "Tokenizer the data were made with: hub id, folder or tokenizer.json; for --icl-tasks and bits per byte, and "
        "named in checkpoints. None: the one the manifests name, if they do.",
    )
    val_data: tuple[str, ...] = flag(
        (), "Validation shards (or their manifest.jsonl), one or more sets; every sequence is scored exactly once."
    )
    val_data_key: tuple[str, ...] = flag((), "As --data-key, one for each --val-data. None: auto.")
    val_num_samples: int | None = flag(
        None, "Tokens of each validation set to score, rounded down to whole sequences (not samples). None: all."
    )

    def __post_init__(self) -> None:
        sources = self.dataset_manifest or self.train_data
        if self.dataset_manifest and self.train_data:
            raise ConfigError("--train-data and --dataset-manifest: both were given. Name the data once.")
        if self.train_data_mix_weights and len(self.train_data_mix_weights) != len(sources):
            raise ConfigError(
                f"--train-data-mix-weights: {len(self.train_data_mix_weights)} weights for {len(sources)} sources. "
                "Give one for each value of --train-data or --dataset-manifest."
            )
        if any(weight <= 0 for weight in self.train_data_mix_weights):
            raise ConfigError(f"--train-data-mix-weights {self.train_data_mix_weights}: every weight must be above 0.")
        if self.train_data_mix_weights and self.train_data_upsampling_factors:
            raise ConfigError("--train-data-mix-weights and --train-data-upsampling-factors: give one of the two.")
        if self.dataset_type == "synthetic" and sources:
            raise ConfigError("--dataset-type synthetic: reads no files. Remove --train-data or --dataset-manifest.")
        if self.dataset_type == "npy" and self.dataset_manifest:
            raise ConfigError("--dataset-type npy: flat arrays have no manifest. Name them with --train-data.")
        if self.workers < 0:
            raise ConfigError(f"--workers {self.workers}: must be 0 or more.")
        if self.val_data_key and len(self.val_data_key) != len(self.val_data):
            raise ConfigError(
                f"--val-data-key: found {len(self.val_data_key)} keys for {len(self.val_data)} sets of --val-data. "
                "Give one for each."
            )
        for key in self.val_data_key:
            if key not in ("auto", *SAMPLE_FORMATS):
                raise ConfigError(f"--val-data-key {key}: choose one of auto, {', '.join(SAMPLE_FORMATS)}.")
        if self.data_cache_gb <= 0:
            raise ConfigError(f"--data-cache-gb {self.data_cache_gb}: must be above 0.")
        if self.squash_mask_left and self.target_mask_left is None:
            raise ConfigError("--squash-mask-left: needs --target-mask-left, the token to take out.")
        if self.doc_mask_token is not None and not self.doc_mask:
            raise ConfigError(f"--doc-mask-token {self.doc_mask_token}: belongs to --doc-mask, which is not given.")
        for (_, last), (first, _) in itertools.pairwise(self.skipped_ranges):
            if first <= last:
                raise ConfigError(f"--skip-steps: the ranges {self.skip_steps} overlap. Join them.")

    @cached_property
    def skipped_ranges(self) -> list[tuple[int, int]]:
        """`--skip-steps` as (first, last) pairs in order.

        Raises:
            ConfigError: a range is malformed.
        """
        return sorted(_range(text) for text in self.skip_steps)


def _range(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    if not (first.isdecimal() and (last or first).isdecimal()) or int(last or first) < int(first):
        raise ConfigError(f"--skip-steps {text}: write `first-last`, for example 1200-1210.")
    return int(first), int(last or first)
