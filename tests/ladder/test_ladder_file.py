"""The ladder file: what it may say, and the plan and the trainer's flags that follow from it."""

import json

import pytest
from ladders import SIZES, write_ladder
from runs import SEQ_LEN, VOCAB

from open_lm.errors import ConfigError
from open_lm.ladder import ModelLadder
from open_lm.ladder.__main__ import main
from open_lm.ladder.config import read_ladder
from open_lm.ladder.ladder import differing
from open_lm.ladder.plan import as_argv, plan_size, train_flags
from open_lm.params import parse_args, read_config
from open_lm.run.dry_run import forecast


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sizs": {}}, "did you mean sizes"),
        ({"data": "LEAVE OUT"}, "data is missing"),
        ({"data": {"manifests": []}}, "manifests"),
        ({"data": {"manifests": ["a"], "weights": [1, 2]}}, "2 weights for 1"),
        ({"data": {"manifests": "d/manifest.jsonl"}}, "need a list"),
        ({"val_data": "d/manifest.jsonl"}, "need a list"),
        ({"sizes": {}}, "found none"),
        ({"sizes": {"a/b": {}}}, "path component"),
        ({"counting": "some"}, "non-embedding"),
        ({"flags": {"lr": 1e-3}}, "the ladder sets"),
        ({"max_devices": 0}, "max_devices"),
        ({"sequence_length": True}, "sequence_length"),
        ({"seed": -1}, "seed"),
    ],
)
def test_a_ladder_file_that_cannot_be_honoured_is_refused(tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        read_ladder(write_ladder(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"run": {"configurator": "mine"}}, "wsds-chinchilla"),
        ({"run": {"lr_multiplyer": 1}}, "did you mean lr_multiplier"),
        ({"run": {"lr_multiplier": "big"}}, "need a number"),
        ({"run": {"lr_multiplier": 0}}, "above 0"),
        ({"run": {"decay_fraction": 2}}, "at most 1"),
        ({"run": {"chinchilla_multiple": 0.001, "batch_multiplier": 20}}, "has no step"),
        ({"sizes": {"a": {"hidden_dim": 8}}}, "n_layers"),
        ({"sizes": {"a": {"wide": 8}}}, "no such key"),
        ({"sizes": {"nope": {}}}, "no such model"),
        ({"max_devices": 1, "sizes": {"a": {**SIZES["a"], "min_devices": 2}}}, "needs at least 2"),
        ({"model": {"parametrization": "best"}}, "standard"),
    ],
)
def test_a_rule_or_size_that_makes_no_run_is_refused(tmp_path, changes, words):
    config = read_ladder(write_ladder(tmp_path, **changes))
    with pytest.raises(ConfigError, match=words):
        plan_size(config, next(iter(config.sizes)))


def test_a_missing_file_says_how_to_make_one(tmp_path):
    with pytest.raises(ConfigError, match="init"):
        read_ladder(str(tmp_path / "none.json"))


def test_the_trainer_takes_exactly_the_numbers_of_the_plan(tmp_path):
    ladder = ModelLadder.from_file(write_ladder(tmp_path, run={"chinchilla_multiple": 3}))
    plan = ladder.plan("b")
    model = tmp_path / "model.json"
    model.write_text(json.dumps(plan.size.architecture.to_dict()))
    expected = forecast(read_config(parse_args(as_argv(train_flags(plan, str(model), str(tmp_path), "b")))))
    steps = expected.steps
    assert (steps.tokens_per_step, steps.total_steps) == (plan.batch.tokens, plan.steps)
    assert expected.lr_at.period_ends == plan.schedule.period_ends
    for step in range(steps.total_steps):
        assert expected.lr_at(step) == pytest.approx(plan.schedule(step), abs=1e-12)
    assert [plan.schedule(end - 1) for end in plan.schedule.period_ends] == pytest.approx([0.0] * 4, abs=1e-15)
    assert expected.config.checkpoint.fixed_steps == set(plan.checkpoint_steps)
    flags = expected.config.as_flags()
    assert (flags["wd"], flags["wd_rule"], flags["grad_clip_norm"]) == (0.1, "all-but-embedding", 1.0)
    assert (flags["seed"], flags["z_loss_coefficient"], flags["beta2"]) == (3, 1e-5, 0.99)


def test_a_chinchilla_multiple_that_is_no_power_of_two_ends_the_last_period():
    from open_lm.ladder import WSDSChinchillaRunConfigurator

    assert WSDSChinchillaRunConfigurator(chinchilla_multiple=3).multiples() == (0.5, 1, 2, 3)
    assert WSDSChinchillaRunConfigurator(chinchilla_multiple=0.5).multiples() == (0.5,)


