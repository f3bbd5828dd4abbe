"""A method's options as settings: their types and the method built from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, create_model

from vrm import methods
from vrm.config.check import checked
from vrm.config.schema import ConfigError
from vrm.contract import Method


def method_settings(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return all options of a method, checked and converted by the types of its ``__init__``.

    Raise ``ConfigError`` for an unknown method or option, or a value that is refused.
    """
    try:
        options = methods.options(methods.load(name))
    except ValueError as error:
        raise ConfigError(f"method={name}: {error}") from None
    fields: dict[str, Any] = {
        option: (parameter.annotation, ... if parameter.default is parameter.empty else parameter.default)
        for option, parameter in options.items()
    }
    schema = create_model("Options", __config__=ConfigDict(extra="forbid", arbitrary_types_allowed=True), **fields)
    found = checked(schema, given, prefix="method")
    return {option: getattr(found, option) for option in options}


def build_method(settings: Mapping[str, Any]) -> Method:
    """Build the method of a resolved run from ``{"name": .., option: ..}``. Raise ``ConfigError`` if that fails."""
    options = {key: value for key, value in settings.items() if key != "name"}
    try:
        return methods.load(settings["name"])(**options)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"method={settings['name']}: {error}") from None
