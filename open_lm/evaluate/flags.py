"""Flags of the evaluation command."""

from __future__ import annotations

from dataclasses import dataclass

from open_lm.errors import ConfigError
from open_lm.flags import Registry, flag

ENGINES = Registry(
    "engine",
    {
        "native": "open_lm.evaluate.engine.runner:NativeRunner",
        "lm-eval": "open_lm.evaluate.lm_harness.runner:HarnessRunner",
        "llm-foundry": "open_lm.evaluate.foundry.runner:FoundryRunner",
    },
)

DEFAULT_OUTPUT = "eval_results"


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation"""

    eval_yaml: str | None = flag(None, "Tasks to ask: an LLM Foundry YAML with icl_tasks (engine lm-eval needs none).")
    checkpoint: tuple[str, ...] = flag((), "Run folders (their newest checkpoint) or weights files, one or more.")
    tokenizer: str | None = flag(
        None, "Hub id, local folder or tokenizer.json. None: the one the checkpoint names, if it names one."
    )
    engine: str = flag(
        "native",
        "Who scores: native (our own), llm-foundry (the library itself: the same numbers, slower), lm-eval (harness).",
        choices=ENGINES,
    )
    tasks: tuple[str, ...] = flag((), "Only these tasks: labels of the YAML, or names of lm-eval tasks. None: all.")
    task_path: str | None = flag(None, "Folder of further lm-eval task files (--engine lm-eval).")
    limit: int | None = flag(None, "Only the first N questions of each task (--engine lm-eval).")
    output_dir: str | None = flag(
        None, "Where results.json, results.csv and results.md go. None: eval_results/ in the working folder."
    )
    resume: bool = flag(False, "Keep the tasks that --output-dir holds already (records.jsonl); score the others.")
    max_seq_len: int | None = flag(None, "Longest prompt in tokens. None: the YAML's, at most the model's context.")
    eval_precision: str | None = flag(
        None, "Number format. None: the YAML's precision.", choices=("fp32", "amp_bf16", "fp16", "bf16")
    )
    batch_tokens: int | None = flag(
        None, "Tokens in one forward pass of the native engine. None: 4096 on a CPU, 65536 on a GPU."
    )
    device: str = flag("auto", "Where to compute: auto (a GPU if there is one), cpu or cuda.")
    dclm_json: bool = flag(
        False, "Also write the scores of each checkpoint as DCLM does: dclm/evaluation_NAME.json in --output-dir."
    )
    dclm_metadata: str | None = flag(
        None, "DCLM's eval/eval_meta_data.csv, whose baselines Extended_v2 needs (--dclm-json).", metavar="CSV"
    )
    fsdp: bool = flag(
        False,
        "Spread the weights of each model over the ranks of torchrun, for models that do not fit one GPU. Rank 0 reads "
        "the file. Not with --engine llm-foundry.",
    )

    def __post_init__(self) -> None:
        if not self.eval_yaml and self.engine != "lm-eval":
            raise ConfigError("--eval-yaml is missing: give a file of tasks, such as eval/yamls/light.yaml.")
        if self.dclm_metadata and not self.dclm_json:
            raise ConfigError("--dclm-metadata: has no effect without --dclm-json.")
        if self.fsdp and self.engine == "llm-foundry":
            raise ConfigError("--fsdp: not with --engine llm-foundry, take native: it gives the same numbers.")
        if self.engine == "lm-eval" and not self.tasks:
            raise ConfigError("--tasks is missing: name lm-eval tasks, such as --tasks arc_easy.")
