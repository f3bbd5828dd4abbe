"""What every method promises, on made-up networks: the contract suite, over ``CASES`` and their variants."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vrm import methods
from vrm.config.resolve import merge
from vrm.contract import Method, RowLoss

from .cases import CASES
from .harness import Case
from .objective import check_lifted, check_teacher_is_constant
from .worlds import (
    BATCH,
    EXTREMES,
    INVARIANCES,
    PAIRS,
    Inputs,
    build,
    draw,
    gradients,
    loss_of,
    pair_of,
    progress,
    step,
)

Settings = Mapping[str, Any]


def _name(case: Case, settings: Settings) -> str:
    return "-".join([case.name, *(f"{option}={value}" for option, value in settings.items())])


RUNS = [pytest.param(case, settings, id=_name(case, settings)) for case in CASES for settings in case.variants]
each_run = pytest.mark.parametrize(("case", "settings"), RUNS)
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def close(actual: Tensor, expected: Tensor, rtol: float, what: str = "") -> None:
    """Within ``rtol`` of the largest entry of ``expected``."""
    assert torch.isfinite(actual).all(), f"{what} is not finite"
    error = (actual.double() - expected.double()).abs().max().item() if actual.numel() else 0.0
    bound = 1e-12 + rtol * (expected.double().abs().max().item() if actual.numel() else 0.0)
    assert error <= bound, f"{what} off by {error:.3g}, allowed {bound:.3g}"


def close_all(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], rtol: float) -> None:
    """Each tensor close, relative to the largest entry of all of them."""
    scale = max(x.double().abs().max().item() for x in expected.values())
    for name, x in actual.items():
        assert torch.isfinite(x).all(), f"{name} is not finite"
        error = (x.double() - expected[name].double()).abs().max().item()
        assert error <= 1e-12 + rtol * scale, f"{name} off by {error:.3g}, the largest entry is {scale:.3g}"


def evaluate(method: Method, inputs: Inputs, phase: Any, at: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective and its gradients."""
    loss = loss_of(method, inputs, phase, at)
    return loss.detach(), gradients(method, inputs, loss)


def warmed(case: Case, settings: Settings, dtype: torch.dtype = torch.float64, name: str = "alike") -> Method:
    """The method after one step, so that memories hold something and first-batch constants are set."""
    pair = pair_of(case, name)
    method = build(case, settings, pair, dtype=dtype)
    step(method, draw(method, pair, seed=100, dtype=dtype), method.phases[0], progress(method.phases[0], step=0))
    return method


def test_every_method_has_a_case() -> None:
    assert [case.name for case in CASES] == list(methods.names())


@each_case
def test_published_settings_are_options(case: Case) -> None:
    method = methods.load(case.name)
    for data, condition, pairs in methods.published_tables(method):
        chosen = dict([condition.split("=")]) if condition else {}
        for pair in pairs:
            assert pair == "*" or pair.count("/") == 1
            settings: dict[str, Any] = dict(chosen)
            for _, found in methods.published(method, data, pair, chosen):
                settings = merge(settings, found)
            assert settings.keys() <= methods.options(method).keys()
            method(**settings)


@each_case
def test_describes_itself(case: Case) -> None:
    method = methods.load(case.name)
    assert method.title
    assert method.venue
    assert 1980 < method.year < 2030
    assert method.family in ("logit", "feature", "relation")
    assert len(inspect.getdoc(inspect.getmodule(method)) or "") > 100
    assert all(parameter.annotation is not inspect.Parameter.empty for parameter in methods.options(method).values())


@each_case
def test_edges_of_the_options(case: Case) -> None:
    method = methods.load(case.name)
    for settings in case.legal:
        method(**settings)
    for settings in case.illegal:
        with pytest.raises(ValueError, match=next(iter(settings))):
            method(**settings)


