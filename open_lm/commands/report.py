"""`openlm report`: one run, or several compared, on one self-contained HTML page; refreshed while they train."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from open_lm import storage, text
from open_lm.errors import ConfigError
from open_lm.evaluate.records import read_results, short
from open_lm.flags import Parser, add_group, flag, read_group
from open_lm.report import figures, page
from open_lm.report.answers import answer_tables, compared_answers
from open_lm.report.facts import RunSummary, distinct_names, read_json, read_run
from open_lm.report.rows import read_json_lines
from open_lm.report.stages import stage_table


@dataclass(frozen=True)
class ReportConfig:
    """Report"""

    run: tuple[str, ...] = flag(
        (), "Folder of a run, <logs>/<name>; several, or --run again, to compare them.", repeatable=True
    )
    output: str = flag("report.html", "The page to write.")
    title: str | None = flag(None, "Heading of the page. None: the names of the runs.")
    watch: int | None = flag(
        None, "Rewrite the page every so many seconds until interrupted; it reloads itself.", least=1
    )
    corpus: str | None = flag(None, "corpus.json that `openlm corpus` wrote.")
    ledgers: tuple[str, ...] = flag((), "ledger.json of each set of shards, the training set first.")
    scores: str | None = flag(None, "results.json of `openlm evaluate`.")
    samples: str | None = flag(None, "Texts that `openlm generate` wrote, as jsonl.")
    answers: tuple[str, ...] = flag(
        (), "Folders of `openlm evaluate --reward … --prompts`, one for each model whose answers are compared."
    )
    stages: tuple[str, ...] = flag(
        (), "Folders of the runs that led to --run, in their order: a table says what each measured first and last."
    )
    commands: str | None = flag(None, "The commands that made the run; lines with # explain them.")
    timings: str | None = flag(None, "Seconds of each step: lines of step, tab, seconds.")

    def __post_init__(self) -> None:
        if not self.run:
            raise ConfigError("--run is missing: name the folder of a run, <logs>/<name>.")
        if len(self.run) > page.N_COLOURS:
            raise ConfigError(f"--run names {len(self.run)} runs: a page compares up to {page.N_COLOURS}.")
        for folder in self.answers:
            if not storage.exists(storage.join(folder, "rewards.json")):
                raise ConfigError(f"--answers {folder}: holds no rewards.json. Make it with openlm evaluate --reward.")
        for name in ("corpus", "scores", "samples", "commands", "timings"):
            path = getattr(self, name)
            if path and not storage.exists(path):
                raise ConfigError(f"--{name} {path}: no such file. Leave the flag out, or make the file first.")


def main(argv: Sequence[str] | None = None) -> str:
    """Write the page and return its path; with --watch write it again and again."""
    parser = Parser(description="Put a run, or several to compare, on one self-contained HTML page.")
    add_group(parser, ReportConfig)
    config = read_group(parser.parse_args(argv), ReportConfig)
    storage.write_text(config.output, build(config))
    print(f"report: {Path(config.output).resolve()}", flush=True)
    while config.watch:
        time.sleep(config.watch)
        storage.write_text(config.output, build(config))
    return config.output


def build(config: ReportConfig) -> str:
    """The page as HTML."""
    names = distinct_names(config.run)
    runs = [replace(read_run(folder), name=name) for folder, name in zip(config.run, names, strict=True)]
    first = runs[0]
    corpus = read_json(config.corpus, "--corpus") if config.corpus else None
    ledgers = [read_json(path, "--ledgers") for path in config.ledgers]
    is_one = len(runs) == 1
    sections = [
        page.cards(figures.headline(first)) if is_one else figures.comparison(runs),
        page.section(
            "Stage by stage",
            "What training measured when it began and when it ended, the mean of up to three logged values each.",
            stage_table([*map(read_run, config.stages), first]) if config.stages else "",
        ),
        page.section("Loss", explain_loss(runs), figures.loss_figure(runs) + figures.small_figures(runs)),
        page.section("Scores over training", "", figures.score_figures(runs)),
        page.section(
            "From text to tokens",
            "Every document and token is accounted for.",
            page.flow(stages(first, corpus, ledgers)) if (is_one and not first.counts_steps) or ledgers else "",
        ),
        page.section("Scores", "The orange mark is chance, what guessing would score.", score_table(config.scores)),
        page.section("Texts it writes", "The prompt is coloured; the rest is the model's.", texts(config.samples)),
        page.section(
            "Answers compared",
            "Mean rewards with their standard errors, and what each model writes to the same prompts.",
            compared_answers(config.answers),
        ),
        page.section(
            "Answers while training",
            "By the first and by the last model whose answers were shown (rollouts.jsonl).",
            answer_tables(first) if is_one else "",
        ),
        page.section("What took how long", "", timing_table(config.timings)),
        page.section(
            "The commands", "Each can be copied and run from the root of the clone.", command_list(config.commands)
        ),
    ]
    title = config.title or " and ".join(run.name for run in runs)
    return page.page(title, lead(runs), sections, footer(runs), refresh_seconds=config.watch)


def lead(runs: Sequence[RunSummary]) -> str:
    """The lead of the page: its subject, in one sentence."""
    if len(runs) > 1:
        return f"{len(runs)} runs compared over the tokens they trained on."
    model = runs[0].config.get("model", {})
    shape = f" {model['n_layers']} layers, {model['hidden_dim']} wide, context {model['seq_len']}." if model else ""
    flags, n_tokens = runs[0].config.get("flags", {}), text.count(runs[0].last("train/tokens") or 0)
    if runs[0].task != "pretrain" or flags.get("pretrained"):
        length = f"in {runs[0].steps:,} steps" if runs[0].counts_steps else ""
        return f"A language model post-trained by {runs[0].task} {length or f'on {n_tokens} tokens'}.{shape}"
    return f"A language model trained from scratch on {n_tokens} tokens.{shape}"


def explain_loss(runs: Sequence[RunSummary]) -> str:
    """The caption of the loss chart."""
    if any(run.task not in figures.PREDICTING for run in runs):
        return "The loss of a preference or of a reward says little by itself: look at the figures below it."
    known = "The dashed line is the loss of a uniform guess. " if runs[0].uniform_loss else ""
    return f"{known}Validation text is never trained on; each of its tokens is scored once. Hover for values."


def stages(facts: RunSummary, corpus: Any, ledgers: Sequence[Any]) -> list[tuple[str, str, list[str]]]:
    """Input and output of each stage, from files of text to tokens trained on."""
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
    trained, steps = facts.last("train/tokens") or 0, facts.steps
    per_step = f"{facts.tokens_per_step:,.0f} tokens a step"
    found.append(("trained", f"{text.count(trained)} tokens", [f"{steps:,} steps", per_step]))
    validated = facts.last("valid/tokens")
    if validated is not None:
        found.append(("validated on", f"{text.count(validated)} tokens", ["of validation text,", "each exactly once"]))
    return found


def _names(n_ledgers: int) -> list[str]:
    return ["training shards", *["validation shards"] * (n_ledgers - 1)][:n_ledgers]


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


def footer(runs: Sequence[RunSummary]) -> str:
    """The source of the figures."""
    folders = ", ".join(run.folder for run in runs)
    return f"From {folders}, by Python {platform.python_version()} on {platform.machine()}."
