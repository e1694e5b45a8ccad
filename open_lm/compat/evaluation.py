"""`evaluate_loop`: validation loss of a model as OpenLM's scripts ask for it.  Shapes: B samples, S tokens."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from open_lm.compat.data import DataInfo, sample_chunk


def evaluate_loop(
    model: nn.Module, data_list: Sequence[DataInfo], start_epoch: int, args: Namespace, writer: Any = None
) -> list[dict[str, Any]]:
    """The metrics of each set: `loss` is the mean over all unmasked targets of all ranks."""
    found = []
    for number, data in enumerate(data_list):
        metrics = _evaluate(model, data, args)
        metrics |= {"val_data": [args.val_data[number]], "checkpoint_path": getattr(args, "resume", None),
                    "model": getattr(args, "hf_model", None) or getattr(args, "model", None),
                    "train_tokens": start_epoch * (getattr(args, "train_num_samples", None) or 0)}  # fmt: skip
        if writer is not None:
            writer.add_scalar(f"valid/loss/{number}", metrics["loss"], start_epoch)
        found.append(metrics)
    return found


@torch.no_grad()
def _evaluate(model: nn.Module, data: DataInfo, args: Namespace) -> dict[str, Any]:
    began, device = time.perf_counter(), next(model.parameters()).device
    was_training = model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, tokens, sequences
    for (samples_BS,) in data.dataloader:
        kept_BS = samples_BS[(samples_BS >= 0).all(dim=1)]
        if not len(kept_BS):  # every rank has as many batches; rows without a sample fill the last
            model(samples_BS.new_zeros(1, args.seq_len).to(device))
            continue
        inputs_BT, targets_BT = (part.to(device) for part in sample_chunk(kept_BS, args))
        found = model(inputs_BT)
        logits_BTV = found[0] if isinstance(found, tuple) else found.logits
        losses_N = F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), reduction="none")
        parts = (losses_N.double().sum(), (targets_BT != -100).sum(), torch.tensor(len(kept_BS)))
        sums += torch.stack([part.double().to(device) for part in parts])
    model.train(was_training)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(sums)
    loss, tokens, sequences = sums.tolist()
    return {"loss": loss / max(tokens, 1), "tokens": int(tokens), "sequences": int(sequences),
            "seconds": time.perf_counter() - began}  # fmt: skip