def test_the_library_answers_what_the_seed_does(tmp_path):
    ladder = ModelLadder.from_file(write_ladder(tmp_path))
    assert ladder.get_num_params("a") == 6568
    assert ladder.get_model_config("a").hidden_dim == 8
    assert ladder.get_num_devices("a") == 1
    assert ladder.get_save_folder("a") == str(tmp_path / "out/a")
    assert ladder.work_dir == str(tmp_path / "out")
    assert [(c.info.step, c.path) for c in ladder.get_checkpoints("a")][:2] == [(0, None), (58, None)]
    assert len(ladder.get_metrics()) == 0
    remote = ModelLadder.from_file(write_ladder(tmp_path, dir="s3://bucket/ladders"))
    assert remote.get_save_folder("a") == "s3://bucket/ladders/a"
    assert remote.work_dir == str(tmp_path / "tiny-work")
    assert "s3://bucket/ladders" in remote.command("a")


def test_another_seed_or_counting_is_another_run(tmp_path):
    first = ModelLadder.from_file(write_ladder(tmp_path)).plan("a")
    seeded = ModelLadder.from_file(write_ladder(tmp_path, seed=4)).plan("a")
    counted = ModelLadder.from_file(write_ladder(tmp_path, counting="total")).plan("a")
    assert {k for k, v in first.facts().items() if seeded.facts()[k] != v} == {"seed"}
    assert counted.n_params == 6696
    assert counted.steps != first.steps


def test_a_dry_run_warns_of_a_batch_and_a_size_off_their_aim(tmp_path, capsys):
    sizes = {"1M": {"hidden_dim": 128, "n_layers": 4, "rank_microbatch_tokens": 16_000}}
    path = write_ladder(tmp_path, sizes=sizes, run={}, vocab_size=256)
    main(["dry-run", "--ladder", path, "--tokens-per-second", "1e5"])
    report = capsys.readouterr().out
    assert "WARNING" in report
    assert "off the name 1M" in report
    assert "hours at 100,000 tokens/s" in report
    assert (tmp_path / "out/plots/lr-1M.png").read_bytes().startswith(b"\x89PNG")


def test_init_writes_a_ladder_file_that_can_be_planned(tmp_path, capsys, monkeypatch):
    write_ladder(tmp_path)
    monkeypatch.chdir(tmp_path)
    arguments = [
        "init",
        "--ladder",
        "made/ladder.json",
        "--sizes",
        "16x1",
        "32x2",
        "--manifests",
        "data/manifest.jsonl",
    ]
    arguments += [
        "--val-data",
        "held-out/manifest.jsonl",
        "--vocab-size",
        str(VOCAB),
        "--sequence-length",
        str(SEQ_LEN),
    ]
    main([*arguments, "--device-type", "cpu"])
    made = ModelLadder.from_file("made/ladder.json")
    assert made.sizes == ("16x1", "32x2")
    assert made.config.path(made.config.data.manifests[0]) == "data/manifest.jsonl"
    assert made.plan("32x2").steps > 0
    with pytest.raises(ConfigError, match="exists"):
        main([*arguments, "--device-type", "cpu"])


def test_an_unknown_command_or_size_is_named(tmp_path):
    with pytest.raises(ConfigError, match="dry-run"):
        main(["climb"])
    with pytest.raises(ConfigError, match="--size c"):
        main(["status", "--ladder", write_ladder(tmp_path), "--size", "c"])


def test_a_plan_from_before_the_architecture_had_a_key_is_the_same_plan(tmp_path):
    facts = ModelLadder.from_file(write_ladder(tmp_path)).plan("a").facts()
    kept = json.loads(json.dumps(facts))
    del kept["model"]["parametrization"], kept["model"]["base_width"]
    assert differing(kept, json.loads(json.dumps(facts))) == []
    kept["model"]["hidden_dim"] = 16
    assert differing(kept, json.loads(json.dumps(facts))) == ["model.hidden_dim was 16, is now 8"]


def test_the_plan_of_a_started_size_does_not_depend_on_the_folder_it_is_called_from(tmp_path, monkeypatch):
    path = write_ladder(tmp_path)
    monkeypatch.chdir(tmp_path)
    near = plan_size(read_ladder("ladder.json"), next(iter(SIZES))).facts()
    monkeypatch.chdir("/")
    assert plan_size(read_ladder(path), next(iter(SIZES))).facts() == near
