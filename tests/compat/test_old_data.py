"""Data and validation loss through OpenLM's import names equal its own functions and ours."""

import json
from types import SimpleNamespace

import pytest
import torch
from shared import SHARED, needs_shared
from tiny_models import make_model

from open_lm.compat.data import data_config
from open_lm.data import get_data, get_wds_dataset, mask_sequence, sample_chunk
from open_lm.data.shards import write_shard
from open_lm.evaluate import evaluate_loop

SEQ_LEN = 12


@pytest.fixture
def shard(tmp_path):
    """Ten samples of seq_len + 1 ids."""
    samples = torch.randint(0, 50, (10, SEQ_LEN + 1), generator=torch.Generator().manual_seed(1))
    with open(tmp_path / "00000001.tar", "wb") as file:
        write_shard(file, samples.numpy().astype("<u2"), "npy")
    (tmp_path / "manifest.jsonl").write_text(json.dumps({"shard": "00000001", "num_sequences": 10}) + "\n")
    return tmp_path, samples


def arguments(folder, **values):
    named = {"val_data": [str(folder / "00000001.tar")], "val_data_key": ["auto"], "seq_len": SEQ_LEN, "vocab_size": 53,
             "per_gpu_val_batch_size": 4, "rank": 0, "world_size": 1, "global_batch_size": 2}  # fmt: skip
    return SimpleNamespace(**{**named, **values})


@needs_shared
def test_masks_are_openlms_in_all_cases_that_its_own_function_made():
    cases = json.loads((SHARED / "fixtures/openlm_masks/cases.json").read_text())
    for case in cases:
        args = SimpleNamespace(seq_len=len(case["samples"][0]) - 1, **{k: case[k] for k in case if "mask" in k})
        inputs, targets = mask_sequence(torch.tensor(case["samples"]), 0, args)
        assert inputs.tolist() == case["inputs"] and targets.tolist() == case["targets"]
    assert len(cases) == 24


def test_masks_worked_by_hand():
    args = SimpleNamespace(seq_len=6, target_mask_left=8, target_mask_individual=9, squash_mask_left=True)
    inputs, targets = mask_sequence(torch.tensor([[1, 8, 2, 8, 3, 4, 9]]), 0, args)
    assert inputs.tolist() == [[1, 2, 3, 4, 9, 9]] and targets.tolist() == [[-100, 3, 4, -100, -100, -100]]
    args.squash_mask_left = False
    inputs, targets = mask_sequence(torch.tensor([[5, 5, 1, 8, 2, 8, 3, 4, 9]]), 2, args)
    assert inputs.tolist() == [[1, 8, 2, 8, 3, 4]] and targets.tolist() == [[-100, -100, -100, 3, 4, -100]]


def test_every_validation_sample_is_read_once_and_scored_as_a_plain_model_does(shard):
    folder, samples = shard
    args = arguments(folder, resume="epoch_3.pt", model="m", train_num_samples=100)
    data = get_data(args, epoch=0, tokenizer=None, skip_train=True)
    assert data["train"] is None
    read = torch.cat([batch for (batch,) in data["val_list"][0].dataloader])
    assert torch.equal(read[(read >= 0).all(1)], samples)
    model = make_model("llama")
    (metrics,) = evaluate_loop(model, data["val_list"], 3, args, None)
    inputs, targets = sample_chunk(samples, args)
    expected = torch.nn.functional.cross_entropy(model(inputs)[0].flatten(0, 1), targets.flatten())
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert (metrics["sequences"], metrics["tokens"], metrics["train_tokens"]) == (10, 120, 300)
    assert metrics["checkpoint_path"] == "epoch_3.pt"


def test_training_data_are_intervals_of_tokens_without_repeats(shard):
    folder, samples = shard
    args = arguments(
        folder, dataset_manifest=[str(folder / "manifest.jsonl")], train_num_samples=4 * SEQ_LEN, workers=0
    )
    assert data_config(args).dataset_manifest == (str(folder / "manifest.jsonl"),)
    info = get_wds_dataset(args, True, epoch=0)
    first = torch.cat([batch for (batch,) in info.dataloader])
    info.set_epoch(1)
    second = torch.cat([batch for (batch,) in info.dataloader])
    rows = {tuple(row) for row in torch.cat((first, second)).tolist()}
    assert first.shape == second.shape == (4, SEQ_LEN + 1) and len(rows) == 8
    assert rows <= {tuple(row) for row in samples.tolist()}


def test_the_ray_tool_is_imported_under_its_old_name():
    pytest.importorskip("ray")
    from open_lm.datapreprocess.ray import tokenize_shuffle

    assert callable(tokenize_shuffle.main)
