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
from open_lm.ladder.plan import plan_size
from open_lm.ladder.records import smoothed_loss
from open_lm.ladder.training import as_argv, require_devices, train_flags
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
        ({"name": 5}, "name in the ladder file: found 5, need text"),
        ({"dir": None}, "dir in the ladder file: found null, need text"),
        ({"device_type": 7}, "device_type .* need text"),
        ({"sizes": {"a": 5}}, r"sizes.a .* need an object"),
        ({"sizes": ["60M", {}]}, r"sizes\[1\] .* need text"),
        ({"sizes": ["60M", "60M"]}, "60M stands twice"),
        ({"data": {"manifests": [3]}}, r"data.manifests\[0\] .* need text"),
        ({"data": {"manifests": ["a"], "weights": ["x"]}}, r"data.weights\[0\] .* need a number"),
        ({"data": {"manifests": ["a"], "weights": [-1]}}, "from 0 on"),
        ({"model": []}, "need an object"),
        ({"tokenizer": ["a"]}, "tokenizer .* need text"),
        ({"rank_microbatch_tokens": 4096.5}, "whole number"),
        ({"flags": {"skip-scheduler": True}}, "the ladder sets --skip-scheduler"),
        ({"flags": {"lr-cooldown-power": 2}}, "the ladder sets"),
        ({"flags": {"force-min-lr": 1e-4}}, "the ladder sets"),
        ({"flags": {"--lr-scheduler": "cosine"}}, "the ladder sets"),
        ({"flags": {"epochs": 3}}, "the ladder sets"),
        ({"flags": {"qk_norm": False}}, "stand under model"),
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
        ({"run": {"z_loss": float("nan")}}, "finite"),
        ({"run": {"decay_fraction": 2}}, "at most 1"),
        ({"run": {"chinchilla_multiple": 0.001, "batch_multiplier": 20}}, "has no step"),
        ({"run": {"chinchilla_multiple": 0.04, "batch_multiplier": 0.1}}, "warm-up of .* outlasts"),
        ({"run": {"chinchilla_multiple": 0.5, "decay_fraction": 0.95}}, "warm-up of .* outlasts"),
        ({"sizes": {"a": {"hidden_dim": 8}}}, "n_layers"),
        ({"sizes": {"a": {"wide": 8}}}, "no such key"),
        ({"sizes": {"nope": {}}}, "no such model"),
        ({"max_devices": 1, "sizes": {"a": {**SIZES["a"], "min_devices": 2}}}, "needs at least 2"),
        ({"model": {"parametrization": "best"}}, "standard"),
        ({"sizes": {"a": {**SIZES["a"], "hidden_dim": "8"}}}, "hidden_dim .* whole number"),
        ({"sizes": {"a": {**SIZES["a"], "n_heads": 1.5}}}, "n_heads .* whole number"),
        ({"sizes": {"a": {**SIZES["a"], "rank_microbatch_tokens": 0}}}, "rank_microbatch_tokens .* from 1 on"),
        ({"sizes": {"a": {"model": 3}}}, "sizes.a.model .* need text"),
        ({"sizes": {"a": {**SIZES["a"], "ffn_multiplier": -1}}}, "above 0"),
    ],
)
def test_a_rule_or_size_that_makes_no_run_is_refused(tmp_path, changes, words):
    path = write_ladder(tmp_path, **changes)
    with pytest.raises(ConfigError, match=words):
        main(["dry-run", "--no-plot", "--ladder", path])


def test_a_key_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "ladder.json"
    path.write_text('{"name": "x", "sizes": {"a": {}, "a": {}}}')
    with pytest.raises(ConfigError, match="'a' stands twice"):
        read_ladder(str(path))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"flags": {"precison": "fp32"}}, "did you mean --precision"),
        ({"flags": {"workers": "many"}}, "workers"),
        ({"flags": {"lr_cooldown_po": 2}}, "change --lr-cooldown-power from 1.0 to 2.0"),
        ({"flags": {"mesh": "tp=2"}}, "do not fit"),
        ({"max_devices": 2, "sizes": {"a": {**SIZES["a"], "min_devices": 2, "min_dp": 1}}}, "Give flags.mesh"),
    ],
)
def test_flags_of_training_are_checked_before_anything_runs(tmp_path, changes, words):
    path = write_ladder(tmp_path, **changes)
    for command in ("dry-run", "run"):
        with pytest.raises(ConfigError, match=words):
            main([command, "--ladder", path])
    assert not (tmp_path / "out/a").exists()


def test_ranks_that_are_not_data_parallel_take_the_mesh_of_the_flags(tmp_path):
    sizes = {"a": {**SIZES["a"], "min_devices": 2, "min_dp": 1}}
    ladder = ModelLadder.from_file(
        write_ladder(tmp_path, max_devices=4, sizes=sizes, flags={"mesh": "tp=2"}, run={"batch_multiplier": 40})
    )
    batch = ladder.plan("a").batch
    assert (batch.devices, batch.dp_world_size) == (4, 2)
    assert "--mesh tp=2" in " ".join(ladder.command("a"))


def test_a_size_that_needs_several_devices_is_sharded_over_them_and_the_dry_run_says_so(tmp_path, capsys):
    sizes = {"small": SIZES["a"], "large": {**SIZES["a"], "min_devices": 2}}
    path = write_ladder(tmp_path, max_devices=4, sizes=sizes, run={"batch_multiplier": 40, "chinchilla_multiple": 8})
    ladder = ModelLadder.from_file(path)
    assert ladder.plan("small").batch.devices > 1
    assert "--fsdp" not in ladder.command("small")
    assert "--fsdp" in ladder.command("large")
    main(["dry-run", "--ladder", path, "--no-plot"])
    memory = [line for line in capsys.readouterr().out.splitlines() if line.startswith("memory")]
    assert "whole on each" in memory[0]
    assert "sharded over 4 ranks" in memory[1]


