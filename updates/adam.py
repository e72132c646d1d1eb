"""AdamW (Loshchilov & Hutter, arXiv 1711.05101), cautious weight decay (Chen et al., arXiv 2510.12402)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from schedule import StepPlan
from settings import Settings
from settings.optim import Hyper
from updates.rows import Rows
from updates.views import Views

# Elements per pass of the eager rule on the CPU, so that its ten operations work in the cache instead of in
# memory. The rule is elementwise, so the chunk size does not change a bit of the result.
CHUNK = 65536
# Elements of a table that the eager rule for rows has in `math_dtype` at a time: four tensors of 256 MiB,
# where those of record 92's table would have 260 GB each.
TABLE_CHUNK = 2 ** 26
LEAST_KEPT = 1e-3  # least share of kept entries by which C-Optim divides


def adamw_(
    p: torch.Tensor, g: torch.Tensor, m: torch.Tensor, v: torch.Tensor, *, lr: float | torch.Tensor,
    decay: float, beta1: float | torch.Tensor, beta2: float | torch.Tensor, eps: float,
    eps_after_correction: bool, correction1: float | torch.Tensor, correction2: float | torch.Tensor,
    math_dtype: torch.dtype, cautious: float = 0.0, strict: bool = False,
    stretch: float | torch.Tensor | None = None, c_optim: float = 0.0, kept: torch.Tensor | None = None
) -> None:
    """One AdamW step in place on p and its moments m, v, elementwise; compiled, one pass over the tensors.

    lr, correction1, correction2: numbers or 0-d tensors; correction: 1 - beta^t.
    eps_after_correction: eps is added to the root of the corrected second moment, otherwise to the raw one.
    math_dtype: of the arithmetic; results are stored in the dtypes of p, m and v.
    decay: p <- p - lr decay p first. cautious: p <- p - u - lr^2 cautious p where u p >= 0 (strict: > 0),
        otherwise p - u, u the update. stretch: factor of cautious, None: 1.
    c_optim: share s of the cautious update (Liang et al., arXiv 2411.16085), before that decay: where u g > 0
        u <- (1-s) u + s u / max(kept, LEAST_KEPT), otherwise (1-s) u. kept: 0-d, share of the entries of the
        whole parameter with u g > 0.
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
    if c_optim:
        u.lerp_(agree(m, g) * u / kept.clamp(min=LEAST_KEPT), c_optim)
    if cautious:
        towards_zero = u * p > 0 if strict else u * p >= 0
        strength = lr * lr * cautious if stretch is None else lr * lr * cautious * stretch
        u.add_((towards_zero * p).mul_(strength))
    p.sub_(u)
    for old, new in zip(stored, (p, m, v)):
        if new is not old:
            old.copy_(new)


