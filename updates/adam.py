"""AdamW (Loshchilov & Hutter, arXiv 1711.05101)."""

from dataclasses import dataclass

import torch


def adamw_(
    p, g, m, v, *, lr, decay, beta1, beta2, eps, eps_after_correction, correction1, correction2, math_dtype
):
    """One AdamW step in place on p and its moments m, v, elementwise. Compiled, it is one pass over its
    tensors.

    lr, correction1, correction2: numbers or 0-d tensors; correction: 1 - beta^t.
    eps_after_correction: eps is added to the root of the corrected second moment, otherwise to the raw one.
    math_dtype: of the arithmetic; results are stored in the dtypes of p, m and v.
    """
    stored = (p, m, v)
    p, g, m, v = (x.to(math_dtype) for x in (p, g, m, v))  # the tensors themselves where they have this dtype
    m.mul_(beta1).add_((1 - beta1) * g)
    v.mul_(beta2).add_(((1 - beta2) * g).mul_(g))
    if decay:
        p.sub_((lr * decay) * p)
    if eps_after_correction:
        p.sub_(((lr / correction1) * m).div_((v / correction2).sqrt_().add_(eps)))
    else:
        p.sub_(((lr * correction2 ** 0.5 / correction1) * m).div_(v.sqrt().add_(eps)))
    for old, new in zip(stored, (p, m, v)):
        if new is not old:
            old.copy_(new)


@dataclass(frozen=True)
class AdamW:
    """AdamW as a rule for banks of single numbers. Fields: constants of the group; dtypes by numerics."""
    lr: float
    beta1: float
    beta2: float
    eps: float
    decay: float
    eps_after_correction: bool
    math_dtype: torch.dtype
    state_dtype: torch.dtype | None  # None: the parameter's

    name = "adamw"
    shared = False  # Cheap enough to be done by every process where parameters are not sharded.
    skips_idle = False

    @classmethod
    def of(cls, s, group) -> "AdamW":
        """The rule for one group (settings.Hyper) of a run."""
        n = s.numerics
        return cls(
            group.lr, group.beta1, group.beta2, group.eps, group.weight_decay,
            s.optim.adam.eps_after_correction, getattr(torch, n.adam),
            None if n.adam_state == "parameter" else getattr(torch, n.adam_state)
        )

    def unit(self, shape, views) -> tuple[int, ...]:
        return ()

    def state(self, unit, dtype) -> dict:
        """{name: (shape of one unit, dtype)} for a parameter of this dtype."""
        return {name: (unit, self.state_dtype or dtype) for name in ("exp_avg", "exp_avg_sq")}

    def numbers(self, plan, t: int) -> dict[str, float]:
        """What changes from step to step. t: updates of the bank, this one included."""
        return {
            "lr": self.lr * plan.lr_factor, "correction1": 1 - self.beta1**t, "correction2": 1 - self.beta2**t
        }

    def update_(self, p, g, state, numbers, views) -> None:
        adamw_(
            p, g, state["exp_avg"], state["exp_avg_sq"], decay=self.decay, beta1=self.beta1, beta2=self.beta2,
            eps=self.eps, eps_after_correction=self.eps_after_correction, math_dtype=self.math_dtype,
            **numbers
        )
