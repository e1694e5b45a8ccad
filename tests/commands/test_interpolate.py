"""`openlm interpolate`: the losses along the line between two checkpoints are those of the averaged weights."""

import csv
import json
import math

import pytest
import torch
from runs import flags, folder_of, run, write_data

from open_lm.commands.interpolate import draw, main
from open_lm.errors import ConfigError
from open_lm.main import main as train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A base model, one trained on from it on other data, and a held-out set of each."""
    folder = tmp_path_factory.mktemp("line")
    sets = {name: write_data(folder / name, (20,), seed=seed) for name, seed in (("a", 7), ("b", 8))}
    run(folder, write_data(folder / "base_data"), name="base")
    base = folder_of(folder, "base") / "checkpoints" / "epoch_1.pt"
    train(flags(folder, write_data(folder / "more", (40,), seed=3), "--pretrained", str(base), name="tuned", steps=5))
    tuned = folder_of(folder, "tuned") / "checkpoints" / "epoch_1.pt"
    data = [sets[name].replace("manifest.jsonl", "00000000.tar") for name in "ab"]
    where = ["--device", "cpu", "--precision", "fp32", "--global-val-batch-size", "4"]
    return str(base), str(tuned), ["--val-data", *data, "--val-names", "a", "b", *where]


def test_table_and_picture_hold_the_losses_of_the_averaged_weights(trained, tmp_path, capsys):
    base, tuned, flags = trained
    losses = main([base, tuned, *flags, "--shares", "0", "0.25", "1", "1.5", "--output", str(tmp_path / "line.png")])
    assert [share for share, _ in losses] == [0, 0.25, 1, 1.5]
    rows = list(csv.DictReader((tmp_path / "line.csv").open()))
    assert [float(row["share"]) for row in rows] == [0, 0.25, 1, 1.5]
    assert (tmp_path / "line.png").read_bytes().startswith(b"\x89PNG")
    first, second = (torch.load(path, weights_only=True) for path in (base, tuned))
    mixed = {k: (0.75 * first["state_dict"][k].double() + 0.25 * second["state_dict"][k].double()).float()
             for k in first["state_dict"]}  # fmt: skip
    torch.save({**first, "state_dict": mixed}, tmp_path / "mixed.pt")
    ends = (base, str(tmp_path / "mixed.pt"), tuned)
    where = ["--logs-dir", str(tmp_path), "--name", "plain"]
    train([*flags, *where, "--val-checkpoints", *ends])
    lines = (tmp_path / "plain" / "checkpoints" / "results.jsonl").read_text().splitlines()
    for (_, at), line in zip(losses, lines, strict=False):
        assert list(at.values()) == pytest.approx([row["loss"] for row in json.loads(line)], abs=1e-6)
    assert losses[0][1] != losses[1][1] != losses[2][1]


def test_points_are_evenly_spaced_and_a_picture_of_one_set_has_one_panel(trained, tmp_path):
    base, tuned, flags = trained
    one = [flags[0], flags[1], *flags[flags.index("--device") :]]
    losses = main([base, tuned, *one, "--points", "3", "--output", str(tmp_path / "line.svg")])
    assert [share for share, _ in losses] == [0, 0.5, 1]
    assert (tmp_path / "line.svg").read_text().count("share of the second checkpoint") <= 1


def test_what_cannot_be_is_refused(trained, tmp_path):
    base, tuned, flags = trained
    with pytest.raises(ConfigError, match=r"--output line\.txt"):
        main([base, tuned, *flags, "--output", "line.txt"])
    with pytest.raises(ConfigError, match=r"nothing to do: .*--val-data"):
        main([base, tuned, "--output", str(tmp_path / "line.png")])
    more = ["--dataset-type", "synthetic", "--train-tokens", "1280", "--model", "open_lm_test_tiny"]
    with pytest.raises(ConfigError, match="only evaluates"):
        main([base, tuned, *flags, *more, "--output", str(tmp_path / "line.png")])
    with pytest.raises(ConfigError, match="did you mean --val-data"):
        main([base, tuned, "--val-dota", "x", "--output", str(tmp_path / "line.png")])


def test_panels_tell_long_paths_apart_and_a_point_without_a_loss_is_not_the_least(tmp_path, monkeypatch):
    from matplotlib import pyplot

    names = [f"s3://a-bucket-of-many-letters/{kind}/shard-{{000..100}}.tar" for kind in ("base", "chat")]
    losses = [(0.0, 2.0), (0.5, math.nan), (1.0, 1.0)]
    monkeypatch.setattr(pyplot, "close", lambda figure: None)  # it is looked at below
    draw([(share, dict.fromkeys(names, loss)) for share, loss in losses], str(tmp_path / "line.png"))
    axes = pyplot.gcf().axes
    assert [axis.get_title() for axis in axes[:2]] == [
        "…ers/base/shard-{000..100}.tar",
        "…ers/chat/shard-{000..100}.tar",
    ]
    assert [axis.lines[1].get_xydata().tolist() for axis in axes[:2]] == [[[1.0, 1.0]]] * 2
