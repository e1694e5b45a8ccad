"""HTML of the report: one page that loads nothing from outside."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

N_COLOURS = 6
"""Runs that a page can tell apart by colour."""

STYLE = """
:root { --ground: #fbfaf7; --card: #ffffff; --ink: #1f2328; --soft: #656d76; --line: #e4e1d9; --train: #2f6fb3;
  --faint: #a9c6e4; --held-out: #d4622a; --third: #3a8c6e; --code: #f4f2ec;
  --run0: #2f6fb3; --run1: #d4622a; --run2: #3a8c6e; --run3: #8a56ac; --run4: #b8860b; --run5: #c2185b; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171a; --card: #1c2024; --ink: #e6e4df; --soft: #98a0a8;
  --line: #30363c; --train: #6aa9e9; --faint: #35506c; --held-out: #f08a4f; --third: #63bd9b; --code: #15191c;
  --run0: #6aa9e9; --run1: #f08a4f; --run2: #63bd9b; --run3: #b98ad9; --run4: #d9b154; --run5: #f06292; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); line-height: 1.5;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 30px; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 19px; margin: 44px 0 12px; }
p.lead { margin: 6px 0 24px; color: var(--soft); font-size: 17px; max-width: 80ch; }
p.note { margin: 0 0 12px; color: var(--soft); font-size: 14.5px; max-width: 90ch; }
.absent { color: var(--soft); font-style: italic; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(168px, 1fr)); gap: 12px; }
.card, figure, pre, table, .flow > div { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.card { padding: 14px 16px; }
.card b { display: block; font-size: 25px; font-weight: 650; letter-spacing: -0.01em;
  font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: 13.5px; display: block; }
figure { margin: 0; padding: 14px 16px 8px; }
figcaption { font-size: 14.5px; margin-bottom: 6px; display: flex; gap: 20px; flex-wrap: wrap; align-items: baseline; }
figcaption b { font-size: 15.5px; }
.key::before { content: ""; display: inline-block; width: 18px; height: 3px; border-radius: 2px; margin-right: 7px;
  vertical-align: middle; background: var(--line); }
.key.train::before { background: var(--train); } .key.held-out::before { background: var(--held-out); }
.key.faint::before { background: var(--faint); } .key.third::before { background: var(--third); }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 12px; margin-top: 12px; }
@media (max-width: 760px) { .pair, .texts { grid-template-columns: 1fr; } }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font-size: 13px; font-variant-numeric: tabular-nums; }
svg .axis { stroke: var(--soft); stroke-width: 1; } svg .grid { stroke: var(--line); stroke-width: 1; }
svg .rule { stroke: var(--soft); stroke-width: 1.2; stroke-dasharray: 5 5; } svg .rule-name { font-style: italic; }
svg .line { fill: none; stroke-width: 2.4; stroke-linejoin: round; }
svg .line.faint { stroke: var(--faint); stroke-width: 1.3; } svg .line.train { stroke: var(--train); }
svg .band { fill: transparent; } svg .tip { visibility: hidden; pointer-events: none; }
svg .hover:hover .tip { visibility: visible; } svg .tip line { stroke: var(--soft); stroke-width: 1; }
svg .tip rect { fill: var(--card); stroke: var(--line); } svg .tip text { fill: var(--ink); }
RUN_COLOURS
svg .line.held-out { stroke: var(--held-out); } svg .line.third { stroke: var(--third); }
svg .dot { stroke: var(--card); stroke-width: 1.5; } svg .dot.held-out { fill: var(--held-out); }
svg .dot.third { fill: var(--third); }
.pair svg text { font-size: 15px; }
.texts { display: grid; grid-template-columns: 1fr 1fr; gap: 12px; align-items: start; } .texts pre { margin: 0; }
.flow { display: flex; gap: 24px; flex-wrap: wrap; }
.flow > div { flex: 1 1 150px; padding: 12px 14px; position: relative; }
.flow > div + div::before { content: "→"; position: absolute; left: -21px; top: 50%; transform: translateY(-50%);
  color: var(--soft); font-size: 18px; }
