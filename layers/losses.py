"""Cross entropies of full logits, with several weighted targets, a prefix target or a set of candidates.

kernels.cross_entropy computes the same in chunks.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def in_candidates(candidates: torch.Tensor, targets: torch.Tensor, missing: int) -> torch.Tensor:
    """The index of each target in a set of candidate classes, for a softmax over the candidates only.

    Sampled softmax, record 92 (Jean et al., arXiv 1412.2007).

    Args:
        candidates: (P,) int64, distinct and ascending.
        targets: int64 of any shape; negative: no target.
        missing: the index given to a target that is no candidate.

    Returns: indices in the shape of targets, -1 where there is no target.
    """
    at = torch.searchsorted(candidates, targets).clamp(max=len(candidates) - 1)
    position = torch.where(candidates[at] == targets, at, missing)
    return position.masked_fill(targets < 0, -1)


def plain_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropies of targets (...) int64 by logits (..., V), in at least float32."""
    losses = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    return losses.to(torch.promote_types(losses.dtype, torch.float32)).view(targets.shape)


def weighted_losses(
    logits: torch.Tensor, targets: torch.Tensor, weights: Sequence[float] | torch.Tensor = (1.0,),
    prefix: torch.Tensor | None = None, prefix_weight: float | torch.Tensor | None = None,
    full_mass: bool = False
) -> torch.Tensor:
    """The loss (R, T) of several weighted targets.

    For token t: the sum over n of weights[n] times the cross entropy of targets[:, t + n] (multi-token
    prediction, record 53), plus prefix_weight times that of prefix[:, t] (record 88).

    Args:
        logits: (R, T, V).
        targets: (R, T) int64. Those beyond the end of a row add nothing.
        weights: N numbers, a sequence or a tensor.
        prefix: (R, T) int64, or None; a negative one adds nothing.
        prefix_weight: one number, with `prefix`.
        full_mass: at the end of a row the gradient of log_z counts all weights (model.head.mtp.full_mass).
    """
    # at least float32: in bfloat16 an error of log_z (about 10) would change every gradient by up to 3 %
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_z, total = logits.logsumexp(-1), 0.0  # (R, T), shared by all targets
    for n in range(min(len(weights), targets.size(1))):
        tokens = targets.size(1) - n  # number of tokens that have an n-th target
        chosen = at_targets(logits[:, :tokens], targets[:, n:])
        total = total + F.pad(weights[n] * (log_z[:, :tokens] - chosen), (0, n))
        if full_mass:  # zero, with the gradient of log_z
            rest = log_z[:, tokens:]
            total = total + F.pad(weights[n] * (rest - rest.detach()), (tokens, 0))
    if prefix is None:
        return total
    chosen = at_targets(logits, prefix.clamp(min=0))
    return total + (prefix_weight * (log_z - chosen)).masked_fill(prefix < 0, 0.0)


def at_targets(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The logit (R, T) of each target: logits (R, T, V), targets (R, T) int64."""
    if torch.compiler.is_compiling():
        return AtTargets.apply(logits, targets)
    return logits.gather(-1, targets[..., None])[..., 0]


class AtTargets(torch.autograd.Function):
    """at_targets in a compiled graph: the gradient is a comparison, which fuses with the other terms'.

    The gradient of a gather is a scatter, for which Inductor makes a float32 tensor of all logits per target.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(targets)
        ctx.classes = logits.size(-1)
        return logits.gather(-1, targets[..., None])[..., 0]

    @staticmethod
    def backward(ctx, g: torch.Tensor) -> tuple[torch.Tensor, None]:
        targets, = ctx.saved_tensors
        classes = torch.arange(ctx.classes, device=targets.device)
        return torch.where(classes == targets[..., None], g[..., None], 0.0), None
