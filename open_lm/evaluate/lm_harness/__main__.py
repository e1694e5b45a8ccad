"""The harness's own command line, with `--model openlm` known to it."""

from open_lm.distributed import ranks_from_environment
from open_lm.errors import ConfigError
from open_lm.evaluate.lm_harness.runner import require_harness


def main() -> None:
    """Run `lm_eval` as installed."""
    require_harness()
    if ranks_from_environment()[1] > 1:
        raise ConfigError("the harness's own command runs on one rank: take `openlm evaluate --engine lm-eval`.")
    from lm_eval.__main__ import cli_evaluate

    import open_lm.evaluate.lm_harness.adapter  # noqa: F401  (registers openlm)

    cli_evaluate()


if __name__ == "__main__":
    from open_lm.command import run

    run(main)
