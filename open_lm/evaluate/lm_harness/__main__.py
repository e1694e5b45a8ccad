"""The harness's own command line, with `--model openlm` known to it."""

from open_lm.evaluate.lm_harness.runner import require_harness


def main() -> None:
    """Run `lm_eval` as installed."""
    require_harness()
    from lm_eval.__main__ import cli_evaluate

    import open_lm.evaluate.lm_harness.adapter  # noqa: F401  (registers openlm)

    cli_evaluate()


if __name__ == "__main__":
    from open_lm.command import run

    run(main)
