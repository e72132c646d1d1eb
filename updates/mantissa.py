"""bfloat16 weights with a kept mantissa (record 57).

A float32 number is stored as its upper 16 bits, which are the bfloat16 weight in use, and its lower 16 bits,
which are optimizer state. The weight is thus truncated towards zero, and no bit is lost between updates.
"""

import torch


def join(weight: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """The float32 numbers of bfloat16 weights and int16 lower halves of the same shape."""
    return (weight.view(torch.int16).int() << 16 | low.int() & 0xFFFF).view(torch.float32)


def split_(whole: torch.Tensor, weight: torch.Tensor, low: torch.Tensor) -> None:
    """The inverse of `join`, in place on weight (bfloat16) and low (int16)."""
    bits = whole.view(torch.int32)
    weight.view(torch.int16).copy_((bits >> 16).to(torch.int16))
    low.copy_((bits & 0xFFFF).to(torch.int16))
