"""AdamW for bfloat16 tables with a float32 master copy from a step on."""

from dataclasses import dataclass

import torch

from kernels.rounding import rounded
from schedule import StepPlan
from settings import Settings
from settings.optim import Hyper
from updates.adam import AdamW, chunks
from updates.views import Views


@dataclass(frozen=True)
class MasterAdamW(AdamW):
    """AdamW that updates a float32 master w of a bfloat16 table p (jn2clark's claims from 2580 to 2540 steps;
    read in the source of those trainers).

    From step `start` on:  w <- p + (w - bf16(w));  AdamW on w, with moments in float32;  p <- bf16(w)

    The first line takes in what others have written to p; a master of zeros begins so as p. Before `start`
    the table is AdamW's, with moments rounded to its dtype. Most updates near the end of a run are smaller
    than half a unit in the last place of a bfloat16 number near 10.
    """
    start: int = 0

    name = "master_adamw"

    @classmethod
    def of(cls, s: Settings, group: Hyper) -> "MasterAdamW":
        """The rule for one group of a run."""
        plain = AdamW.of(s, group)
        return cls(**{name: getattr(plain, name) for name in AdamW.__dataclass_fields__},
                   start=s.optim.embed.master)

    def state(self, unit: tuple[int, ...], dtype: torch.dtype, views: Views) -> dict:
        if dtype != torch.bfloat16:
            return super().state(unit, dtype, views)
        return {name: (unit, torch.float32) for name in ("exp_avg", "exp_avg_sq", "master")}

    def numbers(self, plan: StepPlan, t: int) -> dict:
        return super().numbers(plan, t) | {"has_master": float(plan.step >= self.start)}

    def update_(
        self, p: torch.Tensor, g: torch.Tensor, state: dict[str, torch.Tensor], numbers: dict,
        views: Views | None
    ) -> None:
        numbers = dict(numbers)
        has_master = numbers.pop("has_master")
        if "master" not in state:
            super().update_(p, g, state, numbers, views)
        else:
            for parts in chunks((p, g, state["exp_avg"], state["exp_avg_sq"], state["master"])):
                self.update_part_(*parts, has_master, numbers)

    def update_part_(
        self, p: torch.Tensor, g: torch.Tensor, m: torch.Tensor, v: torch.Tensor, master: torch.Tensor,
        has_master: float | torch.Tensor, numbers: dict
    ) -> None:
        """update_ of a part of a table. has_master: number or 0-d tensor, 1 or 0."""
        w = p.float() + (master - rounded(master, torch.bfloat16))  # p itself before `start`
        super().update_(w, g.float(), {"exp_avg": m, "exp_avg_sq": v}, numbers, None)
        p.copy_(w)
        master.copy_(has_master * w)
        for moment in (m, v):
            short = rounded(moment, torch.bfloat16)
            moment.copy_(short + has_master * (moment - short))  # exact: both terms are close
