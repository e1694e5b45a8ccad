"""Is our engine the same as LLM Foundry's, and how much faster? Both score the same model on the same files, timed.

`python benchmarks/icl.py --data ../shared/data/icl --tokenizer ../shared/data/gpt-neox-20b-tokenizer.json`
Needs `make install-eval`. The engines take turns on each file; model loading and imports are not counted. LLM Foundry
pads every row to max_seq_len, so its time is shown twice: at the longest row of the file, the least that it can be set
to, and at 1024, half of what its own `hf_eval.yaml`, OpenLM's and DCLM's files have.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
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
    rows: int = flag(40, "Only N rows of each file, evenly spaced. 0: all.")
    turns: int = flag(3, "How often each engine scores each file; medians are shown.")
    num_fewshot: int = flag(0, "Examples before each question.")
    max_seq_len: tuple[int, ...] = flag((0, 1024), "LLM Foundry pads every row to it. 0: the longest row of each file.")
    batch_size: int = flag(32, "device_eval_batch_size of LLM Foundry.")
    hidden_dim: int = flag(64, "Width of the random model.")
    n_layers: int = flag(2, "Layers of the random model.")
    context: int = flag(2048, "Context of the random model in tokens.")
    threads: int = flag(2, "Threads of torch on a CPU.")
    device: str = flag("auto", "auto, cpu or cuda.")
    engines: tuple[str, ...] = flag(("native", "llm-foundry"), "Which engines.")
    output: str | None = flag(None, "Also write the figures to this JSON file.")


def main() -> None:
    """Print one line a file and length: both scores, both times, their quotient."""
    parser = Parser(prog="icl.py", description=__doc__)
    add_group(parser, BenchmarkConfig)
    config = read_group(parser.parse_args(), BenchmarkConfig)
    import torch

    from open_lm.distributed import start_world
    from open_lm.evaluate.flags import ENGINES

    torch.set_num_threads(config.threads)
    with start_world(config.device) as world, tempfile.TemporaryDirectory() as folder:
        eval_model = eval_model_of(config, world.device)
        rows = []
        for name in config.files:
            suite, longest = suite_of(config, name, eval_model, folder)
            for max_seq_len in dict.fromkeys(n or longest for n in config.max_seq_len):
                runners = {
                    engine: ENGINES.load(engine)(eval_model, suite, world, max_seq_len, "fp32")
                    for engine in config.engines
                }
                rows.append(compare(runners, name, config.turns) | {"max_seq_len": max_seq_len})
                print(json.dumps(rows[-1]), flush=True)
    for engine in config.engines:
        print(f"{engine}: {sum(row[f'{engine} s'] for row in rows):.1f} s")
    if config.output:
        Path(config.output).write_text(json.dumps(rows, indent=1) + "\n")


def compare(runners: dict, name: str, turns: int) -> dict:
    """Scores, medians of wall and of CPU seconds, and how many times faster the first engine was in each turn."""
    wall, cpu = ({engine: [] for engine in runners} for _ in range(2))
    row: dict = {"file": name}
    for _ in range(turns):
        for engine, runner in runners.items():
            began, began_cpu = time.perf_counter(), time.process_time()
            (record,) = runner.run(runner.keys[0], lambda n: None)
            wall[engine].append(time.perf_counter() - began)
            cpu[engine].append(time.process_time() - began_cpu)
            row |= {engine: record.value, "questions": record.questions}
    row |= {f"{engine} s": round(statistics.median(seconds), 2) for engine, seconds in wall.items()}
    row |= {f"{engine} CPU-s": round(statistics.median(seconds), 2) for engine, seconds in cpu.items()}
    if len(runners) == 2:
        first, second = runners
        row["equal"] = abs(row[first] - row[second]) < 1e-6
        for unit, seconds in (("wall", wall), ("CPU", cpu)):
            ratios = sorted(b / a for a, b in zip(seconds[first], seconds[second], strict=True))
            row[f"times faster, {unit}"] = [round(x, 1) for x in (statistics.median(ratios), ratios[0], ratios[-1])]
    return row


def eval_model_of(config: BenchmarkConfig, device):
    import torch

    from open_lm.data.tokenizer import load_tokenizer
    from open_lm.evaluate.eval_model import EvalModel
    from open_lm.evaluate.records import CheckpointRecords
    from open_lm.model import create_model
    from open_lm.model.config import ModelConfig

    tokenizer = load_tokenizer(config.tokenizer)
    torch.manual_seed(0)
    architecture = ModelConfig(
        hidden_dim=config.hidden_dim, n_layers=config.n_layers, n_heads=config.hidden_dim // 32,
        seq_len=config.context, vocab_size=-(-tokenizer.vocab_size // 128) * 128,
    )  # fmt: skip
    model = create_model(architecture).to(device).eval()
    about = CheckpointRecords("random", "", "", tokenizer.name)
    return EvalModel(model, tokenizer, config.context, architecture.vocab_size, about)


def suite_of(config: BenchmarkConfig, name: str, eval_model, folder: str):
    """The task of one file, and the tokens of its longest row."""
    from open_lm.evaluate.engine.icl import IclEngine
    from open_lm.evaluate.tasks.entry import read_task
    from open_lm.evaluate.tasks.jobs import JobBook
    from open_lm.evaluate.tasks.suite import Suite

    kind, delimiter = FILES[name]
    source = Path(config.data) / f"{name}.jsonl"
    path = Path(folder) / f"{name}.jsonl"
    lines = [line for line in source.read_text().split("\n") if line]
    step = max(1, len(lines) // (config.rows or len(lines)))
    path.write_text("\n".join(lines[::step][: config.rows]) + "\n")
    entry = {"label": name, "icl_task_type": kind, "num_fewshot": [config.num_fewshot], "random_baseline": 0.0}
    task = replace(read_task({**entry, "dataset_uri": str(source)}, "benchmark"), continuation_delimiter=delimiter)
    book = JobBook([task])
    prepared = IclEngine(eval_model.model, eval_model.tokenizer, max_seq_len=config.context).prepare(book.jobs[0], book)
    longest = max(len(c.context) + len(c.continuation) for question in prepared.questions for c in question.choices)
    return Suite(tasks=(replace(task, dataset_uri=str(path)),), batch_size=config.batch_size), longest


if __name__ == "__main__":
    run(main)
