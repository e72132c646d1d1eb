"""AdamW (Loshchilov & Hutter, arXiv 1711.05101), cautious weight decay (Chen et al., arXiv 2510.12402)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from optim_settings import Hyper

# Elements per pass of the eager rule on the CPU, so that its ten operations work in the cache instead of in
# memory. The rule is elementwise, so the chunk size does not change a bit of the result.
CHUNK = 65536


def adamw_(
    p, g, m, v, *, lr, decay, beta1, beta2, eps, eps_after_correction, correction1, correction2, math_dtype,
    cautious=0.0, strict=False, stretch=None
):
    """One AdamW step in place on p and its moments m, v, elementwise; compiled, one pass over the tensors.

    lr, correction1, correction2: numbers or 0-d tensors; correction: 1 - beta^t.
    eps_after_correction: eps is added to the root of the corrected second moment, otherwise to the raw one.
    math_dtype: of the arithmetic; results are stored in the dtypes of p, m and v.
    decay: p <- p - lr decay p first. cautious: p <- p - u - lr^2 cautious p where u p >= 0 (strict: > 0),
        otherwise p - u, u the update. stretch: factor of cautious, None: 1.
    """
    stored = (p, m, v)
    p, g, m, v = (x.to(math_dtype) for x in (p, g, m, v))  # the tensors themselves where they have this dtype
    m.mul_(beta1).add_((1 - beta1) * g)
    v.mul_(beta2).add_(((1 - beta2) * g).mul_(g))
    if decay:
        p.sub_((lr * decay) * p)
    if eps_after_correction:
        u = ((lr / correction1) * m).div_((v / correction2).sqrt_().add_(eps))
    else:
        u = ((lr * correction2 ** 0.5 / correction1) * m).div_(v.sqrt().add_(eps))
    if cautious:
        towards_zero = u * p > 0 if strict else u * p >= 0
        strength = lr * lr * cautious if stretch is None else lr * lr * cautious * stretch
        u.add_((towards_zero * p).mul_(strength))
    p.sub_(u)
    for old, new in zip(stored, (p, m, v)):
        if new is not old:
            old.copy_(new)


def chunks(tensors: tuple[torch.Tensor, ...]) -> Iterator[tuple[torch.Tensor, ...]]:
    """Tensors of one size in pieces of CHUNK elements, as views; on a GPU and when compiled, whole."""
    first = tensors[0]
    if first.is_cuda or first.numel() <= CHUNK or torch.compiler.is_compiling():
        yield tensors
        return
    yield from zip(*(x.view(-1).split(CHUNK) for x in tensors))


@dataclass(frozen=True)
class AdamW:
    """AdamW as a rule for banks of single numbers; the fields are the constants of the group."""
    lr: float
    beta1: float
    beta2: float
    eps: float
    decay: float
    cautious: float  # cautious weight decay, multiplied by the squared learning rate; 0.0: none
    strict: bool
    eps_after_correction: bool
    math_dtype: torch.dtype
    state_dtype: torch.dtype | None  # None: the parameter's
    bias_correction: bool = True
    group: Hyper | None = None  # with a slower cadence: the group, whose updates then stand for several

    name = "adamw"
    shared = False  # cheap enough for every process to repeat where parameters are not sharded
    skips_idle = False
    eager = False  # compiled and captured in CUDA graphs where the optimizer is

    @classmethod
    def of(cls, s, group) -> "AdamW":
        """The rule for one group (settings.Hyper) of a run."""
        n, cautious = s.numerics, s.optim.adam.cautious_decay
        return cls(
            group.lr, group.beta1, group.beta2, group.eps, group.weight_decay,
            cautious.weight_decay * group.decay_mul if cautious else 0.0, bool(cautious and cautious.strict),
            s.optim.adam.eps_after_correction, getattr(torch, n.adam),
            None if n.adam_state == "parameter" else getattr(torch, n.adam_state), group.bias_correction,
            group if group.slower else None
        )

    def unit(self, shape, views) -> tuple[int, ...]:
        return ()

    def state(self, unit, dtype, views) -> dict:
        """{name: (shape of one unit, dtype)} for a parameter of this dtype."""
        return {name: (unit, self.state_dtype or dtype) for name in ("exp_avg", "exp_avg_sq")}

    def numbers(self, plan, t: int) -> dict[str, float]:
        """The numbers that change from step to step. t: updates of the bank, this one included."""
        t = t if self.bias_correction else math.inf  # 1 - beta^t = 1
        if self.group is None:
            return {"lr": self.lr * plan.lr_factor, "correction1": 1 - self.beta1**t,
                    "correction2": 1 - self.beta2**t}
        n = self.group.stretch(plan.step)
        beta1, beta2 = self.beta1**n, self.beta2**n
        return {"lr": self.lr * plan.lr_factor, "correction1": 1 - beta1**t, "correction2": 1 - beta2**t,
                "beta1": beta1, "beta2": beta2, "stretch": n}

    def update_(self, p, g, state, numbers, views) -> None:
        numbers = {"beta1": self.beta1, "beta2": self.beta2, **numbers}
        for tensors in chunks((p, g, state["exp_avg"], state["exp_avg_sq"])):
            adamw_(
                *tensors, decay=self.decay, eps=self.eps, eps_after_correction=self.eps_after_correction,
                math_dtype=self.math_dtype, cautious=self.cautious, strict=self.strict, **numbers
            )


@dataclass(frozen=True)
class RowAdam(AdamW):
    """Adam with one second moment per row and no first moment (record 92), for banks of rows (N, D).

    v <- beta2 v + (1-beta2) mean(g^2) for every row; u = lr sqrt(1-beta2^t) g / (sqrt(v) + eps), and the
    cautious decay where u moves an entry towards zero. So a row without gradient keeps its values.
    """
    name = "row_adam"

    def unit(self, shape, views) -> tuple[int, ...]:
        return tuple(shape[-1:])

    def state(self, unit, dtype, views) -> dict:
        return {"row_moment": ((1,), self.state_dtype or dtype)}

    def update_(self, p, g, state, numbers, views) -> None:
        beta2, lr, wide = numbers.get("beta2", self.beta2), numbers["lr"], self.math_dtype
        moment = state["row_moment"]
        moment.lerp_(g.to(wide).square().mean(-1, keepdim=True).to(moment.dtype), 1 - beta2)
        u = (lr * numbers["correction2"] ** 0.5) * g.to(wide) / (moment.to(wide).sqrt() + self.eps)
        wide_p = p.to(wide)
        if self.cautious:
            decay = lr * lr * self.cautious * numbers.get("stretch", 1.0)
            u.add_(torch.where(u * wide_p > 0, wide_p, 0.0) * decay)
        p.copy_(wide_p - u)