@pytest.mark.parametrize(
    ("device_type", "n_here", "words"),
    [
        ("H100", 0, 'device_type H100 .* no GPU. Give "cpu"'),
        ("any", 2, r"on 8 devices, this machine has 2.*\n.*--nnodes=4 .*--nproc-per-node=2 -m open_lm.main --model"),
        ("any", 8, None),
        ("any", 0, None),
        ("cpu", 2, None),
    ],
)
def test_a_size_that_this_machine_is_too_small_for_is_refused_with_the_command_for_several(
    tmp_path, monkeypatch, device_type, n_here, words
):
    sizes = {"a": {**SIZES["a"], "min_devices": 8}}
    ladder = ModelLadder.from_file(write_ladder(tmp_path, sizes=sizes, max_devices=8, device_type=device_type))
    monkeypatch.setattr("torch.cuda.device_count", lambda: n_here)
    plan, command = ladder.plan("a"), ladder.command("a")
    if words is None:
        require_devices(plan, command)
    else:
        with pytest.raises(ConfigError, match=words):
            ladder.run("a")
        assert (tmp_path / "out/a/model.json").exists()  # the printed command finds what it names


def test_a_decay_of_the_whole_period_keeps_the_names_of_finished_models(tmp_path):
    run = {"chinchilla_multiple": 2, "decay_fraction": 1.0, "lr_multiplier": 0.05}
    checkpoints = ModelLadder.from_file(write_ladder(tmp_path, run=run)).plan("a").numbers.checkpoints
    assert [info.description for info in checkpoints] == [
        "initialisation", "period 1, 0.5×C post-decay", "period 2, 1×C post-decay", "period 3, 2×C post-decay",
    ]  # fmt: skip


def test_the_training_loss_of_a_checkpoint_is_that_of_the_last_tenth_of_its_decay(tmp_path):
    run = {"chinchilla_multiple": 4, "batch_multiplier": 0.02}
    plan = ModelLadder.from_file(write_ladder(tmp_path, run=run, val_data=[])).plan("a")
    last, decay = plan.steps, plan.decay_steps(plan.numbers.periods[-1])
    assert plan.loss_steps(last) == decay // 10 > 1
    assert plan.loss_steps(last - decay) == decay // 10  # of the same period
    rows = {step: {"train/loss": float(last - step)} for step in range(1, last + 1)}
    expected = sum(range(decay // 10)) / (decay // 10)
    assert smoothed_loss(rows, last, plan.loss_steps(last)) == pytest.approx(expected)
    assert smoothed_loss(rows, 0, 5) is None
    assert smoothed_loss({10: {"train/loss": 3.0}, 20: {"train/loss": 2.0}}, 20, 4) == 2.0
    uneven = {10: {"train/loss": 3.0}, 11: {"train/loss": 2.0}}  # each the mean since the one before
    assert smoothed_loss(uneven, 11, 10) == pytest.approx(32 / 11)


def test_a_missing_file_says_how_to_make_one(tmp_path):
    with pytest.raises(ConfigError, match="init"):
        read_ladder(str(tmp_path / "none.json"))


def test_the_trainer_takes_exactly_the_numbers_of_the_plan(tmp_path):
    ladder = ModelLadder.from_file(write_ladder(tmp_path, run={"chinchilla_multiple": 3}))
    plan = ladder.plan("b")
    model = tmp_path / "model.json"
    model.write_text(json.dumps(plan.size.architecture.to_dict()))
    expected = forecast(read_config(parse_args(as_argv(train_flags(plan, str(model), str(tmp_path), "b")))))
    steps = expected.run_length
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


def test_init_takes_model_files_by_paths_from_the_ladder_and_refuses_two_of_one_name(tmp_path, monkeypatch):
    write_ladder(tmp_path)
    monkeypatch.chdir(tmp_path)
    architecture = ModelLadder.from_file("ladder.json").get_model_config("a").to_dict()
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "m.json").write_text(json.dumps(architecture))
    arguments = ["init", "--ladder", "made/l.json", "--manifests", "data/manifest.jsonl", "--vocab-size", str(VOCAB)]
    arguments += ["--sequence-length", str(SEQ_LEN), "--sizes", "one/m.json"]
    with pytest.raises(ConfigError, match="a second size called m"):
        main([*arguments, "two/m.json"])
    main(arguments)
    assert json.loads((tmp_path / "made/l.json").read_text())["sizes"] == {"m": {"model": "../one/m.json"}}
    monkeypatch.chdir("/")
    assert ModelLadder.from_file(str(tmp_path / "made/l.json")).get_model_config("m").hidden_dim == 8


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


@pytest.mark.parametrize(
    ("report_to", "warns"), [(None, True), ("tensorboard", True), ("wandb", False), ("all", False)]
)
def test_a_project_without_weights_and_biases_is_warned_of(tmp_path, report_to, warns):
    flags = {"--report-to": report_to} if report_to else {}
    plan = plan_size(read_ladder(write_ladder(tmp_path, project="mine", flags=flags)), "a")
    assert any('flags.report_to "wandb"' in warning for warning in plan.warnings) == warns
