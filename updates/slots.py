"""The slots of Muon's chain: each transforms the update and passes it to the next slot.

`updates/chain.py` puts them in order; SOAP and other preconditioners have files of their own.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch

from kernels.newton_schulz import newton_schulz, schatten4
from schedule import StepPlan
from updates.views import Views


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics of a parameter of this dtype: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


class Step(NamedTuple):
    """The inputs of a slot in one update, of whole units or of one of their matrices.

    p: parameter (N, ...), which `after` may change in place. g: its gradient as it came.
    state: {name: tensor} of all slots. numbers: those of the step. name: of the matrix (q, c_fc, ...).
    scratch: what a slot leaves for a later slot, or for its own `after`, in this update.
    """
    p: torch.Tensor
    g: torch.Tensor
    state: dict
    numbers: dict
    views: Views
    name: str
    scratch: dict

    def parts(self) -> list["Step"]:
        """One Step for each matrix of the units, as views of this one.

        A state `name@q` is that of the matrix q alone, which sees it as `name`.
        """
        if not self.views.joined:
            return [self._replace(name=self.views.name)]
        shared = {name: self.views.split(x) for name, x in self.state.items() if "@" not in name}
        parts = zip(self.views.names, self.views.split(self.p), self.views.split(self.g))
        return [
            Step(p, g, {name: x[i] for name, x in shared.items()} | self.own(which), self.numbers, self.views,
                 which, {})
            for i, (which, p, g) in enumerate(parts)
        ]

    def own(self, which: str) -> dict[str, torch.Tensor]:
        """The state of one matrix alone."""
        return {name.partition("@")[0]: x for name, x in self.state.items() if name.endswith("@" + which)}


class Slot:
    """One transformation of the update in Muon's chain.

    each_matrix: called for each matrix of the units, with u (N, rows, cols); otherwise u has whole units
        (N, *unit).
    eager: neither compiled nor captured in a CUDA graph (decompositions).
    products: has batched products, which may round differently for another batch size.
    only: names of the matrices it acts on; (): all.
    """
    each_matrix: ClassVar[bool] = True
    eager: ClassVar[bool] = False
    products: ClassVar[bool] = False
    only: Any = ()

    def state(self, unit: tuple[int, ...], dtype: torch.dtype, views: Views) -> dict[str, tuple]:
        """{name: (shape of one unit, dtype)}, zeros at the start. dtype: of the parameter."""
        return {}

    def numbers(self, plan: StepPlan, t: int) -> dict[str, float]:
        """Numbers that change from step to step. t: updates of the bank, this one included.

        Their names are shared by all slots of a chain.
        """
        return {}

    def __call__(self, u: torch.Tensor, step: Step) -> torch.Tensor:
        """The update that the next slot gets."""
        raise NotImplementedError

    def after(self, step: Step) -> None:
        """Called when the parameter has moved: may change step.p and the slot's state in place."""

    def acts_on(self, name: str) -> bool:
        """Whether it acts on the matrix of this name."""
        return not self.only or name in self.only

    def of_each(
        self, unit: tuple[int, ...], views: Views, shapes: Callable[[int, int], dict[str, tuple]]
    ) -> dict[str, tuple]:
        """A state of its own for each matrix it acts on. shapes: (rows, cols) -> {name: (shape, dtype)}."""
        found = {}
        for which, (rows, cols) in zip(views.names, views.shapes(unit)):
            if self.acts_on(which):
                mark = f"@{which}" if views.joined else ""
                found |= {name + mark: kind for name, kind in shapes(rows, cols).items()}
        return found


