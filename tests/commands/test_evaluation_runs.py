"""Evaluation without training: many checkpoints, intervals, bits per byte; a line of results.jsonl for each."""

import io
import json
import math
import tarfile

import numpy as np
import pytest
import torch
from icl_setup import write_tokenizer
from runs import SEQ_LEN, folder_of, metrics, run, run_command, write_data

from open_lm import load_model
from open_lm.errors import CheckpointError, ConfigError
from open_lm.main import main


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with three checkpoints, and held-out data whose manifest names the tokenizer."""
    folder = tmp_path_factory.mktemp("trained")
    shape = {"hidden_dim": 16, "n_layers": 1, "n_heads": 2, "seq_len": SEQ_LEN, "vocab_size": 400}
    (folder / "model.json").write_text(json.dumps({**shape, "post_embed_norm": False, "weight_tying": False}))
    manifest = write_data(folder / "data", vocab=400)
    held_out = folder / "held_out"
    path = write_data(held_out, (17,), seed=1, vocab=400)
    tokenizer = write_tokenizer(folder / "tokenizer.json")
    row = json.loads((held_out / "manifest.jsonl").read_text())
    (held_out / "manifest.jsonl").write_text(json.dumps({**row, "tokenizer": tokenizer}) + "\n")
    val = path.replace("manifest.jsonl", "00000000.tar")
    run(folder, manifest, "--model", str(folder / "model.json"), "--num-checkpoints", "3", "--val-data", val)
    return {"folder": folder, "run": folder_of(folder), "val": val, "tokenizer": tokenizer, "manifest": manifest}


def evaluate(trained, tmp_path, *more):
    main(arguments(trained, tmp_path, *more))
    return results(tmp_path)


def arguments(trained, tmp_path, *more):
    where = ["--device", "cpu", "--precision", "fp32", "--logs-dir", str(tmp_path), "--name", "eval"]
    return ["--val-data", trained["val"], "--global-val-batch-size", "4", *where, *more]


def results(tmp_path):
    lines = (tmp_path / "eval" / "checkpoints" / "results.jsonl").read_text().splitlines()
    return [row for line in lines for row in json.loads(line)]


def test_a_run_folder_means_all_its_checkpoints_in_order_of_steps(trained, tmp_path):
    rows = evaluate(trained, tmp_path, "--val-checkpoints", str(trained["run"]))
    assert [row["step"] for row in rows] == [4, 8, 12]
    assert [row["checkpoint_path"][-10:] for row in rows] == ["epoch_1.pt", "epoch_2.pt", "epoch_3.pt"]
    during = metrics(trained["folder"], key="valid/loss")
    assert [row["loss"] for row in rows] == pytest.approx(list(during.values()), abs=1e-6)
    lines = [json.loads(line) for line in (tmp_path / "eval" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 12]


def test_files_and_globs_each_once_and_of_other_shapes(trained, tmp_path):
    manifest = write_data(tmp_path / "data", vocab=400)
    wide = {"hidden_dim": 32, "n_layers": 1, "n_heads": 2, "seq_len": SEQ_LEN, "vocab_size": 400}
    (tmp_path / "wide.json").write_text(json.dumps({**wide, "post_embed_norm": False, "weight_tying": False}))
    run(tmp_path, manifest, "--model", str(tmp_path / "wide.json"), name="wide")
    pattern = str(trained["run"] / "checkpoints" / "epoch_[23].*")
    rows = evaluate(
        trained, tmp_path, "--val-checkpoints", str(tmp_path / "logs" / "wide" / "checkpoints" / "epoch_1.pt"), pattern,
        str(trained["run"] / "checkpoints" / "epoch_2.pt"),
    )  # fmt: skip
    assert [row["step"] for row in rows] == [12, 8, 12]


def test_bits_per_byte_follow_from_the_tokenizer_that_the_manifest_names(trained, tmp_path):
    (row,) = evaluate(trained, tmp_path, "--val-checkpoints", str(trained["run"] / "checkpoints" / "epoch_3.pt"))
    assert row["bits_per_byte"] == pytest.approx(row["loss"] * row["tokens"] / math.log(2) / row["bytes"])
    from open_lm.data.tokenizer import load_tokenizer
    from open_lm.data.validation import validation_batches

    tokenizer = load_tokenizer(trained["tokenizer"])
    (batch,) = validation_batches(
        trained["val"], vocab_size=400, seq_len=SEQ_LEN, batch=17, rank=0, world_size=1
    )  # fmt: skip
    pieces = [tokenizer.token_of(i) for i in batch.targets_BT.flatten().tolist()]
    special = ("<|endoftext|>", "<|padding|>")
    assert row["bytes"] == sum(len(piece) for piece in pieces if piece not in special)
    assert metrics(trained["folder"], key="valid/bits_per_byte")[12] == pytest.approx(row["bits_per_byte"], rel=1e-5)


def test_a_tokenizer_that_is_not_at_hand_costs_only_the_bits(trained, tmp_path):
    held_out = tmp_path / "held_out"
    path = write_data(held_out, (5,), vocab=400)
    row = json.loads((held_out / "manifest.jsonl").read_text())
    (held_out / "manifest.jsonl").write_text(json.dumps({**row, "tokenizer": "nobody/nothing"}) + "\n")
    val = path.replace("manifest.jsonl", "00000000.tar")
    more = ["--val-checkpoints", str(trained["run"] / "checkpoints" / "epoch_3.pt"), "--val-data", val]
    (row,) = evaluate(trained, tmp_path, *more)
    assert (row["bits_per_byte"], row["bytes"]) == (None, None)
    with pytest.raises(ConfigError, match=r"--tokenizer no.json: no such file"):
        evaluate(trained, tmp_path, *more, "--tokenizer", "no.json")


def test_intervals_fill_openlms_keys(trained, tmp_path):
    more = ["--val-seq-ci", "--val-tok-ci", "--val-iter-ci", "500", "--val-checkpoints", str(trained["run"])]
    (*_, row) = evaluate(trained, tmp_path, *more)
    for kind in ("sequences", "tokens"):
        assert row[f"loss_{kind}_lower_95"] < row["loss"] < row[f"loss_{kind}_upper_95"]
    (*_, narrow) = evaluate(trained, tmp_path, *more, "--no-val-tok-ci", "--val-max-pop-ci", "4")
    assert narrow["loss_tokens_lower_95"] == narrow["loss_tokens_upper_95"] == -1.0
    widths = [r["loss_sequences_upper_95"] - r["loss_sequences_lower_95"] for r in (row, narrow)]
    assert widths[1] == pytest.approx(widths[0] * math.sqrt(17 / 4), rel=0.25)


def test_two_ranks_evaluate_every_checkpoint_alike(trained, tmp_path):
    flags = arguments(trained, tmp_path, "--val-checkpoints", str(trained["run"]), "--fsdp")
    done = run_command(flags, ranks=2)
    assert done.returncode == 0, done.stderr
    during = metrics(trained["folder"], key="valid/loss")
    assert [row["loss"] for row in results(tmp_path)] == pytest.approx(list(during.values()), abs=1e-5)
    assert {row["sequences"] for row in results(tmp_path)} == {17}


def test_what_openlm_wrote_is_found_by_its_numbers(trained, tmp_path):
    theirs = tmp_path / "theirs" / "checkpoints"
    theirs.mkdir(parents=True)
    for label, source in [("2", "1"), ("10", "3")]:
        content = torch.load(trained["run"] / "checkpoints" / f"epoch_{source}.pt", weights_only=True)
        torch.save(content, theirs / f"epoch_{label}.pt")
    rows = evaluate(trained, tmp_path, "--val-checkpoints", str(tmp_path / "theirs"))
    assert [row["step"] for row in rows] == [4, 12]


@pytest.mark.parametrize(
    ("flags", "error", "said"),
    [
        (["--val-checkpoints", "/no/such/run"], CheckpointError, "--val-checkpoints /no/such/run: no checkpoints"),
        (["--val-checkpoints", "/no/such/*.pt"], CheckpointError, "no checkpoints there"),
        (["--val-checkpoints", "/no/such.pt"], CheckpointError, r"/no/such.pt"),
        (["--val-checkpoints", "a.pt", "--resume", "b.pt"], ConfigError, "only evaluates"),
        ([], ConfigError, "--val-checkpoints"),
    ],
)
def test_what_is_not_there_is_said(trained, tmp_path, flags, error, said):
    with pytest.raises(error, match=said):
        main(arguments(trained, tmp_path, *flags))


def masked_loss(model, samples, left, individual):
    """What OpenLM's masks leave of the targets, in plain Python: the mean cross-entropy in fp64, and their number."""
    total = n_targets = 0
    for sample in samples:
        inputs, targets = sample[:-1], sample[1:]
        last = max((at for at, token in enumerate(targets) if token == left), default=-1)
        with torch.no_grad():
            logits_TV = model(torch.tensor([inputs]))[0][0].double()
        for at, token in enumerate(targets):
            if at > last and token != individual:
                total -= (logits_TV[at] - logits_TV[at].logsumexp(0))[token].item()
                n_targets += 1
    return total / n_targets, n_targets


def test_the_masks_of_a_re_evaluation_are_openlms_by_an_independent_reference(trained, tmp_path):
    """As DCLM evaluates a checkpoint anew: --val-data with --target-mask-left and --target-mask-individual."""
    with open(trained["val"], "rb") as file, tarfile.open(fileobj=file) as tar:
        samples = [np.load(io.BytesIO(tar.extractfile(member).read())).tolist() for member in tar]
    left, individual = samples[0][6], samples[1][9]
    masks = ["--target-mask-left", str(left), "--target-mask-individual", str(individual)]
    path = str(trained["run"] / "checkpoints" / "epoch_3.pt")
    (row,) = evaluate(trained, tmp_path, "--val-checkpoints", path, *masks)
    loss, n_targets = masked_loss(load_model(path).eval(), samples, left, individual)
    assert row["tokens"] == n_targets <= len(samples) * SEQ_LEN - 7
    assert row["loss"] == pytest.approx(loss, abs=1e-5)
