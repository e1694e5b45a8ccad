"""Tables that laws are fitted to: conditions on their rows, metrics of a ladder, and values that make no point."""

import json

import numpy as np
import pandas as pd
import pytest
from ladders import SIZES, write_ladder

from open_lm.errors import ConfigError, DataError
from open_lm.ladder import ModelLadder
from open_lm.ladder.__main__ import main
from open_lm.ladder.commands import ladder_table
from open_lm.ladder.fitting import fit
from open_lm.ladder.ladder import PLAN
from open_lm.ladder.laws import LAWS
from open_lm.ladder.optimum import compute_optimal
from open_lm.ladder.points import Points, TableColumns, points_of, split, where
from open_lm.ladder.records import checkpoint_metrics, metrics_name

THETA = np.array([np.log(482.0), np.log(2085.0), 1.82, 0.348, 0.366])
OWN = {
    "sizes": {**SIZES, "c": {"hidden_dim": 32, "n_layers": 2, "n_heads": 2}},
    "run": {"chinchilla_multiple": 2, "batch_multiplier": 2.0},
    "counting": "total",
}
QUICK = ["--bootstrap", "0"]


def points_with(n, d, loss):
    return Points(n, d, loss, n * np.nan, tuple(map(str, range(len(n)))))


def trained_ladder(tmp_path):
    """A ladder file and the records of runs whose losses follow a law, without training them."""
    path = write_ladder(tmp_path, **OWN)
    ladder = ModelLadder.from_file(path)
    for size in ladder.sizes:
        plan, kept = ladder.plan(size), tmp_path / "out" / size / "checkpoints"
        kept.mkdir(parents=True)
        (tmp_path / "out" / size / PLAN).write_text(json.dumps(plan.facts()))
        for info in plan.numbers.checkpoints:
            d = np.array([max(1, info.step) * plan.batch.tokens])
            loss = LAWS["chinchilla"].loss(THETA[None], np.array([plan.n_params]), d)[0, 0]
            loss += 0.1 * info.description.endswith("pre-decay")
            row = checkpoint_metrics(plan, info, {info.step: {"valid/loss": loss}})
            (kept / metrics_name(info.step)).write_text(json.dumps(row))
    return path


@pytest.mark.parametrize(
    ("condition", "chosen"),
    [
        ("size>=370M", ["370M", "1.5B"]),
        ("size < 1M", ["158K"]),
        ("size>60000000", ["370M", "1.5B"]),
        ("size=60M", ["60M"]),
    ],
)
def test_labels_of_sizes_are_compared_as_numbers(condition, chosen):
    frame = pd.DataFrame({"size": ["60M", "370M", "158K", "1.5B"]})
    assert list(where(frame, [condition])["size"]) == chosen
    assert list(split(frame, [condition], "--hold-out")[1]["size"]) == chosen


def test_text_that_is_no_size_has_no_order():
    frame = pd.DataFrame({"size": ["60M", "large"]})
    for condition in ("size>60M", "size<=big"):
        with pytest.raises(ConfigError, match=r"is no number and no size such as 60M.*num_params"):
            where(frame, [condition])


def test_columns_of_truth_values_are_compared_with_true_and_false():
    frame = pd.DataFrame({"tied": [True, False, True], "N": [1, 2, 3]})
    assert list(where(frame, ["tied=True"])["N"]) == list(where(frame, ["tied!=false"])["N"]) == [1, 3]
    for condition in ("tied=yes", "tied>true"):
        with pytest.raises(ConfigError, match="give tied=true or tied=false"):
            where(frame, [condition])


def test_the_metrics_of_a_ladder_are_read_from_a_table_as_from_the_ladder(tmp_path, caplog, capsys):
    path, table = trained_ladder(tmp_path), str(tmp_path / "m.csv")
    main(["metrics", "--ladder", path, "--output", table])
    ladder = ModelLadder.from_file(path)
    of_ladder = points_of(ladder_table(ladder, ladder.sizes), TableColumns())
    caplog.clear()
    result = main(["fit", "--data", table, *QUICK, "--output-dir", str(tmp_path)])
    found = result.found.points
    assert len(found) == 9  # three sizes, the ends of three decays
    np.testing.assert_allclose(found.d, of_ladder.d)
    assert found.names == of_ladder.names
    assert result.report["counting"] == "total"
    assert "12 of 21 rows of the metrics are left out: 3 of step 0, 9 inside a run" in caplog.text
    every = main(["fit", "--data", table, *QUICK, "--all-checkpoints", "--output-dir", str(tmp_path)])
    assert len(every.found.points) == 18
    assert "N counted total" in capsys.readouterr().out


