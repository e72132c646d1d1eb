"""Signed initial gains of the norms before attention and MLP (optimizer track, results 30 and 46)."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from settings import Settings
from settings.model import head_dim


@torch.no_grad()
def fill_gains(
    blocks: Sequence[nn.Module], s: Settings, generator: Callable[[int], torch.Generator]
) -> None:
    """Set the gain before attention to 1 - alpha s and that before the MLP to 1 + alpha s (model.init).

    A block without one of the two sublayers has one gain only.

    generator: function (layer) -> the generator of its signs; a pair goes by its first layer.
    """
    alpha, width, d = s.model.init.signed_gains.alpha, head_dim(s), s.model.model_dim
    first = s.model.init.signed_gains.pairs_from
    signs = {}
    for i, block in enumerate(blocks):
        if i not in signs and first is not None and i >= first:
            signs[i], signs[i + 1] = paired_signs(d // width, width, generator(i))
        elif i not in signs:
            signs[i] = random_signs((d,), generator(i))
        for name, turn in (("attn_norm", -1), ("mlp_norm", 1)):
            if hasattr(block, name):
                getattr(block, name).gain.copy_(1 + turn * alpha * signs[i])


def random_signs(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Independent signs +1 and -1, float32."""
    return 2.0 * torch.randint(2, shape, generator=generator) - 1


def paired_signs(
    heads: int, width: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """The signs (heads * width,) of two layers, whose numbers of +1 add up to `width` in each head.

    That of the first layer is drawn and then goes halfway to width / 2, rounded to even at a half.
    """
    pair = [], []
    for _ in range(heads):
        plus = int((random_signs((width,), generator) > 0).sum())
        plus = round(width / 2 + (plus - width / 2) / 2)
        for layer, count in zip(pair, (plus, width - plus)):
            signs = torch.cat([torch.ones(count), -torch.ones(width - count)])
            layer.append(signs[torch.randperm(width, generator=generator)])
    return torch.cat(pair[0]), torch.cat(pair[1])
