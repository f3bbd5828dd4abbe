"""Plain YAML and ``key=value`` words: text from outside, read without executing anything."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from vrm.config.schema import ConfigError

NAMED_SECTIONS = ("teacher", "student", "model", "method", "data", "optimizer", "schedule")
"""Sections for which ``X=v`` is short for ``X.name=v``."""
PLAIN_TEXT = ("name", "weights", "root", "run", "pair", "variant", "cache")
"""Keys whose value is taken as it stands, never as a number."""
LARGEST_YAML = 200_000
"""The most characters of YAML that are read; the longest shipped recipe has two thousand."""


class _PlainLoader(yaml.SafeLoader):
    """Reads numbers, words, lists and keys only: no tags, and no references (a few can stand for gigabytes)."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise yaml.constructor.ConstructorError(None, None, "anchors and aliases are refused", event.start_mark)
        if getattr(event, "tag", None) is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the tag {event.tag!r} is refused", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        found = super().construct_mapping(node, deep)
        if len(found) < len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a key is given twice", node.start_mark)
        return cast(dict[Any, Any], found)


# As in YAML 1.2, "off", "on", "yes" and "no" are words (capture=off); a setting that is true or false accepts them.
_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag != "tag:yaml.org,2002:bool"]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def _parse(text: str) -> Any:
    """Return the content of plain YAML. Raise ``yaml.YAMLError`` for anything else."""
    if len(text) > LARGEST_YAML:
        raise yaml.YAMLError(f"it has {len(text):,} characters, at most {LARGEST_YAML:,} are read")
    try:
        return yaml.load(text, Loader=_PlainLoader)
    except (ValueError, RecursionError, OverflowError) as error:  # an impossible date, too many digits, too deep
        raise yaml.YAMLError(str(error)) from None


def read_yaml(content: bytes, what: str) -> dict[str, Any]:
    """Return the keys and values of plain YAML. Raise ``ConfigError``, which names ``what``, for anything else."""
    try:
        found = _parse(content.decode("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{what} is not plain YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ConfigError(f"{what} must hold keys and values")
    return found


def split_words(words: Sequence[str], keys: Collection[str]) -> tuple[list[str], list[str]]:
    """Return the words that set one of ``keys``, and the others."""
    own = [word for word in words if word.partition("=")[0] in keys]
    return own, [word for word in words if word not in own]


def in_words(value: object) -> str:
    """Return a value as the command line takes it."""
    if isinstance(value, str | Path):
        return str(value)
    if isinstance(value, tuple):
        value = list(value)
    text: str = yaml.safe_dump(value, default_flow_style=True, width=2**16)
    return text.removesuffix("...\n").strip()


IN_PYTHON = {
    "teacher.allow_weak": "allow_weak_teacher={}",
    "data.size": "from_dataset(.., size={})",
    "data.bad_images": "leave it out of the data set",
}
"""Settings that Python spells in a way of its own."""
PYTHON_SECTIONS = {section: f"{section}_settings" for section in ("student", "teacher", "data")} | {"method": "options"}
"""The arguments of :func:`vrm.distill` that hold the settings of a section, where they are not called like it."""


def in_python(text: str) -> str:
    """Return a message in which each setting, ``key=value`` or a quoted key, is an argument of :func:`vrm.distill`."""

    def argument(match: re.Match[str]) -> str:
        key, value = match["key"] or match["alone"], match["value"] or ".."
        if "/" in value or re.fullmatch("[a-z][a-z0-9_]*", value):
            value = value.capitalize() if value in ("true", "false") else f'"{value}"'
        section, _, name = key.rpartition(".")
        if key in IN_PYTHON:
            return IN_PYTHON[key].format(value)
        if section and name == "name":
            return f"{section}={value}"
        return f'{PYTHON_SECTIONS.get(section, section)}={{"{name}": {value}}}' if section else f"{key}={value}"

    setting = r"(?<![\w/.-])(?P<key>(?:[a-z_]+\.)?[a-z_]+)=(?P<value>\[[^\]]*\]|[^\s,;:()\[\]]+)"
    return re.sub(rf"{setting}|'(?P<alone>[a-z_]+\.[a-z_]+)'", argument, text)


def parse_words(words: Sequence[str]) -> dict[str, Any]:
    """Return ``["method=vrm", "method.alpha=20"]`` as a nested dictionary.

    Raise ``ConfigError`` for a word that is not of the form key=value, or a key that is given twice.
    """
    tree: dict[str, Any] = {}
    seen: set[str] = set()
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"{word!r} is not of the form key=value, for example method=vrm or method.alpha=20")
        path = [*key.split("."), "name"] if key in NAMED_SECTIONS else key.split(".")
        if ".".join(path) in seen:
            raise ConfigError(f"{key} is given twice; give it once")
        seen.add(".".join(path))
        try:
            value = text if path[-1] in PLAIN_TEXT else _parse(text)
        except yaml.YAMLError:
            raise ConfigError(
                f"{key}={text}: the value is not plain YAML (a number, a word, true/false or [a, b])"
            ) from None
        here = tree
        for part in path[:-1]:
            here = here.setdefault(part, {})
            if not isinstance(here, dict):
                raise ConfigError(f"{key}={text}: {part} already has a plain value")
        here[path[-1]] = value
    return tree
