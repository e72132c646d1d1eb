"""What a hook is: state besides parameters and optimizer, and the points of a step at which it may act."""

import contextlib
from typing import Any

import torch

from schedule import StepPlan, Windows
from system.world import World


class Stateful:
    """A hook that does nothing; subclasses override the methods that they need.

    per_rank: last parts of the names of tensors whose first axis is this process's logical ranks, of which a
    checkpoint holds those of all processes. Every other tensor is the same on all processes.
    """
    per_rank: tuple[str, ...] = ()

    def before_forwards(self, plan: StepPlan) -> None:
        """Before the first forward of a step."""

    def before_update(self, plan: StepPlan, world: World) -> None:
        """After the last backward of a step, before the parameters move. May be collective."""

    def after_update(self, plan: StepPlan) -> None:
        """After the parameters have moved."""

    def for_validation(self, windows: Windows | None) -> Any:
        """A context manager around each validation. windows: those of the validation."""
        return contextlib.nullcontext()

    def reading(self, step: int) -> Any:
        """A context manager in which the model holds what a validation before this step reads.

        For weights that training goes on without; schedule.readouts names them.
        """
        return contextlib.nullcontext()

    def restored(self) -> None:
        """After the tensors of `tensors()` were filled from a checkpoint."""

    def reset(self) -> None:
        """Restore the state before the first step. Called after the reset of model and optimizer."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """{name: tensor} of the whole state."""
        return {}
