"""The head: the stream to soft-capped logits, and their cross entropies."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from common.errors import UserError
from kernels.cross_entropy import linear_cross_entropy
from kernels.fp8_linear import fp8_linear
from kernels.rounding import RoundedSigmoid
from layers.losses import in_candidates, plain_losses, weighted_losses
from layers.primitives import bias_init, constant, dtype, gradient_unit, linear, linear_init, normal
from layers.primitives import parameter, products_dtype, uniform
from settings import Settings
from settings.model import Softcap, padded_vocab

MASKED = -60.0  # soft-capped logit of a token that cannot follow (record 91)
CHUNK = 2048  # tokens whose logits are masked at once
LARGEST_LOGITS = 2 ** 31  # most logits that validation on a GPU computes at once: 4 GiB in bfloat16


class Head(nn.Module):
    """Stream (R, T, D) -> logits (R, T, V), soft-capped; cross entropy over all V classes."""

    def __init__(self, s: Settings) -> None:
        super().__init__()
        m, n = s.model, s.numerics
        self.weight = self.bias = None
        if m.head.untied:
            init = linear_init(s, m.model_dim, projection=False)
            if m.init.head_std is not None:
                init = normal(m.init.head_std)
            elif m.head.untied.init != "linear":
                zero = m.head.untied.init == "zero"
                init = constant(0.0) if zero else uniform(1 / math.sqrt(m.model_dim))
            self.weight = parameter(
                (padded_vocab(s), m.model_dim), n.head, role="lm_head", label="lm_head", init=init
            )
        if m.head.bias:
            self.bias = parameter((padded_vocab(s),), n.scalar, role="scalar", label="bias",
                                  init=bias_init(s, m.model_dim, projection=True))
        self.softcap, self.cap_dtype = m.head.softcap, dtype(n.softcap)
        self.sigmoid = None if n.softcap_sigmoid == "unrounded" else dtype(n.softcap_sigmoid)
        self.scale = 1 / math.sqrt(m.model_dim) if m.head.logit_scale == "rsqrt_dim" else None
        self.fp8, self.transpose = n.fp8_head, s.system.kernels.transpose
        self.products = products_dtype(s)
        self.reduction = m.head.loss_reduction
        self.full_mass = m.head.mtp is not None and m.head.mtp.full_mass
        self.loss_dtype, self.eval_loss_dtype = dtype(n.loss), dtype(n.eval_loss)
        self.auto, self.classes = s.system.kernels.loss == "auto", padded_vocab(s)
        self.backend = {
            "auto": None, "whole": None, "chunks": "torch", "triton": "triton"
        }[s.system.kernels.loss]
        kfac = s.optim.lm_head.kfac
        self.sample = kfac.sample if kfac else None
        if kfac:  # summed here, read and emptied by system.head_inputs
            kept = {"dtype": torch.promote_types(dtype(n.matmul), torch.float32)}
            self.register_buffer("input_gram", torch.zeros(m.model_dim, m.model_dim, **kept), False)
            self.register_buffer("input_count", torch.zeros((), **kept), False)

    @torch.no_grad()
    def collect(self, x: torch.Tensor) -> None:
        """Add every sample-th input of x (R, T, D) to the sums of their products and of their number."""
        x = x.detach().flatten(0, 1)[::self.sample].to(self.input_gram.dtype)
        self.input_gram.add_(x.mT @ x)
        self.input_count.add_(len(x))

    def operands(
        self, table: torch.Tensor | None, tokens_per_rank: int | None
    ) -> tuple[torch.Tensor, tuple | None]:
        """(weight, FP8 factors or None) of the matrix product; only training uses FP8.

        table: the embedding's weight, for a tied head. tokens_per_rank: as in `losses`.
        """
        weight = table if self.weight is None else self.weight
        if not (self.fp8 and self.training):
            return weight, None
        # Undo the loss averaging before the FP8 cast.
        unit = gradient_unit(self.reduction, tokens_per_rank)
        return weight, (self.fp8.x, self.fp8.w, self.fp8.grad * unit)

    def logits_dtype(self) -> torch.dtype:
        """Dtype of the logits that the cross entropy reads, in training or validation."""
        return self.loss_dtype if self.training else self.eval_loss_dtype

    def loss_backend(self, targets: torch.Tensor) -> str | None:
        """The backend of kernels.cross_entropy for targets (R, T); None: all logits at once."""
        many = targets.numel() * self.classes > LARGEST_LOGITS
        if self.auto and targets.is_cuda and not self.training and many:
            return "torch"  # in records 21 to 33 a row of 262,144 tokens has 26 GB of logits
        return self.backend

    def losses(
        self, x: torch.Tensor, table: torch.Tensor | None, targets: torch.Tensor,
        weights: torch.Tensor | Sequence[float] | None = None, *, prefix: torch.Tensor | None = None,
        prefix_weight: torch.Tensor | float | None = None, candidates: torch.Tensor | None = None,
        corrections: torch.Tensor | None = None, tokens_per_rank: int | None = None
    ) -> torch.Tensor:
        """Cross entropies (R, T) of the targets (R, T) int64.

        Args:
            x: the stream (R, T, D), normed.
            table: the embedding's weight (V, D), for a tied head.
            weights: loss weights of the next tokens, the first one first (layers.losses.weighted_losses);
                None: only the next token, with weight 1.
            prefix, prefix_weight: a second target per token, (R, T) int64, and the weight of its cross
                entropy; negative targets are ignored. None: no second target.
            candidates: (P,) int64, distinct classes in ascending order, to which the softmax is restricted,
                or (R, P), those of each row. Every target must be one of them; other prefix targets are
                ignored. None: all classes.
            corrections: in the shape of candidates, added to their soft-capped logits; None: nothing.
            tokens_per_rank: tokens of a logical rank in this step; needed by an FP8 head in training.
        """
        if candidates is not None and candidates.dim() == 2:
            return torch.cat([
                self.losses(
                    x[i:i + 1], table, targets[i:i + 1], weights, candidates=of_row,
                    prefix=None if prefix is None else prefix[i:i + 1], prefix_weight=prefix_weight,
                    corrections=None if corrections is None else corrections[i],
                    tokens_per_rank=tokens_per_rank
                ) for i, of_row in enumerate(candidates)
            ])
        if self.sample is not None and self.training:
            self.collect(x)
        weight, fp8 = self.operands(table, tokens_per_rank)
        x, backend, bias = x.to(self.products or x.dtype), self.loss_backend(targets), self.bias
        if candidates is not None:
            weight = weight.index_select(0, candidates)
            bias = None if bias is None else bias.index_select(0, candidates)
            # a target outside the candidates gets an index past the last logit, which raises an error
            targets = in_candidates(candidates, targets, missing=len(candidates))
            prefix = None if prefix is None else in_candidates(candidates, prefix, missing=-1)
        if backend is None or corrections is not None:
            logits = self.logits(x, weight, fp8, bias)
            if corrections is not None:
                logits = logits + corrections.to(logits.dtype)
            if weights is not None or prefix is not None:
                weights = (1.0,) if weights is None else weights
                return weighted_losses(logits, targets, weights, prefix, prefix_weight, self.full_mass)
            return plain_losses(logits, targets)
        if bias is not None:
            x, weight = with_bias(x, weight, bias)
        try:
            return linear_cross_entropy(
                x, weight, targets, softcap=self.softcap, weights=(1.0,) if weights is None else weights,
                prefix=prefix, prefix_weight=None if prefix is None else prefix_weight, fp8=fp8,
                full_mass=self.full_mass, logit_scale=self.scale, cap_dtype=self.cap_dtype, backend=backend,
                logits8=fp8 is not None and self.fp8.logits == "e4m3", loss_dtype=self.logits_dtype(),
                sigmoid=self.sigmoid if self.training else None, transpose=self.transpose
            )
        except ValueError as error:
            raise UserError(f"system.kernels.loss: {error}: set it to chunks or whole") from None

    def masked_losses(
        self, x: torch.Tensor, table: torch.Tensor | None, targets: torch.Tensor, tokens: torch.Tensor,
        impossible: torch.Tensor
    ) -> torch.Tensor:
        """Cross entropies (R, T) with canonical masking (record 91), for validation.

        A class that never follows the token before the target gets the logit MASKED.

        Args:
            tokens: (R, T) int64, the tokens before the targets.
            impossible: (V, V / 8) uint8, the bits of data/seams.py.
        """
        weight, _ = self.operands(table, None)
        bit = torch.arange(8, device=x.device, dtype=torch.uint8)
        parts = []
        for part in zip(
            *(t.flatten(0, 1).split(CHUNK) for t in (x.to(self.products or x.dtype), targets, tokens))
        ):
            of_part, target, before = part
            logits = self.logits(of_part[None], weight, None, self.bias)[0]  # (n, V)
            masked = (impossible[before][..., None] >> bit & 1).bool().flatten(-2)
            logits = logits.masked_fill(masked, MASKED)
            parts.append(plain_losses(logits, target))
        return torch.cat(parts).view(targets.shape)

    def forward(
        self, x: torch.Tensor, table: torch.Tensor | None, tokens_per_rank: int | None = None
    ) -> torch.Tensor:
        return self.logits(x.to(self.products or x.dtype), *self.operands(table, tokens_per_rank), self.bias)

    def logits(
        self, x: torch.Tensor, weight: torch.Tensor, fp8: tuple | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Stream (R, T, D), weight (V, D) and bias (V,) or None -> soft-capped logits (R, T, V)."""
        if fp8 is None:
            z = linear(x, weight, bias)
        else:
            z = fp8_linear(x, weight, *fp8, self.transpose, rounds_result=self.fp8.logits == "e4m3")
        if self.scale is not None or self.softcap is not None:
            z = z.to(torch.promote_types(z.dtype, self.cap_dtype))
        if self.scale is not None:
            z = z * self.scale
        if self.softcap is not None:
            z = bounded(z, self.softcap, self.sigmoid if self.training else None)
        return z.to(self.logits_dtype())


