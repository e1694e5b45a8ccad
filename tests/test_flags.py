"""Flags: declared once in a dataclass, typed on the command line or in a file, refused with the nearest known name."""

from dataclasses import dataclass

import pytest

from open_lm import flags
from open_lm.errors import ConfigError
from open_lm.flags import Parser, add_group, flag, read_group


@dataclass(frozen=True)
class Cooking:
    """Cooking"""

    lr: float = flag(5e-4, "Heat.")
    wd: float = flag(0.2, "Salt.")
    steps: int = flag(10, "Stirs.")
    mode: str = flag("boil", "How.", choices=("boil", "fry"))
    fast: bool = flag(False, "Hurry.")
    names: tuple[str, ...] = flag((), "What.")
    limit: float | None = flag(None, "Most.")

    def __post_init__(self):
        if self.steps < 0:
            raise ConfigError(f"--steps {self.steps} must not be negative.")


def parse(*argv, file=None):
    parser = Parser(prog="cook")
    add_group(parser, Cooking)
    if file is not None:
        flags.set_defaults_from(parser, flags.read_config_file(str(file)), f"--config {file}")
    return read_group(parser.parse_args(list(argv)), Cooking)


def test_defaults_come_from_the_dataclass():
    assert parse() == Cooking()


def test_every_kind_of_value_is_read():
    got = parse("--lr", "3e-4", "--fast", "--names", "a", "b", "--limit", "1", "--mode", "fry")
    assert got == Cooking(lr=3e-4, fast=True, names=("a", "b"), limit=1.0, mode="fry")


def test_a_bool_can_be_switched_off_again():
    assert parse("--fast", "--no-fast").fast is False


def test_a_prefix_that_is_unique_is_enough():
    assert parse("--st", "3").steps == 3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--stepz", "3"], "did you mean --steps"),
        (["--mode", "grill"], "invalid choice: 'grill'"),
        (["--steps", "many"], "invalid int value: 'many'"),
        (["--steps", "-1"], "--steps -1"),
        (["stray"], "a value without a flag"),
    ],
)
def test_what_is_wrong_is_named(argv, message):
    with pytest.raises(ConfigError, match=message):
        parse(*argv)


def test_a_file_sets_defaults_and_the_command_line_wins(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("lr: 3e-4\nwd: 0\nnames: [x, y]\nfast: true\nsteps: 7\n")  # YAML reads `3e-4` as a string
    assert parse("--steps", "9", file=file) == Cooking(lr=3e-4, wd=0.0, names=("x", "y"), fast=True, steps=9)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("mode: banana", "choose one of boil, fry"),
        ("stepps: 3", "did you mean steps"),
        ("fast: 1", "need true or false"),
        ("lr: null", "found nothing"),
        ("max-steps: 1", "unknown flag"),
        ("config: x", "unknown flag"),
        ("steps: 1.5", "need one int"),
        ("steps: true", "need one int"),
        ("- a list", "not `flag: value` pairs"),
        ("a: [", "readable YAML"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path, content, message):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message) as error:
        parse(file=file)
    assert str(file) in str(error.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        parse(file=tmp_path / "none.yaml")


def test_underscore_spelling_takes_both():
    parser = Parser(prog="cook")

    @dataclass(frozen=True)
    class Ray:
        """Ray"""

        content_key: str = flag("text", "Key.")

    add_group(parser, Ray, separator="_")
    assert parser.parse_args(["--content_key", "a"]).content_key == "a"
    assert parser.parse_args(["--content-key", "b"]).content_key == "b"


def test_help_shows_defaults_and_choices(capsys):
    parser = Parser(prog="cook")
    add_group(parser, Cooking)
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    shown = capsys.readouterr().out
    assert "Heat. (default: 0.0005)" in shown and "{boil,fry}" in shown and "--no-fast" in shown
