"""The slots of Muon's chain: each transforms the update and passes it to the next slot.

A slot has a `state(unit, dtype, views)` like a rule, and is called with (u, step): the update so far and the
Step. With `each_matrix`, u is a batch (N, rows, cols) of one of the unit's matrices; otherwise u has whole
units (N, *unit). A slot changes only its state in place. A new slot is one class here and its section in
optim_settings.Muon.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from kernels.newton_schulz import newton_schulz
from updates.views import Views


class Step(NamedTuple):
    """The inputs of a slot: parameter, state of all slots, numbers of this step, views of the parameter."""
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
    """Nesterov momentum: M <- mu M + g, update g + mu M.

    ema (record 15): M <- mu M + (1-mu) g, update (1-mu) g + mu M.
    """
    ema: bool

    each_matrix = False

    def state(self, unit, dtype, views) -> dict:
        return {"momentum_buffer": (unit, dtype)}

    def __call__(self, u, step):
        buffer, momentum = step.state["momentum_buffer"], step.numbers["momentum"]
        g = u.to(buffer.dtype)
        if self.ema:  # M + (1-mu) (g - M), as the originals round it
            buffer.lerp_(g, 1 - momentum)
            return g.lerp(buffer, momentum)
        buffer.mul_(momentum).add_(g)
        return momentum * buffer + g


@dataclass(frozen=True)
class TwoRails:
    """Momentum from a fast and a slow moving average (record 92).

    V0 <- b V0 + (1-b) g, V1 <- beta V1 + (1-beta) g, update (1-mu) g + mu ((1-share) V0 + share V1). b and
    share are the step's numbers `fast_beta` and `share`, mu is Muon's momentum.
    """
    beta: float

    each_matrix = False

    def state(self, unit, dtype, views) -> dict:
        return {"momentum_buffer": (unit, dtype), "slow_buffer": (unit, dtype)}

    def __call__(self, u, step):
        fast, slow, n = step.state["momentum_buffer"], step.state["slow_buffer"], step.numbers
        g = u.to(fast.dtype)
        fast.lerp_(g, 1 - n["fast_beta"])
        slow.lerp_(g, 1 - self.beta)
        return g.lerp(fast.lerp(slow, n["share"]), n["momentum"])


@dataclass(frozen=True)
class Orthogonalise:
    """Newton-Schulz iteration or Polar Express (kernels/newton_schulz.py).

    least: dtype whose precision the result has at least.
    """
    steps: int
    dtype: torch.dtype
    norm_dtype: torch.dtype
    form: str
    polar_express: bool
    least: torch.dtype
    one_by_one: bool  # a batched product may round differently for another batch size
    fused: bool
    anvil: bool = False
    convergent: bool = False

    each_matrix = True

    def state(self, unit, dtype, views) -> dict:
        return {}

    def __call__(self, u, step):
        how = dict(
            steps=self.steps, dtype=self.dtype, norm_dtype=self.norm_dtype, form=self.form,
            polar_express=self.polar_express, fused=self.fused, anvil=self.anvil, convergent=self.convergent
        )
        if self.one_by_one:
            x = torch.stack([newton_schulz(matrix, **how) for matrix in u]) if len(u) else u.to(self.dtype)
        else:
            x = newton_schulz(u, **how)
        return x.to(torch.promote_types(x.dtype, self.least))


FACTORS = {"none": lambda rows, cols: 1.0,
           "sqrt_max": lambda rows, cols: math.sqrt(max(rows, cols)),
           "sqrt_ratio": lambda rows, cols: math.sqrt(max(1, rows / cols))}


@dataclass(frozen=True)
class NorMuon:
    """A second moment per neuron (Li et al., NorMuon, arXiv 2510.05491; record 41).

    s <- beta2 s + (1-beta2) mean(u^2) over the entries of a neuron (defined in updates/views.py). u / sqrt(s)
    is rescaled to the Frobenius norm of u, which also cancels the bias of s. Both together are one factor per
    neuron, computed in float32 or wider and applied in `dtype`.
    """
    beta2: float
    floor: float  # of s under the root
    dtype: torch.dtype

    each_matrix = False

    def state(self, unit, dtype, views) -> dict:
        return {"second_moment": (views.statistics_shape(unit), dtype)}

    def __call__(self, u, step):
        u = u.to(self.dtype)
        factors = [
            (x, self.factor(x, moment, axis).to(x.dtype))
            for x, moment, axis in step.views.neurons(u.contiguous(), step.state["second_moment"])
        ]
        if len(factors) == 1:
            x, factor = factors[0]
            return (x * factor).view(u.shape)
        return step.views.join([x * factor for x, factor in factors])

    def factor(self, u, moment, axis):
        """Update the second moment of matrices u (N, rows, cols) and return the factor of each neuron.

        The factors have size 1 at `axis` and the other sizes of u.
        """
        wide = torch.promote_types(u.dtype, torch.float32)
        squares = u.to(wide).square().mean(axis, keepdim=True) * u.size(axis)
        moment.lerp_((squares / u.size(axis)).to(moment.dtype), 1 - self.beta2)
        factor = moment.clamp_min(self.floor).rsqrt().to(wide)
        norms = [x.sum((-2, -1), keepdim=True).sqrt() for x in (squares, squares * factor.square())]
        return factor * (norms[0] / norms[1].clamp_min(1e-10))


@dataclass(frozen=True)
class CautiousDecay:
    """Cautious weight decay (Chen et al., arXiv 2510.12402; record 43): u + lr decay p only where u p >= 0.

    The learning rate multiplies the update once more, so the decay is quadratic in it.
    """
    decay: float
    dtype: torch.dtype  # to which the sum is rounded
    slow: bool = False  # the slow momentum buffer in place of u decides (record 92)

    each_matrix = False

    def state(self, unit, dtype, views) -> dict:
        return {}

    def __call__(self, u, step):
        gate = step.state["slow_buffer"] if self.slow else u
        decay = (gate * step.p >= 0) * step.p
        return decay.mul_(step.numbers["lr"] * self.decay).add_(u).to(self.dtype)


@dataclass(frozen=True)
class Scale:
    """Multiplies the update by a factor of the matrix's shape and by the factor `mul` of the label.

    kind: none; sqrt_max, sqrt(max(rows, cols)) (record 4); sqrt_ratio, sqrt(max(1, rows / cols)) (record 8).
    """
    kind: str
    mul: float = 1.0

    each_matrix = True

    def state(self, unit, dtype, views) -> dict:
        return {}

    def __call__(self, u, step):
        return self.mul * FACTORS[self.kind](*step.views.shape(u)) * u


@dataclass(frozen=True)
class Decay:
    """Decoupled weight decay: adds `decay` times the parameter to the update."""
    decay: float

    each_matrix = False

    def state(self, unit, dtype, views) -> dict:
        return {}

    def __call__(self, u, step):
        return u + self.decay * step.p.to(u.dtype)


def chain(s, group) -> tuple:
    """The slots that the settings ask for, in their order. group: optim_settings.Hyper."""
    muon, n = s.optim.muon, s.numerics
    slots = [Momentum(muon.momentum_ema) if muon.slow is None else TwoRails(muon.slow.beta)]
    slots.append(
        Orthogonalise(
            muon.ns_steps, getattr(torch, n.newton_schulz), getattr(torch, n.newton_schulz_norm),
            n.newton_schulz_form, muon.polar_express, getattr(torch, n.muon_update),
            one_by_one=s.system.reduction == "ordered", fused=s.system.kernels.muon == "triton",
            anvil=muon.anvil_maps, convergent=muon.convergent
        )
    )
    if muon.normuon:
        slots.append(NorMuon(muon.normuon.beta2, muon.normuon.floor, getattr(torch, n.newton_schulz)))
    if muon.cautious_decay:
        decay = muon.cautious_decay
        slots.append(CautiousDecay(decay.weight_decay, getattr(torch, n.muon_decay), decay.gate == "slow"))
    if muon.scale != "none" or group.lr_mul != 1:
        slots.append(Scale(muon.scale, group.lr_mul))
    if group.weight_decay:
        slots.append(Decay(group.weight_decay))
    return tuple(slots)
