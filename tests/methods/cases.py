"""The methods under test: one entry a method, in alphabetical order."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F

from vrm.contract import Progress
from vrm.divergences import cross_entropy
from vrm.methods.kd import kd_loss
from vrm.projectors import ConvRegressor, as_map, resize, to_smaller

from . import vrm_golden
from .harness import Case, Golden, Outcome, batch_norms


def ab(golden: Golden) -> Outcome:
    """AB: connectors as released, loss of each stage, weighted sum."""
    from vrm.methods.ab import ab_loss, connector

    students, teachers = golden.stages("feat_student"), golden.stages("feat_teacher")
    outcome: Outcome = {}
    losses = []
    for i, (s, t) in enumerate(zip(students, teachers, strict=True)):
        if golden.hyperparameters["connectors"] is not None:
            connect = connector(tuple(s.shape[1:]), tuple(t.shape[1:]))
            names = [name for name, _ in connect.named_parameters()]
            golden.load(connect, {f"connector.{i}.{name}": name for name in names})
            s = connect(s)
            outcome |= batch_norms(f"after.connector.{i}.", connect)
        outcome[f"out.connected_student.{i}"] = s
        losses.append(ab_loss(s, t, margin=golden.hyperparameters["margin"]) * 2.0 ** (i + 1 - len(students)))
    stages = torch.stack(losses)
    return outcome | {"out.loss": stages.sum(), "out.loss_per_stage": stages}


def at(golden: Golden) -> Outcome:
    """AT: sum over stages."""
    from vrm.methods.at import at_loss

    pairs = zip(golden.stages("feat_student"), golden.stages("feat_teacher"), strict=True)
    stages = torch.stack([at_loss(s, t, power=golden.hyperparameters["p"]) for s, t in pairs])
    return {"out.loss": stages.sum(), "out.loss_per_stage": stages}


def cc(golden: Golden) -> Outcome:
    """CC: both embeddings, and the loss."""
    from vrm.methods.cc import cc_loss

    embedded = {}
    for network in ("student", "teacher"):
        features = golden[f"feat_{network}"].flatten(1)
        linear = torch.nn.Linear(features.shape[1], golden.hyperparameters["embed_dim"])
        golden.load(linear, {f"embed_{network}.{name}": name for name in ("weight", "bias")})
        embedded[network] = linear(features)
    return {
        "out.embedded_student": embedded["student"],
        "out.embedded_teacher": embedded["teacher"],
        "out.loss": cc_loss(embedded["student"], embedded["teacher"]),
    }


def crd(golden: Golden) -> Outcome:
    """CRD: several steps by its pure functions, with the file's negatives; memories and normalisers as they evolve."""
    from vrm.methods.crd import contrast_loss, contrast_scores, log_normaliser, updated_rows

    settings = golden.hyperparameters
    num_data, embed, outcome, total, log_z = settings["num_data"], {}, {}, [], None
    for network in ("student", "teacher"):
        embed[network] = torch.nn.Linear(settings[f"{network}_dim"], settings["embed_dim"])
        golden.load(embed[network], {f"embed_{network}.{name}": name for name in ("weight", "bias")})
    memory = {network: golden.tensors[f"state.memory_{network}"] for network in embed}
    for step in range(settings["steps"]):
        index, contrast = golden[f"step{step}.index"], golden[f"step{step}.contrast_index"]
        value = {n: F.normalize(embed[n](golden[f"step{step}.feat_{n}"].flatten(1)), dim=1) for n in embed}
        scores = {
            network: contrast_scores(value[network], memory[other], contrast, temperature=settings["temperature"])
            for network, other in (("student", "teacher"), ("teacher", "student"))
        }
        log_z = log_z or {n: log_normaliser(scores[n], num_data=num_data) for n in embed}
        losses = {n: contrast_loss(scores[n], log_z[n], num_data=num_data, eps=settings["eps"]) for n in embed}
        total.append(losses["student"] + losses["teacher"])
        outcome[f"out.step{step}.loss"] = total[-1]
        for n in embed:
            rows = updated_rows(memory[n], index, value[n].detach(), momentum=settings["momentum"])
            memory[n] = memory[n].index_copy(0, index, rows)
            outcome[f"out.step{step}.loss_{n}_anchor"] = losses[n]
            outcome[f"out.step{step}.score_{n}"] = (scores[n] - log_z[n]).exp()
            outcome[f"out.z_{n}"] = log_z[n].exp()
            outcome[f"after.step{step}.memory_{n}"] = memory[n]
    return {**outcome, "out.loss": torch.stack(total).sum()}