.flow h3 { margin: 0 0 4px; font-size: 13px; color: var(--soft); font-weight: 600; }
.flow b { font-size: 19px; display: block; font-variant-numeric: tabular-nums; }
.flow span { font-size: 13.5px; color: var(--soft); display: block; }
.wide { overflow-x: auto; margin-bottom: 12px; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: 15px; overflow: hidden; }
th, td { padding: 8px 14px; text-align: left; border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; } th { color: var(--soft); font-weight: 600; font-size: 13.5px; }
.bar { position: relative; height: 10px; min-width: 180px; border-radius: 5px; background: var(--line); }
.bar b { position: absolute; inset: 0 auto 0 0; border-radius: 5px; background: var(--train); }
.bar i { position: absolute; top: -4px; bottom: -4px; width: 2px; background: var(--held-out); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
pre { padding: 12px 16px; margin: 0 0 12px; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13.5px;
  line-height: 1.5; font-family: ui-monospace, "Cascadia Mono", "DejaVu Sans Mono", Menlo, monospace;
  background: var(--code); }
pre .prompt { color: var(--held-out); font-weight: 650; } pre .comment { color: var(--soft); }
footer { margin-top: 48px; color: var(--soft); font-size: 13.5px; }
""".replace(
    "RUN_COLOURS",
    "\n".join(
        f".key.run{k}::before {{ background: var(--run{k}); }} svg .line.run{k} {{ stroke: var(--run{k}); }} "
        f"svg .line.run{k}.dotted {{ stroke-width: 1; stroke-dasharray: 2 3; }} "
        f"svg .dot.run{k} {{ fill: var(--run{k}); }} "
        f"svg .dot.run{k}.ring {{ fill: var(--card); stroke: var(--run{k}); stroke-width: 2; }}"
        for k in range(N_COLOURS)
    ),
)


def page(title: str, lead: str, sections: Iterable[str], footer: str, *, refresh_seconds: int | None = None) -> str:
    """The whole document; `sections` are pieces of HTML, empty ones are left out. It may reload itself."""
    refresh = f'<meta http-equiv="refresh" content="{refresh_seconds}">\n' if refresh_seconds else ""
    body = "\n".join(section for section in sections if section)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n{refresh}'
        f"<style>{STYLE}</style></head>\n"
        f'<body><main>\n<h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>\n{body}\n'
        f"<footer>{escape(footer)}</footer>\n</main></body></html>\n"
    )


def section(heading: str, words: str, content: str) -> str:
    """A heading, a sentence under it, and `content`; nothing when there is no content."""
    return f"<section><h2>{escape(heading)}</h2>{note(words)}{content}</section>" if content else ""


def note(words: str) -> str:
    """A sentence in small type."""
    return f'<p class="note">{escape(words)}</p>' if words else ""


def cards(facts: Sequence[tuple[str, str]]) -> str:
    """The figures to see first: (value, what it is)."""
    shown = (f'<div class="card"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for value, name in facts)
    return f'<div class="cards">{"".join(shown)}</div>'


def figure(title: str, keys: Sequence[tuple[str, str]], chart: str) -> str:
    """A chart under its title and its keys: (style of the line, what it is)."""
    shown = "".join(f'<span class="key {style}">{escape(name)}</span>' for style, name in keys)
    return f"<figure><figcaption><b>{escape(title)}</b>{shown}</figcaption>{chart}</figure>"


def side_by_side(figures: Sequence[str]) -> str:
    """Small figures, two in a row."""
    return f'<div class="pair">{"".join(figures)}</div>' if figures else ""


def flow(stages: Sequence[tuple[str, str, Sequence[str]]]) -> str:
    """Stages from left to right: (name, the count that matters, further lines)."""
    shown = []
    for name, value, lines in stages:
        rest = "".join(f"<span>{escape(line)}</span>" for line in lines)
        shown.append(f"<div><h3>{escape(name)}</h3><b>{escape(value)}</b>{rest}</div>")
    return f'<div class="flow">{"".join(shown)}</div>' if shown else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, words: Sequence[int] = (0,)) -> str:
    """A table; every column but those of `words` holds numbers."""
    if not rows:
        return ""
    kinds = ["" if k in words else ' class="number"' for k in range(len(head))]
    names = "".join(f"<th{kind}>{escape(name)}</th>" for kind, name in zip(kinds, head, strict=True))
    lines = ("".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, row, strict=True)) for row in rows)
    return scrolled(f"<tr>{names}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}")


def scrolled(rows: str) -> str:
    """A table of `rows` that scrolls sideways where the page is narrower."""
    return f'<div class="wide"><table>{rows}</table></div>'


def scores(rows: Sequence[tuple[str, float, float | None, float | None, int]]) -> str:
    """Tasks with their scores as bars from 0 to 1: (task, score, standard error, chance, questions)."""
    lines = []
    for task, score, error, chance, n_questions in rows:
        mark = f'<i style="left:{100 * chance:.1f}%"></i>' if chance else ""
        bar = f'<div class="bar"><b style="width:{100 * score:.1f}%"></b>{mark}</div>'
        cells = (f"{score:.3f}" + (f" ± {error:.3f}" if error is not None else ""), f"{n_questions:,}")
        numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells)
        lines.append(f"<tr><td>{escape(task)}</td><td>{bar}</td>{numbers}</tr>")
    head = '<tr><th>task</th><th>0 … 1</th><th class="number">score</th><th class="number">questions</th></tr>'
    return scrolled(f"{head}{''.join(lines)}") if lines else ""


def samples(texts: Sequence[tuple[str, str]]) -> str:
    """Written texts: (prompt, continuation)."""
    shown = (f'<pre><span class="prompt">{escape(prompt)}</span>{escape(rest)}</pre>' for prompt, rest in texts)
    return f'<div class="texts">{"".join(shown)}</div>' if texts else ""


def commands(lines: Sequence[str]) -> str:
    """Commands to copy; lines that begin with # explain them."""
    shown = (f'<span class="comment">{escape(line)}</span>' if line.startswith("#") else escape(line) for line in lines)
    return f"<pre>{chr(10).join(shown)}</pre>" if lines else ""
