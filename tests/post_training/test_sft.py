"""Fine-tuning: the loss over marked samples, and the noise of NEFTune, against what they are defined as."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import folder_of, metrics, run, weights

from open_lm.checkpoint.load_model import load_model
from open_lm.data.batch import Batch
from open_lm.data.manifest import write_manifest
from open_lm.data.marks import ID_BITS, PADDING, START, UNTRAINED, marked_dtype
from open_lm.data.masking import with_marks
from open_lm.data.shards import write_shard
from open_lm.errors import ConfigError
from open_lm.model import create_model
from open_lm.model.config import ModelConfig
from open_lm.post_training.sft import EmbeddingNoise, FineTuning
from open_lm.train.tasks import NextToken

SEQ_LEN, VOCAB = 16, 16


def marked_samples(n=24, seed=0):
    """Samples of two documents: a prompt and an answer each, with padding behind the second."""
    generator = np.random.default_rng(seed)
    rows = np.zeros((n, SEQ_LEN + 1), marked_dtype(np.dtype("<u2")))
    rows["ids"] = generator.integers(0, VOCAB, rows.shape)
    for row in rows:
        middle, end = generator.integers(5, 9), generator.integers(11, SEQ_LEN + 2)
        row["marks"][[0, middle]] = START
        row["marks"][1:3] = row["marks"][middle + 1 : middle + 3] = UNTRAINED
        row["marks"][[0, middle]] |= UNTRAINED
        row["marks"][end:] = PADDING
        row["ids"][end:] = 0
    return rows


def write_marked(folder, rows, form="samples"):
    folder.mkdir()
    with open(folder / "00000000.tar", "wb") as file:
        write_shard(file, rows, "npy")
    write_manifest(str(folder / "manifest.jsonl"), [{"shard": "00000000", "num_sequences": len(rows), "form": form}])
    return str(folder / "manifest.jsonl")


def mean_loss(model, rows):
    """The loss of each document read alone, over all their trained tokens."""
    losses = []
    for row in rows:
        begins = [*np.flatnonzero(row["marks"] & START), len(row)]
        for start, stop in itertools.pairwise(begins):
            ids, marks = torch.tensor(row["ids"][start:stop].astype("int64")), row["marks"][start:stop]
            kept = np.flatnonzero(marks[1:] == 0)
            logits = model(ids[None, :-1])[0][0]
            losses.append(F.cross_entropy(logits[kept], ids[1:][kept], reduction="none"))
    return torch.cat(losses).mean().item(), sum(map(len, losses))


@pytest.mark.parametrize("accum", ["1", "4"])
def test_packed_conversations_train_and_validate_as_each_alone(tmp_path, accum):
    rows = marked_samples()
    manifest = write_marked(tmp_path / "sft", rows)
    held_out = ["--val-data", manifest, "--val-every-steps", "1", "--accum-freq", accum]
    result = run(tmp_path, manifest, "--task", "sft", *held_out, batch=24, steps=1)
    start = run(tmp_path, manifest, "--task", "sft", "--lr", "1e-30", batch=24, steps=1, name="start")
    model = load_model(f"{start.folder}/checkpoints/epoch_1.pt")
    expected, n_targets = mean_loss(model, rows)
    assert metrics(tmp_path)[1] == pytest.approx(expected, abs=1e-6)
    shares = metrics(tmp_path, key="train/target_share")[1], metrics(tmp_path, key="train/real_token_share")[1]
    n_real = (rows["marks"][:, :-1] & PADDING == 0).sum()
    assert shares == pytest.approx((n_targets / rows["ids"][:, 1:].size, n_real / rows["ids"][:, 1:].size), rel=0.02)
    trained = load_model(f"{result.folder}/checkpoints/epoch_1.pt")
    assert result.validation[0].loss == pytest.approx(mean_loss(trained, rows)[0], abs=1e-6)
    assert result.validation[0].tokens == n_targets


def test_noise_is_bounded_and_the_same_at_any_accumulation_and_after_a_restart(tmp_path):
    manifest = write_marked(tmp_path / "sft", marked_samples())
    flags = ["--task", "sft", "--neftune-alpha", "5", "--save-every-steps", "3"]
    for name, accum in (("one", "1"), ("four", "4")):
        run(tmp_path, manifest, *flags, "--accum-freq", accum, "--multiple-data-passes", name=name, steps=6)
    plain = run(tmp_path, manifest, "--task", "sft", "--multiple-data-passes", name="plain", steps=6)
    losses = {name: list(metrics(tmp_path, name=name).values()) for name in ("one", "four", "plain")}
    assert losses["four"] == pytest.approx(losses["one"], abs=1e-5)
    assert losses["plain"][0] != pytest.approx(losses["one"][0], abs=1e-4)
    assert plain.step == 6
    stopped = [*flags, "--multiple-data-passes", "--stop-at-step", "3"]
    run(tmp_path, manifest, *stopped, name="again", steps=6)
    run(tmp_path, manifest, *flags, "--multiple-data-passes", "--resume", "latest", name="again", steps=6)
    for name, tensor in weights(tmp_path, "one").items():
        assert torch.equal(tensor, weights(tmp_path, "again")[name]), name


def test_noise_is_that_of_the_paper():
    noise = EmbeddingNoise(alpha=5.0, seed=1, rows=torch.arange(2))
    embedding = torch.nn.Embedding(7, 32)
    embedding.register_forward_hook(noise.hook)
    ids = torch.zeros(2, 8, dtype=torch.long)
    added = embedding(ids) - embedding.weight[0]
    bound = 5 / math.sqrt(8 * 32)
    assert added.abs().max() <= bound
    assert added.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert not torch.equal(added[0], added[1])
    assert torch.equal(embedding.eval()(ids)[0, 0], embedding.weight[0])


def test_pairs_are_no_data_for_fine_tuning(tmp_path):
    manifest = write_marked(tmp_path / "pairs", marked_samples(), form="pairs")
    with pytest.raises(ConfigError, match="holds pairs, --task needs samples"):
        run(tmp_path, manifest, "--task", "sft")


def test_the_task_is_kept_with_the_run(tmp_path):
    manifest = write_marked(tmp_path / "sft", marked_samples())
    run(tmp_path, manifest, "--task", "sft", steps=2)
    names = json.loads((folder_of(tmp_path) / "metrics.jsonl").read_text().splitlines()[0])
    assert "train/target_share" in names


def test_packed_conversations_are_refused_by_models_that_would_mix_them(tmp_path, make_chat):
    _, folder = make_chat([{"prompt": "a", "response": "b"}] * 9)
    mamba = tmp_path / "mamba.json"
    mamba.write_text(json.dumps({"d_model": 16, "n_layer": 1, "vocab_size": 400, "seq_len": 120}))
    with pytest.raises(ConfigError, match="--no-packing"):
        run(tmp_path, f"{folder}/manifest.jsonl", "--task", "sft", "--model", str(mamba), batch=1)


class _FirstHalf:
    def take(self, x_BS):
        return x_BS[:, : x_BS.shape[1] // 2]


def test_the_share_of_real_tokens_is_that_of_whole_rows_also_where_ranks_share_them_out():
    rows = torch.tensor([[5, 6, 7, 8, 9, 1, 1, 1, 1]])
    marks = torch.tensor([[START | UNTRAINED, 0, 0, 0, 0, *[PADDING] * 4]])
    batch = with_marks(Batch.from_samples(rows), rows | marks << ID_BITS)
    half = replace(batch.of_part(_FirstHalf()), documents_BT=None, part=None)
    model = create_model(ModelConfig(hidden_dim=16, n_layers=1, n_heads=2, seq_len=8, vocab_size=16))
    task = FineTuning(NextToken())
    for one in (batch, half):
        sums = dict(zip(task.names, task.loss_sums(model, one).parts.tolist(), strict=True))
        assert sums["real_token_share"] / one.n_targets == pytest.approx(5 / 8)
