"""`openlm prepare-chat`: conversations, preference pairs or prompts to data; only answers are trained on."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from open_lm import storage
from open_lm.errors import ConfigError
from open_lm.flags import Parser, add_group, flag, read_group


@dataclass(frozen=True)
class MakeAssistantData:
    """Input and output"""

    input_files: tuple[str, ...] = flag(
        (),
        "Rows: .jsonl(.zst, .gz) or .parquet, paths or urls, globs or folders; with messages, conversations, prompt "
        "and completion, instruction and output; for pairs chosen and rejected.",
    )
    dataset: str | None = flag(None, "A data set of the Hugging Face Hub, owner/name, instead of --input-files.")
    config: str | None = flag(None, "Configuration (subset) of --dataset. None: its default.")
    split: str = flag("train", "Split of --dataset.")
    output_dir: str = flag(
        "", "Folder or url for the shards, manifest.jsonl and ledger.json. It appears when all is there."
    )
    form: str = flag(
        "conversations",
        "conversations (for --task sft); pairs: chosen and rejected answers (for preferences and reward models); "
        "prompts: prompts.jsonl (for reinforcement learning).",
        choices=("conversations", "pairs", "prompts"),
    )
    tokenizer: str = flag("EleutherAI/gpt-neox-20b", "Hub id, local Hugging Face folder, or tokenizer.json file.")
    chat_template: str | None = flag(
        None,
        "Jinja file, or one of tulu, chatml, plain. None: the tokenizer's own, else tulu. Answers are told by its "
        "{%% generation %%} blocks, else by what each adds to the text.".replace("%%", "%"),
    )
    seqlen: int = flag(2048, "Tokens a model sees at once.", least=1)
    packing: bool = flag(True, "Put several conversations into one sample, attention kept apart; else one in each.")
    on_long: str = flag(
        "truncate",
        "What is longer than --seqlen: truncate (counted; left out where no answer remains), or drop.",
        choices=("truncate", "drop"),
    )
    shard_size: int = flag(8192, "Samples in a shard; the last one may hold fewer.", least=1)
    seed: int = flag(42, "Of the shuffle.")
    num_workers: int = flag(0, "Accepted for OpenLM's commands and ignored: one process does the work.", least=0)
    num_consumers: int = flag(0, "Accepted for OpenLM's commands and ignored, as --num-workers.", least=0)
    on_bad_line: str = flag(
        "stop", "A row that is of no known form: stop, or skip and count it.", choices=("stop", "skip")
    )

    def __post_init__(self) -> None:
        if bool(self.input_files) == bool(self.dataset):
            raise ConfigError("--input-files or --dataset: give one of the two. See --help.")
        if not self.output_dir:
            raise ConfigError("--output-dir: not given. See --help.")
        if self.num_workers > 1 or self.num_consumers > 1:
            logging.warning("--num-workers, --num-consumers: ignored, one process does the work.")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Make the data set; its ledger."""
    parser = Parser(description=__doc__)
    add_group(parser, MakeAssistantData)
    flags = read_group(parser.parse_args(argv), MakeAssistantData)
    if storage.exists(flags.output_dir):
        raise ConfigError(f"--output-dir {flags.output_dir}: exists already. Choose another folder.")

    from open_lm.data.tokenizer import load_tokenizer
    from open_lm.post_training.chat.prepare import ChatJob, prepare
    from open_lm.post_training.chat.rows import files_named
    from open_lm.post_training.chat.template import load_template

    tokenizer = load_tokenizer(flags.tokenizer)
    job = ChatJob(
        form=flags.form,
        files=tuple(files_named(flags.input_files, flags.dataset, flags.config, flags.split)),
        seq_len=flags.seqlen,
        packing=flags.packing,
        truncate=flags.on_long == "truncate",
        skip_bad=flags.on_bad_line == "skip",
        shard_size=flags.shard_size,
        seed=flags.seed,
    )
    ledger = prepare(job, load_template(flags.chat_template, tokenizer), tokenizer, flags.output_dir)
    say(ledger, flags.output_dir)
    return ledger


def say(ledger: dict[str, Any], folder: str) -> None:
    """Print the sums of the ledger, and what to train with."""
    rows, tokens = ledger[ledger["form"]], ledger["tokens"]
    form, left_out = ledger["form"], {**rows["rejected"], **rows["dropped"]}
    print(f"{form:14} {rows['in']:,} in = {rows['used']:,} used + {sum(left_out.values()):,} left out {left_out}")
    if not ledger["samples"]:
        print(f"train with     --task grpo --prompts {folder}/prompts.jsonl")
        return
    print(
        f"tokens         {tokens['in']:,} in - {tokens['cut_off']:,} cut off + {tokens['padding']:,} padding = "
        f"{tokens['in_shards']:,} in {ledger['samples']:,} samples; {tokens['trained']:,} trained on"
    )
    task = "dpo" if ledger["form"] == "pairs" else "sft"
    print(f"train with     --task {task} --dataset-manifest {folder}/manifest.jsonl")
