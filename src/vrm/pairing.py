"""Pairing: which tap of the student learns from which tap of the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vrm.contract import Probe


def match_stages(student: Probe, teacher: Probe, *, pre: bool = False) -> tuple[tuple[str, str], ...]:
    """Return pairs (student tap, teacher tap) of stages that see the image at about the same scale.

    Networks with equally many stages, whose strides differ by at most a factor of two, pair by position, as in the
    released code behind the published tables. Otherwise stages pair by stride: among the stages of each stride that
    both networks have, the last pair first, then the ones before them, until one network has no more. If no stride is
    shared, stages pair by position from the end. Raise ``ValueError`` if either network has no stages.
    """
    for probe in (student, teacher):
        if not probe.stages:
            raise ValueError(f"{probe.name} has no known stages; name the module paths of its feature maps instead")
    pairs = list(zip(student.stages, teacher.stages, strict=False))
    aligned = all(0.5 <= student.stride(s) / teacher.stride(t) <= 2 for s, t in pairs)
    if len(student.stages) != len(teacher.stages) or not aligned:
        pairs = []
        for stride in dict.fromkeys(student.stride(stage) for stage in student.stages):
            of_student = [stage for stage in student.stages if student.stride(stage) == stride]
            of_teacher = [stage for stage in teacher.stages if teacher.stride(stage) == stride]
            count = min(len(of_student), len(of_teacher))
            pairs += zip(of_student[len(of_student) - count :], of_teacher[len(of_teacher) - count :], strict=True)
    if not pairs:
        count = min(len(student.stages), len(teacher.stages))
        pairs = list(zip(student.stages[-count:], teacher.stages[-count:], strict=True))
    suffix = ":pre" if pre else ""
    return tuple((s + suffix, t + suffix) for s, t in pairs)


def pair_taps(
    student: Probe, teacher: Probe, student_taps: Sequence[str], teacher_taps: Sequence[str]
) -> tuple[tuple[str, str], ...]:
    """Return the pairs (student tap, teacher tap) that two lists of selectors stand for.

    The lists pair by position; where both say ``stages`` or ``stages:pre``, :func:`match_stages` pairs the stages.
    Raise ``ValueError`` if the lists do not fit each other, or if a network lacks a tap.
    """
    pairs: list[tuple[str, str]] = []
    if len(student_taps) != len(teacher_taps):
        raise ValueError(
            f"student_taps and teacher_taps pair by position, but there are {len(student_taps)} "
            f"({', '.join(student_taps)}) and {len(teacher_taps)} ({', '.join(teacher_taps)}); "
            "name equally many of both networks"
        )
    for of_student, of_teacher in zip(student_taps, teacher_taps, strict=True):
        if of_student.partition(":")[0] == of_teacher.partition(":")[0] == "stages":
            stages = match_stages(student, teacher)
            of_students = [of_student.replace("stages", stage) for stage, _ in stages]
            of_teachers = [of_teacher.replace("stages", stage) for _, stage in stages]
        else:
            of_students, of_teachers = list(student.resolve([of_student])), list(teacher.resolve([of_teacher]))
            if len(of_students) != len(of_teachers):
                raise ValueError(
                    f"{of_student!r} is {len(of_students)} taps of {student.name}, but {of_teacher!r} is "
                    f"{len(of_teachers)} of {teacher.name}; name equally many of both networks"
                )
        for role, probe, names in (("student", student, of_students), ("teacher", teacher, of_teachers)):
            linear = [name for name in names if name.endswith(":pre") and name.removesuffix(":pre") in probe.signed]
            if any(name not in probe.shapes for name in linear):
                raise ValueError(
                    f"{probe.name} has no pre-activation taps (asked for {', '.join(linear)}): its stages end "
                    f"without a ReLU, so their outputs are signed. Choose a {role} with pre-activations, or use the "
                    f"signed outputs themselves with the method's option {role}_taps=[stages]"
                )
            probe.resolve(names)
        pairs += zip(of_students, of_teachers, strict=True)
    return tuple(pairs)
