"""Masks, against tables worked by hand and a loop over single positions."""

import io
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shared import SHARED, needs_shared

from open_lm.data.batch import IGNORED as X
from open_lm.data.config import DataConfig
from open_lm.data.marks import ID_BITS, IDS, marked_dtype
from open_lm.data.marks import PADDING as P
from open_lm.data.marks import START as S
from open_lm.data.marks import UNTRAINED as U
from open_lm.data.masking import batch_of, masked_batch
from open_lm.data.reader import SampleReader
from open_lm.data.shard_files import open_files
from open_lm.data.shards import check_ids, read_samples, write_shard
from open_lm.data.sources import open_source
from open_lm.errors import ConfigError

SAMPLES = torch.tensor([[5, 6, 9, 7, 8, 1], [5, 6, 7, 8, 1, 1], [9, 5, 9, 6, 1, 7], [5, 5, 5, 5, 5, 9]])


@pytest.mark.parametrize(
    ("flags", "targets"),
    [
        ({"left_of": None, "individual": None, "squash": False}, SAMPLES[:, 1:].tolist()),
        (
            {"left_of": 9, "individual": None, "squash": False},
            [[X, X, 7, 8, 1], [6, 7, 8, 1, 1], [X, X, 6, 1, 7], [X, X, X, X, X]],
        ),
        (
            {"left_of": None, "individual": 1, "squash": False},
            [[6, 9, 7, 8, X], [6, 7, 8, X, X], [5, 9, 6, X, 7], [5, 5, 5, 5, 9]],
        ),
        (
            {"left_of": 9, "individual": 1, "squash": False},
            [[X, X, 7, 8, X], [6, 7, 8, X, X], [X, X, 6, X, 7], [X, X, X, X, X]],
        ),
        (
            {"left_of": 9, "individual": 1, "squash": True},
            [[X, 7, 8, X, X], [6, 7, 8, X, X], [X, 6, X, 7, X], [X, X, X, X, X]],
        ),
    ],
)
def test_hand_worked_targets(flags, targets):
    assert masked_batch(SAMPLES, **flags).targets_BT.tolist() == targets


def test_squashing_takes_the_markers_out_of_the_inputs():
    batch = masked_batch(SAMPLES, left_of=9, individual=1, squash=True)
    assert batch.inputs_BT.tolist() == [[5, 6, 7, 8, 1], [5, 6, 7, 8, 1], [5, 6, 1, 1, 1], [5, 5, 5, 5, 5]]


@needs_shared
def test_every_case_of_openlms_own_function_is_met():
    cases = json.loads((SHARED / "fixtures" / "openlm_masks" / "cases.json").read_text())
    for case in cases:
        flags = {"left_of": case["target_mask_left"], "individual": case["target_mask_individual"]}
        batch = masked_batch(torch.tensor(case["samples"]), **flags, squash=case["squash_mask_left"])
        assert batch.inputs_BT.tolist() == case["inputs"] and batch.targets_BT.tolist() == case["targets"], case


@given(
    st.lists(st.lists(st.integers(0, 4), min_size=6, max_size=6), min_size=1, max_size=5), st.booleans(), st.booleans()
)
def test_masks_equal_a_loop_over_single_positions(rows, individual, squash):
    batch = masked_batch(torch.tensor(rows), left_of=2, individual=3 if individual else None, squash=squash)
    for k, row in enumerate(rows):
        inputs, targets = row[:-1], row[1:]
        last = max((i for i, t in enumerate(targets) if t == 2), default=-1)
        expected = [X if i <= last or (individual and t == 3) else t for i, t in enumerate(targets)]
        if squash:
            expected = [e for e, t in zip(expected, targets, strict=True) if t != 2]
            inputs = [t for t in inputs if t != 2]
        assert batch.targets_BT[k].tolist() == expected + [X] * (5 - len(expected))
        assert batch.inputs_BT[k].tolist() == inputs + [3 if individual else 0] * (5 - len(inputs))


