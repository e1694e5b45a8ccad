"""torchrun hands our flags through: argparse there must not take one of them for an abbreviation of its own."""

import subprocess
import sys

import pytest

from open_lm.errors import ConfigError
from open_lm.params import build_parser


@pytest.fixture(scope="module")
def torchrun_options():
    shown = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--help"], capture_output=True, text=True)
    return {word.strip("[],") for word in shown.stdout.split() if word.strip("[],").startswith("--")}


def test_no_flag_but_logs_is_a_prefix_of_a_torchrun_option(torchrun_options):
    ours = {name for action in build_parser()._actions for name in action.option_strings if name.startswith("--")}
    shadowed = {name for name in ours for theirs in torchrun_options if theirs.startswith(name) and theirs != name}
    assert shadowed <= {"--logs"}, "give these flags an alias, as --logs has --logs-dir"
    assert "--logs-dir" in ours


@pytest.mark.parametrize("prefix", ["--z-loss", "--accum"])
def test_prefixes_that_people_use_stay_unambiguous(prefix):
    assert build_parser().parse_args(["--dataset-type", "synthetic", prefix, "1"])


def test_an_unknown_flag_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean --global-batch-size"):
        build_parser().parse_args(["--global-batchsize", "3"])
