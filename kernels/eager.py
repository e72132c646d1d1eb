"""Operations of an eager step on the CPU in fewer passes over memory, with the bits of torch's own autograd.

An eager step reads and writes every tensor once for each operation. Autograd derives a backward pass from the
operations of the forward pass, one by one; written by hand, it needs fewer. Values and gradients are the same
bits, because every product and sum is rounded where it was before: factors of 2 and signs are exact, and
a + b = b + a. A sum of three terms has an order, so an argument must have no other use whose gradient
autograd would add in between.

float32 and float64 only, not inside torch.compile, and gradients of gradients are refused.
"""

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def applies(x: torch.Tensor) -> bool:
    """Whether x is computed by operations of the CPU one by one, in a dtype that they do not widen."""
    exact = x.dtype in (torch.float32, torch.float64)
    return exact and x.device.type == "cpu" and not torch.compiler.is_compiling()


class ReluSq(Function):
    """relu(x)^2, elementwise."""

    @staticmethod
    def forward(ctx, x):
        y = F.relu(x)
        ctx.save_for_backward(y)
        return y.square()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        y, = ctx.saved_tensors
        return torch.ops.aten.threshold_backward((y * 2).mul_(g), y, 0)


class RMSNorm(Function):
    """x (..., n) / sqrt(mean(x^2) + eps). With r that factor: dx = r g - r^3 mean(g x) x."""

    @staticmethod
    def forward(ctx, x, eps):
        r = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, r)
        return x * r

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, r = ctx.saved_tensors
        inner = (g * x).sum(-1, keepdim=True).mul_(-0.5).mul_(r.pow(3)).div_(x.size(-1))
        return (g * r).add_(x * inner.mul_(2)), None


class Rotate(Function):
    """Rotation of the pairs (j, j + K/2) of x (R, T, H, K) by angles whose cos and sin are (T, 1, K/2).

    Its gradient is turned back by the same angles.
    """

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return turned(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        cos, sin = ctx.saved_tensors
        return turned(g, cos, -sin), None, None


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (R, T, H, K) with its pairs turned. The tables are spread over the heads, so that a token is one
    stretch of memory."""
    tokens, heads, width = x.shape[1:]
    cos = torch.cat([cos, cos], dim=-1).expand(tokens, heads, width).contiguous()
    sin = torch.cat([sin, -sin], dim=-1).expand(tokens, heads, width).contiguous()
    first, second = x.chunk(2, dim=-1)
    return (x * cos).add_(torch.cat([second, first], dim=-1).mul_(sin))
