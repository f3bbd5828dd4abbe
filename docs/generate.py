"""Write docs/methods: a page for each method, and an index by family and by year.

Run it after a change to a method: ``python docs/generate.py``.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from vrm import methods
from vrm.contract import Method
from vrm.methods._page import needs_in_words, page

FOLDER = Path(__file__).parent / "methods"


def index(found: dict[str, type[Method]]) -> str:
    """Return the index of methods, by family and by year, each with a link to its page."""
    lines = [
        "# Methods",
        "",
        "Each page is made from the method's file; `vrm methods NAME` shows it with its cost.",
        "",
    ]
    lines += ["## By family", ""]
    for family, names in groupby(sorted(found, key=lambda name: (found[name].family, name)), lambda n: found[n].family):
        lines += [f"### {family.capitalize()}", "", "| method | title | venue | needs |", "| --- | --- | --- | --- |"]
        for name in names:
            method = found[name]
            needs = needs_in_words(method())
            lines.append(f"| [{name}]({name}.md) | {method.title} | {method.venue} {method.year} | {needs} |")
        lines.append("")
    lines += ["## By year", ""]
    for year, names in groupby(sorted(found, key=lambda name: (found[name].year, name)), lambda n: found[n].year):
        lines.append(f"- {year}: " + ", ".join(f"[{name}]({name}.md)" for name in names))
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the folder anew."""
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.md"):
        old.unlink()
    found = {name: methods.load(name) for name in methods.names()}
    for name in found:
        (FOLDER / f"{name}.md").write_text(page(name), encoding="utf-8")
    (FOLDER / "index.md").write_text(index(found), encoding="utf-8")


if __name__ == "__main__":
    main()