def test_the_loader_masks_what_the_flags_say(data_set):
    from open_lm.data.config import DataConfig
    from open_lm.data.loader import build_loader

    folder = data_set([8])  # samples are: number, number, 7, 7, 7

    def batch(seq_len, **flags):
        config = DataConfig(dataset_manifest=(f"{folder}/manifest.jsonl",), workers=0, **flags)
        loader = build_loader(config, vocab_size=99, seq_len=seq_len, global_batch=8, rank=0, world_size=1, seed=0)
        return next(loader.batches(0, 1))

    plain, left, one = batch(4), batch(4, target_mask_left=7), batch(4, target_mask_individual=7)
    assert (plain.targets_BT != X).all()
    assert (left.targets_BT == X).all()  # up to the last 7
    assert sorted((one.targets_BT == X).sum(1).tolist()) == [3] * 7 + [4]
    squashed = batch(4, target_mask_left=7, squash_mask_left=True)
    assert squashed.inputs_BT.shape == (8, 4) and not (squashed.inputs_BT == 7).any()


def marked(rows, marks):
    return torch.tensor(rows) | torch.tensor(marks) << ID_BITS


def test_marks_say_what_is_trained_on_and_where_documents_begin():
    rows = [[5, 6, 7, 8, 9, 1, 1], [5, 6, 7, 8, 9, 2, 3]]
    marks = [[S | U, U, 0, S, 0, P, P], [0] * 7]
    batch = batch_of(marked(rows, marks), DataConfig(), None)
    assert batch.inputs_BT.tolist() == [row[:-1] for row in rows]
    assert batch.targets_BT.tolist() == [[X, 7, X, 9, X, X], rows[1][1:]]
    documents = [[1, 1, 1, 2, 2, 2], [0] * 6]
    assert batch.documents_BT.tolist() == documents
    assert batch.extras["real_share"].tolist() == pytest.approx([5 / 6, 1])


def test_one_document_a_sample_needs_no_document_mask():
    assert batch_of(marked([[5, 6, 7, 8]], [[S | U, U, 0, P]]), DataConfig(), None).documents_BT is None


def test_marks_and_masks_by_token_hold_together():
    config = DataConfig(target_mask_left=6, target_mask_individual=8)
    batch = batch_of(marked([[5, 6, 7, 8, 9, 4]], [[0, 0, 0, 0, 0, U]]), config, None)
    assert batch.targets_BT.tolist() == [[X, 7, X, 9, X]]


def test_taking_tokens_out_of_marked_samples_is_refused():
    config = DataConfig(target_mask_left=6, squash_mask_left=True)
    with pytest.raises(ConfigError, match="--squash-mask-left"):
        batch_of(marked([[5, 6, 7, 8]], [[0, 0, 0, U]]), config, None)


@pytest.mark.parametrize("ids", ["<u2", "<u4"])
def test_marked_samples_survive_a_shard(tmp_path, ids):
    rows = np.zeros((3, 5), marked_dtype(np.dtype(ids)))
    rows["ids"], rows["marks"] = np.arange(15).reshape(3, 5), [[S | U, U, 0, 0, P]] * 3
    rows["ids"][0, 0] = np.iinfo(ids).max if ids == "<u2" else (1 << 28) - 1
    with open(tmp_path / "00000000.tar", "wb") as file:
        write_shard(file, rows, "npy")
    source = open_source(str(tmp_path / "00000000.tar"))
    files = open_files([source], DataConfig(), 1)
    read = SampleReader([source.shards], files=files, data_key="auto", vocab_size=1 << 28, sample_tokens=5).read
    zero = np.zeros(3, np.int64)
    tokens, unreadable, *_ = read(zero, zero, np.arange(3), zero)
    assert not unreadable
    assert (tokens & IDS).tolist() == rows["ids"].tolist()
    assert (tokens >> ID_BITS).tolist() == rows["marks"].tolist()
    numpys_own = np.load(io.BytesIO((tmp_path / "00000000.tar").read_bytes()[512:]))
    assert (numpys_own == rows[0]).all()
    shown = [ids.tolist() for _, ids in read_samples(str(tmp_path / "00000000.tar"))]
    assert shown == rows["ids"].tolist()


def test_a_marked_id_beyond_the_vocabulary_is_an_error():
    row = np.zeros(2, marked_dtype(np.dtype("<u4")))
    row["ids"] = [3, 300]
    with pytest.raises(ValueError, match="token id 300 is outside a vocabulary of 100"):
        check_ids(row, 100)
    row["ids"], row["marks"] = 3, 8
    with pytest.raises(ValueError, match="mark 8"):
        check_ids(row, 100)