def dkd(golden: Golden) -> Outcome:
    """DKD: both divergences, their weighted sum, and the total under the ramp."""
    from vrm.methods.dkd import dkd_loss, nckd_loss, tckd_loss

    settings = golden.hyperparameters
    logits = golden["logits_student"], golden["logits_teacher"], golden["target"]
    temperature = settings["temperature"]
    loss = dkd_loss(*logits, alpha=settings["alpha"], beta=settings["beta"], temperature=temperature)
    epoch = torch.tensor(settings["epoch"], dtype=torch.float64)
    ramp = Progress(epoch, epoch, 0, 0).ramp(settings["warmup_epochs"])
    task = settings["ce_weight"] * cross_entropy(golden["logits_student"], golden["target"])
    return {
        "out.loss": loss,
        "out.tckd": tckd_loss(*logits, temperature=temperature),
        "out.nckd": nckd_loss(*logits, temperature=temperature),
        "out.loss_ce_weighted": task,
        "out.loss_kd_weighted": ramp * loss,
        "out.loss_total": task + ramp * loss,
    }


def dot(golden: Golden) -> Outcome:
    """DOT: steps of the optimiser with given gradients; a parameter without one of them has none in the file."""
    from vrm.methods.dot import TwoMomenta

    settings, outcome = golden.hyperparameters, {}
    parameters = {name: torch.nn.Parameter(golden[f"init.{name}"].clone()) for name in settings["params"]}
    optimizer = TwoMomenta(
        parameters.values(),
        lr=settings["lr"][0],
        **{name: settings[name] for name in ("momentum", "delta", "weight_decay")},
    )
    for step, lr in enumerate(settings["lr"]):
        optimizer.param_groups[0]["lr"] = lr
        apart = [[golden.tensors.get(f"in.step{step}.grad_{k}.{name}") for name in parameters] for k in ("task", "kd")]
        optimizer.step_apart(*apart)
        outcome |= {f"after.step{step}.{name}": parameter.detach().clone() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        outcome[f"after.final.task_buffer.{name}"] = state["task_momentum"]
        outcome[f"after.final.kd_buffer.{name}"] = state["distillation_momentum"]
    return outcome


def fitnet(golden: Golden) -> Outcome:
    """FitNets: the regressor chosen by size, and the squared error."""
    from vrm.methods.fitnet import fitnet_loss

    s, t = golden["feat_student"], golden["feat_teacher"]
    regressor = ConvRegressor(tuple(s.shape[1:]), tuple(t.shape[1:]), relu=True)
    golden.load(regressor, {name: name for name, _ in regressor.named_parameters()})
    regressed = regressor(s)
    outcome = {"out.regressed": regressed, "out.loss": fitnet_loss(regressed, t)}
    return outcome | batch_norms("after.", regressor)


def fsp(golden: Golden) -> Outcome:
    """FSP: matrices of neighbouring maps, sum over pairs."""
    from vrm.methods.fsp import flow, fsp_loss

    flows = {
        who: [flow(bottom, top) for bottom, top in pairwise(golden.stages(f"feat_{who}"))]
        for who in ("student", "teacher")
    }
    pairs = torch.stack([fsp_loss(s, t) for s, t in zip(flows["student"], flows["teacher"], strict=True)])
    matrices = {f"out.fsp_{who}.{i}": matrix for who, each in flows.items() for i, matrix in enumerate(each)}
    return matrices | {"out.loss": pairs.sum(), "out.loss_per_pair": pairs}


def kd(golden: Golden) -> Outcome:
    """KD: the loss, and the total with its weights."""
    settings = golden.hyperparameters
    loss = kd_loss(golden["logits_student"], golden["logits_teacher"], temperature=settings["temperature"])
    task = cross_entropy(golden["logits_student"], golden["target"])
    task, distillation = settings["ce_weight"] * task, settings["kd_weight"] * loss
    return {
        "out.loss": loss,
        "out.loss_ce_weighted": task,
        "out.loss_kd_weighted": distillation,
        "out.loss_total": task + distillation,
    }


def kdsvd(golden: Golden) -> Outcome:
    """KDSVD: everything with the signs of the file's singular vectors, and ``own.loss`` with those of our own.

    ``own.flipped`` (B, pairs, vectors): whether our teacher's vectors have another relative sign between neighbouring
    stages than the file's; each such flip moves the loss by its ``sign_flip_delta``.
    """
    from vrm.methods.kdsvd import as_matrix, kdsvd_loss, relation, stage_vectors

    settings, students, teachers = golden.hyperparameters, golden.stages("feat_student"), golden.stages("feat_teacher")
    layout, outcome, stages, signs = settings["layout"], {}, [], []
    for i, (s, t) in enumerate(zip(students, teachers, strict=True)):
        aligned, vectors, scale = stage_vectors(
            as_matrix(s, layout),
            as_matrix(t, layout),
            num_vectors=settings["k"],
            num_extra=settings["student_extra_vectors"],
        )
        theirs = golden.tensors[f"out.teacher_right_singular_vectors.{i}"].to(vectors)
        signs.append((vectors * theirs).sum(1).sign())
        turn = signs[-1][:, None]
        stages.append((aligned * turn * scale[:, None], vectors * turn * scale[:, None]))
        outcome[f"out.teacher_right_singular_vectors.{i}"] = vectors * turn
        outcome[f"out.teacher_singular_values_normalised.{i}"] = scale

    def pair(before: tuple, here: tuple, sign: float = 1.0) -> torch.Tensor:
        s, t = (relation(here[i], sign * before[i], denominator=settings["rbf_denominator"]) for i in range(2))
        return (s - t).square().sum((1, 2)) / len(s)  # (B, vectors)

    losses = torch.stack([pair(*neighbours) for neighbours in pairwise(stages)], dim=1)
    flipped = torch.stack([pair(*neighbours, sign=-1.0) for neighbours in pairwise(stages)], dim=1)
    return {
        **outcome,
        "out.loss": losses.sum(),
        "out.sign_flip_delta": flipped - losses,
        "own.loss": kdsvd_loss(students, teachers, num_vectors=settings["k"], layout=layout).sum(),
        "own.flipped": torch.stack([a * b < 0 for a, b in pairwise(signs)], dim=1),
    }


def check_kdsvd(golden: Golden, outcome: Outcome) -> None:
    """All of the file with its signs; with our own, the loss but for the flips that our signs are."""
    golden.check(outcome)
    expected = golden.tensors["out.loss"] + golden.tensors["out.sign_flip_delta"][outcome["own.flipped"]].sum()
    tolerance = golden.spec["tolerance"]
    torch.testing.assert_close(outcome["own.loss"].detach(), expected, rtol=tolerance["rtol"], atol=tolerance["atol"])


def nst(golden: Golden) -> Outcome:
    """NST: sum over stages."""
    from vrm.methods.nst import nst_loss

    pairs = zip(golden.stages("feat_student"), golden.stages("feat_teacher"), strict=True)
    kernel = {name: golden.hyperparameters[name] for name in ("degree", "offset")}
    stages = torch.stack([nst_loss(s, t, **kernel) for s, t in pairs])
    return {"out.loss": stages.sum(), "out.loss_per_stage": stages}


def ofd(golden: Golden) -> Outcome:
    """OFD: connectors, margins, partial distance of each stage, weighted sum."""
    from vrm.methods.ofd import connector, margin, ofd_loss

    students, teachers = golden.stages("feat_student"), golden.stages("feat_teacher")
    outcome: Outcome = {}
    losses = []
    for i, (s, t) in enumerate(zip(students, teachers, strict=True)):
        connect = connector(s.shape[1], t.shape[1], kernel_size=golden.hyperparameters["connector_kernel_size"])
        names = {"conv.weight": "0.weight", "bn.weight": "1.weight", "bn.bias": "1.bias"}
        golden.load(connect, {f"connector.{i}.{theirs}": ours for theirs, ours in names.items()})
        s = connect(s)
        margins = margin(golden[f"teacher_bn_weight.{i}"], golden[f"teacher_bn_bias.{i}"])
        outcome |= {f"out.connected_student.{i}": s, f"out.margin.{i}": margins}
        outcome |= batch_norms(f"after.connector.{i}.", connect, {"1": "bn"})
        losses.append(ofd_loss(s, resize(t, (s.shape[2], s.shape[3])), margins))
    stages = torch.stack(losses)
    weights = 2.0 ** torch.arange(1 - len(students), 1, dtype=torch.float64)
    return outcome | {
        "out.loss": (weights * stages).sum(),
        "out.loss_per_stage_unweighted": stages,
        "out.stage_weight": weights,
    }


def pkt(golden: Golden) -> Outcome:
    """PKT: the loss."""
    from vrm.methods.pkt import pkt_loss

    return {"out.loss": pkt_loss(golden["feat_student"], golden["feat_teacher"], eps=golden.hyperparameters["eps"])}


def reviewkd(golden: Golden) -> Outcome:
    """ReviewKD: fused maps from all maps and the pooled vectors, loss of each, sum under the ramp."""
    from vrm.methods.reviewkd import Review, hcl_loss

    settings = golden.hyperparameters
    students, teachers = (
        [as_map(x) for x in (*golden.stages(f"feat_{who}"), golden[f"pooled_{who}"])] for who in ("student", "teacher")
    )
    shapes = ([tuple(x.shape[1:]) for x in maps] for maps in (students, teachers))
    review = Review(*shapes, mid_channels=settings["mid_channels"])
    ours = [name for name, _ in review.named_parameters()]
    golden.load(review, {name.replace("fusions", "abf").replace("attention", "att"): name for name in ours})
    fused = review(students)
    stages = torch.stack([hcl_loss(s, t) for s, t in zip(fused, teachers, strict=True)])
    epoch = torch.tensor(settings["epoch"], dtype=torch.float64)
    ramp = Progress(epoch, epoch, 0, 0).ramp(settings["warmup_epochs"])
    outcome = {f"out.fused_student.{i}": x for i, x in enumerate(fused)}
    return (
        outcome
        | batch_norms("after.", review, {"fusions": "abf"})
        | {
            "out.loss": stages.sum(),
            "out.loss_per_stage": stages,
            "out.loss_kd_weighted": settings["reviewkd_weight"] * ramp * stages.sum(),
        }
    )


def rkd(golden: Golden) -> Outcome:
    """RKD: both losses, and their weighted sum."""
    from vrm.methods.rkd import rkd_angle_loss, rkd_distance_loss

    student, teacher, settings = golden["feat_student"], golden["feat_teacher"], golden.hyperparameters
    distance = rkd_distance_loss(student, teacher, squared=settings["squared"], eps=settings["eps"])
    angle = rkd_angle_loss(student, teacher)
    return {
        "out.loss_distance": distance,
        "out.loss_angle": angle,
        "out.loss": settings["distance_weight"] * distance + settings["angle_weight"] * angle,
    }


def sp(golden: Golden) -> Outcome:
    """SP: the loss of each pair of layers, and their sum."""
    from vrm.methods.sp import sp_loss

    stages = sp_loss(golden.stages("feat_student"), golden.stages("feat_teacher"))
    return {"out.loss_per_stage": stages, "out.loss": stages.sum()}


def vid(golden: Golden) -> Outcome:
    """VID: regressors with their variances, sum over stages."""
    from vrm.methods.vid import VariationalRegressor, initial_log_scale, vid_loss

    settings = golden.hyperparameters
    losses = []
    for i, (s, t) in enumerate(zip(golden.stages("feat_student"), golden.stages("feat_teacher"), strict=True)):
        s, t = to_smaller(s, t)
        regressor = VariationalRegressor(
            s.shape[1], t.shape[1], variance=settings["init_pred_var"], eps=settings["eps"], learn_variance=True
        )
        names = {f"conv{k}.weight": f"mean.{2 * k}.weight" for k in range(3)} | {"log_scale": "log_scale"}
        golden.load(regressor, {f"stage.{i}.{theirs}": ours for theirs, ours in names.items()})
        mean, variance = regressor(s)
        losses.append(vid_loss(mean, t, variance))
    stages = torch.stack(losses)
    log_scale = initial_log_scale(settings["init_pred_var"], eps=settings["eps"])
    return {
        "out.loss": stages.sum(),
        "out.loss_per_stage": stages,
        "out.log_scale_at_init": torch.tensor([log_scale], dtype=torch.float64),
    }


STAGE_1 = {"student_taps": ("stage1",), "teacher_taps": ("stage1",)}
STAGE_1_PRE = {"student_taps": ("stage1:pre",), "teacher_taps": ("stage1:pre",)}
STAGES_1_2 = {"student_taps": ("stage1", "stage2"), "teacher_taps": ("stage1", "stage2")}
STEM_1 = {"student_taps": ("stem", "stage1"), "teacher_taps": ("stem", "stage1")}

CASES = (
    Case(
        "ab",
        golden=ab,
        legal=({"margin": 0.0}, {"pretrain_epochs": 1}),
        illegal=({"margin": -0.1}, {"pretrain_epochs": 0}),
        alternatives={
            "student_taps": (STAGE_1_PRE, STAGE_1_PRE | {"student_taps": ("stage2:pre",)}),
            "teacher_taps": (STAGE_1_PRE, STAGE_1_PRE | {"teacher_taps": ("stage2:pre",)}),
        },
        invariances=("sample_order", "logit_shift"),
        refuses={
            "teacher_of_tokens": "no pre-activation taps",
            "student_ends_linear": "no pre-activation taps",
            "teacher_ends_linear": "no pre-activation taps",
        },
    ),
    Case(
        "at",
        golden=at,
        legal=({"power": 1},),
        illegal=({"power": 0},),
        alternatives={
            "student_taps": (STAGE_1, STAGE_1 | {"student_taps": ("stage2",)}),
            "teacher_taps": (STAGE_1, STAGE_1 | {"teacher_taps": ("stage2",)}),
        },
        invariances=("sample_order", "logit_shift", "scale", "sample_scale", "channel_order", "mirror"),
    ),
    Case("cc", golden=cc, legal=({"embed_dim": 1},), illegal=({"embed_dim": 0},), invariances=("logit_shift",)),
    Case("ce", invariances=("sample_order", "logit_shift")),
    Case(
        "crd",
        golden=crd,
        small={"embed_dim": 4, "num_negatives": 12},
        variants=({}, {"num_negatives": 2}, {"num_negatives": 40}, {"positive": "relax"}),
        alternatives={"positive": ({}, {"positive": "relax"})},
        legal=({"embed_dim": 1}, {"num_negatives": 1}, {"temperature": 0.01}, {"momentum": 0.0}),
        illegal=(
            {"embed_dim": 0},
            {"num_negatives": 0},
            {"temperature": 0.0},
            {"momentum": -0.1},
            {"momentum": 1.0},
            {"positive": "any"},
        ),
        invariances=("sample_order", "logit_shift"),
    ),
    Case(
        "dkd",
        golden=dkd,
        legal=({"warmup_epochs": 1}, {"temperature": 0.5}),
        illegal=({"warmup_epochs": 0}, {"temperature": 0.0}, {"temperature": -1.0}),
        invariances=("sample_order", "logit_shift"),
    ),
    Case(
        "dot",
        golden=dot,
        alternatives={"delta": ({}, {"delta": 0.05})},
        legal=({"delta": 0.0}, {"delta": 0.99}, {"temperature": 0.5}),
        illegal=({"delta": -0.1}, {"delta": 1.0}, {"temperature": 0.0}, {"temperature": -1.0}),
        invariances=("sample_order", "logit_shift"),
    ),
    Case(
        "fitnet",
        golden=fitnet,
        legal=({"hint_epochs": 1}, {"temperature": 0.5}),
        illegal=({"hint_epochs": 0}, {"temperature": 0.0}, {"temperature": -1.0}),
        variants=({}, {"two_stage": True}),
        alternatives={
            "student_tap": ({"teacher_tap": "stage2"}, {"student_tap": "stage1", "teacher_tap": "stage2"}),
            "teacher_tap": ({}, {"teacher_tap": "stage3"}),
        },
        invariances=("sample_order", "logit_shift"),
    ),
    Case(
        "fsp",
        golden=fsp,
        legal=({"pretrain_epochs": 1},),
        illegal=({"pretrain_epochs": 0},),
        same_channels=True,
        alternatives={
            "student_taps": (STEM_1, STEM_1 | {"student_taps": ("stem", "stage1:pre")}),
            "teacher_taps": (STEM_1, STEM_1 | {"teacher_taps": ("stem", "stage1:pre")}),
        },
        invariances=("sample_order", "logit_shift"),
        refuses={"teacher_of_tokens": "no tap 'stem'"},
    ),
    Case(
        "kd",
        golden=kd,
        legal=({"temperature": 0.5},),
        illegal=({"temperature": 0.0}, {"temperature": -1.0}),
        invariances=("sample_order", "logit_shift"),
    ),
    Case(
        "kdsvd",
        golden=kdsvd,
        check=check_kdsvd,
        same_channels=True,
        variants=({}, {"num_vectors": 2}),
        alternatives={
            "layout": ({}, {"layout": "width_space"}),
            "student_taps": (STAGES_1_2, STAGES_1_2 | {"student_taps": ("stage1", "stage2:pre")}),
            "teacher_taps": (STAGES_1_2, STAGES_1_2 | {"teacher_taps": ("stage1", "stage2:pre")}),
        },
        refuses={"teacher_of_tokens": "needs two at least"},
        legal=({"num_vectors": 1},),
        illegal=({"num_vectors": 0}, {"layout": "height_space"}),
        invariances=("sample_order", "logit_shift", "scale", "sample_scale", "channel_order", "mirror"),
    ),
    Case(
        "nst",
        golden=nst,
        legal=({"degree": 1},),
        illegal=({"degree": 0},),
        alternatives={
            "student_taps": (STAGE_1, STAGE_1 | {"student_taps": ("stage2",)}),
            "teacher_taps": (STAGE_1, STAGE_1 | {"teacher_taps": ("stage2",)}),
        },
        invariances=("sample_order", "logit_shift", "scale", "sample_scale", "channel_order", "mirror"),
    ),
    Case(
        "ofd",
        golden=ofd,
        legal=({"kernel_size": 5},),
        illegal=({"kernel_size": 0}, {"kernel_size": -1}, {"kernel_size": 2}),
        elsewhere={"teacher_batch_statistics": "own/test_ofd.py::test_ofd_can_be_taught_as_released"},
        alternatives={
            "kernel_size": ({}, {"kernel_size": 3}),
            "student_taps": (STAGE_1_PRE, STAGE_1_PRE | {"student_taps": ("stage2:pre",)}),
            "teacher_taps": (STAGE_1_PRE, STAGE_1_PRE | {"teacher_taps": ("stage2:pre",)}),
        },
        invariances=("sample_order", "logit_shift"),
        refuses={
            "teacher_of_tokens": "teacher has none",
            "student_ends_linear": "no pre-activation taps",
            "teacher_ends_linear": "teacher has none",
        },
    ),
    Case("pkt", golden=pkt, invariances=("sample_order", "logit_shift", "rotation", "channel_order")),
    Case(
        "reviewkd",
        golden=reviewkd,
        legal=({"warmup_epochs": 1}, {"max_mid_channels": 1}),
        illegal=({"warmup_epochs": 0}, {"max_mid_channels": 0}),
        alternatives={
            "max_mid_channels": ({}, {"max_mid_channels": 2}),
            "student_taps": ({}, {"student_taps": ("stages:pre",)}),
            "teacher_taps": ({}, {"teacher_taps": ("stages",)}),
        },
        invariances=("sample_order", "logit_shift"),
        refuses={"teacher_of_tokens": "no pre-activation taps", "teacher_ends_linear": "no pre-activation taps"},
    ),
    Case(
        "rkd",
        golden=rkd,
        variants=({}, {"squared": True}),
        invariances=("sample_order", "logit_shift", "rotation", "scale", "translation"),
    ),
    Case(
        "sp",
        golden=sp,
        variants=({}, {"student_taps": ("stages",), "teacher_taps": ("stages",)}),
        alternatives={
            "student_taps": ({}, {"student_taps": ("stage1",)}),
            "teacher_taps": ({}, {"teacher_taps": ("stage1",)}),
        },
        invariances=("sample_order", "logit_shift", "rotation", "scale", "channel_order", "mirror"),
    ),
    Case(
        "vid",
        golden=vid,
        legal=({"eps": 1e-9, "initial_variance": 1.1e-9},),
        illegal=({"eps": 0.0}, {"initial_variance": 1e-5}, {"initial_variance": 1e-6}),
        alternatives={
            "student_taps": (STAGE_1, STAGE_1 | {"student_taps": ("stage2",)}),
            "teacher_taps": (STAGE_1, STAGE_1 | {"teacher_taps": ("stage2",)}),
        },
        invariances=("sample_order", "logit_shift"),
    ),
    Case(
        "vrm",
        golden=lambda golden: vrm_golden.golden(golden.spec, golden.tensors),
        golden_keys=("vrm_features", "vrm_redundant"),
        variants=(
            {},
            {"keep": 1.0},
            {"keep": 0.5, "joint_entropy": "collision"},
            {"prune_redundant": False},
            {"vertices": "features"},
            {"matching": "huber", "delta": 0.1},
            {"num_virtual_views": 2, "virtual_cross_entropy": False},
        ),
        same_channels=True,  # for the variant on features
        elsewhere={"gather": "own/test_vrm.py::test_gathered_relations_span_all_processes"},
        alternatives={
            "keep": ({}, {"keep": 0.5}),
            "joint_entropy": ({"keep": 0.5}, {"keep": 0.5, "joint_entropy": "cross"}),
            "matching": ({"delta": 0.1}, {"delta": 0.1, "matching": "huber"}),
            "delta": ({"matching": "huber"}, {"matching": "huber", "delta": 0.1}),
            "vertices": ({}, {"vertices": "features"}),
        },
        illegal=(
            {"temperature": 0.0},
            {"keep": 0.0},
            {"keep": 1.1},
            {"eps": 0.0},
            {"delta": 0.0},
            {"num_virtual_views": 0},
            {"joint_entropy": "none"},
            {"vertices": "none"},
            {"matching": "none"},
        ),
        legal=({"alpha": 0.0, "beta": 0.0}, {"keep": 1e-6}),
        invariances=("sample_order",),
    ),
)
