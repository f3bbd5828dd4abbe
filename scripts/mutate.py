"""Seed mistakes in the methods' formulas, one at a time, and report those that no test catches.

    python scripts/mutate.py dkd fitnet                        # by name, or all methods without a name
    python scripts/mutate.py --module vrm.projectors --tests tests/test_projectors.py tests/methods/test_golden.py

Each mistake is one change of a function's syntax tree: another operator, comparison, constant or reduction, a dropped
summand, call, keyword or statement, or exchanged arguments. The changed module replaces the real one in a forked
process, which runs the method's reference vectors, its own tests (``tests/methods/own/test_NAME.py``) and its part of
the contract suite, except compilation and distribution, which are slow and test nothing more about the formula. This is
not part of CI, because some survivors change no value and a person has to judge them. POSIX only.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import gc
import importlib
import importlib.util
import io
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 120
SLOW = ("test_compiles_to_one_graph", "test_two_processes_equal_one")

OPERATORS: dict[type[ast.operator], tuple[type[ast.operator], ...]] = {
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.Pow: (ast.Mult,),
    ast.FloorDiv: (ast.Mult,),
    ast.BitOr: (ast.BitAnd,),
    ast.BitAnd: (ast.BitOr,),
}
COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
}
CALLS = {
    "sum": "mean",
    "mean": "sum",
    "max": "min",
    "min": "max",
    "amax": "amin",
    "amin": "amax",
    "maximum": "minimum",
    "minimum": "maximum",
    "softmax": "log_softmax",
    "log_softmax": "softmax",
    "sigmoid": "tanh",
    "exp": "expm1",
    "expm1": "exp",
    "log": "log1p",
    "log1p": "log",
    "logsumexp": "amax",
    "triu": "tril",
    "tril": "triu",
}
DROPPED = (
    "detach",
    "abs",
    "relu",
    "sqrt",
    "square",
    "clamp",
    "log",
    "exp",
    "pow",
    "lift",
    "normalize",
    "softplus",
    "mT",
)


@dataclass(frozen=True)
class Mutant:
    """A changed syntax tree, with a description and the line of the change."""

    what: str
    line: int
    tree: ast.Module


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Yield the possible mistakes in one node, each as a description and a replacement."""
    match node:
        case ast.BinOp(left, op, right):
            for other in OPERATORS.get(type(op), ()):
                yield f"{type(op).__name__} -> {other.__name__}", ast.BinOp(left, other(), right)
            if isinstance(op, ast.Add | ast.Sub | ast.Mult | ast.Div | ast.BitOr | ast.BitAnd):
                yield f"drop right of {type(op).__name__}", left
            if isinstance(op, ast.Add | ast.Mult | ast.BitOr | ast.BitAnd):
                yield f"drop left of {type(op).__name__}", right
            if isinstance(op, ast.Sub):
                yield "exchange sides of Sub", ast.BinOp(right, op, left)
        case ast.AugAssign(target, op, value):
            for other in OPERATORS.get(type(op), ()):
                yield f"{type(op).__name__}= -> {other.__name__}=", ast.AugAssign(target, other(), value)
            yield "drop assignment", ast.Pass()
        case ast.Compare(left, [op], [right]):
            for flipped in COMPARISONS.get(type(op), ()):
                yield f"{type(op).__name__} -> {flipped.__name__}", ast.Compare(left, [flipped()], [right])
        case ast.BoolOp(op, values):
            other_op = ast.Or() if isinstance(op, ast.And) else ast.And()
            yield "and <-> or", ast.BoolOp(other_op, values)
        case ast.UnaryOp(ast.USub() | ast.Not(), operand):
            yield "drop sign", operand
        case ast.IfExp(_, body, orelse):
            yield "always then", body
            yield "always else", orelse
        case ast.If(test, body, orelse):
            yield "negate if", ast.If(ast.UnaryOp(ast.Not(), test), body, orelse)
        case ast.Constant(bool() as value):
            yield f"{value} -> {not value}", ast.Constant(not value)
        case ast.Constant(int() as value):
            yield f"{value} -> {value + 1}", ast.Constant(value + 1)
        case ast.Constant(float() as value):
            yield f"{value} -> {2 * value or 1.0}", ast.Constant(2 * value or 1.0)
        case ast.Attribute(value, "mT"):
            yield "drop mT", value
        case ast.Call():
            yield from call_changes(node)
        case ast.Expr(ast.Call()):
            yield "drop statement", ast.Pass()


