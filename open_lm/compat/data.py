"""Data as OpenLM's scripts read it: `get_data`, `get_wds_dataset`, `mask_sequence`, `sample_chunk`.

Shapes: B samples, S tokens of a sample, T positions.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from open_lm.data.batch import IGNORED, Batch
from open_lm.data.config import DataConfig


@dataclass
class DataInfo:
    """One data set: `dataloader` yields `(samples,)`, (B, seq_len + 1) ids each; rows of -1 are no samples."""

    make: Callable[[int], Iterable[Batch]]
    name: str = ""
    epoch: int = 0

    @property
    def dataloader(self) -> Iterator[tuple[Tensor]]:
        """The batches of the current epoch, from the first."""
        return ((_samples(batch),) for batch in self.make(self.epoch))

    def set_epoch(self, epoch: int) -> None:
        """Let the next dataloader be that of interval number `epoch`."""
        self.epoch = epoch


def get_data(
    args: Namespace, epoch: int = 0, tokenizer: Any = None, skip_train: bool = False, floor: bool = True
) -> dict[str, Any]:
    """`train` (None without training data, or with `skip_train`) and `val_list`, a DataInfo for each of `val_data`.

    Raises:
        ConfigError: an argument has a value out of range.
        DataError: a set is damaged.
    """
    trains = not skip_train and (getattr(args, "train_data", None) or getattr(args, "dataset_manifest", None))
    train = get_wds_dataset(args, is_train=True, epoch=epoch) if trains else None
    return {"train": train, "val_list": [_validation_set(args, i) for i in range(len(args.val_data or []))]}


def get_wds_dataset(args: Namespace, is_train: bool, epoch: int = 0, **ignored: Any) -> DataInfo:
    """The training data, or the first of `val_data`.

    Raises:
        DataError: it is damaged, or too short for an interval of `train_num_samples` tokens.
    """
    if not is_train:
        return _validation_set(args, 0)
    from open_lm.data.loader import build_loader

    loader = build_loader(
        data_config(args),
        vocab_size=args.vocab_size,
        seq_len=args.seq_len,
        global_batch=args.global_batch_size,
        rank=getattr(args, "rank", 0),
        world_size=getattr(args, "world_size", 1),
        seed=getattr(args, "seed", 0),
    )
    tokens = getattr(args, "train_num_samples", None)
    n_steps = max(1, tokens // (args.seq_len * args.global_batch_size)) if tokens else len_of(loader, args)
    return DataInfo(lambda number: loader.batches(number * n_steps, (number + 1) * n_steps), "train", epoch)


def len_of(loader: Any, args: Namespace) -> int:
    """The whole batches of one pass."""
    return loader.n_sequences // args.global_batch_size


def data_config(args: Namespace) -> DataConfig:
    """The flags of data among the arguments, whoever parsed them."""
    known = {f.name for f in fields(DataConfig)}
    given = {name: value for name, value in vars(args).items() if name in known and value is not None}
    plain: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return DataConfig(**plain)


def _validation_set(args: Namespace, number: int) -> DataInfo:
    from open_lm.data.validation import validation_batches

    keys, limit = getattr(args, "val_data_key", None), getattr(args, "val_num_samples", None)
    batch = getattr(args, "per_gpu_val_batch_size", None) or getattr(args, "per_gpu_batch_size", None)
    world_size = getattr(args, "world_size", 1)
    total = getattr(args, "global_val_batch_size", None) or getattr(args, "global_batch_size", None) or world_size

    def batches(epoch: int) -> Iterable[Batch]:
        return validation_batches(
            args.val_data[number],
            key=keys[number] if keys else "auto",
            vocab_size=args.vocab_size,
            seq_len=args.seq_len,
            batch=batch or max(1, total // world_size),
            rank=getattr(args, "rank", 0),
            world_size=world_size,
            max_sequences=max(1, limit // args.seq_len) if limit else None,
        )

    return DataInfo(batches, args.val_data[number])


def _samples(batch: Batch) -> Tensor:
    """The samples a batch was made of, (B, S); rows without any target are -1."""
    last_B1 = batch.targets_BT[:, -1:]
    samples_BS = torch.cat((batch.inputs_BT, last_B1), dim=1)
    return samples_BS.masked_fill((batch.targets_BT == IGNORED).all(dim=1, keepdim=True), -1)


def sample_chunk(chunk: Tensor, args: Namespace) -> tuple[Tensor, Tensor]:
    """Inputs and targets of samples of seq_len + 1 tokens; of longer ones, those of their first seq_len + 1."""
    return mask_sequence(chunk[:, : args.seq_len + 1], 0, args)


def mask_sequence(chunk: Tensor, start_idx: int, args: Namespace, ignore_tok: int = IGNORED) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T) of `chunk` from `start_idx` on, targets masked as `target_mask_*` of `args` say.

    `target_mask_left`: targets up to and including the last such token; `squash_mask_left` also takes all of them out
    of inputs and targets, and fills up inputs with `target_mask_individual`. `target_mask_individual`: such targets.
    """
    samples_BS = chunk[:, start_idx : start_idx + args.seq_len + 1]
    left, individual = getattr(args, "target_mask_left", None), getattr(args, "target_mask_individual", None)
    squash = bool(getattr(args, "squash_mask_left", False))
    rows = [_masked(sample, left, individual, squash, ignore_tok) for sample in samples_BS]
    inputs, targets = zip(*rows, strict=True)
    return torch.stack(inputs), torch.stack(targets)


def _masked(
    sample_S: Tensor, left: int | None, individual: int | None, squash: bool, ignored: int
) -> tuple[Tensor, Tensor]:
    inputs_T, targets_T = sample_S[:-1], sample_S[1:]
    is_masked_T = targets_T == individual if individual is not None else torch.zeros_like(targets_T, dtype=torch.bool)
    markers = (sample_S == left).nonzero().flatten() if left is not None else sample_S.new_zeros(0)
    if len(markers):
        is_masked_T[: int(markers[-1])] = True
    masked_T = targets_T.masked_fill(is_masked_T, ignored)
    if not squash or not len(markers):
        return inputs_T, masked_T
    filler = 0 if individual is None else individual
    return _filled(inputs_T[inputs_T != left], len(inputs_T), filler), _filled(
        masked_T[targets_T != left], len(targets_T), ignored
    )


def _filled(row: Tensor, length: int, filler: int) -> Tensor:
    """The row, filled up on the right."""
    return torch.nn.functional.pad(row, (0, length - len(row)), value=filler)
