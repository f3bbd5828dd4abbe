"""The documentation page of each method."""

from __future__ import annotations

import importlib.util
import inspect
import re
from pathlib import Path

import pytest
import torch

from vrm import methods
from vrm.methods._page import explain_options, needs_in_words, page, venue_in_words

COMMITTED = Path(__file__).parents[2] / "docs" / "methods"
each_method = pytest.mark.parametrize("name", methods.names())


@each_method
def test_says_all_there_is(name: str) -> None:
    method, text = methods.load(name), page(name)
    flat = " ".join(text.split())
    assert text.startswith(f"# {name}\n")
    for fact in (method.title, venue_in_words(method), method.family):
        assert fact in flat
    assert explain_options(method).keys() == methods.options(method).keys(), "explain each option under Args"
    for option, meaning in explain_options(method).items():
        assert re.search(rf"- `{option}` \([^()]*, default [^()]*\): {re.escape(meaning)}", flat)
    for data, condition, pairs in methods.published_tables(method):
        for pair in pairs:
            rows = [row for row in text.splitlines() if row.startswith(f"- {data}, ") and condition in row]
            assert any(pair in row or pair == "*" for row in rows)
    formula = [line for line in (inspect.getdoc(inspect.getmodule(method)) or "").splitlines() if line[:4] == "    "]
    assert all(line in text for line in formula if "`" not in line)
    assert "``" not in text
    assert needs_in_words(method())


@each_method
def test_leaves_torch_randomness_alone(name: str) -> None:
    before = torch.get_rng_state()
    page(name)
    needs_in_words(methods.load(name)())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("path", sorted(COMMITTED.glob("*.md")), ids=lambda path: path.stem)
def test_committed_page_is_up_to_date(path: Path) -> None:
    """Pages of methods that are there are as `python docs/generate.py` writes them, and in the index."""
    if path.stem in methods.names():
        assert path.read_text(encoding="utf-8") == page(path.stem)
        assert (COMMITTED / "index.md").read_text(encoding="utf-8").count(f"({path.stem}.md)") == 2


@each_method
def test_every_method_has_a_committed_page(name: str) -> None:
    assert (COMMITTED / f"{name}.md").is_file(), "run `make docs`"


def test_committed_index_is_up_to_date() -> None:
    """By family and by year, as `python docs/generate.py` writes it for the methods that are there."""
    spec = importlib.util.spec_from_file_location("generate", COMMITTED.parent / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    text = (COMMITTED / "index.md").read_text(encoding="utf-8")
    if not {*re.findall(r"\[(\w+)\]\(\1\.md\)", text)} - {*methods.names()}:  # none was taken away
        assert text == generate.index({name: methods.load(name) for name in methods.names()})
    families, years = text.split("## By year")
    for name in methods.names():
        method = methods.load(name)
        (section,) = (part for part in families.split("### ") if f"[{name}]({name}.md)" in part)
        assert section.startswith(method.family.capitalize())
        (line,) = (line for line in years.splitlines() if f"[{name}]({name}.md)" in line)
        assert line.startswith(f"- {method.year}: ")


def test_unknown_method() -> None:
    name = methods.names()[-1]
    with pytest.raises(ValueError, match=f"did you mean .*{name}"):
        page(name + "x")