def call_changes(call: ast.Call) -> Iterator[tuple[str, ast.AST]]:
    """Yield the possible mistakes in a call."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    of_module = isinstance(call.func, ast.Attribute) and getattr(call.func.value, "id", "") in ("torch", "F")
    if name in CALLS and isinstance(call.func, ast.Attribute):
        yield (
            f"{name} -> {CALLS[name]}",
            ast.Call(ast.Attribute(call.func.value, CALLS[name]), call.args, call.keywords),
        )
    if name in DROPPED:
        inner = call.args[0] if of_module or isinstance(call.func, ast.Name) else call.func.value  # type: ignore[attr-defined]
        yield f"drop {name}", inner
    if name == "Term" and len(call.args) > 1:
        yield "drop weight", ast.Call(call.func, [call.args[0], ast.Constant(1.0), *call.args[2:]], call.keywords)
    if name == "Term" and len(call.args) > 2:
        yield "drop role", ast.Call(call.func, call.args[:2], call.keywords)
    if len(call.args) >= 2 and not any(isinstance(arg, ast.Starred) for arg in call.args[-2:]):
        exchanged = [*call.args[:-2], call.args[-1], call.args[-2]]
        yield f"exchange last arguments of {name}", ast.Call(call.func, exchanged, call.keywords)
    for i, keyword in enumerate(call.keywords):
        if keyword.arg not in (None, "strict"):
            rest = call.keywords[:i] + call.keywords[i + 1 :]
            yield f"drop {keyword.arg}= of {name}", ast.Call(call.func, call.args, rest)


class Replace(ast.NodeTransformer):
    """Replace the node numbered ``number`` by ``new``."""

    def __init__(self, number: int, new: ast.AST) -> None:
        self.number, self.new = number, new

    def visit(self, node: ast.AST) -> ast.AST:
        """Return the replacement of this node, or visit its children."""
        return self.new if getattr(node, "number", None) == self.number else super().generic_visit(node)


def mutants(source: str) -> Iterator[Mutant]:
    """Yield all changes of all functions, but in defaults, annotations, error messages and ``strict=`` of ``zip``."""
    tree = ast.parse(source)
    for number, node in enumerate(ast.walk(tree)):
        node.number = number  # type: ignore[attr-defined]
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    skipped: set[int] = set()
    for function in functions:
        aside = [function.args, *function.decorator_list, *([function.returns] if function.returns else [])]
        aside += [node.exc for node in ast.walk(function) if isinstance(node, ast.Raise) and node.exc]
        aside += [node.annotation for node in ast.walk(function) if isinstance(node, ast.AnnAssign)]
        aside += [node for node in ast.walk(function) if isinstance(node, ast.keyword) and node.arg == "strict"]
        skipped |= {inner.number for node in aside for inner in ast.walk(node)}  # type: ignore[attr-defined]
    seen: set[int] = set()
    for function in functions:
        for node in ast.walk(function):
            number = node.number  # type: ignore[attr-defined]
            if number in skipped or number in seen:
                continue
            seen.add(number)
            for what, new in changes(node):
                changed = Replace(number, copy.deepcopy(new)).visit(copy.deepcopy(tree))
                yield Mutant(what, getattr(node, "lineno", 0), ast.fix_missing_locations(changed))


class Select:
    """A pytest plugin that keeps the tests of one method. ``CASES`` must hold its case alone."""

    def __init__(self, method: str | None) -> None:
        self.method = method

    def wants(self, item: pytest.Item) -> bool:
        """Return whether a test is about the method."""
        if self.method is None or item.path.name == f"test_{self.method}.py":
            return True
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if "path" in parameters:
            from tests.methods.test_golden import BY_KEY

            return parameters["path"].stem.rpartition("_")[0] in BY_KEY
        return "case" in parameters

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Keep the tests of the method."""
        slow = {item for item in items if item.name.startswith(SLOW)}
        items[:] = [item for item in items if item not in slow and self.wants(item)]


