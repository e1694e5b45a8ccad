"""Published scaling fits, reproduced from their data (../shared/data/scaling, skipped where that is not present)."""

from pathlib import Path

import numpy as np
import pytest

from open_lm.ladder.fitting import fit
from open_lm.ladder.laws import LAWS
from open_lm.ladder.minimise import Problem
from open_lm.ladder.points import TableColumns, points_of, read_table
from open_lm.ladder.task_error import fit_error, tasks_above_chance

DATA = Path(__file__).resolve().parents[3] / "shared/data/scaling"
pytestmark = pytest.mark.skipif(not DATA.exists(), reason="no ../shared/data/scaling")

SMALL = ("d=96_l=8_h=4-1.0", "d=512_l=8_h=4-1.0", "d=576_l=24_h=8-1.0", "d=1024_l=24_h=8-1.0", "d=96_l=8_h=4-16.0")
"""The five runs that the study of over-training fits its law to."""


def chinchilla_points(drop):
    table = read_table(str(DATA / "chinchilla_besiroglu.csv"))
    return points_of(table, TableColumns(params="Model Size", flops="Training FLOP"), drop_first=drop)


def overtraining_points(names, dataset, error=()):
    runs = read_table(str(DATA / "openlm_overtraining/runs.csv")).set_index("name")
    return points_of(
        runs.loc[[f"{dataset}-{name}" for name in names]],
        TableColumns(params="params", loss="loss_c4_val", error=error),
    )


def test_chinchilla_as_besiroglu_et_al_refit_it():
    found = fit(LAWS["chinchilla"], chinchilla_points(5), resamples=400)
    assert found.value <= 0.0010182741
    printed = {"A": 477.83, "B": 2143.42, "E": 1.8172, "alpha": 0.3473, "beta": 0.3672}
    for name, value in printed.items():
        assert found.parameters[name] == pytest.approx(value, abs=0.005 if value > 100 else 0.00005)
    assert found.at_bounds == ()
    published = {"alpha": (0.316, 0.371), "beta": (0.336, 0.415), "E": (1.772, 1.877)}
    for name, bounds in published.items():
        assert found.intervals()[name] == pytest.approx(bounds, abs=0.015)


def test_other_published_parameters_score_worse_on_the_same_points():
    points = chinchilla_points(5)
    problem = Problem(LAWS["chinchilla"], points.n, points.d, "huber-log")

    def score(a, b, floor, alpha, beta):
        theta = np.array([[np.log(a), np.log(b), floor, alpha, beta]])
        return float(problem.value(theta, points.loss[None], np.ones((1, len(points))))[0])

    assert score(482.01, 2085.43, 1.8172, 0.3478, 0.3658) == pytest.approx(0.00102284, abs=5e-9)
    assert score(406.4, 410.7, 1.69, 0.34, 0.28) == pytest.approx(0.00412101, rel=0.05)  # printed with few digits


def test_dropping_the_first_rows_is_what_moves_the_law():
    found = fit(LAWS["chinchilla"], chinchilla_points(0))
    assert found.parameters["B"] == pytest.approx(12_846, rel=1e-3)
    assert found.parameters["beta"] == pytest.approx(0.453, abs=5e-4)


@pytest.mark.parametrize(
    ("dataset", "a", "c", "b", "floor"),
    [
        ("rpj", 166.211, 366.687, -0.27285, 1.83665),
        ("c4_original", 113.693, 189.516, -0.24247, 1.50826),
        ("rw_original", 125.096, 246.207, -0.25439, 1.73446),
    ],
)
def test_over_training_laws_of_openlms_study(dataset, a, c, b, floor):
    found = fit(LAWS["overtraining"], overtraining_points(SMALL, dataset)).parameters
    assert [round(found[name], 3) for name in ("a", "c")] == [a, c]
    assert [round(found[name], 5) for name in ("b", "E")] == [b, floor]


def test_error_law_of_openlms_study_and_its_two_predictions():
    runs = read_table(str(DATA / "openlm_overtraining/runs.csv"))
    tasks = read_table(str(DATA / "openlm_overtraining/eval_metadata.csv")).set_index("Eval Task")
    columns = [name for name in runs if name.startswith("acc_")]
    chance = tasks.loc[[name.removeprefix("acc_") for name in columns], "Random baseline"].to_numpy() / 100
    of_154m = runs[runs["name"].str.contains("d=576_l=24_h=8")]
    solved = tuple(np.array(columns)[tasks_above_chance(of_154m[columns].to_numpy(), chance, 0.1)])
    assert len(solved) == 17
    points = overtraining_points((*SMALL, "open_lm_1b-1.0"), "rpj", solved)
    errors = fit_error("exponential", points)
    found = errors.parameters
    assert round(found["k"], 4) == 2.2065
    assert [round(found[name], 5) for name in ("gamma", "epsilon")] == [0.71459, 0.85699]
    law = fit(LAWS["overtraining"], points.take(slice(0, 5)))
    large = overtraining_points(("open_lm_1b-32.0", "open_lm_7b-1.0"), "rpj", solved)
    off = 100 * (law.predict(large.n, large.d) / large.loss - 1)
    assert [round(float(x), 4) for x in off] == [0.7103, 0.7320]
    chained = [errors.chained(law, n, d)[0] / e - 1 for n, d, e in zip(large.n, large.d, large.error, strict=True)]
    assert [round(100 * float(x), 2) for x in chained] == [3.64, 0.05]


def test_counting_embeddings_or_not_visibly_moves_the_law():
    runs = read_table(str(DATA / "openlm_overtraining/runs.csv")).set_index("name")
    chosen = runs.loc[[f"rpj-{name}" for name in SMALL]]
    without = points_of(chosen, TableColumns(params="params_no_embed", loss="loss_c4_val"))
    assert fit(LAWS["overtraining"], without).parameters["E"] == pytest.approx(1.8879, abs=1e-3)
