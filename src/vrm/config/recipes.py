"""Recipes: YAML files of settings, shipped with the package or the user's own."""

from __future__ import annotations

from importlib import resources
from typing import Any

from vrm.config.schema import ConfigError
from vrm.config.words import NAMED_SECTIONS, read_yaml
from vrm.files import user_path
from vrm.wording import nearest


def recipes() -> tuple[str, ...]:
    """Return the names of the shipped recipes."""
    folder = resources.files("vrm") / "recipes"
    return tuple(sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml")))


def read_recipe(name: str) -> dict[str, Any]:
    """Return the content of a shipped recipe, or of any YAML file by a path that ends in ``.yaml``."""
    if name.endswith((".yaml", ".yml")):
        path = user_path(name)
        if not path.is_file():
            shipped = ", ".join(recipes())
            raise ConfigError(f"recipe {name!r} is not a file; give a path to a YAML file or one of {shipped}")
        return complete_sections(read_yaml(path.read_bytes(), f"recipe {name!r}"), name)
    if name not in recipes():
        raise ConfigError(f"unknown recipe {name!r}; {nearest(name, recipes())}")
    content = (resources.files("vrm") / "recipes" / f"{name}.yaml").read_bytes()
    return complete_sections(read_yaml(content, f"recipe {name!r}"), name)


def complete_sections(content: dict[str, Any], name: str) -> dict[str, Any]:
    """Write ``data: digits`` as ``data: {name: digits}``. Raise ``ConfigError`` for a section that is not a mapping."""
    for key, value in content.items():
        if key in NAMED_SECTIONS and isinstance(value, str):
            content[key] = {"name": value}
        elif key in (*NAMED_SECTIONS, "students", "variants", "transformers", "inputs") and not isinstance(value, dict):
            raise ConfigError(f"recipe {name!r}: {key} must hold keys and values, got {value!r}")
        elif key in ("students", "variants", "inputs") and not all(isinstance(inner, dict) for inner in value.values()):
            raise ConfigError(f"recipe {name!r}: each entry of {key} must hold keys and values, got {value!r}")
        elif key == "pairs" and not (isinstance(value, list) and all(str(pair).count("/") == 1 for pair in value)):
            raise ConfigError(f"recipe {name!r}: pairs must be a list of TEACHER/STUDENT, got {value!r}")
    return content