def unnoticed(name: str, mutant: Mutant | None, method: str | None, tests: list[str]) -> bool:
    """Return whether the tests pass in a fork in which the mutant replaces the module (None: the module as it is)."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status) == 0
    signal.alarm(TIMEOUT)  # an endless loop ends by the signal, which counts as noticed
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    code = 1
    try:
        if mutant is not None:
            spec = importlib.util.find_spec(name)
            assert spec is not None
            module = ModuleType(name)
            module.__spec__, module.__file__ = spec, spec.origin
            sys.modules[name] = module
            exec(compile(mutant.tree, spec.origin or name, "exec"), module.__dict__)
            parent, _, last = name.rpartition(".")
            setattr(importlib.import_module(parent), last, module)
        if method is not None:  # collect for this method alone
            cases = importlib.import_module("tests.methods.cases")
            cases.CASES = tuple(case for case in cases.CASES if case.name == method)
        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:warnings", *tests]
        code = int(pytest.main(options, plugins=[Select(method)]))
    finally:
        os._exit(code)


def examine(name: str, method: str | None, tests: list[str], jobs: int) -> tuple[int, list[Mutant]]:
    """Return the number of mutants of a module, and those that survive.

    Raise ``SystemExit`` if the tests fail without any mutant.
    """
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).read_text(encoding="utf-8")
    if not unnoticed(name, None, method, tests):
        raise SystemExit(f"the tests of {name} fail as it is")
    every = list(mutants(source))
    with ThreadPoolExecutor(jobs) as pool:
        survived = list(pool.map(lambda mutant: unnoticed(name, mutant, method, tests), every))
    survivors = [mutant for mutant, alive in zip(every, survived, strict=True) if alive]
    lines = source.splitlines()
    print(f"{name}: {len(every)} seeded, {len(every) - len(survivors)} caught, {len(survivors)} survived")
    for mutant in survivors:
        print(f"  {mutant.line}: {mutant.what}: {lines[mutant.line - 1].strip()}", flush=True)
    return len(every), survivors


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help="names of methods; all by default")
    parser.add_argument("--module", help="a module that is no method")
    parser.add_argument("--tests", nargs="+", default=[], help="the tests of --module")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT), str(ROOT / "src")]
    import torch

    for name in ("hypothesis", "torch._dynamo", "vrm.contract"):  # slow to import; here once for all forks
        importlib.import_module(name)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main(["--version"])  # loads its own plugins
    gc.freeze()  # pytest collects garbage at every end
    torch.set_num_threads(1)
    if arguments.module:
        jobs = [(arguments.module, None, arguments.tests)]
    else:
        from vrm import methods

        jobs = []
        for name in arguments.methods or methods.names():
            tests = [f"tests/methods/{file}" for file in ("test_golden.py", f"own/test_{name}.py", "test_contract.py")]
            tests = [path for path in tests if Path(path).exists()]
            jobs.append((f"vrm.methods.{name}", name, tests))
    results = [examine(*job, arguments.jobs) for job in jobs]
    seeded, alive = sum(number for number, _ in results), sum(len(survivors) for _, survivors in results)
    print(f"{seeded} seeded, {seeded - alive} caught, {alive} survived")
    gc.unfreeze()


if __name__ == "__main__":
    main()