@dataclass(frozen=True)
class Momentum(Slot):
    """Nesterov momentum: M <- mu M + g, update g + mu M.

    ema (record 15): M <- mu M + (1-mu) g, update (1-mu) g + mu M.
    """
    ema: bool

    each_matrix = False

    def state(self, unit: tuple[int, ...], dtype: torch.dtype, views: Views) -> dict:
        return {"momentum_buffer": (unit, dtype)}

    def __call__(self, u: torch.Tensor, step: Step) -> torch.Tensor:
        buffer, momentum = step.state["momentum_buffer"], step.numbers["momentum"]
        g = u.to(buffer.dtype)
        if self.ema:  # M + (1-mu) (g - M), as the originals round it
            buffer.lerp_(g, 1 - momentum)
            return g.lerp(buffer, momentum)
        buffer.mul_(momentum).add_(g)
        return momentum * buffer + g


@dataclass(frozen=True)
class Orthogonalise(Slot):
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
    by_schatten4: bool = False
    long: bool = False
    soft: tuple = ()  # weights of the iterates in the sum that updates/contra.py blends in
    coefficients: tuple = ()

    def __call__(self, u: torch.Tensor, step: Step) -> torch.Tensor:
        step.scratch["direction"] = u
        x = self.iterated(u)
        if self.soft:
            step.scratch["soft"], x = x[1], x[0]
        return x.to(torch.promote_types(x.dtype, self.least))

    def iterated(self, u: torch.Tensor) -> torch.Tensor | Sequence[torch.Tensor]:
        """The orthogonalised u, and the weighted sum of the iterates if there are weights."""
        how = dict(
            steps=self.steps, dtype=self.dtype, norm_dtype=self.norm_dtype, form=self.form,
            polar_express=self.polar_express, fused=self.fused, anvil=self.anvil,
            convergent=self.convergent, by_schatten4=self.by_schatten4, weights=self.soft, long=self.long,
            coefficients=self.coefficients
        )
        if not self.one_by_one or not len(u):
            return newton_schulz(u, **how)
        found = [newton_schulz(matrix, **how) for matrix in u]
        return [torch.stack(x) for x in zip(*found)] if self.soft else torch.stack(found)


@dataclass(frozen=True)
class Smooth(Slot):
    """A moving average of the orthogonalised updates v (medium record 13): b <- s b + (1-s) v.

    The update is b, or with `lookahead` s b + (1-s) v. Both are computed in float32 or wider and rounded to
    `dtype`, that of the buffer. There is no bias correction.
    """
    coef: float
    start: float
    steps: int
    lookahead: bool
    dtype: torch.dtype

    def state(self, unit: tuple[int, ...], dtype: torch.dtype, views: Views) -> dict:
        return {"smoothed_update": (unit, self.dtype)}

    def numbers(self, plan: StepPlan, t: int) -> dict:
        x = min(plan.step / self.steps, 1)
        return {"smoothing": (1 - x) * self.start + x * self.coef}

    def __call__(self, u: torch.Tensor, step: Step) -> torch.Tensor:
        buffer, s = step.state["smoothed_update"], step.numbers["smoothing"]
        wide = torch.promote_types(self.dtype, torch.float32)
        v = u.to(self.dtype).to(wide)
        buffer.copy_(s * buffer.to(wide) + (1 - s) * v)
        smoothed = s * buffer.to(wide) + (1 - s) * v if self.lookahead else buffer
        return smoothed.to(self.dtype).to(u.dtype)


FACTORS = {"none": lambda rows, cols: 1.0,
           "sqrt_max": lambda rows, cols: math.sqrt(max(rows, cols)),
           "match_rms": lambda rows, cols: 0.2 * math.sqrt(max(rows, cols)),
           "sqrt_ratio": lambda rows, cols: math.sqrt(max(1, rows / cols)),
           "sqrt_aspect": lambda rows, cols: math.sqrt(max(rows / cols, cols / rows))}


