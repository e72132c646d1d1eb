"""Muon (Jordan et al., kellerjordan.github.io/posts/muon) as a chain of slots.

p <- p - lr u, where u is the result of the last slot.
"""

from dataclasses import dataclass

import torch

from optim_settings import SlowMomentum
from updates import mantissa
from updates.slots import Step, chain


@dataclass(frozen=True)
class Muon:
    """Muon as a rule for banks of units (N, *unit), each of one or several matrices (updates/views.py)."""
    lr: float
    slots: tuple
    update_dtype: torch.dtype  # dtype of the update when it is subtracted
    keeps_mantissa: bool  # of bfloat16 parameters (updates/mantissa.py)
    skips_idle: bool  # do not update experts that received no tokens in this step
    slow: SlowMomentum | None = None  # settings of the second momentum buffer

    name = "muon"
    shared = True  # orthogonalising every matrix on every process costs more than gathering parameters

    @classmethod
    def of(cls, s, group) -> "Muon":
        """The rule for one group (settings.Hyper) of a run."""
        return cls(
            group.lr, chain(s, group), getattr(torch, s.numerics.muon_update), s.numerics.matrix_mantissa,
            not s.optim.muon.update_idle_experts, s.optim.muon.slow
        )

    def unit(self, shape, views) -> tuple[int, ...]:
        return views.unit(shape)

    def state(self, unit, dtype, views) -> dict:
        """{name: (shape of one unit, dtype)} for a parameter of this dtype."""
        found = {}
        if self.keeps_mantissa and dtype == torch.bfloat16:
            found["mantissa"], dtype = (unit, torch.int16), torch.float32
        for slot in self.slots:
            found |= slot.state(unit, dtype, views)
        return found

    def numbers(self, plan, t: int) -> dict[str, float]:
        """The numbers that change from step to step. t: updates of the bank, this one included."""
        numbers = {"lr": self.lr * plan.lr_factor, "momentum": plan.momentum}
        if self.slow is not None:
            both = plan.step >= self.slow.start
            numbers["fast_beta"] = self.slow.fast_beta if both else plan.momentum
            numbers["share"] = self.slow.share if both else 0.0
        return numbers

    def direction(self, p, g, state, numbers, views, mask=None) -> torch.Tensor:
        """The update (N, *unit) before the learning rate. mask: None or (N, 1, ...), where 0 skips a unit."""
        step, u, matrices = Step(p, state, numbers, views), g, None
        for slot in self.slots:
            if slot.each_matrix and matrices is None:
                matrices = views.split(u)
            elif not slot.each_matrix and matrices is not None:
                u, matrices = views.join(matrices), None
            if slot.each_matrix:
                matrices = [slot(x, part) for x, part in zip(matrices, step.parts())]
            else:
                u = slot(u, step)
        u = (u if matrices is None else views.join(matrices)).to(self.update_dtype)
        return u if mask is None else u * mask.to(u.dtype)

    def apply_(self, p, u, numbers) -> None:
        """p <- p - lr u.

        With a number lr and float32, product and difference are rounded once, like torch's `add_` with
        `alpha` in the originals. (In bfloat16 that rounding would depend on the position of an entry.)
        """
        lr, u = numbers["lr"], u.to(p.dtype)
        if isinstance(lr, torch.Tensor) or p.dtype == torch.bfloat16:
            p.sub_(lr * u)
        else:
            p.sub_(u, alpha=lr)

    def update_(self, p, g, state, numbers, views, mask=None) -> None:
        if "mantissa" not in state:
            self.apply_(p, self.direction(p, g, state, numbers, views, mask), numbers)
            return
        whole = mantissa.join(p, state["mantissa"])
        self.apply_(whole, self.direction(whole, g, state, numbers, views, mask), numbers)
        mantissa.split_(whole, p, state["mantissa"])
