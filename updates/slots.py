"""The slots of Muon's chain. Each takes the update so far and returns the next one.

A slot has a `state(unit, dtype)` like a rule, and is called with (u, step): the update so far, and a Step.
`each_matrix`: u is a batch (N, rows, cols) of one of the unit's matrices; otherwise u has whole units (N,
*unit). Only state is changed in place. A new slot is one class here and its section in settings.Muon.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from kernels.newton_schulz import newton_schulz
from updates.views import Views


class Step(NamedTuple):
    """What a slot can look at: the parameter, the state of all slots, this step's numbers and the parameter's
    views."""
    p: torch.Tensor
    state: dict
    numbers: dict
    views: Views

    def parts(self) -> list["Step"]:
        """One Step for each matrix of the units, as views of this one."""
        if not self.views.joined:
            return [self]
        states = {name: self.views.split(x) for name, x in self.state.items()}
        return [Step(p, {name: x[i] for name, x in states.items()}, self.numbers, self.views)
                for i, p in enumerate(self.views.split(self.p))]


@dataclass(frozen=True)
class Momentum:
    """Nesterov momentum. averaged: M <- mu M + (1-mu) g and (1-mu) g + mu M (record 15); otherwise M <- mu M
    + g and g + mu M."""
    averaged: bool

    each_matrix = False

    def state(self, unit, dtype) -> dict:
        return {"momentum_buffer": (unit, dtype)}

    def __call__(self, u, step):
        buffer, momentum = step.state["momentum_buffer"], step.numbers["momentum"]
        g = u.to(buffer.dtype)
        if self.averaged:  # M + (1-mu) (g - M), as the originals round it
            buffer.lerp_(g, 1 - momentum)
            return g.lerp(buffer, momentum)
        buffer.mul_(momentum).add_(g)
        return momentum * buffer + g


@dataclass(frozen=True)
class Orthogonalise:
    """Newton-Schulz iteration (kernels/newton_schulz.py). The result has at least the precision of
    `least`."""
    steps: int
    dtype: torch.dtype
    norm_dtype: torch.dtype
    form: str
    least: torch.dtype
    one_by_one: bool  # A batched product may round differently for another batch size.
    fused: bool

    each_matrix = True

    def state(self, unit, dtype) -> dict:
        return {}

    def __call__(self, u, step):
        how = dict(
            steps=self.steps, dtype=self.dtype, norm_dtype=self.norm_dtype, form=self.form, fused=self.fused
        )
        if self.one_by_one:
            x = torch.stack([newton_schulz(matrix, **how) for matrix in u]) if len(u) else u.to(self.dtype)
        else:
            x = newton_schulz(u, **how)
        return x.to(torch.promote_types(x.dtype, self.least))


FACTORS = {"sqrt_max": lambda rows, cols: math.sqrt(max(rows, cols)),
           "sqrt_ratio": lambda rows, cols: math.sqrt(max(1, rows / cols))}


@dataclass(frozen=True)
class Scale:
    """Factor by the shape of the matrix: sqrt(max(rows, cols)) (record 4) or sqrt(max(1, rows / cols))
    (record 8)."""
    kind: str

    each_matrix = True

    def state(self, unit, dtype) -> dict:
        return {}

    def __call__(self, u, step):
        return FACTORS[self.kind](*step.views.shape(u)) * u


@dataclass(frozen=True)
class Decay:
    """Decoupled weight decay: the update grows by `decay` times the parameter."""
    decay: float

    each_matrix = False

    def state(self, unit, dtype) -> dict:
        return {}

    def __call__(self, u, step):
        return u + self.decay * step.p.to(u.dtype)


def chain(s, group) -> tuple:
    """The slots that the settings ask for, in their order. group: settings.Hyper."""
    muon, n = s.optim.muon, s.numerics
    slots = [Momentum(muon.averaged)]
    slots.append(
        Orthogonalise(
            muon.ns_steps, getattr(torch, n.newton_schulz), getattr(torch, n.newton_schulz_norm),
            n.newton_schulz_form, getattr(torch, n.muon_update), one_by_one=s.system.reduction == "ordered",
            fused=s.system.kernels.muon == "triton"
        )
    )
    if muon.scale != "none":
        slots.append(Scale(muon.scale))
    if group.weight_decay:
        slots.append(Decay(group.weight_decay))
    return tuple(slots)