def test_metrics_that_count_parameters_in_two_ways_make_no_law(tmp_path):
    path, table = trained_ladder(tmp_path), str(tmp_path / "m.csv")
    frame = main(["metrics", "--ladder", path])
    pd.concat([frame, frame.assign(counting="non-embedding")]).to_csv(table, index=False)
    with pytest.raises(ConfigError, match=r"non-embedding and total. Choose by --where counting=non-embedding"):
        main(["fit", "--data", table, *QUICK, "--output-dir", str(tmp_path)])


def test_a_fit_after_a_change_of_the_ladder_file_says_what_changed(tmp_path, caplog):
    path = trained_ladder(tmp_path)
    main(["fit", "--ladder", path, *QUICK])
    assert "another ladder file" not in caplog.text
    main(["fit", "--ladder", write_ladder(tmp_path, **OWN, seed=4), *QUICK])
    assert "size a was trained by another ladder file: seed was 3, is now 4" in caplog.text


@pytest.mark.parametrize("noise", [0.0, 0.003, 0.02])
@pytest.mark.parametrize(
    ("name", "exchangeable"), [("chinchilla", {"a", "b", "alpha", "beta"}), ("overtraining", {"a", "c"})]
)
def test_one_ratio_of_tokens_to_parameters_leaves_the_terms_exchangeable(name, exchangeable, noise):
    rng = np.random.default_rng(5)
    n = np.geomspace(1e7, 3e9, 8)
    d = 20 * n * rng.uniform(0.99, 1.01, 8)  # whole batches
    loss = LAWS["chinchilla"].loss(THETA[None], n, d)[0] * np.exp(noise * rng.normal(size=8))
    assert exchangeable <= {*fit(LAWS[name], points_with(n, d, loss)).undetermined}


def test_a_budget_without_an_optimum_is_reported_as_that(tmp_path, capsys):
    n, multiple = (x.ravel() for x in np.meshgrid(np.geomspace(1e7, 3e9, 6), [0.5, 1, 2, 4, 16]))
    noise = np.exp(0.001 * np.random.default_rng(0).normal(size=len(n)))
    frame = pd.DataFrame({"num_params": n, "tokens": 20 * n * multiple, "loss": (2 + 400 * n**-0.3) * noise})
    frame.to_csv(tmp_path / "runs.csv")  # more tokens do not help, so that the largest model is best
    flags = ["--bootstrap", "20", "--budget", "1e21", "--output-dir", str(tmp_path)]
    result = main(["fit", "--data", str(tmp_path / "runs.csv"), *flags])
    row = json.loads((tmp_path / "fit.json").read_text())["compute_optimal"][0]
    assert compute_optimal(result.found, 1e21).edge == row["edge"] == "largest"
    assert all(row[key] is None for key in ("n", "n_95", "d", "ratio", "loss"))
    assert "none. WARNING: the law has no optimum inside" in capsys.readouterr().out


def test_percentages_are_no_scores():
    frame = pd.DataFrame({"num_params": [1e6], "tokens": [1e7], "loss": [3.0], "acc": [45.2], "core": [-0.02]})
    for given in (False, True):
        with pytest.raises(DataError, match=r"acc: 45.2 is outside .* divide percentages by 100"):
            points_of(frame, TableColumns(error=("core", "acc")[given:], errors_given=given))
    assert points_of(frame, TableColumns(error=("core",))).error[0] == 1.02  # centred accuracy, below chance


def test_a_size_of_no_parameters_is_refused_whatever_gives_its_tokens():
    frame = pd.DataFrame({"num_params": [0.0, 1e6], "tokens": [1e7] * 2, "C": [6e13] * 2, "M": [20] * 2, "loss": 3.0})
    for columns in (TableColumns(), TableColumns(flops="C"), TableColumns(ratio="M")):
        with pytest.raises(DataError, match="parameters 0 is not positive"):
            points_of(frame, columns)
