"""The page: well-formed, self-contained, true to the records, and safe against any name."""

from __future__ import annotations

import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from vrm import config
from vrm.report import command, summarise, write_report, write_run_report
from vrm.report.html import looks
from vrm.runs.errors import RunError
from vrm.runs.folder import Record, read_run

from .runs import write_run

EVIL = "<script>alert('1')</script>&\"]]>"
VOID = {"meta", "link", "br", "img", "hr", "input"}


class Reader(HTMLParser):
    """Checks that tags nest, and gathers tags, attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def several(folder: Path) -> list[Record]:
    """Three settings over two seeds, one of them with a run that did not end."""
    return [
        write_run(
            folder / f"{method}-{views}-{seed}",
            seed=seed,
            method=method,
            views=views,
            top1=top1,
            finished=finished,
            epochs=2,
        )
        for method, views, seed, top1, finished in (
            ("kd", 1, 0, (50.0, 80.0), True),
            ("kd", 1, 1, (50.0, 82.0), True),
            ("kd", 2, 0, (55.0, 84.0), True),
            ("kd", 2, 1, (55.0, 85.0), True),
            ("vrm", 1, 0, (60.0, 90.0), True),
            ("vrm", 1, 1, (61.0,), False),
        )
    ]


def test_the_page_is_whole_and_self_contained(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, several(tmp_path / "runs"), title="A title", notes=["A note."], repeat="vrm demo")
    page = path.read_text(encoding="utf-8")
    read = Reader(page)
    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        ElementTree.fromstring(svg)
    assert not {"script", "link", "img", "iframe", "object"} & set(read.tags)
    assert not {"src", "href", "xlink:href"} & {name for name, _ in read.attributes}
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "@import" not in page
    assert not re.findall(r"url\((?!#)", page)
    identities = [value for name, value in read.attributes if name == "id"]
    assert len(identities) == len(set(identities))
    for svg in re.findall(r'<svg[^>]*role="img"[^>]*>', page):
        assert all(name in identities for name in re.search(r'aria-labelledby="([^"]*)"', svg)[1].split())  # type: ignore[index]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_the_page_tells_what_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, several(tmp_path / "runs"), title="A title", notes=["A note."], repeat="vrm demo seeds=2")
    text = " ".join(Reader(path.read_text(encoding="utf-8")).text.split())
    for told in (
        "A title", "A note.", "81.00", "1.41", "84.50", "0.71", "90.00", "1 of 2", "2 × 2", "77,850", "unequal passes",
        "Unfinished, not counted: vrm, seed 1 (epoch 1, top-1 61.00)", "Teacher: resnet20, top-1 97.00 %",
        "vrm is ahead, but not beyond doubt: 5.50 points over kd with two views", "chosen on the test set",
        "cpu (x86_64, 1 thread)", "2.8.0", "vrm demo seeds=2", "recipe: digits",
    ):  # fmt: skip
        assert told in text


def test_curves_are_whole_and_the_legend_shows_their_lines(tmp_path: Path) -> None:
    """From the first epoch on, with the axis that takes; each name beside a piece of its own line; no column twice."""
    records = several(tmp_path / "runs")
    records += [write_run(tmp_path / "ce", method="ce", top1=(2.0, 60.0, 90.0, 91.0), loss=(9.0, 1.0, 1.0, 1.0))]
    write_report(tmp_path / "report.html", records, title="A title")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    charts = re.findall(r'<svg[^>]*role="img".*?</svg>', page, flags=re.DOTALL)
    assert len(charts) == 6, "curves, runs, and a panel of losses for each of four settings"
    for chart in (charts[0], *charts[2:]):
        height = float(re.search(r'viewBox="0 0 \d+ (\d+)"', chart)[1])  # type: ignore[index]
        assert (paths := re.findall(r'<path class="line [^>]* d="M([^"]*)"', chart))
        assert all(0 <= float(point.split()[1]) <= height for path in paths for point in path.split("L"))
    drawn = re.findall(r'<path (class="line [^"]*"(?: stroke-dasharray="[^"]*")?) d=', charts[0])
    legend = re.findall(r'<line (class="line [^"]*"(?: stroke-dasharray="[^"]*")?) x1=', charts[0])
    assert sorted(set(drawn)) == sorted(set(legend) | {line for line in drawn if " faint" in line})
    assert len(legend) == len(set(legend)) == 4
    heads = re.findall(r"<th scope=.col.[^>]*>([^<]*)</th>", page.split("</thead>")[0])
    assert len(heads) == len(set(heads))
    assert {"last sd", "best sd"} <= set(heads)


def test_any_characters_are_shown_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    records = [
        write_run(
            tmp_path / "a",
            method="vrm",
            student=EVIL,
            device=EVIL,
            options={EVIL: EVIL},
            data={"name": EVIL},
            teacher=EVIL,
            finished=finished,
            seed=seed,
        )
        if seed == 0
        else write_run(tmp_path / "b<i>", method="vrm", student=EVIL, finished=False, seed=seed)
        for seed, finished in ((0, True), (1, False))
    ]
    write_report(path, records, title=EVIL, notes=[EVIL], label=lambda record: EVIL, repeat=EVIL)
    read = Reader(path.read_text(encoding="utf-8"))
    assert not {"script", "i"} & set(read.tags)
    assert read.text.count(EVIL) >= 8


def test_no_epoch_yet_is_a_page_too(tmp_path: Path) -> None:
    record = write_run(tmp_path / "a", top1=(), loss=(), finished=False)
    write_run_report(record.path)
    assert "No epoch is done yet" in Reader((record.path / "report.html").read_text(encoding="utf-8")).text


def test_values_that_are_not_finite_leave_the_curve(tmp_path: Path) -> None:
    record = write_run(tmp_path / "a", top1=(1.0, 2.0, 3.0), loss=(float("nan"), float("inf"), 2.0))
    write_run_report(record.path)
    page = (record.path / "report.html").read_text(encoding="utf-8")
    Reader(page)
    assert not re.findall(r'="[^"]*\b(nan|inf)\b', page)


def test_the_report_of_one_run(tmp_path: Path) -> None:
    record = write_run(tmp_path / "a", top1=(50.0, 70.0, 65.0))
    write_run_report(record.path)
    text = Reader((record.path / "report.html").read_text(encoding="utf-8")).text
    assert "kd: resnet8 from resnet20 on digits" in text
    assert "Test top-1 65.00\xa0% after the last epoch; 70.00\xa0% after the best" in text
    assert "Every run." not in text
    with pytest.raises(RunError, match="not a run folder"):
        write_run_report(tmp_path)


def test_many_settings_keep_their_own_looks(tmp_path: Path) -> None:
    rows = summarise(
        [write_run(tmp_path / f"m{i}-{v}", method=f"m{i}", views=v) for i in range(8) for v in (1, 2)]
        + [write_run(tmp_path / "vrm", method="vrm")]
    )
    look = looks(rows, rows[-1])
    assert len(set(look.values())) == len(rows)
    assert [id(row) for row in rows if look[id(row)].hue == 0] == [id(rows[-1])]
    one, two = look[id(rows[0])], look[id(rows[1])]
    assert one.hue == two.hue  # one method, one hue; more views are drawn solid
    assert (two.rank, one.rank) == (0, 1)


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("train", ["model=resnet20", "optimizer.lr=0.1", "data.labels_per_class=5"]),
        (
            "distill",
            ["student=resnet8", "teacher=a folder/t/", "method=kd", "method.temperature=2", "views=2", "seed=3"],
        ),
        ("distill", ["student=resnet8", "method=ce", "schedule=step", "schedule.milestones=[3,5]", "threads=1"]),
    ],
)
def test_the_command_repeats_the_run(tmp_path: Path, verb: str, words: list[str]) -> None:
    run = config.resolve(verb, "digits", [*words, f"run={tmp_path}/r"]).run  # type: ignore[arg-type]
    (tmp_path / "r").mkdir()
    (tmp_path / "r/config.yaml").write_text(config.dump(run), encoding="utf-8")
    told = command(read_run(tmp_path / "r"))
    assert told is not None
    first, second, recipe, *given = shlex.split(told)
    assert (first, second, recipe) == ("vrm", "train" if run.teacher is None else "distill", "digits")
    assert config.resolve(second, recipe, given).run == run  # type: ignore[arg-type]
    assert len(given) <= len(words) + 1


def test_no_command_for_runs_from_python_and_all_words_for_lost_recipes(tmp_path: Path) -> None:
    assert command(write_run(tmp_path / "a", recipe="python")) is None
    told = command(write_run(tmp_path / "b", recipe="gone.yaml", options={"temperature": 2.0}))
    assert told is not None
    assert told.startswith("vrm distill gone.yaml run=")
    assert "method=kd method.temperature=2.0" in told
    write_run_report(tmp_path / "a")
    assert "started from Python" in (tmp_path / "a/report.html").read_text(encoding="utf-8")
