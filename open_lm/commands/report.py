"""`openlm report`: a run on one self-contained HTML page: curves, counts at each stage, scores, texts, commands."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_lm import storage, text
from open_lm.errors import ConfigError
from open_lm.evaluate.records import read_results, short
from open_lm.flags import Parser, add_group, flag, read_group
from open_lm.report import page
from open_lm.report.charts import Rule, Series, line_chart
from open_lm.report.facts import RunSummary, read_json, read_json_lines, read_run, smoothed


@dataclass(frozen=True)
class ReportConfig:
    """Report"""

    run: str = flag("", "Folder of the run, <logs>/<name>.")
    output: str = flag("report.html", "The page to write.")
    title: str | None = flag(None, "Heading of the page. None: the name of the run.")
    corpus: str | None = flag(None, "corpus.json of scripts/make_corpus.py.")
    ledgers: tuple[str, ...] = flag((), "ledger.json of each set of shards, the training set first.")
    scores: str | None = flag(None, "results.json of eval/eval_openlm_ckpt.py.")
    samples: str | None = flag(None, "Texts that scripts/generate.py wrote, as jsonl.")
    commands: str | None = flag(None, "The commands that made the run; lines with # explain them.")
    timings: str | None = flag(None, "Seconds of each step: lines of step, tab, seconds.")

    def __post_init__(self) -> None:
        if not self.run:
            raise ConfigError("--run is missing: name the folder of a run, <logs>/<name>.")
        for name in ("corpus", "scores", "samples", "commands", "timings"):
            path = getattr(self, name)
            if path and not storage.exists(path):
                raise ConfigError(f"--{name} {path}: no such file. Leave the flag out, or make the file first.")


def main(argv: Sequence[str] | None = None) -> str:
    """Write the page and return its path."""
    parser = Parser(description="Put a run on one self-contained HTML page.")
    add_group(parser, ReportConfig)
    config = read_group(parser.parse_args(argv), ReportConfig)
    storage.write_text(config.output, build(config))
    print(f"report: {Path(config.output).resolve()}")
    return config.output


def build(config: ReportConfig) -> str:
    """The page as HTML."""
    facts = read_run(config.run)
    corpus = read_json(config.corpus, "--corpus") if config.corpus else None
    ledgers = [read_json(path, "--ledgers") for path in config.ledgers]
    sections = [
        page.cards(headline(facts)),
        page.section("Loss", explain_loss(facts), loss_figure(facts)),
        page.pair(rate_figure(facts), speed_figure(facts)),
        page.section(
            "From text to tokens",
            "Every document and token is accounted for.",
            page.flow(stages(facts, corpus, ledgers)),
        ),
        page.section("Scores", "The orange mark is chance, what guessing would score.", score_table(config.scores)),
        page.section("Texts it writes", "The prompt is coloured; the rest is the model's.", texts(config.samples)),
        page.section("What took how long", "", timing_table(config.timings)),
        page.section(
            "The commands", "Each can be copied and run from the root of the clone.", command_list(config.commands)
        ),
    ]
    return page.page(config.title or facts.name, lead(facts), sections, footer(facts))


def lead(facts: RunSummary) -> str:
    """What the page is about, in one sentence."""
    model = facts.config.get("model", {})
    shape = f" {model['n_layers']} layers, {model['hidden_dim']} wide, context {model['seq_len']}." if model else ""
    return f"A language model trained from scratch on {text.count(facts.last('train/tokens') or 0)} tokens.{shape}"


def headline(facts: RunSummary) -> list[tuple[str, str]]:
    """The figures to see first."""
    held_out, uniform = facts.last("valid/loss"), facts.uniform_loss
    cards = []
    if held_out is not None:
        cards.append((f"{held_out:.3f}", "held-out loss, nats a token"))
        cards.append((f"{math.exp(held_out):.1f}", "held-out perplexity"))
    if held_out is not None and uniform:
        cards.append((f"{held_out / uniform:.0%}", f"of ln({facts.vocab_size}) = {uniform:.2f}, the loss of a guess"))
    cards.append((text.count(facts.last("train/tokens") or 0), "tokens trained on"))
    cards.append((text.count(facts.last("train/tokens_per_second") or 0), "tokens a second at the end"))
    return cards


def explain_loss(facts: RunSummary) -> str:
    """What the loss chart shows."""
    known = "The dashed line is the loss of a model that knows nothing. " if facts.uniform_loss else ""
    return f"{known}Held-out documents are never trained on; each of their tokens is scored once."


def loss_figure(facts: RunSummary) -> str:
    """Training and held-out loss over tokens."""
    raw, held_out = facts.over_tokens("train/loss"), facts.over_tokens("valid/loss")
    series = [
        Series("training", raw, "faint"),
        Series("training, smoothed", smoothed(raw, max(len(raw) // 20, 1)), "train"),
        Series("held-out", held_out, "held-out", dots=True),
    ]
    rules = (
        [Rule(f"ln({facts.vocab_size}) = {facts.uniform_loss:.2f}", y=facts.uniform_loss)] if facts.uniform_loss else []
    )
    rules += [Rule("checkpoint", x=step * facts.tokens_per_step) for step in facts.checkpoint_steps[:-1]]
    chart = line_chart(
        series, label="Loss over tokens", x_name="tokens", write_x=text.count, write_y=lambda y: f"{y:.3g}", rules=rules
    )
    keys = [("faint", "training"), ("train", "training, smoothed"), ("held-out", "held-out")]
    return page.figure("Loss, nats a token", keys, chart)


def rate_figure(facts: RunSummary) -> str:
    """The learning rate over tokens."""
    series = [Series("learning rate", facts.over_tokens("train/lr"), "third")]
    chart = line_chart(
        series, label="Learning rate over tokens", x_name="tokens", write_x=text.count, write_y=lambda y: f"{y:.2g}",
        width=560, height=260, from_zero=True,
    )  # fmt: skip
    return page.figure("Learning rate", [], chart)


def speed_figure(facts: RunSummary) -> str:
    """Throughput over tokens."""
    series = [Series("tokens a second", facts.over_tokens("train/tokens_per_second"), "train")]
    chart = line_chart(
        series, label="Throughput over tokens", x_name="tokens", write_x=text.count, write_y=text.count,
        width=560, height=260, from_zero=True,
    )  # fmt: skip
    return page.figure("Throughput, tokens a second", [], chart)


def stages(facts: RunSummary, corpus: Any, ledgers: Sequence[Any]) -> list[tuple[str, str, list[str]]]:
    """What went in and came out at each stage, from files of text to tokens trained on."""
    found = []
    if corpus:
        left_out = sum(corpus["rejected"].values())
        lines = [
            f"{corpus['documents']:,} documents",
            f"{len(corpus['sources'])} sources",
            f"{left_out:,} files left out",
        ]
        found.append(("text", f"{corpus['bytes'] / 1e6:.1f} MB", lines))
    found += [ledger_stage(name, ledger) for name, ledger in zip(_names(len(ledgers)), ledgers, strict=True)]
    trained, steps = facts.last("train/tokens") or 0, max(facts.metrics.get("train/loss", {0: 0.0}))
    found.append(
        (
            "trained",
            f"{text.count(trained)} tokens",
            [f"{steps:,} steps", f"{facts.tokens_per_step:,.0f} tokens a step"],
        )
    )
    held_out = facts.last("valid/tokens")
    if held_out is not None:
        found.append(("validated on", f"{text.count(held_out)} tokens", ["of held-out text,", "each exactly once"]))
    return found


def _names(n_ledgers: int) -> list[str]:
    return ["training shards", *["held-out shards"] * (n_ledgers - 1)][:n_ledgers]


def ledger_stage(name: str, ledger: Any) -> tuple[str, str, list[str]]:
    """One set of shards: tokens and samples out, documents in."""
    documents, tokens = ledger["documents"], ledger["tokens"]
    rejected = sum(documents["rejected"].values())
    lines = [
        f"{documents['tokenized']:,} documents, {rejected:,} rejected",
        f"{ledger['samples']:,} samples of {ledger['tokens_per_sample']}",
        f"{tokens['tail']:,} tokens of tail",
    ]
    return name, f"{text.count(tokens['in'])} tokens", lines


def score_table(path: str | None) -> str:
    """The tasks of a results.json; of several checkpoints the last."""
    if not path:
        return ""
    rows = [
        (f"{record.key}, {short(record.metric)}", record.value, record.stderr, record.chance, record.questions)
        for record in read_results(path).runs[-1].records
    ]
    return page.scores(rows)


def texts(path: str | None) -> str:
    """The texts of a file of samples."""
    rows = read_json_lines(path, needed=("prompt", "text")) if path else []
    return page.samples([(row["prompt"], row["text"].replace("<|endoftext|>", "")) for row in rows])


def command_list(path: str | None) -> str:
    """The lines of a file of commands."""
    return page.commands(storage.read_text(path).splitlines()) if path else ""


def timing_table(path: str | None) -> str:
    """The seconds of each step; of a step that was run twice the later ones."""
    lines = storage.read_text(path).splitlines() if path else []
    seconds = {step: float(value) for step, _, value in (line.partition("\t") for line in lines)}
    rows = [(step, text.duration(value)) for step, value in seconds.items()]
    return page.table(("step", "time"), [*rows, ("all steps", text.duration(sum(seconds.values())))] if rows else [])


def footer(facts: RunSummary) -> str:
    """Where the figures come from."""
    return f"From {facts.folder}, by Python {platform.python_version()} on {platform.machine()}."