@each_case
def test_defaults_agree(case: Case) -> None:
    """The class has the published settings of CIFAR-100, and the functions of its module have those of the class."""
    method = methods.load(case.name)
    defaults = {name: option.default for name, option in methods.options(method).items()}
    published = method.published.get("cifar100", {}).get("*", {})
    assert published == {name: defaults[name] for name in published}
    for name, function in inspect.getmembers(inspect.getmodule(method), inspect.isfunction):
        if function.__module__ == method.__module__:
            for parameter in inspect.signature(function).parameters.values():
                if parameter.name in defaults and parameter.default is not parameter.empty:
                    assert parameter.default == defaults[parameter.name], f"{parameter.name} of {name}"


@each_case
def test_functions_lift_half_types_and_detach_the_teacher(case: Case) -> None:
    for function in case.functions:
        check_lifted(function)
        check_teacher_is_constant(function)


@each_run
def test_terms(case: Case, settings: Settings) -> None:
    """Values carry the gradient and weights do not; cross entropy is the task, all else distillation."""
    method = warmed(case, settings)
    inputs = draw(method, pair_of(case))
    for phase in method.phases:
        losses = method(*inputs.views(), inputs.batch, progress(phase))
        assert set(phase.terms or losses) == losses.keys()
        for name, term in losses.items():
            assert term.role == ("task" if name.startswith("ce") else "distillation")
            assert term.value.ndim == 0
            assert term.value.requires_grad
            assert not (isinstance(term.weight, Tensor) and term.weight.requires_grad)


@each_run
def test_the_rows_of_a_loss_average_to_its_distillation(case: Case, settings: Settings) -> None:
    """The distillation of a method that others may build upon is the mean of its rows, each of its own sample alone."""
    method = warmed(case, settings)
    if not isinstance(method, RowLoss):
        return
    inputs, at = draw(method, pair_of(case)), progress(method.phases[0])
    student, teacher = inputs.views()
    logits = student.real.logits, teacher.real.logits
    rows = method.row_loss(*logits, inputs.batch.target, at)
    close(rows.mean(), method(student, teacher, inputs.batch, at).total(role="distillation"), 1e-12, "mean")
    assert rows.shape == inputs.batch.target.shape
    for row in range(len(rows)):
        alone = method.row_loss(*(x[row : row + 1] for x in logits), inputs.batch.target[row : row + 1], at)
        close(alone[0], rows[row], 1e-12, f"row {row}")


