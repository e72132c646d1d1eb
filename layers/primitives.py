"""The building blocks of the model's parts: parameters, initialisers, coefficients, norms, linear layers.

No dtype is written here: all come from the precision plan (settings.numerics).
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from settings import Settings
from settings.data import LOGICAL_RANKS
from updates.views import Views

# fills a tensor in place, by a generator, and returns it
Initialiser = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


def dtype(name: str) -> torch.dtype:
    """torch.dtype of a setting such as "bfloat16"."""
    return getattr(torch, name)


# ----- parameters -------------------------------------------------------------------------------------------

def normal(std: float) -> Initialiser:
    """Initialiser: normal with mean 0."""
    return lambda tensor, generator: tensor.normal_(0.0, std, generator=generator)


def uniform(bound: float) -> Initialiser:
    """Initialiser: uniform in [-bound, bound]."""
    return lambda tensor, generator: tensor.uniform_(-bound, bound, generator=generator)


def constant(value: float) -> Initialiser:
    """Initialiser: one value."""
    def fill(tensor, generator):
        return tensor.fill_(value)

    fill.constant = True  # drawn once for all entries
    return fill


def mimetic(scale: float, noise: float) -> Initialiser:
    """Initialiser of a square matrix: scale times the identity, and normal noise of this deviation."""
    def fill(tensor, generator):
        tensor.normal_(0.0, noise, generator=generator).diagonal().add_(scale)
        return tensor

    return fill


def values(numbers: Sequence[float]) -> Initialiser:
    """Initialiser: these numbers, one per entry of a vector."""
    return lambda tensor, generator: tensor.copy_(torch.tensor(numbers, dtype=tensor.dtype))


def parameter(
    shape: tuple[int, ...], dtype_name: str, *, role: str, init: Initialiser | None, label: str,
    parts: Sequence[Initialiser] | None = None, first_part: int = 0, views: Views = Views(),
    drawn_as: str | None = None
) -> nn.Parameter:
    """A parameter with its initialiser, and its role and label for the optimizer.

    The values are left empty: GPT.initialise fills them.

    role: embed, lm_head, matrix, scalar or router.
    label: the kind of parameter; its section in settings.optim, if it is on, overrides that of the role.
    views: the matrices in the parameter (updates/views.py).
    parts: initialisers of the slices along dim 0, where several logical matrices share one tensor.
    first_part: number of the first slice, where other processes or another parameter hold those before it.
    drawn_as: name that keys the initial values, in place of its own, where a setting decides how tensors are
    cut.

    The parameter's `row_lookups` is the number of rows of a table that a token looks up, for tables whose
    gradient can be these rows; the optimizer sets `takes_rows` if it takes them (optim.RowBank). A table that
    is shared out over processes (kernels/shared_table.py) leaves them in `arrived`.
    """
    p = nn.Parameter(torch.empty(shape, dtype=dtype(dtype_name)))
    p.role, p.label, p.views = role, label, views
    p.parts, p.first_part, p.drawn_as = parts or [init], first_part, drawn_as
    p.row_lookups, p.takes_rows, p.arrived = 0, False, []
    return p


def linear_init(
    s: Settings, fan_in: int, projection: bool, bound: float | None = None, factor: float = 1.0
) -> Initialiser:
    """The initialiser of a linear weight.

    projection: whether the layer writes into the residual stream.
    bound: bound of the uniform or normal scheme, in place of model.init.bound and zero_proj.
    factor: of the bound.
    """
    if bound is None and projection and s.model.init.zero_proj:
        return constant(0.0)
    if s.model.init.scheme == "gpt2":
        return normal(0.02 / math.sqrt(2 * s.model.num_layers) if projection else 0.02)
    width = factor * (s.model.init.bound if bound is None else bound) / math.sqrt(fan_in)
    return normal(width / math.sqrt(3)) if s.model.init.scheme == "normal" else uniform(width)


def bias_init(s: Settings, fan_in: int, projection: bool) -> Initialiser:
    """The initialiser of a bias. projection: of a layer that writes into the residual stream, or of the
    head."""
    drawn = s.model.init.bias == "all" or s.model.init.bias == "inner" and not projection
    return uniform(1 / math.sqrt(fan_in)) if drawn else constant(0.0)


# ----- coefficients: learned or constant --------------------------------------------------------------------

class Learned(nn.Module):
    """n learned scalars, stored in one vector (n,). A call returns them as n 0-d tensors."""

    def __init__(
        self, n: int, value: float | Sequence[float], dtype_name: str, sigmoid: bool, label: str
    ) -> None:
        super().__init__()
        init = constant(value) if isinstance(value, (int, float)) else values(value)
        self.value = parameter((n,), dtype_name, role="scalar", label=label, init=init)
        self.sigmoid = sigmoid

    def forward(self) -> tuple[torch.Tensor, ...]:
        return (torch.sigmoid(self.value) if self.sigmoid else self.value).unbind()


class Constant(nn.Module):
    """n equal coefficients that are plain numbers: what Learned becomes when `learned` is off."""

    def __init__(self, n: int, value: float | Sequence[float]) -> None:
        super().__init__()
        self.values = [value] * n if isinstance(value, (int, float)) else list(value)

    def forward(self) -> list[float]:
        return self.values


def coefficient(
    n: int, value: float | Sequence[float], learned: bool, dtype_name: str, label: str, sigmoid: bool = False
) -> Learned | Constant:
    """n coefficients that start at `value`, a number or one for each (before the sigmoid, if there is
    one)."""
    if learned:
        return Learned(n, value, dtype_name, sigmoid, label)
    return Constant(n, 1 / (1 + math.exp(-value)) if sigmoid else value)


class Norm(nn.Module):
    """RMSNorm, x / sqrt(mean(x^2) + eps) with a gain or without, or LayerNorm with gain and bias.

    Computed in the dtype numerics.norm.
    """

    def __init__(self, s: Settings) -> None:
        super().__init__()
        n = s.numerics
        self.eps, self.dtype = n.norm_eps, dtype(n.norm)
        self.gain = self.bias = None
        if s.model.norm == "layernorm" or s.model.norm_gain:
            self.gain = parameter(
                (s.model.model_dim,), n.scalar, role="scalar", label="norm", init=constant(1.0)
            )
        if s.model.norm == "layernorm":
            self.bias = parameter(
                (s.model.model_dim,), n.scalar, role="scalar", label="norm", init=constant(0.0)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.bias is None:
            return rms_norm(x, self.eps, self.dtype, self.gain)
        y = F.layer_norm(
            x.to(self.dtype), x.shape[-1:], self.gain.to(self.dtype), self.bias.to(self.dtype), self.eps
        )
        return y.to(x.dtype)


def rms_norm(
    x: torch.Tensor, eps: float, stat_dtype: torch.dtype, gain: torch.Tensor | None = None
) -> torch.Tensor:
    """x (..., n) divided by its root mean square, times a gain (n,); computed in stat_dtype, returned in x's
    dtype."""
    gain = None if gain is None else gain.to(stat_dtype)
    return F.rms_norm(x.to(stat_dtype), x.shape[-1:], gain, eps=eps).to(x.dtype)


def products_dtype(s: Settings) -> torch.dtype | None:
    """torch.dtype to which operands of products are rounded (numerics.products); None: they are not."""
    return None if s.numerics.products == "matmul" else dtype(s.numerics.products)


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None,
    products: torch.dtype | None = None
) -> torch.Tensor:
    """x (..., in) times weight (out, in), the weight cast to x's dtype; returned in x's dtype.

    products: dtype to which both operands, and in the backward pass the gradient, are rounded before a
        product, and in which its result arrives; None: x's.
    """
    if products is None:
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    y = F.linear(x.to(products), weight.to(products)).to(x.dtype)
    return y if bias is None else y + bias.to(x.dtype)


def gradient_unit(reduction: str, tokens_per_rank: int) -> int:
    """Factor of the trainer's gradients to those of a rank's sum of losses, in which FP8 scales are given.

    The trainer divides by the eight ranks and, for a mean, by their tokens.
    reduction: model.head.loss_reduction.
    """
    unit = 1 if reduction == "step_sum" else LOGICAL_RANKS
    return unit * tokens_per_rank if reduction == "mean" else unit
