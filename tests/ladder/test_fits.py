"""Fits of scaling laws on points whose law is known, and what they refuse."""

import json

import numpy as np
import pandas as pd
import pytest

from open_lm.errors import ConfigError, DataError
from open_lm.ladder.__main__ import main
from open_lm.ladder.fitting import draw_weights, fit
from open_lm.ladder.laws import LAWS
from open_lm.ladder.minimise import Problem, huber
from open_lm.ladder.optimum import compute_optimal, isoflop
from open_lm.ladder.points import Points, TableColumns, points_of, where
from open_lm.ladder.task_error import fit_error, sigmoid

TRUE = {
    "chinchilla": np.array([np.log(482.0), np.log(2085.0), 1.82, 0.348, 0.366]),
    "overtraining": np.array([120.0, -0.25, 240.0, 1.7]),
}


def synthetic(name, *, noise=0.0, sizes=6, seed=0):
    """Runs of a ladder of `sizes` sizes, at 0.5 to 16 times Chinchilla."""
    n, multiple = (x.ravel() for x in np.meshgrid(np.geomspace(1e7, 3e9, sizes), [0.5, 1, 2, 4, 16]))
    d = 20 * n * multiple
    loss = LAWS[name].loss(TRUE[name][None], n, d)[0]
    loss = loss * np.exp(noise * np.random.default_rng(seed).normal(size=len(loss)))
    return Points(n, d, loss, np.full(len(n), np.nan), tuple(map(str, range(len(n)))))


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("units", [1.0, 1e-6, 1e-12, 1e9])
def test_a_law_without_noise_is_found_exactly_in_any_units(name, units):
    points = synthetic(name)
    scaled = Points(points.n * units, points.d * units, points.loss, points.error, points.names)
    found = fit(LAWS[name], scaled)
    index = LAWS[name].names.index("E")
    assert found.theta[index] == pytest.approx(TRUE[name][index], rel=1e-5)
    assert abs(found.relative_residuals).max() < 1e-6
    exponent = {"chinchilla": 3, "overtraining": 1}[name]
    assert found.theta[exponent] == pytest.approx(TRUE[name][exponent], rel=1e-4)


@pytest.mark.parametrize("name", LAWS)
def test_derivatives_are_those_of_the_law(name):
    law, theta, points = LAWS[name], TRUE[name], synthetic(name, sizes=2)
    exact = law.jacobian(theta[None], points.n, points.d)[0]
    for k in range(len(theta)):
        step = np.zeros_like(theta)
        step[k] = 1e-6 * max(1, abs(theta[k]))
        above, below = (law.loss((theta + s * step)[None], points.n, points.d)[0] for s in (1, -1))
        np.testing.assert_allclose(exact[:, k], (above - below) / (2 * step[k]), rtol=1e-5, atol=1e-8)


def test_huber_counts_squares_up_to_delta_and_lines_beyond():
    np.testing.assert_allclose(huber(np.array([0.5, 1.0, -3.0]), 1.0), [0.125, 0.5, 2.5])
    np.testing.assert_allclose(huber(np.array([3.0]), float("inf")), [4.5])


def test_intervals_hold_the_law_that_made_the_points_about_as_often_as_they_say():
    law, theta, held = LAWS["chinchilla"], TRUE["chinchilla"], []
    exact = law.loss(theta[None], np.array([7e9]), np.array([1.4e11]))[0, 0]
    for seed in range(12):
        found = fit(law, synthetic("chinchilla", noise=0.003, sizes=4, seed=seed), resamples=100, seed=seed)
        low, high = np.percentile(found.predict_all(7e9, 1.4e11), [2.5, 97.5])
        bounds = [*(found.intervals()[name] for name in law.names), (low, high)]
        held += [low < value < high for (low, high), value in zip(bounds, [*theta, exact], strict=True)]
    assert 0.85 < np.mean(held) <= 1  # the benchmark benchmarks/ladder_coverage.py draws 200


