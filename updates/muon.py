"""Muon (Jordan et al., kellerjordan.github.io/posts/muon) as a chain of slots.

p <- p - lr u, where u is the result of the last slot.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from schedule import StepPlan
from settings import Settings
from settings.optim import Hyper
from updates import mantissa
from updates.chain import chain
from updates.slots import Slot, Step
from updates.views import Views


@dataclass(frozen=True)
class Muon:
    """Muon as a rule for banks of units (N, *unit), each of one or several matrices (updates/views.py)."""
    lr: float
    slots: tuple
    update_dtype: torch.dtype  # dtype of the update when it is subtracted
    keeps_mantissa: bool  # of bfloat16 parameters (updates/mantissa.py)
    skips_idle: bool  # do not update experts that received no tokens in this step
    one_by_one: bool  # unit by unit, where a batched product may round differently for another batch size
    decay: float = 0.0  # decoupled weight decay of weights with a kept mantissa; that of others is a slot

    name = "muon"
    shared = True  # orthogonalising every matrix on every process costs more than gathering parameters

    @classmethod
    def of(cls, s: Settings, group: Hyper) -> "Muon":
        """The rule for one group of a run."""
        slots = chain(s, group)
        return cls(
            group.lr, slots, getattr(torch, s.numerics.muon_update), s.numerics.matrix_mantissa,
            not s.optim.muon.update_idle_experts,
            s.system.reduction == "ordered" and any(slot.products for slot in slots),
            group.weight_decay if s.numerics.matrix_mantissa else 0.0
        )

    def unit(self, shape: tuple[int, ...], views: Views) -> tuple[int, ...]:
        return views.unit(shape)

    def state(self, unit: tuple[int, ...], dtype: torch.dtype, views: Views) -> dict:
        """{name: (shape of one unit, dtype)} for a parameter of this dtype."""
        found = {}
        if self.keeps_mantissa and dtype == torch.bfloat16:
            found["mantissa"], dtype = (unit, torch.int16), torch.float32
        for slot in self.slots:
            found |= slot.state(unit, dtype, views)
        return found

    @property
    def eager(self) -> bool:
        """Whether the update is neither compiled nor captured in a CUDA graph."""
        return any(slot.eager for slot in self.slots)

    def numbers(self, plan: StepPlan, t: int) -> dict[str, float]:
        """The numbers that change from step to step. t: updates of the bank, this one included."""
        numbers = {"lr": self.lr * plan.lr_factor, "momentum": plan.momentum}
        for slot in self.slots:
            numbers |= slot.numbers(plan, t)
        return numbers

    def direction(
        self, p: torch.Tensor, g: torch.Tensor, state: dict[str, torch.Tensor], numbers: dict, views: Views,
        mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The update (N, *unit) before the learning rate. mask: None or (N, 1, ...), where 0 skips a unit.

        Nothing may follow the step of such a chain (`follows`).
        """
        if self.one_by_one and len(p) > 1:
            return torch.cat([self.direction(*one) for one in units(p, g, state, numbers, views, mask)])
        return self.chained(Step(p, g, state, numbers, views, "", {}), mask)[0]

    def chained(self, step: Step, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, list[Step]]:
        """(the update, one Step for each matrix) of a chain that is called for the units of a Step."""
        u, matrices, parts = step.g, None, step.parts()
        for slot in self.slots:
            if slot.each_matrix and matrices is None:
                matrices = step.views.split(u)
            elif not slot.each_matrix and matrices is not None:
                u, matrices = step.views.join(matrices), None
            if slot.each_matrix:
                matrices = [
                    slot(x, part) if slot.acts_on(part.name) else x for x, part in zip(matrices, parts)
                ]
            else:
                u = slot(u, step)
        u = (u if matrices is None else step.views.join(matrices)).to(self.update_dtype)
        return u if mask is None else u * mask.to(u.dtype), parts

    def apply_(self, p: torch.Tensor, u: torch.Tensor, numbers: dict) -> None:
        """p <- p - lr u.

        With a number lr and float32, product and difference are rounded once, like torch's `add_` with
        `alpha` in the originals. (In bfloat16 that rounding would depend on the position of an entry.)
        """
        lr, u = numbers["lr"], u.to(p.dtype)
        if isinstance(lr, torch.Tensor) or p.dtype == torch.bfloat16:
            p.sub_(lr * u)
        else:
            p.sub_(u, alpha=lr)

    def update_(
        self, p: torch.Tensor, g: torch.Tensor, state: dict[str, torch.Tensor], numbers: dict, views: Views,
        mask: torch.Tensor | None = None
    ) -> None:
        if self.one_by_one and len(p) > 1:
            for one in units(p, g, state, numbers, views, mask):
                self.update_(*one)
            return
        kept = "mantissa" in state
        whole = mantissa.join(p, state["mantissa"]) if kept else p
        before = whole.clone() if self.follows and mask is not None else None
        step = Step(whole, g, state, numbers, views, "", {})
        u, parts = self.chained(step, mask)
        if self.decay:  # rounded before the step, as in medium record 7
            decay = numbers["lr"] * self.decay
            whole.mul_(1 - (decay if mask is None else decay * mask))
        self.apply_(whole, u, numbers)
        for slot in self.follows:
            for part in parts if slot.each_matrix else [step]:
                if slot.acts_on(part.name):
                    slot.after(part)
        if before is not None:  # units that are skipped stay
            whole.copy_(torch.where(mask != 0, whole, before))
        if kept:
            mantissa.split_(whole, p, state["mantissa"])

    @property
    def follows(self) -> list[Slot]:
        """The slots that act once more when the parameter has moved."""
        return [slot for slot in self.slots if type(slot).after is not Slot.after]


def units(
    p: torch.Tensor, g: torch.Tensor, state: dict[str, torch.Tensor], numbers: dict, views: Views,
    mask: torch.Tensor | None
) -> Iterator[tuple]:
    """The arguments of an update for each unit of a batch, as views."""
    for i in range(len(p)):
        one = slice(i, i + 1)
        yield (p[one], g[one], {name: x[one] for name, x in state.items()}, numbers, views,
               None if mask is None else mask[one])
