"""Write docs/methods, a page for each method and an index by family and by year, and docs/settings.md.

Run it after a change to a method or to the schema of settings: ``python docs/generate.py``.
"""

from __future__ import annotations

import inspect
import textwrap
from itertools import groupby
from pathlib import Path

from vrm import methods
from vrm.config.effects import CONDITIONS, PYTHON_CONDITIONS
from vrm.config.roles import REQUIRED, Setting, section_of, settings
from vrm.config.schema import Run, Trained
from vrm.contract import Method
from vrm.methods._page import needs_in_words, page, venue_in_words

FOLDER = Path(__file__).parent / "methods"
SETTINGS = Path(__file__).parent / "settings.md"

SETTINGS_HEAD = """# Settings

Every setting of a run, made from its schema, `src/vrm/config/schema.py`. On the command line a setting is a word
`key=value`, in any order: `vrm distill digits student=resnet8 method=kd optimizer.lr=0.1`. `X=v` is short for
`X.name=v`, and `vrm train` calls the student `model`. In a recipe and in Python the part before the dot is a section:
`vrm.distill(.., optimizer={"lr": 0.1})`. In every path `~` stands for the home folder.

Settings resolve in this order, later ones win: default, recipe, values published for the data set, values published
for the pair of networks, a variant of the recipe, command line or Python call. A run says where each came from.

A setting's role says what it decides:

- **trained**: the result. A run goes on with the same value only, unless it is marked below. Two runs of one row of a
  table share all of these, except the seeds.
- **kept**: what is written, and when.
- **placed**: where the work is done, how fast, and what stops it.

A setting that is given where it has no effect is refused with the reason. `vrm resume RUN key=value` accepts what may
change when a run goes on.
"""


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
            lines.append(f"| [{name}]({name}.md) | {method.title} | {venue_in_words(method)} | {needs} |")
        lines.append("")
    lines += ["## By year", ""]
    for year, names in groupby(sorted(found, key=lambda name: (found[name].year, name)), lambda n: found[n].year):
        lines.append(f"- {year}: " + ", ".join(f"[{name}]({name}.md)" for name in names))
    return "\n".join(lines) + "\n"


def settings_page() -> str:
    """Return the page of all settings, by section."""
    lines = [SETTINGS_HEAD]
    by_section: dict[str, list[Setting]] = {}
    for setting in settings():
        by_section.setdefault(setting.key.rpartition(".")[0], []).append(setting)
    for name, found in by_section.items():
        schema = section_of(Run.model_fields[name]) if name else Run
        lines += [f"## {name.capitalize() or 'Run'}", "", *_paragraph(inspect.getdoc(schema) or ""), ""]
        for setting in found:
            lines += [f"### `{setting.key.removesuffix('.name')}`", "", *_facts(setting), ""]
    lines += ["## Without effect from Python", ""]
    lines += _paragraph(
        "`vrm.distill` is given networks and data as objects and refuses: "
        + ", ".join(f"`{condition.key}`" for condition in PYTHON_CONDITIONS)
        + "."
    )
    return "\n".join(lines) + "\n"


def _facts(setting: Setting) -> list[str]:
    """Return the lines on one setting: type, default, role, meaning, example, and where it is refused."""
    default = REQUIRED if setting.default == REQUIRED else f"default `{setting.default}`"
    role = f"**{setting.decides}**"
    if isinstance(setting.role, Trained):
        role += {
            "fixed": ", a seed" if setting.role.seed else "",
            "free": ", may change when a run goes on",
            "folder": ", a run folder may move",
        }[setting.role.resume]
    reasons = [condition.otherwise for condition in CONDITIONS if condition.key == setting.key]
    refused = f" Refused where it has no effect: {reasons[0]}." if reasons else ""
    facts = f"{setting.type[0].upper()}{setting.type[1:]}; {default}; {role}."
    example = "vrm distill cifar100" if setting.key == "recipe" else setting.example  # no setting to give
    return [*_paragraph(facts), "", *_paragraph(f"{setting.meaning} For example `{example}`.{refused}")]


def _paragraph(text: str) -> list[str]:
    return textwrap.wrap(text.replace("``", "`"), 118, break_long_words=False, break_on_hyphens=False)


def main() -> None:
    """Write the pages anew."""
    SETTINGS.write_text(settings_page(), encoding="utf-8")
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.md"):
        old.unlink()
    found = {name: methods.load(name) for name in methods.names()}
    for name in found:
        (FOLDER / f"{name}.md").write_text(page(name), encoding="utf-8")
    (FOLDER / "index.md").write_text(index(found), encoding="utf-8")


if __name__ == "__main__":
    main()