def test_the_same_seed_gives_the_same_intervals_and_another_does_not():
    points = synthetic("chinchilla", noise=0.003, sizes=3)
    first, again, other = (fit(LAWS["chinchilla"], points, resamples=20, seed=s).resampled for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_every_resample_holds_enough_different_points():
    weights = draw_weights(8, 6, 200, seed=0)
    assert weights.sum(axis=1) == pytest.approx(8)
    assert ((weights > 0).sum(axis=1) >= 6).all()
    assert draw_weights(5, 5, 10, seed=0) is None


def test_a_parameter_that_the_points_leave_open_is_reported_at_its_bound():
    points = synthetic("chinchilla")
    flat = Points(points.n, points.d, points.loss * 0 + 3 + 1e3 * points.d**-0.4, points.error, points.names)
    found = fit(LAWS["chinchilla"], flat)
    assert {*found.at_bounds, *found.undetermined} & {"a", "alpha"}


N, ONES = np.geomspace(1e7, 3e9, 8), np.ones(8)


@pytest.mark.parametrize(
    ("name", "n", "d", "among"),
    [
        ("chinchilla", ONES * 1e8, 20 * N, {"a", "E"}),  # one size
        ("chinchilla", np.tile([1e8, 1e9], 4), 20 * N, {"a", "E"}),  # two sizes, three unknowns of N
        ("chinchilla", N, ONES * 1e10, {"b", "E"}),  # one length
        ("chinchilla", N, 20 * N, {"a", "b"}),  # one ratio
        ("overtraining", N, 20 * N, {"a", "c"}),
        ("overtraining", ONES * 1e8, 20 * N, {"a", "E"}),
    ],
)
@pytest.mark.parametrize("noise", [0.0, 0.003])
def test_parameters_that_the_points_do_not_tell_apart_are_named(name, n, d, among, noise):
    loss = LAWS[name].loss(TRUE[name][None], n, d)[0] * np.exp(noise * np.random.default_rng(0).normal(size=8))
    found = fit(LAWS[name], Points(n, d, loss, n * np.nan, tuple(map(str, range(8)))))
    assert among & {*found.undetermined, *found.at_bounds}
    assert found.undetermined or found.at_bounds


@pytest.mark.parametrize("name", LAWS)
def test_a_ladder_of_several_sizes_and_lengths_determines_every_parameter(name):
    assert fit(LAWS[name], synthetic(name, noise=0.003)).undetermined == ()


def test_a_table_whose_index_repeats_loses_no_row_to_the_ones_held_out(tmp_path):
    points = synthetic("chinchilla")
    frame = pd.DataFrame({"num_params": points.n, "tokens": points.d, "loss": points.loss, "run": points.names})
    frame.index = [0] * len(frame)
    frame.to_pickle(tmp_path / "runs.pkl")
    flags = ["--bootstrap", "0", "--hold-out", "run=29", "--output-dir", str(tmp_path)]
    result = main(["fit", "--data", str(tmp_path / "runs.pkl"), *flags])
    assert (len(result.found.points), len(result.held_out)) == (29, 1)


def test_the_command_warns_of_a_law_that_is_not_determined(tmp_path, capsys):
    n = np.geomspace(1e7, 3e9, 8)
    loss = LAWS["chinchilla"].loss(TRUE["chinchilla"][None], n, 20 * n)[0]
    pd.DataFrame({"num_params": n, "tokens": 20 * n, "loss": loss}).to_csv(tmp_path / "runs.csv")
    main(["fit", "--data", str(tmp_path / "runs.csv"), "--bootstrap", "0", "--output-dir", str(tmp_path)])
    assert "WARNING: the points do not tell" in capsys.readouterr().out
    assert json.loads((tmp_path / "fit.json").read_text())["undetermined"]


def test_the_table_of_a_sweep_is_drawn_and_its_own_flags_are_named(tmp_path):
    frame = pd.DataFrame({"width": [8, 8, 16], "lr": [1e-3, 2e-3, 1e-3], "final": [3.0, np.nan, 2.5]})
    frame.to_csv(tmp_path / "sweep.csv")
    flags = ["plot", "--data", str(tmp_path / "sweep.csv"), "--output", str(tmp_path / "sweep.png")]
    for extra, words in (([], "--group-column num_params"), (["--group-column", "width"], "--loss-column loss")):
        with pytest.raises(ConfigError, match=words):
            main([*flags, *extra])
    main([*flags, "--group-column", "width", "--loss-column", "final"])
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    frame.assign(lr=0.0).to_csv(tmp_path / "sweep.csv")
    with pytest.raises(DataError, match="--lr-column lr: 0 is not positive"):
        main([*flags, "--group-column", "width", "--loss-column", "final"])


def test_too_few_points_are_refused():
    with pytest.raises(DataError, match="4 points do not determine the 5 parameters"):
        fit(LAWS["chinchilla"], synthetic("chinchilla").take(slice(0, 4)))


def test_the_compute_optimal_split_is_that_of_the_closed_form():
    found = fit(LAWS["chinchilla"], synthetic("chinchilla"))
    big_a, big_b, alpha, beta = (found.parameters[name] for name in ("A", "B", "alpha", "beta"))
    flops = 1e22
    ratio = (alpha * big_a / (beta * big_b)) ** (1 / (alpha + beta))
    best = compute_optimal(found, flops)
    assert best.n == pytest.approx(ratio * (flops / 6) ** (beta / (alpha + beta)), rel=1e-3)
    assert 6 * best.n * best.d == pytest.approx(flops)


def test_isoflop_parabolas_find_the_exponent_of_the_law():
    law, theta = LAWS["chinchilla"], TRUE["chinchilla"]
    flops, spread = (x.ravel() for x in np.meshgrid(np.geomspace(1e19, 1e22, 5), np.geomspace(0.3, 3, 7)))
    alpha, beta = theta[3], theta[4]
    best = (alpha * 482 / (beta * 2085)) ** (1 / (alpha + beta)) * (flops / 6) ** (beta / (alpha + beta))
    n = best * spread
    d = flops / (6 * n)
    points = Points(n, d, law.loss(theta[None], n, d)[0], n * np.nan, tuple(map(str, n)))
    found = isoflop(points)
    assert len(found.curves) == 5
    assert all(curve.inside for curve in found.curves)
    assert found.exponent == pytest.approx(beta / (alpha + beta), abs=0.005)
    assert found.optimum(1e21)[0] == pytest.approx(
        best[np.argmin(abs(flops - 1e21))] * (1e21 / flops[np.argmin(abs(flops - 1e21))]) ** 0.51, rel=0.1
    )


def test_a_single_budget_is_no_isoflop_analysis():
    with pytest.raises(DataError, match="IsoFLOP"):
        isoflop(synthetic("chinchilla").take(slice(0, 3)))


def test_the_sigmoid_error_law_is_found_again():
    loss = np.linspace(1.8, 4, 30)
    error = sigmoid(loss, -0.55, 3.0, 2.6, 0.85)
    points = Points(loss, loss, loss, error, tuple(map(str, loss)))
    found = fit_error("sigmoid", points, resamples=20)
    assert found.parameters == pytest.approx({"a": -0.55, "L0": 2.6, "k": 3.0, "b": 0.85}, rel=1e-4)
    assert abs(found.predict(loss) - error).max() < 1e-6


def test_rows_are_chosen_by_conditions_and_bad_ones_are_named():
    frame = pd.DataFrame({"N": [1e6, 2e6, 3e6], "set": ["a", "a", "b"]})
    assert list(where(frame, ["set=a", "N>1e6"])["N"]) == [2e6]
    for condition, words in (
        ("set~a", "OP VALUE"),
        ("M>1", "no such column"),
        ("N>x", "holds numbers"),
        ("N>9e9", "no row"),
    ):
        with pytest.raises(ConfigError, match=words):
            where(frame, [condition])


def test_tokens_come_from_compute_or_from_a_ratio():
    frame = pd.DataFrame({"N": [1e6], "C": [6e14], "M": [100.0], "loss": [3.0], "tokens": [7.0]})
    assert points_of(frame, TableColumns(params="N", flops="C")).d[0] == pytest.approx(1e8)
    assert points_of(frame, TableColumns(params="N", ratio="M")).d[0] == pytest.approx(1e8)
    assert points_of(frame, TableColumns(params="N")).d[0] == 7


def test_a_loss_that_is_no_positive_number_is_refused_and_a_missing_one_left_out():
    frame = pd.DataFrame({"num_params": [1.0, 1.0], "tokens": [1.0, 1.0], "loss": [-1.0, np.nan]})
    with pytest.raises(DataError, match="not positive"):
        points_of(frame, TableColumns())
    assert len(points_of(frame.iloc[1:], TableColumns())) == 0


def test_rows_that_are_left_out_are_counted_in_the_log(caplog):
    frame = pd.DataFrame({"num_params": [1.0, 2.0, 3.0], "tokens": [1.0, np.inf, 1.0], "loss": [3.0, 3.0, np.nan]})
    assert len(points_of(frame, TableColumns())) == 1
    assert "2 of 3 rows lack a finite loss, N or D and are left out: 1, 2" in caplog.text


def test_an_error_law_without_resamples_has_no_intervals():
    loss = np.linspace(1.8, 4, 30)
    points = Points(loss, loss, loss, sigmoid(loss, -0.55, 3.0, 2.6, 0.85), tuple(map(str, loss)))
    assert fit_error("sigmoid", points, resamples=0).intervals() == {}


def test_the_command_fits_any_table_and_writes_json_and_picture(tmp_path, capsys):
    points = synthetic("chinchilla", noise=0.002)
    table = tmp_path / "runs.csv"
    pd.DataFrame({"size": points.n, "D": points.d, "bpb": points.loss, "acc": 1 - 0.2 * points.loss}).to_csv(table)
    main(
        ["fit", "--data", str(table), "--params-column", "size", "--tokens-column", "D", "--loss-column", "bpb",
         "--hold-out", "size>2e9", "--score-columns", "acc", "--error-anchor", "0", "0", "--bootstrap", "30",
         "--predict", "7e9:140e9", "--budget", "1e21", "--output-dir", str(tmp_path / "out")]
    )  # fmt: skip
    report = json.loads((tmp_path / "out/fit.json").read_text())
    assert (tmp_path / "out/fit.png").read_bytes().startswith(b"\x89PNG")
    assert (report["points"], len(report["held_out"])) == (25, 5)
    assert all(abs(row["relative_error"]) < 0.01 for row in report["held_out"])
    assert report["predictions"][0]["loss_95"][0] < report["predictions"][0]["loss"]
    assert report["compute_optimal"][0]["n_95"] is not None
    assert report["counting"] == "as in the table"
    assert "held out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--loss-column", "nope"], "no such column"),
        (["--predict", "7e9"], "N:D"),
        (["--law", "nope"], "choose"),
        (["--budget", "-1"], "--budget"),
        (["--hold-out", "num_params>0"], "do not determine"),
    ],
)
def test_what_cannot_be_fitted_is_refused_with_a_reason(tmp_path, extra, words):
    points = synthetic("chinchilla", sizes=2)
    table = tmp_path / "runs.csv"
    pd.DataFrame({"num_params": points.n, "tokens": points.d, "loss": points.loss}).to_csv(table)
    with pytest.raises((ConfigError, DataError), match=words):
        main(["fit", "--data", str(table), "--output-dir", str(tmp_path), *extra])


def test_a_problem_counts_what_is_not_finite_as_infinitely_bad():
    problem = Problem(LAWS["overtraining"], np.array([1e6]), np.array([1e7]), "least-squares")
    assert problem.value(np.full((1, 4), np.nan), np.ones((1, 1)), np.ones((1, 1)))[0] == np.inf