def kept(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function's first result, at every call. It needs no gradient."""
    results: list[Tensor] = []

    def first(*args: Any, **options: Any) -> Tensor:
        if not results:
            results.append(function(*args, **options))
            assert not results[0].requires_grad
        return results[0]

    return first


@each_run
def test_gradients(case: Case, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finite differences agree in float64; the student, and each parameter of the method, learns in some phase."""
    pair = pair_of(case)
    method = warmed(case, settings)
    for name in case.constants:
        module = inspect.getmodule(type(method))
        monkeypatch.setattr(module, name, kept(getattr(module, name)))
    inputs = draw(method, pair, size=max(3, method.needs.min_batch))
    names = list(inputs.student)
    parameters = {name: p for name, p in method.named_parameters() if p.requires_grad}
    moved: set[str] = set()
    for phase in method.phases:

        def objective(*tensors: Tensor, phase: Any = phase) -> Tensor:
            student = dict(zip(names, tensors, strict=False))
            weights = dict(zip(parameters, tensors[len(names) :], strict=True))
            views = Inputs(student, inputs.teacher, inputs.batch).views()
            terms = torch.func.functional_call(method, weights, (*views, inputs.batch, progress(phase)))
            return terms.total(names=phase.terms)

        leaves = (*inputs.student.values(), *parameters.values())
        rtol = case.tolerances.get("gradcheck", 1e-5)
        assert torch.autograd.gradcheck(objective, leaves, fast_mode=True, atol=1e-5, rtol=rtol)
        grads = gradients(method, inputs, objective(*leaves))
        assert any(grad.any() for name, grad in grads.items() if name.startswith("student")), phase.name
        used = torch.autograd.grad(objective(*leaves), leaves, allow_unused=True)
        moved |= {name for name, grad in zip(parameters, used[len(names) :], strict=True) if grad is not None}
    assert moved == parameters.keys()


@each_run
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision(case: Case, settings: Settings, dtype: torch.dtype) -> None:
    """Half inputs are lifted: the loss is float32, and as near to float64 as float32 comes; no half loss is."""
    method = warmed(case, settings, torch.float32)
    exact = copy.deepcopy(method).double()
    inputs = draw(method, pair_of(case), dtype=dtype).to(dtype)
    for phase in method.phases:
        loss, grads = evaluate(method, inputs, phase)
        single, grads_single = evaluate(copy.deepcopy(method), inputs.to(torch.float32), phase)
        double, grads_double = evaluate(exact, inputs.to(torch.float64), phase)
        assert loss.dtype == torch.float32
        close(loss, single, 1e-6, "loss")
        close(loss, double, case.tolerances.get("half", 1e-4), "loss")
        eps = torch.finfo(dtype).eps
        close_all(grads, grads_single, 2 * eps)
        close_all(grads, grads_double, 2 * eps + case.tolerances.get("half", 1e-4))


@each_run
@pytest.mark.parametrize("extreme", EXTREMES)
def test_extremes_are_finite(case: Case, settings: Settings, extreme: str) -> None:
    if extreme in case.undefined:
        return
    method = warmed(case, settings, torch.float32)
    inputs = EXTREMES[extreme](draw(method, pair_of(case), dtype=torch.float32))
    for phase in method.phases:
        loss, grads = step(method, inputs, phase)
        assert torch.isfinite(loss)
        for name, grad in grads.items():
            assert torch.isfinite(grad).all(), name
    assert all(torch.isfinite(buffer).all() for buffer in method.buffers())


@each_run
@pytest.mark.parametrize("name", PAIRS)
def test_pairs_of_networks(case: Case, settings: Settings, name: str) -> None:
    """Two classes, maps of other sizes and shapes, other numbers of stages, tokens: works, or says why not.

    What is matched has been asked for.
    """
    pair = pair_of(case, name)
    if name in case.refuses:
        with pytest.raises(ValueError, match=case.refuses[name]):
            build(case, settings, pair)
        return
    method = build(case, settings, pair)
    student, teacher = pair.probes()
    for of_student, of_teacher in method.matched:
        assert of_student in student.resolve(method.needs.student_taps)
        assert of_teacher in teacher.resolve(method.needs.teacher_taps)
    inputs = draw(method, pair)
    for phase in method.phases:
        loss, grads = evaluate(method, inputs, phase)
        assert torch.isfinite(loss)
        assert all(torch.isfinite(grad).all() for grad in grads.values())


@each_run
def test_batches_of_any_size(case: Case, settings: Settings) -> None:
    """A smaller last batch, and the smallest that is declared, after a full one; a smaller one is refused."""
    method = warmed(case, settings)
    smallest = method.needs.min_batch
    for phase in method.phases:
        if smallest > 1:
            with pytest.raises(ValueError, match=r"batch of|more than 1 value"):
                loss_of(method, draw(method, pair_of(case), size=smallest - 1), phase)
        for size in {BATCH - 1, smallest}:
            inputs = draw(method, pair_of(case), size=size)
            loss, grads = step(method, inputs, phase)
            assert torch.isfinite(loss)
            assert all(torch.isfinite(grad).all() for grad in grads.values())


@each_run
def test_leaves_its_inputs_alone(case: Case, settings: Settings) -> None:
    """No gradient reaches the teacher's tensors, and no tensor is written to."""
    method = warmed(case, settings)
    inputs = draw(method, pair_of(case))
    for x in inputs.teacher.values():
        x.requires_grad_()
    before = [x.detach().clone() for tensors in (inputs.student, inputs.teacher) for x in tensors.values()]
    for phase in method.phases:
        loss_of(method, inputs, phase).backward()
        step(method, inputs, phase)
    after = [x.detach() for tensors in (inputs.student, inputs.teacher) for x in tensors.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(x.grad is None for x in inputs.teacher.values())


@each_run
def test_stays_on_one_device(case: Case, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is made on the CPU: all of it runs on the device without memory, which mixes with no other."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it does not know this device
    method = warmed(case, settings).to("meta")
    inputs = draw(method, pair_of(case))
    batch = type(inputs.batch)(inputs.batch.index.to("meta"), inputs.batch.target.to("meta"))
    inputs = replace(inputs.map(lambda x: x.to("meta")), batch=batch)
    for phase in method.phases:
        loss, grads = step(method, inputs, phase)
        assert all(x.is_meta for x in (loss, *grads.values(), *method.buffers()))


INVARIANT = [
    pytest.param(case, settings, name, id=f"{_name(case, settings)}-{name}")
    for case in CASES
    for settings in case.variants
    for name in case.invariances
]


@pytest.mark.parametrize(("case", "settings", "name"), INVARIANT)
def test_invariances(case: Case, settings: Settings, name: str) -> None:
    torch.manual_seed(1)
    method = warmed(case, settings)
    inputs = draw(method, pair_of(case))
    for phase in method.phases:
        loss = loss_of(method, inputs, phase)
        close(loss_of(method, INVARIANCES[name](inputs), phase), loss, case.tolerances.get("invariances", 1e-9), name)


@each_run
def test_state_round_trip(case: Case, settings: Settings) -> None:
    """Built anew with other weights and loaded, the method goes on as before."""
    method = warmed(case, settings)
    anew = build(case, settings, pair_of(case), seed=1)
    anew.load_state_dict(method.state_dict())
    inputs = draw(method, pair_of(case))
    for phase in method.phases:
        assert torch.equal(step(method, inputs, phase)[0], step(anew, inputs, phase)[0])
    for name, value in method.state_dict().items():
        assert torch.equal(value, anew.state_dict()[name]), name


@each_run
def test_only_after_step_changes_buffers(case: Case, settings: Settings) -> None:
    """``forward`` moves nothing but the running statistics of batch norms, ``after_step`` no parameter."""
    method = warmed(case, settings)
    inputs = draw(method, pair_of(case))
    norms = [f"{name}." for name, m in method.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for phase in method.phases:
        before = copy.deepcopy(method.state_dict())
        loss_of(method, inputs, phase)
        for name, value in method.state_dict().items():
            assert torch.equal(value, before[name]) or name.startswith(tuple(norms)), name
        parameters = {name: p.detach().clone() for name, p in method.named_parameters()}
        student, teacher = inputs.views()
        method.after_step(student, teacher, inputs.batch, progress(phase))
        assert all(torch.equal(p, parameters[name]) for name, p in method.named_parameters())


@each_run
def test_compiles_to_one_graph(case: Case, settings: Settings) -> None:
    method = warmed(case, settings)
    compiled = copy.deepcopy(method)
    inputs = draw(method, pair_of(case))
    for phase in method.phases:
        torch._dynamo.reset()
        compiled.compile(fullgraph=True, dynamic=False, backend="aot_eager")
        student, teacher = inputs.views()
        loss = compiled(student, teacher, inputs.batch, progress(phase)).total(names=phase.terms)
        grads = gradients(compiled, inputs, loss)
        eager, grads_eager = evaluate(method, inputs, phase)
        close(loss, eager, case.tolerances.get("compiled", 1e-10), "loss")
        close_all(grads, grads_eager, case.tolerances.get("compiled", 1e-10))


def fingerprint(case: Case, settings: Settings) -> list[Any]:
    """All that an option could change: needs, phases, state, values and gradients in two epochs, the optimiser."""
    pair = pair_of(case)
    method = build(case, settings, pair)
    seen: list[Any] = [method.needs, method.phases, method.matched]
    seen += [(name, tuple(p.shape), p.requires_grad) for name, p in method.named_parameters()]
    for phase in method.phases:
        for number, epoch in enumerate((1, 4)):
            inputs = draw(method, pair, seed=number)
            loss, grads = step(method, inputs, phase, progress(phase, epoch=epoch, step=number))
            values = [loss, *grads.values(), *method.buffers()]
            seen.append([value.tolist() for value in values])
    if method.optimizer is not None:
        weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = type(method).optimizer([weight], lr=0.1, momentum=0.9, weight_decay=0.01, method=method)
        for scale in (1.0, 2.0):
            optimizer.step_apart([scale * torch.arange(3.0).double()], [scale * torch.ones(3).double()])
        seen.append(weight.tolist())
    return seen


OPTIONS = [
    pytest.param(case, option, id=f"{case.name}-{option}")
    for case in CASES
    for option in methods.options(methods.load(case.name))
]


@pytest.mark.parametrize(("case", "option"), OPTIONS)
def test_no_option_is_dead(case: Case, option: str) -> None:
    """A changed value changes something, in one of the variants at least."""
    if option in case.elsewhere:
        file, _, name = case.elsewhere[option].partition("::")
        assert f"def {name}(" in (Path(__file__).parent / file).read_text(encoding="utf-8")
        return
    if option in case.alternatives:
        before, after = case.alternatives[option]
        assert {k: v for k, v in before.items() if k != option} == {k: v for k, v in after.items() if k != option}
        tries = [(before, after)]
    else:
        default = {**methods.options(methods.load(case.name))}[option].default
        tries = []
        for settings in case.variants:
            value = {**case.small, **settings}.get(option, default)
            assert isinstance(value, bool | int | float), f"name an alternative to {option}={value!r} in the case"
            other = (
                not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else 1.5 * value + 0.125
            )
            tries.append((settings, {**settings, option: other}))
    assert any(fingerprint(case, before) != fingerprint(case, after) for before, after in tries)


@each_run
def test_needs_are_honest(case: Case, settings: Settings) -> None:
    """Index and draws are read, and samples coupled (batch norm aside), if and only if so declared."""
    warm = warmed(case, settings)
    inputs = draw(warm, pair_of(case))

    def outcome(batch: Any = inputs.batch, seed: int = 0) -> list[Any]:
        method = copy.deepcopy(warm)
        seen = []
        for phase in method.phases:
            at = progress(phase, seed=seed)
            given = Inputs(inputs.student, inputs.teacher, batch)
            seen += [step(method, given, phase, at)[0].tolist() for _ in range(2)]
        return [*seen, *(buffer.tolist() for buffer in method.buffers())]

    other_index = type(inputs.batch)((inputs.batch.index + 1) % 40, inputs.batch.target)
    assert (outcome() != outcome(batch=other_index)) == warm.needs.index
    assert (outcome() != outcome(seed=1)) == warm.needs.draws

    coupled = False
    for method in (build(case, settings, pair_of(case)), warm):
        method.eval()
        for phase in method.phases:
            whole = loss_of(method, inputs, phase)
            parts = [loss_of(method, inputs.rows(rows), phase) for rows in torch.arange(BATCH).chunk(2)]
            coupled |= bool(((parts[0] + parts[1]) / 2 - whole).abs() > 1e-9 * whole.abs())
    assert coupled == warm.needs.couples_samples


@each_run
def test_two_processes_equal_one(case: Case, settings: Settings, two_processes: Mapping[str, float]) -> None:
    """Value, gradients and memories over two gloo processes: of gathered tensors where the batch is coupled."""
    assert two_processes[_name(case, settings)] <= case.tolerances.get("processes", 1e-9)
