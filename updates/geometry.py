"""Slots that hold the norm of a matrix or of its step: hyperball, floors, radial brake, pin, decay after it.

W is a parameter's matrix, u its update, lr the learning rate; W - lr u is the step.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from schedule import StepPlan
from settings.muon import LateBrake, LateFloor
from updates.norms import frobenius, inner, ramped
from updates.slots import Slot, Step


@dataclass(frozen=True)
class Hyperball(Slot):
    """Keep the Frobenius norm R of each matrix (track 3, result 5).

    W' = W - lr R u / |u|, then W = R W' / |W'|; both norms at least 1e-10. It replaces weight decay.
    added: 1e-10 is added to both norms (result 33).
    """
    added: bool = False

    def __call__(self, u: torch.Tensor, step: Step) -> torch.Tensor:
        step.scratch["radius"] = frobenius(step.p)
        return u * (step.scratch["radius"] / self.norm(u)).to(u.dtype)

    def after(self, step: Step) -> None:
        step.p.mul_(step.scratch["radius"] / self.norm(step.p))

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        # Compiled, of the rows first: with one reduction over both axes the inductor of torch 2.13 cannot
        # compile this chain for a CPU (KeyError in its outer loop fusion).
        if torch.compiler.is_compiling():
            x = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return frobenius(x) + 1e-10 if self.added else frobenius(x, 1e-10)


@dataclass(frozen=True)
class RadialBrake(Slot):
    """Damp the part of the step that lengthens the matrix (track 3, result 29).

    u = T + c W with c = <u, W> / max(|W|^2, 1e-12). Where c < 0 the step - lr u points outward, and c W
    becomes keep c W. late: another `keep` near the end, which it takes linearly (result 38).
    """
    keep: float
    late: LateBrake | None = None

    def numbers(self, plan: StepPlan, t: int) -> dict:
        late, keep = self.late, self.keep
        return {"brake": ramped(keep, late.factor, plan.step, late.start, late.end) if late else keep}

    def __call__(self, u: torch.Tensor, step: Step) -> torch.Tensor:
        w = step.p.to(u.dtype)
        c = inner(u, w) / inner(w, w).clamp_min(1e-12)
        return u + (step.numbers["brake"] - 1) * c.clamp_max(0) * w


@dataclass(frozen=True)
class UpdateFloor(Slot):
    """A lower bound on the relative size of a step (track 3: result 9, matrices; result 46, rows).

    u <- u max(1, ratio |W| / |u|) with the Frobenius norms of each matrix, or those of each row (an output
    channel); norms are at least 1e-8. late: another ratio near the end, which it takes linearly (result 38).
    """
    ratio: float
    per: Literal["matrix", "row"]
    late: LateFloor | None = None

    def numbers(self, plan: StepPlan, t: int) -> dict:
        late, ratio = self.late, self.ratio
        return {"floor": ramped(ratio, late.ratio, plan.step, late.start, late.end) if late else ratio}

    def __call__(self, u: torch.Tensor, step: Step) -> torch.Tensor:
        axes = (-2, -1) if self.per == "matrix" else -1
        w, length = (
            torch.linalg.vector_norm(x, dim=axes, keepdim=True).clamp_min(1e-8)
            for x in (step.p.to(u.dtype), u)
        )
        return u * (step.numbers["floor"] * w / length).clamp_min(1)


@dataclass(frozen=True)
class RadiusPin(Slot):
    """Set the norm of a matrix after the step to what its radial part alone asks for (track 3, result 29).

    With b = max(|W|, 1e-8), r = max(b - lr <u, W> / b, 1e-8): the step is followed by W <- r W / |W|, so that
    the tangential part turns the matrix and does not lengthen it. A matrix of zeros becomes a direction of
    length 1e-8.
    """

    def __call__(self, u: torch.Tensor, step: Step) -> torch.Tensor:
        w = step.p.to(u.dtype)
        b = frobenius(w, 1e-8)
        step.scratch["target"] = (b - step.numbers["lr"] * inner(u, w) / b).clamp_min(1e-8)
        return u

    def after(self, step: Step) -> None:
        step.p.mul_(step.scratch["target"] / frobenius(step.p, 1e-8))


@dataclass(frozen=True)
class LateDecay(Slot):
    """Cautious weight decay of the matrix that the step and the pin have left (track 3, result 46).

    W <- W (1 - lr decay) where u W > 0, with the W from before the step.
    """
    decay: float

    each_matrix = False

    def __call__(self, u: torch.Tensor, step: Step) -> torch.Tensor:
        step.scratch["decayed"] = u * step.p > 0
        return u

    def after(self, step: Step) -> None:
        step.p.sub_(step.scratch["decayed"] * step.p * (step.numbers["lr"] * self.decay))
