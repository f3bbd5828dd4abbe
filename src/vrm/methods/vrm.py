"""VRM: Zhang, Xie, Cai, Ma, "VRM: Knowledge Distillation via Virtual Relation Matching", ICCV 2025 (arXiv 2502.20760).

    L = CE(z_real, y) + CE(z_virtual, y) + alpha * L_ISV + beta * L_ICV

The networks see every image twice, in a real and in a strongly augmented virtual view. Relations are unit differences
between a prediction (softmax at ``temperature``) in the real view and one in the virtual view, of samples
(inter-sample, ISV) and of classes, which are the columns of the predictions (inter-class, ICV). The student's relations
are to equal the teacher's:

    L_graph = mean over kept edges of 1/2 |u_T - u_S|^2,   u = d / max(|d|, eps)

Redundant edges are never built: only real-virtual ones exist. Unreliable edges are pruned: those of high joint entropy
of the student's predictions. There is no factor ``temperature**2``. Gradients reach the student in both views and
nothing else. See :mod:`vrm.relations` for the mathematics.

The paper leaves open, and we chose: the mean over kept edges with its factor one half (so that weights do not depend on
batch, classes or ``keep``); ``alpha = beta = 10``, for which the gradient of the relations is about as large as that of
the cross entropy; the formula of the joint entropy, and the share of edges to keep. Algorithm 1 has squared distances,
the text a Huber loss; the first is the default, and at ``delta=1`` the two are practically the same.

One setting for each ablation; the recipe of CIFAR-100 has variants of them (``variant=redundant``, see
docs/relations.md):

    Table 14  method.virtual_cross_entropy=false        no cross entropy on the virtual view
    Table 15  variant=long                              360 epochs, in the recipe of CIFAR-100
    Table 16  method.temperature=1 (.. 6)
    Table 17  method.prune_redundant=false              all pairs of the 2B predictions; temperature 1, 2, 4
    Table 18  method.vertices=features                  pooled features instead of predictions
              method.keep=1                             no pruning of unreliable edges (sweep: 0.5 .. 1)
              method.matching=huber                     with method.delta=1
              method.num_virtual_views=2
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from vrm.contract import Batch, DataInfo, Losses, Method, Needs, Outputs, Probe, Progress, Term, Views
from vrm.divergences import check_temperature, cross_entropy, lift
from vrm.relations import (
    JointEntropy,
    Matching,
    check_matching,
    check_pruning,
    class_distributions,
    gather_vertices,
    match_relations,
    predictions,
    prune_edges,
)

Vertices = Literal["logits", "features"]

# B batch, C classes, D pooled features, V length of a vertex (C or D)


def _graphs(
    teacher: tuple[Tensor, Tensor],
    student: tuple[Tensor, Tensor],
    sample_distributions: tuple[Tensor, Tensor] | None,
    class_distributions_of: tuple[Tensor, Tensor] | None,
    *,
    keep: float,
    joint_entropy: JointEntropy,
    prune_redundant: bool,
    matching: Matching,
    delta: float,
    eps: float,
    dtype: torch.dtype,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """Match the inter-sample and the inter-class graph of vertices (B, V), each given as (real, virtual).

    A graph is pruned by the student's predictions (B, C) if its distributions are given.
    """

    def global_graph(real: Tensor, virtual: Tensor) -> tuple[Tensor, Tensor]:
        # Lifted first, so that the gradients of all processes add up in float32.
        real, virtual = (gather_vertices(lift(x), group) for x in (real, virtual))
        if prune_redundant:
            return real, virtual
        # Two tensors, because torch.compile does not pass one tensor twice to an autograd function.
        return torch.cat([real, virtual]), torch.cat([real, virtual])

    teacher, student = global_graph(*teacher), global_graph(*student)

    def match(transpose: bool, distributions: tuple[Tensor, Tensor] | None) -> Tensor:
        kept = None
        if distributions is not None:
            real, virtual = global_graph(*(x.detach() for x in distributions))
            if transpose:
                real, virtual = class_distributions(real), class_distributions(virtual)
            kept = prune_edges(
                real,
                virtual,
                keep=keep,
                kind=joint_entropy,
                without_diagonal=not prune_redundant,
                dtype=dtype,
                group=group,
            )
        vertices = (x.T if transpose else x for x in (*teacher, *student))
        return match_relations(
            *vertices,
            keep=kept,
            matching=matching,
            delta=delta,
            eps=eps,
            without_diagonal=not prune_redundant,
            dtype=dtype,
            group=group,
        )

    return match(False, sample_distributions), match(True, class_distributions_of)


def _check_shapes(*vertices_BV: Tensor) -> None:
    """Raise ``ValueError`` unless all four are matrices of one shape."""
    shapes = [tuple(x.shape) for x in vertices_BV]
    if len(shapes[0]) != 2 or len(set(shapes)) > 1:
        raise ValueError(
            "relations of teacher and student are compared coordinate by coordinate, so both views of both networks "
            f"need the same shape (samples, coordinates); got {', '.join(map(str, shapes))} for the student's real and "
            "virtual and the teacher's real and virtual view"
        )


def _both_predictions(real_BC: Tensor, virtual_BC: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the softened predictions of both views, computed together."""
    both_BC = torch.cat([lift(real_BC), lift(virtual_BC)])  # lifted first, since autocast cannot join float16 on a CPU
    real, virtual = predictions(both_BC, temperature=temperature).chunk(2)
    return real, virtual


