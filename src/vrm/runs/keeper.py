"""Keeps a training: saves it, restores it, and writes what a finished run leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from vrm import config, models
from vrm.engine.devices import device_name
from vrm.engine.distribution import World
from vrm.engine.step import Step
from vrm.files import NotWritten
from vrm.models.card import FORMAT
from vrm.runs.assembly import Assembly
from vrm.runs.checkpoint import Checkpoint, read_checkpoint
from vrm.runs.environment import Facts
from vrm.runs.errors import NonFinite, RunError
from vrm.runs.folder import RunFolder
from vrm.runs.plan import Plan
from vrm.runs.resumption import newest_checkpoint
from vrm.runs.state import TrainingState

ROLLBACK_FACTOR = 0.5
"""Factor by which ``nan=rollback`` lowers the learning rate each time."""

SMALLEST_RATE = 2.0**-6
"""The share of its schedule's rate below which a run that keeps meeting NaN gives up."""


class Keeper:
    """Saves and restores a training. Only the main process, which has the folder, writes."""

    def __init__(
        self,
        assembly: Assembly,
        state: TrainingState,
        facts: Facts,
        folder: RunFolder | None,
        world: World,
        note: Callable[[str], None],
    ) -> None:
        """Keep this training in ``folder``, which is None in all processes but the main one."""
        self.assembly, self.state, self.facts, self.folder, self.world = assembly, state, facts, folder, world
        self.note = note
        self.modules: dict[str, nn.Module] = {"student": assembly.student.network, "method": assembly.method}
        if state.average is not None:
            self.modules["ema"] = state.average.average

    @property
    def plan(self) -> Plan:
        """The course of the run."""
        return self.facts.plan

    # ---- saving

    def save(self, step: Step) -> None:
        """Write a checkpoint and drop the oldest ones."""
        self.world.copy_buffers(self.assembly.distiller)
        draws = self.world.gather(_random_state(self.assembly.device))
        measured = {name: self.world.sum(value) for name, value in step.meter.sums.items()}
        if self.folder is None:
            return
        tensors = self._tensors(step, measured)
        tensors |= {f"rng.{rank}.{kind}": value for rank, kinds in enumerate(draws) for kind, value in kinds.items()}
        state = self.state
        values = {
            "step": state.step,
            "phase": step.phase.name,
            "meter": list(step.meter.sums),
            "rate_scale": state.rate_scale,
            "best": state.best,
            "last": state.last,
            "seconds": state.seconds,
            "hashes": self.facts.hashes,
            "environment": self.facts.environment,
            "settings": config.flat(self.assembly.run),
        }
        with self._tolerant():
            self.folder.save(tensors, values, keep=self.assembly.run.checkpoint.keep)

    def _tensors(self, step: Step, measured: Mapping[str, Tensor]) -> dict[str, Any]:
        found: dict[str, Any] = {
            f"{prefix}.{n}": t for prefix, module in self.modules.items() for n, t in module.state_dict().items()
        }
        for i, parameter in enumerate(step.parameters):
            found |= {f"optimizer.{i}.{name}": value for name, value in step.optimizer.state[parameter].items()}
        found |= {f"meter.{name}": value for name, value in measured.items()}
        incident, scale = self.state.incident, self.state.loss_scale
        found |= {f"incident.terms.{name}": value for name, value in incident.terms.items()}
        found |= {"incident.step": incident.step, "incident.index": incident.index}
        if scale is not None:
            found |= {"loss_scale.value": scale.value, "loss_scale.streak": scale.streak}
        return found | {f"best.{name}": value for name, value in self.state.best_weights.items()}

    def save_best(self) -> None:
        """Keep the student's weights as the best so far."""
        network = self.assembly.student.network
        self.state.best_weights = {
            name: value.detach().clone() if isinstance(value, Tensor) else deepcopy(value)
            for name, value in network.state_dict().items()
        }
        if self.folder is not None:
            with self._tolerant():
                self.folder.write_weights("best.safetensors", self.state.best_weights)

    @contextmanager
    def _tolerant(self) -> Iterator[None]:
        """Let a failure to write stop the run, or (``checkpoint.on_error=continue``) tell it and go on."""
        try:
            yield
        except NotWritten as error:
            if self.assembly.run.checkpoint.on_error == "stop":
                raise
            self.note(f"{error}; training goes on, as checkpoint.on_error=continue says")

    # ---- restoring

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take networks, counters and logs back to a checkpoint; :meth:`restore_phase` does the rest."""
        state, values = self.state, checkpoint.state
        state.step, state.rate_scale = values["step"], values["rate_scale"]
        state.best, state.last, state.seconds = values["best"], values["last"], values["seconds"]
        with checkpoint.fitted():
            for prefix, module in self.modules.items():
                module.load_state_dict(checkpoint.part(prefix))
            incident, scale = state.incident, state.loss_scale
            incident.step.copy_(checkpoint.tensors["incident.step"])
            incident.index.copy_(checkpoint.tensors["incident.index"])
            incident.terms = {n: t.to(incident.step.device) for n, t in checkpoint.part("incident.terms").items()}
            if scale is not None:
                scale.value.copy_(checkpoint.tensors["loss_scale.value"])
                scale.streak.copy_(checkpoint.tensors["loss_scale.streak"])
            state.best_weights = checkpoint.part("best")
            _restore_random_state(checkpoint.part(f"rng.{self.world.rank}"), self.assembly.device)
        if self.folder is not None:
            for problem in self.folder.rewind(checkpoint, last_step=self.plan.last_step):
                self.note(problem)
            if state.best_weights:  # better ones may have been written after the checkpoint
                self.folder.write_weights("best.safetensors", state.best_weights)

    def restore_phase(self, step: Step, checkpoint: Checkpoint) -> None:
        """Put momenta back, and (in the main process) what all processes measured since the last reading."""
        with checkpoint.fitted():
            for name in checkpoint.state["meter"]:
                value = checkpoint.tensors[f"meter.{name}"].to(step.meter.device)[None]
                step.meter.add([name], value * self.world.main)
            for i, parameter in enumerate(step.parameters):
                for name, value in step.optimizer.state[parameter].items():
                    value.copy_(checkpoint.tensors[f"optimizer.{i}.{name}"])

    def roll_back(self) -> Checkpoint:
        """Return the newest checkpoint, to be trained on from with a lower rate.

        Raise ``NonFinite`` if the rate would become too low, ``RunError`` without a checkpoint.
        """
        found = newest_checkpoint(self.folder.checkpoints)[0] if self.folder is not None else None
        path = self.world.from_main(None if found is None else found.path)
        if path is None:
            raise RunError(f"{self.assembly.run.run}: no checkpoint to roll back to")
        checkpoint = found or read_checkpoint(path)
        scale = self.state.rate_scale * ROLLBACK_FACTOR
        if scale < SMALLEST_RATE:
            raise NonFinite(
                f"training from step {checkpoint.step} still gives NaN or infinity at {self.state.rate_scale:.3g} "
                "times the learning rate; look at the samples and loss terms in nonfinite.json"
            )
        checkpoint.state["rate_scale"] = scale
        self.note(f"back to step {checkpoint.step}, with {scale:g} times the learning rate")
        return checkpoint

    # ---- the end

    def finish(self) -> dict[str, Any]:
        """Write the student and its card, ``model.json``; the same again if it was written before."""
        state, plan, network = self.state, self.plan, self.assembly.student.network
        images = plan.images_after(state.step)
        views = self.assembly.num_views
        metrics = self.assembly.task.metrics(self.assembly.data.num_classes)
        whole = bool(state.last) and "images" not in state.last  # the scores of a trial are on a sample
        scores = {metric.key: state.last[metric.key] for metric in metrics} if whole else None
        content = asdict(replace(self.assembly.student.card, scores=scores)) | {
            "format": FORMAT,
            "weights_sha256": models.weights_hash(network),
            "last": state.last,
            "best": state.best,
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "steps": state.step,
            "all_steps": plan.num_steps,
            "images_per_second": round(images / max(state.seconds["training"], 1e-9), 1),
            "full_run_seconds": round(self._full_run_seconds()),
            "epochs": state.step / plan.steps_per_epoch,
            "extra_epochs": plan.extra_epochs,
            "student_passes": views * images,
            "student_views": views,
            "seconds": round(state.seconds["all"], 3),
            "device": device_name(self.assembly.device),
        }
        if self.folder is not None:
            weights = {"best.safetensors": state.best_weights, "model.safetensors": network.state_dict()}
            if state.average is not None:
                weights["ema.safetensors"] = state.average.average.state_dict()
            self.folder.finish(content, weights)
        return content

    def _full_run_seconds(self) -> float:
        """Return what all steps, and one evaluation an epoch, take at the speed measured so far."""
        state, plan = self.state, self.plan
        per_step = state.seconds["training"] / max(state.step, 1)
        per_evaluation = state.seconds["evaluation"] / max(plan.epoch_at(state.step - 1), 1)
        return per_step * plan.num_steps + per_evaluation * plan.num_epochs


def _random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the state of torch's generators, from which dropout draws, in this process."""
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _restore_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