def bounded(z: torch.Tensor, softcap: Softcap, sigmoid: torch.dtype | None = None) -> torch.Tensor:
    """The soft-capped logits of z, elementwise (settings.model.Softcap).

    sigmoid: dtype to which the sigmoid is rounded (numerics.softcap_sigmoid); None: it is not.
    """
    if softcap.form == "tanh":
        return softcap.cap * torch.tanh(z / softcap.cap)
    if softcap.form == "rsqrt":
        return softcap.cap * z * torch.rsqrt(z.square() + softcap.cap ** 2)
    if softcap.shift:
        z = z + softcap.shift
    if sigmoid is not None:
        return softcap.cap * RoundedSigmoid.apply(z / softcap.scale, sigmoid)
    return softcap.cap * torch.sigmoid(z / softcap.scale)


BIAS_CHANNELS = 8  # as many as keep rows of 16-bit numbers aligned


def with_bias(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Operands (R, T, D + 8) and (V, D + 8) with the product x W^T + bias, of x (R, T, D), weight (V, D) and
    bias (V,).

    For a cross entropy whose kernels have no bias. The first further channel of x is 1, that of the weight
    the bias; the others are 0.
    """
    ones = F.pad(x.new_ones(*x.shape[:-1], 1), (0, BIAS_CHANNELS - 1))
    column = F.pad(bias.to(weight.dtype)[:, None], (0, BIAS_CHANNELS - 1))
    return torch.cat([x, ones], -1), torch.cat([weight, column], -1)