def vrm_loss(
    student_real_BC: Tensor,
    student_virtual_BC: Tensor,
    teacher_real_BC: Tensor,
    teacher_virtual_BC: Tensor,
    *,
    temperature: float = 4.0,
    keep: float = 0.9,
    joint_entropy: JointEntropy = "mixture",
    prune_redundant: bool = True,
    matching: Matching = "squared",
    delta: float = 1.0,
    eps: float = 1e-8,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the inter-sample and the inter-class loss, two scalars between 0 and 2, of logits (B, C) in two views.

    Zhang et al., ICCV 2025, Algorithm 1. Multiply each by a weight of about 10 and add the cross entropies.

    Args:
        student_real_BC: the student's logits in the real view.
        student_virtual_BC: the student's logits in the virtual view.
        teacher_real_BC: the teacher's logits in the real view; no gradient reaches them.
        teacher_virtual_BC: the teacher's logits in the virtual view.
        temperature: softens all four predictions.
        keep: share of edges that stay when the unreliable ones are pruned, in (0, 1]; 1 prunes none.
        joint_entropy: the measure of unreliability, see :func:`vrm.relations.joint_entropy`.
        prune_redundant: use real-virtual edges only; otherwise all ordered pairs of the 2B predictions, and class
            vertices of length 2B.
        matching: ``squared``, or ``huber`` with threshold ``delta``.
        delta: threshold of the Huber loss.
        eps: shorter differences are not normalised.
        group: match relations over the batches of all these processes; average the values over them.

    Raise ``ValueError`` for logits of different shapes, and as :func:`~vrm.relations.match_relations` and
    :func:`~vrm.relations.prune_edges` say.

    Example:
        >>> isv, icv = vrm_loss(student(real), student(virtual), teacher(real), teacher(virtual))
        >>> loss = cross_entropy(...) + 10 * isv + 10 * icv
    """
    _check_shapes(student_real_BC, student_virtual_BC, teacher_real_BC, teacher_virtual_BC)
    student = _both_predictions(student_real_BC, student_virtual_BC, temperature)
    return _graphs(
        _both_predictions(teacher_real_BC.detach(), teacher_virtual_BC.detach(), temperature),
        student,
        student,
        student,
        keep=keep,
        joint_entropy=joint_entropy,
        prune_redundant=prune_redundant,
        matching=matching,
        delta=delta,
        eps=eps,
        dtype=lift(student_real_BC).dtype,
        group=group,
    )


def vrm_feature_loss(
    student_real_BD: Tensor,
    student_virtual_BD: Tensor,
    teacher_real_BD: Tensor,
    teacher_virtual_BD: Tensor,
    student_logits: tuple[Tensor, Tensor] | None = None,
    *,
    temperature: float = 4.0,
    keep: float = 0.9,
    joint_entropy: JointEntropy = "mixture",
    prune_redundant: bool = True,
    matching: Matching = "squared",
    delta: float = 1.0,
    eps: float = 1e-8,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the same two losses of pooled features (B, D), without softmax (Table 18 of the paper).

    Both networks need the same D. The inter-sample graph is pruned by the student's predictions, softened from
    ``student_logits``: (real, virtual), each (B, C), which may be omitted if ``keep=1``. The graph of feature columns
    is not pruned. The other arguments are those of :func:`vrm_loss`. Raise ``ValueError`` if the logits are missing or
    of other samples, or if the features differ in shape.
    """
    check_pruning(keep, joint_entropy)
    if student_logits is None and keep != 1:
        raise ValueError(f"keep={keep} prunes by the student's predictions: pass student_logits, or keep=1")
    _check_shapes(student_real_BD, student_virtual_BD, teacher_real_BD, teacher_virtual_BD)
    predicted = None
    if student_logits is not None:
        shapes = [tuple(x.shape) for x in student_logits]
        if len(shapes) != 2 or shapes[0] != shapes[1] or shapes[0][:1] != student_real_BD.shape[:1]:
            raise ValueError(
                f"student_logits must be (real, virtual), each ({len(student_real_BD)}, classes), of the samples "
                f"of the features; got {', '.join(map(str, shapes))}"
            )
        predicted = _both_predictions(student_logits[0].detach(), student_logits[1].detach(), temperature)
    return _graphs(
        (teacher_real_BD.detach(), teacher_virtual_BD.detach()),
        (student_real_BD, student_virtual_BD),
        predicted,
        None,
        keep=keep,
        joint_entropy=joint_entropy,
        prune_redundant=prune_redundant,
        matching=matching,
        delta=delta,
        eps=eps,
        dtype=lift(student_real_BD).dtype,
        group=group,
    )


class VRM(Method):
    """Match the relations between real and virtual predictions, of samples and of classes."""

    title = "VRM: Knowledge Distillation via Virtual Relation Matching"
    venue = "ICCV"
    year = 2025
    family = "relation"
    published: ClassVar = {
        "cifar100": {"*": {"temperature": 4.0}},
        "imagenet": {"*": {"temperature": 2.0}},
    }

    def __init__(
        self,
        temperature: float = 4.0,
        alpha: float = 10.0,
        beta: float = 10.0,
        keep: float = 0.9,
        joint_entropy: JointEntropy = "mixture",
        prune_redundant: bool = True,
        virtual_cross_entropy: bool = True,
        vertices: Vertices = "logits",
        matching: Matching = "squared",
        delta: float = 1.0,
        eps: float = 1e-8,
        num_virtual_views: int = 1,
        gather: bool = False,
    ) -> None:
        """Set the options.

        Args:
            temperature: softens the predictions, above 0.
            alpha: weight of the inter-sample term, 0 or more.
            beta: weight of the inter-class term, 0 or more.
            keep: share of edges that stay when the unreliable ones are pruned, in (0, 1]; 1 prunes none.
            joint_entropy: formula by which edges are unreliable (see :func:`vrm.relations.joint_entropy`).
            prune_redundant: use real-virtual edges only; otherwise all pairs.
            virtual_cross_entropy: add the cross entropy on the virtual views.
            vertices: relations of predictions (``logits``) or of pooled ``features``.
            matching: distance of relations, half the squared difference or the Huber loss.
            delta: threshold of the Huber loss, above 0.
            eps: differences shorter than this are not normalised, at least 1e-150. A student whose classifier starts at
                zero has no relations in its first step and gradients of the size 1 / eps; choose 1e-3 for such a
                student.
            num_virtual_views: number of virtual views, 1 or more; losses are the mean over them.
            gather: relate the samples of all processes, whose batches must have one size.
        """
        super().__init__()
        check_pruning(keep, joint_entropy)
        check_matching(matching, delta, eps)
        check_temperature(temperature)
        for name, weight in (("alpha", alpha), ("beta", beta)):
            if not weight >= 0:
                raise ValueError(f"{name}, a weight, must be 0 or more; got {weight}")
        if vertices not in get_args(Vertices):
            raise ValueError(f"vertices must be one of {', '.join(get_args(Vertices))}; got {vertices!r}")
        if not isinstance(num_virtual_views, int) or num_virtual_views < 1:
            raise ValueError(
                "num_virtual_views must be a whole number of at least 1, since VRM relates two views; "
                f"got {num_virtual_views}"
            )
        self.temperature = temperature
        self.alpha = alpha
        self.beta = beta
        self.keep = keep
        self.joint_entropy: JointEntropy = joint_entropy
        self.prune_redundant = prune_redundant
        self.virtual_cross_entropy = virtual_cross_entropy
        self.vertices = vertices
        self.matching: Matching = matching
        self.delta = delta
        self.eps = eps
        self.num_virtual_views = num_virtual_views
        self.gather = gather

    @property
    def needs(self) -> Needs:
        """Virtual views, and batches kept whole because relations join their samples."""
        return Needs(virtual_views=self.num_virtual_views, couples_samples=self.alpha > 0 or self.beta > 0)

    def unused_options(self) -> dict[str, str]:
        """Return what only the Huber loss, only pruning or only relations read, where these are left out."""
        if self.alpha == self.beta == 0:
            reason = "method.alpha=0 and method.beta=0 leave out the relations"
            options = "temperature keep joint_entropy prune_redundant vertices matching delta eps gather"
            return dict.fromkeys(options.split(), reason)
        unused = {}
        if self.matching != "huber":
            unused["delta"] = "only method.matching=huber has a threshold"
        if self.keep == 1:
            unused["joint_entropy"] = "method.keep=1 prunes no edge"
            if self.vertices == "features":
                unused["temperature"] = "features are not softened, and method.keep=1 prunes no edge by predictions"
        return unused

    def build(self, student: Probe, teacher: Probe, data: DataInfo) -> None:
        """Check that the relations can be compared.

        Raise ``ValueError`` if the vertices of the networks differ in length, or if ``gather`` would meet batches that
        do not divide evenly over the processes.
        """
        size = dist.get_world_size() if self.gather and dist.is_available() and dist.is_initialized() else 1
        for batch in (min(data.batch_size, data.num_samples), data.num_samples % data.batch_size):
            if batch % size:
                raise ValueError(
                    f"method.gather=true needs batches that divide evenly over {size} processes, but "
                    f"{data.num_samples} samples in batches of {data.batch_size} give one of {batch}; choose another "
                    "batch_size, or method.gather=false"
                )
        tap = "logits" if self.vertices == "logits" else "pooled"
        for probe in (student, teacher):
            probe.resolve((tap,))
        lengths = student.channels(tap), teacher.channels(tap)
        if lengths[0] != lengths[1]:
            raise ValueError(
                f"VRM on {self.vertices} compares vectors of one length, but {student.name} has {lengths[0]} and "
                f"{teacher.name} {lengths[1]}; "
                + ("both must predict the same classes" if tap == "logits" else "use method.vertices=logits")
            )

    def _match(self, student: tuple[Outputs, Outputs], teacher: tuple[Outputs, Outputs]) -> tuple[Tensor, Tensor]:
        """Return both relation losses of the real view and one virtual view."""
        logits = student[0].logits, student[1].logits
        gathering = self.gather and dist.is_available() and dist.is_initialized()
        options: dict[str, Any] = {
            "temperature": self.temperature,
            "keep": self.keep,
            "joint_entropy": self.joint_entropy,
            "prune_redundant": self.prune_redundant,
            "matching": self.matching,
            "delta": self.delta,
            "eps": self.eps,
            "group": dist.group.WORLD if gathering else None,
        }
        if self.vertices == "logits":
            return vrm_loss(*logits, *(view.logits for view in teacher), **options)
        real_s, virtual_s, real_t, virtual_t = (view.require_pooled() for view in (*student, *teacher))
        return vrm_feature_loss(real_s, virtual_s, real_t, virtual_t, logits, **options)

    def forward(self, student: Views, teacher: Views, batch: Batch, progress: Progress) -> Losses:
        """Return cross entropies and relation losses, each the mean over virtual views."""
        losses = Losses(ce_real=Term(cross_entropy(student.real.logits, batch.target), 1.0, "task"))
        if self.virtual_cross_entropy:
            each = [cross_entropy(virtual.logits, batch.target) for virtual in student.virtual]
            losses["ce_virtual"] = Term(torch.stack(each).mean(), 1.0, "task")
        pairs = zip(student.virtual, teacher.virtual, strict=True)
        matched = [self._match((student.real, s), (teacher.real, t)) for s, t in pairs]
        isv, icv = (torch.stack(each).mean() for each in zip(*matched, strict=True))
        losses["isv"] = Term(isv, self.alpha)
        losses["icv"] = Term(icv, self.beta)
        return losses
