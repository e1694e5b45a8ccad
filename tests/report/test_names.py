"""Names on one page and in one picture: of runs that are called alike, and of the sets they were validated on."""

import json
import re

import pytest
from PIL import Image

from open_lm.commands import plot, report
from open_lm.report.facts import distinct_names


def made(folder, sets, losses=(4.0, 3.0)):
    """A run that measured `losses` in training and 0.5 more on each set, the first of them as valid/loss."""
    (folder / "checkpoints").mkdir(parents=True)
    metrics = ["valid/loss", *(f"valid/{name}/loss" for name in sets[1:])]
    rows = [
        {"step": k, "train/tokens": 100 * k, "train/loss": loss, **{m: loss + 0.5 + n for n, m in enumerate(metrics)}}
        for k, loss in enumerate(losses, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "checkpoints/results.jsonl").write_text(json.dumps([{"name": name} for name in sets]) + "\n")
    return str(folder)


def page_of(tmp_path, *runs):
    report.main(["--run", *runs, "--output", str(tmp_path / "page.html")])
    return (tmp_path / "page.html").read_text()


def test_runs_of_one_name_are_told_apart_by_the_folders_above(tmp_path):
    runs = [made(tmp_path / logs / "third", ["held"]) for logs in ("logs", "logs2")]
    assert distinct_names(runs) == plot.labels_of(runs) == ["logs/third", "logs2/third"]
    assert distinct_names([*runs, str(tmp_path / "other/")]) == ["logs/third", "logs2/third", "other"]
    assert "<td>logs/third</td>" in (content := page_of(tmp_path, *runs)) and "<td>logs2/third</td>" in content


def test_the_page_of_a_run_shows_every_validation_set_by_name(tmp_path):
    content = page_of(tmp_path, made(tmp_path / "run", ["held", "seen"]))
    for shown in ("validation loss on held, nats a token", "validation on held 3.500", "validation on seen 4.500"):
        assert shown in content, shown
    assert "<b>4.500</b><span>validation loss on seen</span>" in content


def test_losses_on_different_sets_never_stand_in_one_column(tmp_path):
    first, second = made(tmp_path / "a", ["held", "seen"]), made(tmp_path / "b", ["seen"])
    content = page_of(tmp_path, first, second)
    table = content[content.index("<table>") : content.index("</table>")]
    head, *rows = [re.findall(r"<t[hd][^>]*>([^<]*)<", row) for row in table.split("</tr>")[:-1]]
    shown = [dict(zip(head, row, strict=True)) for row in rows]
    columns = ("validation loss on held", "validation loss on seen")
    assert [[row[name] for name in columns] for row in shown] == [["3.5000", "4.5000"], ["–", "3.5000"]]
    assert "validated on different sets" in content
    assert "(dots: validation on held; rings: on seen)" in content
    dots = re.findall(r'<circle class="dot (run\d) dotted( ring)?"', content)
    assert dots == [("run0", "")] * 2 + [("run0", " ring")] * 2 + [("run1", " ring")] * 2
    assert "different sets" not in page_of(tmp_path, first, first)


@pytest.mark.parametrize("losses", [(4.0, 3.0), (4.0,)])
def test_a_picture_has_marks_for_every_set_and_for_a_run_of_one_report(tmp_path, losses):
    pytest.importorskip("matplotlib")

    def colours(sets):
        plot.main([made(tmp_path / "-".join(sets), sets, losses), "--output", str(tmp_path / "runs.png")])
        with Image.open(tmp_path / "runs.png") as picture:
            panel = picture.convert("RGB").crop((0, 0, picture.width // 3, picture.height))
            return sum(n for n, (r, g, b) in panel.getcolors(1 << 20) if b - r > 80)  # the first colour, a blue

    one, two = colours(["held"]), colours(["held", "seen"])
    assert one > 60 and two > one + 30