@dataclass(frozen=True)
class NorMuon(Slot):
    """A second moment per neuron (Li et al., NorMuon, arXiv 2510.05491; record 41).

    s <- beta2 s + (1-beta2) mean(u^2) over the entries of a neuron (defined in updates/views.py). u / sqrt(s)
    is rescaled to the Frobenius norm of u, which also cancels the bias of s. Both together are one factor per
    neuron, computed in float32 or wider and applied in `dtype`.

    norm: the one that is restored (updates/norms.py). square: square matrices have it too.
    """
    beta2: float
    floor: float  # of s under the root
    dtype: torch.dtype
    norm: str = "frobenius"
    square: bool = True

    each_matrix = False

    @property
    def products(self) -> bool:
        return self.norm == "schatten4"

    def state(self, unit: tuple[int, ...], dtype: torch.dtype, views: Views) -> dict:
        if not self.square and all(rows == cols for rows, cols in views.shapes(unit)):
            return {}
        return {"second_moment": (views.statistics_shape(unit), dtype)}

    def __call__(self, u: torch.Tensor, step: Step) -> torch.Tensor:
        if "second_moment" not in step.state:
            return u
        u = u.to(self.dtype)
        factors = [
            (x, self.factor(x, moment, axis).to(x.dtype))
            for x, moment, axis in step.views.neurons(u.contiguous(), step.state["second_moment"])
        ]
        if len(factors) == 1:
            x, factor = factors[0]
            return (x * factor).view(u.shape)
        return step.views.join([x * factor for x, factor in factors])

    def factor(self, u: torch.Tensor, moment: torch.Tensor, axis: int) -> torch.Tensor:
        """Update the second moment of matrices u (N, rows, cols) and return the factor of each neuron.

        The factors have size 1 at `axis` and the other sizes of u.
        """
        wide = torch.promote_types(u.dtype, torch.float32)
        if not self.square and u.size(-2) == u.size(-1):
            return torch.ones_like(moment, dtype=wide)
        squares = u.to(wide).square().mean(axis, keepdim=True) * u.size(axis)
        moment.lerp_((squares / u.size(axis)).to(moment.dtype), 1 - self.beta2)
        factor = moment.clamp_min(self.floor).rsqrt().to(wide)
        if self.norm == "schatten4":
            norms = [schatten4(x) for x in (u.to(wide), u.to(wide) * factor)]
            return factor * (norms[0] / norms[1].clamp_min(1e-10))
        norms = [x.sum((-2, -1), keepdim=True).sqrt() for x in (squares, squares * factor.square())]
        return factor * (norms[0] / norms[1].clamp_min(1e-10))


@dataclass(frozen=True)
class CautiousDecay(Slot):
    """Cautious weight decay (Chen et al., arXiv 2510.12402; record 43): u + lr decay p only where u p >= 0.

    The learning rate multiplies the update once more, so the decay is quadratic in it.
    """
    decay: float
    dtype: torch.dtype  # to which the sum is rounded
    slow: bool = False  # the slow momentum buffer in place of u decides (record 92)

    each_matrix = False

    def __call__(self, u: torch.Tensor, step: Step) -> torch.Tensor:
        gate = step.state["slow_buffer"] if self.slow else u
        decay = (gate * step.p >= 0) * step.p
        return decay.mul_(step.numbers["lr"] * self.decay).add_(u).to(self.dtype)


@dataclass(frozen=True)
class Scale(Slot):
    """Multiplies the update by a factor of the matrix's shape and by the factor `mul` of the label.

    kind: none; sqrt_max, sqrt(max(rows, cols)) (record 4); sqrt_ratio, sqrt(max(1, rows / cols)) (record 8);
        sqrt_aspect, sqrt(max(rows / cols, cols / rows)) (claim of 2726 steps of the optimizer track);
        match_rms, 0.2 sqrt(max(rows, cols)), with which entries are about as large as Adam's (Liu et al.,
        arXiv 2502.16982).
    """
    kind: str
    mul: float = 1.0

    def __call__(self, u: torch.Tensor, step: Step) -> torch.Tensor:
        return self.mul * FACTORS[self.kind](*step.views.shape(u)) * u


@dataclass(frozen=True)
class Decay(Slot):
    """Decoupled weight decay: adds `decay` times the parameter to the update."""
    decay: float

    each_matrix = False

    def __call__(self, u: torch.Tensor, step: Step) -> torch.Tensor:
        return u + self.decay * step.p.to(u.dtype)
