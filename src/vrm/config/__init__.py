"""The settings of a run: what each is, how they are resolved, and what a user is told when they do not fit."""

from vrm.config.check import checked
from vrm.config.effects import without_effect
from vrm.config.methods import build_method, method_settings
from vrm.config.recipes import read_recipe, recipes
from vrm.config.resolve import (
    Resolved,
    as_typed,
    changed,
    describe_sources,
    dump,
    merge,
    resolve,
    resolve_evaluation,
    resolve_mapping,
    restore,
    validate,
)
from vrm.config.roles import affects_step, differing, flat, identity, settings, teacher_outputs
from vrm.config.schema import (
    ConfigError,
    Data,
    Evaluation,
    Network,
    Optimizer,
    Run,
    Schedule,
    Teacher,
)
from vrm.config.words import parse_words, read_yaml

__all__ = [
    "ConfigError",
    "Data",
    "Evaluation",
    "Network",
    "Optimizer",
    "Resolved",
    "Run",
    "Schedule",
    "Teacher",
    "affects_step",
    "as_typed",
    "build_method",
    "changed",
    "checked",
    "describe_sources",
    "differing",
    "dump",
    "flat",
    "identity",
    "merge",
    "method_settings",
    "parse_words",
    "read_recipe",
    "read_yaml",
    "recipes",
    "resolve",
    "resolve_evaluation",
    "resolve_mapping",
    "restore",
    "settings",
    "teacher_outputs",
    "validate",
    "without_effect",
]
