"""VRM on reference vectors: our path from a file's spec and tensors to outputs under the file's names."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vrm.divergences import cross_entropy
from vrm.methods.vrm import vrm_feature_loss, vrm_loss
from vrm.relations import class_distributions, joint_entropy, predictions, prune_edges


def golden(spec: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Everything that a file of ``vrm``, ``vrm_features`` or ``vrm_redundant`` may ask for."""
    settings = {key: value for key, value in spec["hyperparameters"].items() if key not in ("alpha", "beta")}
    redundant = spec["method"] == "vrm_redundant"
    networks = [f"{network}_{view}" for network in ("student", "teacher") for view in ("real", "virtual")]
    logits = [tensors[f"in.logits_{name}"] for name in networks if f"in.logits_{name}" in tensors]
    if spec["method"] == "vrm_features":
        features = [tensors[f"in.features_{name}"] for name in networks]
        student_logits = (logits[0], logits[1]) if logits else None
        isv, icv = vrm_feature_loss(*features, student_logits, **settings)
    else:
        isv, icv = vrm_loss(*logits, prune_redundant=not redundant, **settings)
    outputs = {"out.loss_isv": isv, "out.loss_icv": icv}

    if "in.target" in tensors:
        task = cross_entropy(logits[0], tensors["in.target"]) + cross_entropy(logits[1], tensors["in.target"])
        weights = spec["hyperparameters"]
        outputs["out.loss_total"] = task + weights["alpha"] * isv + weights["beta"] * icv

    if logits and not redundant:
        real, virtual = (predictions(z, temperature=settings["temperature"]) for z in logits[:2])
        for graph, p, q in (("isv", real, virtual), ("icv", class_distributions(real), class_distributions(virtual))):
            kind = settings.get("joint_entropy", "mixture")
            outputs[f"out.joint_entropy_{graph}"] = joint_entropy(p, q, kind=kind)
            mask = prune_edges(p, q, keep=settings["keep"], kind=kind)
            if isinstance(mask, Tensor):
                outputs[f"out.mask_{graph}"] = mask
    return outputs
