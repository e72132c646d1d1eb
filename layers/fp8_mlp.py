"""The products of an MLP in FP8, with delayed scales."""

import math

import torch
import torch.distributed as dist
from torch import nn

from kernels.fp8_linear import LARGEST
from kernels.fp8_mlp import E4M3, E5M2, LEAST, Scales, fp8_mlp, fp8_mlp_both, front
from layers.primitives import dtype, gradient_unit
from settings import Settings
from settings.data import LOGICAL_RANKS


class FP8MLP(nn.Module):
    """The products of one MLP in FP8 (settings.numerics.FP8MLP), with the delayed scales.

    Buffers with one scale per logical rank of this process are rings: a forward pass reads the scales of its
    ranks at the front and appends the new ones, so that after the passes of a step the order is the same
    again, whatever the number of ranks per pass.

    Buffers:
        activation: ring, of relu^2.
        weight: scale of c_proj, refreshed before the forwards of a step.
        following: value of `weight` after the next refresh.
        refreshes: number of refreshes so far.
        With FP8 in the backward pass also:
        input: ring, of the MLP's input.
        hidden: ring, of the gradient before relu^2, for gradients of a rank's own loss (`gradient_unit`); the
            backward pass moves it.
        c_fc_weight, c_fc_following: as weight and following, of c_fc.

    Without the second product in FP8 there is no state: the weight scale is computed in each forward, which
    gives the same value all step long, because weights change only in the update.
    """

    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.delayed, self.both = s.numerics.fp8_mlp.c_proj, s.numerics.fp8_mlp.backward
        self.dtype, self.fused = dtype(s.numerics.matmul), s.system.kernels.mlp == "triton"
        self.transpose, self.reduction = s.system.kernels.transpose, s.model.head.loss_reduction
        self.probe, self.parts = None, 1
        self.format = E4M3 if self.both is not None and self.both.format == "e4m3" else E5M2
        if self.delayed is None:
            return
        ranks = LOGICAL_RANKS // (dist.get_world_size() if dist.is_initialized() else 1)
        rings = ["activation"] + ([] if self.both is None else ["input", "hidden"])
        scales = ["weight", "following"] + ([] if self.both is None else ["c_fc_weight", "c_fc_following"])
        for name, shape in [*((name, (ranks,)) for name in rings), *((name, ()) for name in scales)]:
            self.register_buffer(name, torch.ones(shape), persistent=False)
        self.register_buffer("refreshes", torch.zeros((), dtype=torch.int64), persistent=False)
        self.fill()

    def fill(self) -> None:
        """Fill the buffers with the scales of the first step."""
        first = {"activation": self.delayed.first}
        if self.both is not None:
            first |= {"input": self.both.input, "hidden": self.both.hidden}
        for name, buffer in self.named_buffers():
            if name != "refreshes":
                buffer.fill_(first.get(name, 1.0))
        self.refreshes.zero_()

    def forward(
        self, x: torch.Tensor, c_fc: torch.Tensor, c_proj: torch.Tensor, tokens_per_rank: int | None = None
    ) -> torch.Tensor:
        """x (R, T, D), of whole logical ranks or a part of one -> (R, T, D).

        tokens_per_rank: tokens of a logical rank; None: all of x is one rank.
        """
        rows = x.flatten(0, 1)
        parts = max(1, len(rows) // (tokens_per_rank or len(rows)))
        c_fc, c_proj = c_fc.to(x.dtype), c_proj.to(x.dtype)
        if self.both is not None:
            return self.both_passes(rows, c_fc, c_proj, parts, tokens_per_rank or len(rows)).view(x.shape)
        scales = None if self.delayed is None else (self.activation[:parts], self.weight)
        y, largest = fp8_mlp(rows, c_fc, c_proj, parts, scales, self.fused)
        if self.delayed is not None:
            append(self.activation, largest, self.delayed.activation, E4M3)
        return y.view(x.shape)

    def both_passes(
        self, rows: torch.Tensor, c_fc: torch.Tensor, c_proj: torch.Tensor, parts: int, tokens_per_rank: int
    ) -> torch.Tensor:
        """The MLP of rows (N, D) with FP8 in both passes."""
        unit, both = gradient_unit(self.reduction, tokens_per_rank), self.both
        x, p, h = (front(ring, parts) for ring in (self.input, self.activation, self.hidden))
        grad = None if both.grad is None else both.grad / unit
        scales = Scales(x, p, self.c_fc_weight, self.weight, grad, h / unit, self.format)
        self.parts = parts
        probe = torch.zeros_like(h)
        if both.hidden_margin is not None and torch.is_grad_enabled():
            probe = unit * self.measuring(h.device)[:parts]
        y, largest, most = fp8_mlp_both(rows, c_fc, c_proj, scales, probe, self.fused, self.transpose)
        append(self.activation, largest, self.delayed.activation, E4M3)
        if both.input_margin is not None:
            append(self.input, most, both.input_margin, E4M3)
        return y

    def measuring(self, device: torch.device) -> torch.Tensor:
        """The zeros whose gradient is the largest hidden gradient of each rank of a backward pass.

        A custom gradient is how a compiled backward pass can hand out a number.
        """
        if self.probe is None or self.probe.device != device:
            self.probe = torch.zeros(len(self.hidden), device=device, requires_grad=True)
            self.probe.register_post_accumulate_grad_hook(self.measured)
        return self.probe

    @torch.no_grad()
    def measured(self, probe: torch.Tensor) -> None:
        """After a backward pass: move the ring of hidden gradients.

        A rank without any gradient keeps its scale: in the first step a zero c_proj hides all of them, and
        from a maximum of zero the next pass would have a scale that clamps everything.
        """
        largest = probe.grad[:self.parts]
        kept = self.hidden[:self.parts] * (LARGEST[self.format] / self.both.hidden_margin)
        append(self.hidden, torch.where(largest > 0, largest, kept), self.both.hidden_margin, self.format)
        probe.grad = None

    @torch.no_grad()
    def refresh(self, c_fc: torch.Tensor, c_proj: torch.Tensor) -> None:
        """Refresh the scales of the weights before the forwards of a step.

        Delayed scaling: the largest entry of the previous step; in the first steps, of the current weight.
        """
        if self.delayed is None:
            return
        margin = self.delayed.weight
        pairs = [(c_proj, self.weight, self.following, margin is not None)]
        if self.both is not None:
            pairs.append((c_fc, self.c_fc_weight, self.c_fc_following, self.both.c_fc_delayed))
        for weight, scale, following, delayed in pairs:
            largest = torch.linalg.vector_norm(weight, math.inf).to(self.dtype).clamp(min=LEAST)
            exact = (largest / LARGEST[E4M3]).float()
            late = self.refreshes > self.delayed.exact_steps
            scale.copy_(torch.where(late, following, exact) if delayed else exact)
            if margin is not None:
                following.copy_(largest.float() * (margin / LARGEST[E4M3]))
        self.refreshes += 1

    def reset(self) -> None:
        if self.delayed is not None:
            self.fill()
        if self.both is not None and self.both.hidden_margin is not None:
            self.measuring(self.hidden.device).grad = None


def append(ring: torch.Tensor, largest: torch.Tensor, margin: float, of: torch.dtype) -> None:
    """Move a ring on by the parts of a pass, with scales margin x largest / (largest value of a dtype)."""
    new = largest.clamp(min=LEAST) * (margin / LARGEST[of])
    ring.copy_(torch.cat([ring[len(new):], new]))
