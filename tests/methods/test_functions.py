"""The pure functions of the methods where the reference vectors do not reach: other settings, half types, edges."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vrm.contract import Progress
from vrm.methods import ab, at, dkd, fitnet, fsp, nst, ofd, reviewkd, vid

from .cases import CASES
from .harness import Case
from .worlds import PAIRS, Pair, build, draw

TARGET = torch.tensor([0, 2, 1])
MARGIN = torch.tensor([-0.5, -0.1, -2.0, -1.0])
FUNCTIONS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], ...]] = {
    "ab": (ab.ab_loss,),
    "at": (at.at_loss,),
    "dkd": (
        lambda s, t: dkd.dkd_loss(s.flatten(1), t.flatten(1), TARGET),
        lambda s, t: dkd.tckd_loss(s.flatten(1), t.flatten(1), TARGET),
        lambda s, t: dkd.nckd_loss(s.flatten(1), t.flatten(1), TARGET),
    ),
    "fitnet": (fitnet.fitnet_loss,),
    "fsp": (lambda s, t: fsp.fsp_loss(fsp.flow(s, s), fsp.flow(t, t)),),
    "nst": (nst.nst_loss,),
    "ofd": (lambda s, t: ofd.ofd_loss(s, t, MARGIN),),
    "reviewkd": (reviewkd.hcl_loss,),
    "vid": (lambda s, t: vid.vid_loss(s, t, torch.linspace(1, 2, 4)),),
}
each = pytest.mark.parametrize(
    ("method", "function"),
    [pytest.param(name, f, id=f"{name}-{i}") for name, several in FUNCTIONS.items() for i, f in enumerate(several)],
)


def case_of(name: str) -> Case:
    """How the method is tested elsewhere."""
    return next(case for case in CASES if case.name == name)


def maps(*sizes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Random signed tensors."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_lifted(method: str, function: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """Either side may be half; the result is that of float32."""
    s, t = maps((3, 4, 5, 5), (3, 4, 5, 5), dtype=dtype)
    expected = function(s.float(), t.float())
    for x, y in ((s, t), (s.float(), t), (s, t.float())):
        actual = function(x, y)
        assert actual.dtype == torch.float32
        assert actual.item() == pytest.approx(expected.item(), rel=1e-6)


@each
def test_no_gradient_to_the_teacher(method: str, function: Callable[..., Tensor]) -> None:
    s, t = (x.requires_grad_() for x in maps((3, 4, 5, 5), (3, 4, 5, 5)))
    function(s, t).backward()
    assert t.grad is None
    assert s.grad is not None
    assert s.grad.any()


def test_ab_on_each_side_of_the_boundary() -> None:
    """Both margins, both sides of each, and a teacher at exactly zero, which is off."""
    s = torch.tensor([-3.0, -1.5, 0.5, 1.5, 3.0]).reshape(1, 1, 1, 5).double()
    zero, one = torch.zeros_like(s), torch.ones_like(s)
    assert ab.ab_loss(s, zero, margin=2.0).item() == pytest.approx(0.003 * (0.5**2 + 2.5**2 + 3.5**2 + 5.0**2))
    assert ab.ab_loss(s, one, margin=2.0).item() == pytest.approx(0.003 * (5.0**2 + 3.5**2 + 1.5**2 + 0.5**2))
    assert ab.ab_loss(s, one).item() == pytest.approx(0.003 * (4.0**2 + 2.5**2 + 0.5**2))
    twice = torch.cat([s, s]), torch.cat([one, one])
    assert ab.ab_loss(*twice, margin=2.0).item() == pytest.approx(ab.ab_loss(s, one, margin=2.0).item())


def test_ab_connects_only_what_differs() -> None:
    assert isinstance(ab.connector((3, 4, 4), (3, 4, 4)), nn.Identity)
    for teacher in ((4, 4, 4), (3, 2, 2), (3, 4, 2)):
        parts = [type(part) for part in ab.connector((3, 4, 4), teacher).children()]
        assert parts == [nn.Conv2d, nn.BatchNorm2d]


@pytest.mark.parametrize("power", [1, 3, 4])
def test_at_with_other_powers(power: int) -> None:
    s, t = maps((2, 3, 6, 4), (2, 5, 3, 4))
    attentions = []
    for x in (F.adaptive_avg_pool2d(s, (3, 4)), t):
        a = (x**power).mean(1).flatten(1)
        attentions.append(a / a.norm(dim=1, keepdim=True))
    expected = ((attentions[0] - attentions[1]) ** 2).mean()
    assert at.at_loss(s, t, power=power).item() == pytest.approx(expected.item(), rel=1e-12)


def test_at_of_an_empty_map_is_zero() -> None:
    assert not at.attention(torch.zeros(1, 2, 3, 3)).any()


def test_dkd_of_probabilities() -> None:
    """The formula of the paper on probabilities, where these do not underflow."""
    s, t = maps((3, 5), (3, 5))
    p, q = (x.div(2.0).softmax(1) for x in (s, t))
    row = torch.arange(3)
    p_y, q_y = p[row, TARGET], q[row, TARGET]
    tckd = q_y * (q_y / p_y).log() + (1 - q_y) * ((1 - q_y) / (1 - p_y)).log()
    rest = torch.ones_like(p, dtype=torch.bool)
    rest[row, TARGET] = False
    p_rest, q_rest = (x[rest].reshape(3, 4) / (1 - y[:, None]) for x, y in ((p, p_y), (q, q_y)))
    nckd = (q_rest * (q_rest / p_rest).log()).sum(1)
    expected = 4.0 * (0.5 * tckd.mean() + 3.0 * nckd.mean())
    actual = dkd.dkd_loss(s, t, TARGET, alpha=0.5, beta=3.0, temperature=2.0)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-12)


def test_dkd_defaults_are_the_published_ones() -> None:
    s, t = maps((3, 5), (3, 5))
    explicit = dkd.dkd_loss(s, t, TARGET, alpha=1.0, beta=8.0, temperature=4.0)
    assert dkd.dkd_loss(s, t, TARGET).item() == explicit.item()
    parts = dkd.tckd_loss(s, t, TARGET) + 8 * dkd.nckd_loss(s, t, TARGET)
    assert parts.item() == pytest.approx(explicit.item(), rel=1e-12)


def test_dkd_drops_the_target() -> None:
    x = torch.arange(12.0).reshape(3, 4)
    assert dkd.drop_target(x, torch.tensor([0, 3, 1])).tolist() == [[1, 2, 3], [4, 5, 6], [8, 10, 11]]


def test_dkd_of_two_classes_has_no_other_classes_to_compare() -> None:
    s, t = maps((3, 2), (3, 2))
    assert dkd.nckd_loss(s, t, torch.tensor([0, 1, 1])).item() == 0


def test_fitnet_two_stages_anneal_the_distillation() -> None:
    """Half the hint first, without batch norm; then distillation whose weight falls from 4 to 1 in ten epochs."""
    method = build(case_of("fitnet"), {"two_stage": True}, Pair())
    inputs = draw(method, Pair())
    student, teacher = inputs.views()

    def terms(phase: str, epoch: int = 1, num_epochs: int = 10) -> dict[str, tuple[float, float]]:
        at_epoch = Progress(torch.tensor(epoch), torch.tensor(0), num_epochs, 100, phase)
        losses = method(student, teacher, inputs.batch, at_epoch)
        return {name: (term.value.item(), float(term.weight)) for name, term in losses.items()}

    s, t = student.real.taps["stage2"], teacher.real.taps["stage2"]
    regressor = method.get_submodule("regressor")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in regressor.modules())
    assert terms("hint") == {"hint": (pytest.approx((0.5 * (regressor(s) - t) ** 2).mean().item()), 100.0)}
    p, q = ((x.real.logits / 3).softmax(1) for x in (student, teacher))
    divergence = (q * (q / p).log()).sum(1).mean().item()
    for epoch, weight in ((1, 4.0), (4, 3.0), (10, 1.0)):
        assert terms("main", epoch)["kd"] == (pytest.approx(divergence), pytest.approx(weight))
    assert terms("main", 1, 1)["kd"][1] == 4.0
    assert list(terms("main")) == ["ce", "kd"]


def test_fitnet_hint_is_the_matching_stage() -> None:
    method = build(case_of("fitnet"), {"student_tap": "stage1"}, PAIRS["fewer_student_stages"])
    assert method.matched == (("stage1", "stage2"),)
    assert method.needs.teacher_taps == ("stage2",)
    with pytest.raises(
        ValueError, match="no stage of teacher matches 'stem' of student; set teacher_tap, or student_tap"
    ):
        build(case_of("fitnet"), {"student_tap": "stem"}, Pair())
    named = build(case_of("fitnet"), {"student_tap": "stem", "teacher_tap": "stage1"}, Pair())
    assert named.matched == (("stem", "stage1"),)
    for settings in ({"student_tap": "stage9"}, {"teacher_tap": "stage9"}):
        with pytest.raises(ValueError, match="has no tap 'stage9'"):
            build(case_of("fitnet"), settings, Pair())


def test_fitnet_phases() -> None:
    (joint,) = build(case_of("fitnet"), {}, Pair()).phases
    assert (joint.name, joint.epochs, joint.terms) == ("main", None, None)
    hint, main = build(case_of("fitnet"), {"two_stage": True, "hint_epochs": 7}, Pair()).phases
    assert (hint.epochs, hint.terms, hint.schedule) == (7, ("hint",), "constant")
    assert (main.epochs, main.terms, main.schedule) == (None, ("ce", "kd"), "run")


@pytest.mark.parametrize(("name", "trained"), [("ab", ("student",)), ("fsp", ("student", "method"))])
def test_pretraining_phases(name: str, trained: tuple[str, ...]) -> None:
    """Thirty epochs at a constant rate with the method's own loss, then the run's own with cross entropy alone."""
    case = case_of(name)
    pretrain, main = build(case, {}, Pair().of_equal_channels()).phases
    assert (pretrain.name, pretrain.epochs, pretrain.terms, pretrain.schedule) == ("pretrain", 30, (name,), "constant")
    assert (main.name, main.epochs, main.terms, main.schedule) == ("main", None, ("ce",), "run")
    assert main.fresh_optimizer
    assert main.trained == trained


def test_fsp_flow_entry_by_entry() -> None:
    """Rectangular maps: each side is averaged to the smaller."""
    bottom, top = maps((2, 3, 6, 2), (2, 4, 3, 4))
    small_bottom, small_top = F.adaptive_avg_pool2d(bottom, (3, 2)), F.adaptive_avg_pool2d(top, (3, 2))
    expected = torch.einsum("bqhw,bphw->bpq", small_bottom, small_top) / 6
    assert torch.allclose(fsp.flow(bottom, top), expected, rtol=1e-12)


def test_fsp_needs_two_maps_of_equal_channels() -> None:
    case = case_of("fsp")
    alone = {"student_taps": ("stem",), "teacher_taps": ("stem",)}
    with pytest.raises(ValueError, match="needs two at least"):
        build(case, alone, Pair().of_equal_channels())
    with pytest.raises(ValueError, match="stem of student has 3 and stem of teacher has 4"):
        build(case, {}, Pair())


def test_nst_kernel_entry_by_entry() -> None:
    s, t = maps((2, 3, 4, 2), (2, 4, 2, 3))
    s_pooled, t_pooled = (F.adaptive_avg_pool2d(x, (2, 2)).flatten(2) for x in (s, t))
    u, v = (x / x.norm(dim=2, keepdim=True) for x in (s_pooled, t_pooled))

    def mean(a: Tensor, b: Tensor) -> float:
        values = [
            (torch.dot(a[n, i], b[n, j]).item() + 0.5) ** 3
            for n in range(2)
            for i in range(a.shape[1])
            for j in range(b.shape[1])
        ]
        return sum(values) / len(values)

    expected = mean(u, u) + mean(v, v) - 2 * mean(u, v)
    assert nst.nst_loss(s, t, degree=3, offset=0.5).item() == pytest.approx(expected, rel=1e-11)


def test_ofd_margin_is_the_mean_of_the_negative_part() -> None:
    """Against numerical integration; where hardly anything is negative, and for a constant channel, as documented."""
    weight = torch.tensor([1.0, -2.0, 0.5, 1.0, 0.0, 0.0]).double()
    bias = torch.tensor([0.3, -1.0, 1.0, 4.0, -0.7, 0.7]).double()
    actual = ofd.margin(weight, bias)
    for i in range(3):
        x = torch.linspace(-30, 0, 300001, dtype=torch.float64)
        density = torch.exp(-(((x - bias[i]) / weight[i]) ** 2) / 2)
        assert actual[i].item() == pytest.approx((x * density).sum().item() / density.sum().item(), rel=1e-3)
    assert actual[3:].tolist() == [-3.0, pytest.approx(-0.7), 0.0]
    assert ofd.margin(torch.full((1,), 2.0), torch.full((1,), 7.0)).item() == -6.0
    assert ofd.margin(weight.float(), bias.float()).dtype == torch.float32


def test_ofd_regresses_where_it_matters() -> None:
    """Both sides of a positive target; only from above to a negative one, or to the margin below it."""
    t = torch.tensor([1.0, 1.0, -0.5, -0.5, -9.0, -9.0, 0.0]).reshape(1, 1, 1, 7).double()
    s = torch.tensor([2.0, 0.0, 1.0, -0.7, 1.0, -3.0, -1.0]).reshape(1, 1, 1, 7).double()
    loss = ofd.ofd_loss(s, t, torch.tensor([-2.0]).double())
    assert loss.item() == 1.0 + 1.0 + 1.5**2 + 0 + 3.0**2 + 0 + 0


def test_ofd_connector_is_initialised_as_released() -> None:
    torch.manual_seed(0)
    conv, norm = ofd.connector(300, 200, kernel_size=3)
    assert isinstance(conv, nn.Conv2d)
    assert conv.bias is None
    assert conv.padding == (1, 1)
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 200)), rel=0.01)
    assert isinstance(norm, nn.BatchNorm2d)
    assert ofd.connector(3, 2)[0].kernel_size == (1, 1)


def test_ofd_needs_batch_norms() -> None:
    with pytest.raises(ValueError, match="knows none for stage1 of teacher"):
        build(case_of("ofd"), {"teacher_taps": ("stages",)}, Pair())


def test_reviewkd_levels_below_the_height() -> None:
    """On height 4: the whole map, then 2 x 2 at half the weight, and 1 x 1 at a quarter."""
    s, t = maps((2, 3, 4, 6), (2, 3, 4, 6))
    expected = (s - t).pow(2).mean()
    for level, weight in ((2, 0.5), (1, 0.25)):
        pooled = F.adaptive_avg_pool2d(s - t, (level, level))
        expected = expected + weight * pooled.pow(2).mean()
    assert reviewkd.hcl_loss(s, t).item() == pytest.approx(expected.item() / 1.75, rel=1e-12)
    s, t = maps((2, 3, 1, 1), (2, 3, 1, 1))
    assert reviewkd.hcl_loss(s, t).item() == pytest.approx((s - t).pow(2).mean().item(), rel=1e-12)


def test_reviewkd_mid_channels_and_sizes() -> None:
    method = build(case_of("reviewkd"), {}, PAIRS["rectangular"])
    assert method.matched == (*((f"stage{k}", f"stage{k}:pre") for k in (1, 2, 3)), ("pooled", "pooled"))
    fusions = list(method.get_submodule("review.fusions").children())
    assert [fusion.conv_in.out_channels for fusion in fusions] == [5] * 4
    assert [fusion.size for fusion in fusions] == [(8, 6), (4, 3), (2, 2), (1, 1)]
    assert [fusion.attention is None for fusion in fusions] == [False, False, False, True]
    narrow = build(case_of("reviewkd"), {"max_mid_channels": 3}, Pair())
    assert next(narrow.get_submodule("review.fusions").children()).conv_in.out_channels == 3


def test_reviewkd_convolutions_are_initialised_as_released() -> None:
    """Kaiming uniform with a = 1: a bound of sqrt(3 / inputs)."""
    torch.manual_seed(0)
    fusion = reviewkd.Fusion((50, 4, 4), 40, (60, 4, 4), deepest=True)
    for conv, inputs in ((fusion.conv_in, 50), (fusion.conv_out, 40 * 9)):
        assert conv.bias is None
        assert conv.weight.abs().max().item() == pytest.approx(math.sqrt(3 / inputs), rel=0.02)


def test_vid_variance_begins_where_it_is_told() -> None:
    for variance in (0.5, 5.0, 200.0):
        a = vid.initial_log_scale(variance, eps=0.1)
        assert math.log1p(math.exp(-abs(a))) + max(a, 0) + 0.1 == pytest.approx(variance, rel=1e-12)
    regressor = vid.VariationalRegressor(3, 4, variance=2.0, eps=0.1, learn_variance=False)
    mean, variance = regressor(torch.randn(2, 3, 5, 5))
    assert mean.shape == (2, 4, 5, 5)
    assert variance.tolist() == pytest.approx([2.0] * 4)
    assert not regressor.log_scale.requires_grad


def test_vid_regressor_has_no_biases() -> None:
    convs = list(vid.VariationalRegressor(3, 4, variance=2.0, eps=0.1, learn_variance=True).mean)
    assert [type(m) for m in convs] == [nn.Conv2d, nn.ReLU, nn.Conv2d, nn.ReLU, nn.Conv2d]
    assert [(m.in_channels, m.out_channels, m.kernel_size, m.bias) for m in convs[::2]] == [
        (3, 4, (1, 1), None),
        (4, 4, (1, 1), None),
        (4, 4, (1, 1), None),
    ]


def test_vid_is_a_gaussian_likelihood() -> None:
    s, t = maps((2, 3, 4, 4), (2, 3, 4, 4))
    variance = torch.tensor([0.5, 1.0, 3.0]).double()
    normal = torch.distributions.Normal(s, variance.sqrt()[:, None, None].expand_as(s))
    expected = -normal.log_prob(t).mean() - 0.5 * math.log(2 * math.pi)
    assert vid.vid_loss(s, t, variance).item() == pytest.approx(expected.item(), rel=1e-12)
