"""Is our engine the same as LLM Foundry's, and how much faster? Both score the same model on the same files, timed.

`python benchmarks/icl.py --data ../shared/data/icl --tokenizer ../shared/data/gpt-neox-20b-tokenizer.json`
Needs `make install-eval`. The first of both engines' runs warms up; model loading and imports are not counted.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from open_lm.command import run
from open_lm.flags import Parser, add_group, flag, read_group

FILES = {
    "copa": ("multiple_choice", " "),
    "winograd_wsc": ("schema", " "),
    "arc_easy": ("multiple_choice", "\nAnswer: "),
    "jeopardy_all": ("language_modeling", "\nAnswer: "),
    "piqa": ("multiple_choice", "\nAnswer: "),
    "lambada_openai": ("language_modeling", " "),
    "boolq": ("multiple_choice", "\nAnswer: "),
}


@dataclass(frozen=True)
class BenchmarkConfig:
    """Benchmark"""

    data: str = flag("../shared/data/icl", "Folder with LLM Foundry's files.")
    tokenizer: str = flag("../shared/data/gpt-neox-20b-tokenizer.json", "The tokenizer.")
    files: tuple[str, ...] = flag(tuple(FILES), "Which files.")
    rows: int | None = flag(None, "Only the first N rows of each file. None: all.")
    num_fewshot: int = flag(0, "Examples before each question.")
    max_seq_len: int = flag(512, "Context in tokens: LLM Foundry pads every row to it.")
    batch_size: int = flag(32, "device_eval_batch_size of LLM Foundry.")
    hidden_dim: int = flag(64, "Width of the random model.")
    n_layers: int = flag(2, "Layers of the random model.")
    threads: int = flag(2, "Threads of torch on a CPU.")
    device: str = flag("auto", "auto, cpu or cuda.")
    engines: tuple[str, ...] = flag(("native", "llm-foundry"), "Which engines.")
    output: str | None = flag(None, "Also write the figures to this JSON file.")


def main() -> None:
    """Print one line a file: both scores, both times, their quotient."""
    parser = Parser(prog="icl.py", description=__doc__)
    add_group(parser, BenchmarkConfig)
    config = read_group(parser.parse_args(), BenchmarkConfig)
    import torch

    from open_lm.distributed import start_world
    from open_lm.evaluate.icl.config import ENGINES

    torch.set_num_threads(config.threads)
    with start_world(config.device) as world, tempfile.TemporaryDirectory() as folder:
        subject, suite = subject_of(config, world.device), suite_of(config, folder)
        runners = {
            name: ENGINES.load(name)(subject, suite, world, config.max_seq_len, "fp32") for name in config.engines
        }
        warm_up = next(iter(runners.values())).keys[0]
        for runner in runners.values():
            runner.run(warm_up, lambda n: None)
        rows = [compare(runners, key) for key in runners[config.engines[0]].keys]
    total = {name: sum(row[f"{name} s"] for row in rows) for name in runners}
    print("total " + "  ".join(f"{name} {seconds:.1f} s" for name, seconds in total.items()), flush=True)
    if config.output:
        Path(config.output).write_text(json.dumps({"rows": rows, "seconds": total}, indent=1) + "\n")


def compare(runners: dict, key: str) -> dict:
    row: dict = {"key": key}
    for name, runner in runners.items():
        (record,) = runner.run(key, lambda n: None)
        row |= {f"{name}": record.value, f"{name} s": record.seconds, "questions": record.questions}
    if len(runners) == 2:
        first, second = runners
        row["equal"] = abs(row[first] - row[second]) < 1e-6
        row["times faster"] = round(row[f"{second} s"] / row[f"{first} s"], 2)
    print(json.dumps(row), flush=True)
    return row


def subject_of(config: BenchmarkConfig, device):
    import torch

    from open_lm.data.tokenizers import load_tokenizer
    from open_lm.evaluate.icl.records import CheckpointRecords
    from open_lm.evaluate.icl.subject import Subject
    from open_lm.model import create_model
    from open_lm.model.config import ModelConfig

    tokenizer = load_tokenizer(config.tokenizer)
    torch.manual_seed(0)
    architecture = ModelConfig(
        hidden_dim=config.hidden_dim, n_layers=config.n_layers, n_heads=config.hidden_dim // 32,
        seq_len=config.max_seq_len, vocab_size=-(-tokenizer.vocab_size // 128) * 128,
    )  # fmt: skip
    model = create_model(architecture).to(device).eval()
    about = CheckpointRecords("random", "", "", tokenizer.name)
    return Subject(model, tokenizer, config.max_seq_len, architecture.vocab_size, about)


def suite_of(config: BenchmarkConfig, folder: str):
    from open_lm.evaluate.icl.suite import Suite
    from open_lm.evaluate.icl.task import read_task

    tasks = []
    for name in config.files:
        kind, delimiter = FILES[name]
        lines = (Path(config.data) / f"{name}.jsonl").read_text().split("\n")
        path = Path(folder) / f"{name}.jsonl"
        path.write_text("\n".join(line for line in lines[: config.rows] if line) + "\n")
        entry = {"label": name, "dataset_uri": str(path), "icl_task_type": kind, "num_fewshot": [config.num_fewshot]}
        tasks.append(replace(read_task(entry, "benchmark"), continuation_delimiter=delimiter))
    return Suite(tasks=tuple(tasks), batch_size=config.batch_size)


if __name__ == "__main__":
    run(main)