def agree(m: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """Where a first moment m and a gradient g have one sign: u g > 0, whose product may underflow."""
    return m.sign() * g.sign() > 0


def chunks(tensors: tuple[torch.Tensor, ...]) -> Iterator[tuple[torch.Tensor, ...]]:
    """Tensors of one size in pieces of CHUNK elements, as views; on a GPU and when compiled, whole."""
    first = tensors[0]
    if first.is_cuda or first.numel() <= CHUNK or torch.compiler.is_compiling():
        yield tensors
        return
    yield from zip(*(x.view(-1).split(CHUNK) for x in tensors))


def row_chunks(tensors: tuple[torch.Tensor, ...]) -> Iterator[tuple[torch.Tensor, ...]]:
    """Tensors of N rows in pieces of whole rows, TABLE_CHUNK elements of the first; when compiled, whole."""
    first = tensors[0]
    if first.numel() <= TABLE_CHUNK or torch.compiler.is_compiling():
        yield tensors
        return
    rows = max(1, TABLE_CHUNK // first.size(-1))
    yield from zip(*(x.split(rows) for x in tensors))


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
    c_optim: float = 0.0  # share of the cautious update (settings.optim.TableLabel)

    name = "adamw"
    by_rows = False  # momentum moves every row
    shared = False  # cheap enough for every process to repeat where parameters are not sharded
    skips_idle = False

    @property
    def eager(self) -> bool:
        """Whether the update is neither compiled nor captured in a CUDA graph: C-Optim counts before it."""
        return self.c_optim > 0

    @classmethod
    def of(cls, s: Settings, group: Hyper) -> "AdamW":
        """The rule for one group of a run."""
        n, cautious = s.numerics, s.optim.adam.cautious_decay
        return cls(
            group.lr, group.beta1, group.beta2, group.eps, group.weight_decay,
            cautious.weight_decay * group.decay_mul if cautious else 0.0, bool(cautious and cautious.strict),
            s.optim.adam.eps_after_correction, getattr(torch, n.adam),
            None if n.adam_state == "parameter" else getattr(torch, n.adam_state), group.bias_correction,
            group if group.slower else None, group.c_optim
        )

    def unit(self, shape: tuple[int, ...], views: Views) -> tuple[int, ...]:
        return ()

    def state(self, unit: tuple[int, ...], dtype: torch.dtype, views: Views) -> dict:
        """{name: (shape of one unit, dtype)} for a parameter of this dtype."""
        return {name: (unit, self.state_dtype or dtype) for name in ("exp_avg", "exp_avg_sq")}

    def numbers(self, plan: StepPlan, t: int) -> dict[str, float]:
        """The numbers that change from step to step. t: updates of the bank, this one included."""
        t = t if self.bias_correction else math.inf  # 1 - beta^t = 1
        if self.group is None:
            return {"lr": self.lr * plan.lr_factor, "correction1": 1 - self.beta1**t,
                    "correction2": 1 - self.beta2**t}
        n = self.group.stretch(plan.step)
        beta1, beta2 = self.beta1**n, self.beta2**n
        return {"lr": self.lr * plan.lr_factor, "correction1": 1 - beta1**t, "correction2": 1 - beta2**t,
                "beta1": beta1, "beta2": beta2, "stretch": n}

    def agreeing(self, g: torch.Tensor, state: dict[str, torch.Tensor], numbers: dict) -> torch.Tensor:
        """How many entries of a gradient have the sign of the first moment that holds it, 0-d int64.

        g: a part of a bank's gradient; state: {name: the same part}. Such counts, summed over the parts of a
        parameter, give the number `kept` of `update_`.
        """
        beta1 = numbers.get("beta1", self.beta1)
        counts = [
            agree(m.to(self.math_dtype) * beta1 + (1 - beta1) * part.to(self.math_dtype), part).sum()
            for part, m in chunks((g, state["exp_avg"]))
        ]
        return torch.stack(counts).sum()

    def update_(
        self, p: torch.Tensor, g: torch.Tensor, state: dict[str, torch.Tensor], numbers: dict,
        views: Views | None
    ) -> None:
        numbers = {"beta1": self.beta1, "beta2": self.beta2, **numbers}
        for tensors in chunks((p, g, state["exp_avg"], state["exp_avg_sq"])):
            adamw_(
                *tensors, decay=self.decay, eps=self.eps, eps_after_correction=self.eps_after_correction,
                math_dtype=self.math_dtype, cautious=self.cautious, strict=self.strict, c_optim=self.c_optim,
                **numbers
            )


@dataclass(frozen=True)
class RowAdam(AdamW):
    """Adam with one second moment per row and no first moment (record 92), for banks of rows (N, D).

    v <- beta2 v + (1-beta2) mean(g^2) for every row; u = lr sqrt(1-beta2^t) g / (sqrt(v) + eps), and the
    cautious decay where u moves an entry towards zero. So a row without gradient keeps its values, and the
    gradient may come as the rows that have one. The original decays the second moments of the other rows when
    they are next looked up; here all of them decay in each update, which moves 4 bytes of a row's 1,540 and
    gives the same bits as an update of the whole table.
    """
    name = "row_adam"
    by_rows = True
    eager = False

    def unit(self, shape: tuple[int, ...], views: Views) -> tuple[int, ...]:
        return tuple(shape[-1:])

    def state(self, unit: tuple[int, ...], dtype: torch.dtype, views: Views) -> dict:
        return {"row_moment": ((1,), self.state_dtype or dtype)}

    def update_(
        self, p: torch.Tensor, g: torch.Tensor, state: dict[str, torch.Tensor], numbers: dict,
        views: Views | None
    ) -> None:
        for tensors in row_chunks((p, g, state["row_moment"])):
            self.update_rows_(*tensors, numbers)

    def update_rows_(self, p: torch.Tensor, g: torch.Tensor, moment: torch.Tensor, numbers: dict) -> None:
        """update_ of rows (N, D) with their second moments (N, 1)."""
        moment.lerp_(self.mean_square(g).to(moment.dtype), 1 - numbers.get("beta2", self.beta2))
        p.copy_(self.moved(p, g, moment, numbers))

    def mean_square(self, g: torch.Tensor) -> torch.Tensor:
        """Of each row of g (N, D), (N, 1)."""
        return g.to(self.math_dtype).square().mean(-1, keepdim=True)

    def moved(self, p: torch.Tensor, g: torch.Tensor, moment: torch.Tensor, numbers: dict) -> torch.Tensor:
        """Rows p (N, D) after an update by gradients g (N, D), in `math_dtype`.

        moment: second moments (N, 1), this update's gradients included.
        """
        lr, wide = numbers["lr"], self.math_dtype
        u = (lr * numbers["correction2"] ** 0.5) * g.to(wide) / (moment.to(wide).sqrt() + self.eps)
        wide_p = p.to(wide)
        if self.cautious:
            decay = lr * lr * self.cautious * numbers.get("stretch", 1.0)
            u.add_(torch.where(u * wide_p > 0, wide_p, 0.0) * decay)
        return wide_p - u

    def update_touched_(self, p: torch.Tensor, rows: Rows, state: dict, numbers: dict) -> None:
        """update_ of a table p (N, D) whose gradient is `rows`: the same bits as by the dense gradient."""
        moment, square = state["row_moment"], torch.zeros_like(state["row_moment"])
        pieces = rows.pieces(max(1, TABLE_CHUNK // p.size(-1)))
        for piece in pieces:  # a slot without a row adds 0 to the last row
            found = self.mean_square(piece.values).to(square.dtype)
            square.index_add_(0, piece.ids.clamp(max=len(p) - 1), found)
        moment.lerp_(square, 1 - numbers.get("beta2", self.beta2))
        for piece in pieces:
            ids, g = piece.repeated()
            p.index_copy_(0, ids, self.moved(p[ids], g, moment[ids], numbers).to(p.dtype))
