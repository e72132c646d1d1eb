"""The whole model of the optimizer track in small: parameters of the originals under our names."""

from collections.abc import Callable

import numpy as np
import torch

import golden_records

OF_BLOCK = {  # our parameter of a block -> parameters of the original's, which it holds one above the other
    "attn.qkvo": [f"attn.{x}.weight" for x in ("q", "k", "v", "proj")],
    "attn.bias": [f"attn.{x}.bias" for x in ("q", "k", "v", "proj")],
    "mlp.c_fc": "mlp.fc.weight", "mlp.c_proj": "mlp.proj.weight", "mlp.c_fc_bias": "mlp.fc.bias",
    "mlp.c_proj_bias": "mlp.proj.bias", "attn_norm.gain": "norm1.gains", "mlp_norm.gain": "norm2.gains",
}
OUTSIDE = {"embed.weight": "embed.weight", "lm_head.weight": "proj.weight", "lm_head.bias": "proj.bias",
           "embed.norm.gain": "norm1.gains", "norm.gain": "norm2.gains"}


def theirs(layers: int, apart: bool = False) -> dict[str, str | list[str]]:
    """{our parameter: the original's, or a list of those that it holds}.

    apart: whether the bias of attention's output projection is a parameter of its own (optim.o_bias).
    """
    found = dict(OUTSIDE)
    for layer in range(layers):
        for ours, names in OF_BLOCK.items():
            block = f"blocks.{layer}."
            several = [block + name for name in names] if isinstance(names, list) else block + names
            if apart and ours == "attn.bias":
                found[block + "attn.o_bias"] = several[3:]
                several = several[:3]
            found[block + ours] = several
    return found


def ours(
    get: Callable[[str], np.ndarray], layers: int, apart: bool = False, only: str | None = None
) -> dict[str, np.ndarray]:
    """{our parameter: float64 array}. get: array of a name of the original. only: one of our parameters."""
    def joined(names):
        if isinstance(names, list):
            return np.stack([get(name).astype(np.float64) for name in names], axis=-1 - get(names[0]).ndim)
        return get(names).astype(np.float64)

    return {name: joined(names) for name, names in theirs(layers, apart).items() if only in (None, name)}


def small(ref: str, config: dict, *, rows: int, length: int, **more) -> tuple:
    """(settings, float64 model) of a result at the sizes of a fixture, with eight ranks of `rows` rows."""
    return golden_records.build(ref, **{
        "model.num_layers": config.get("num_layers", config.get("layers")),
        "model.model_dim": config["model_dim"],
        "model.attn.num_heads": config.get("num_heads", config.get("heads")),
        "model.vocab_size": config["vocab"], "model.pad_vocab_to": 1, "data.seq_len": length,
        "data.tokens_per_rank": rows * length, "validation.seq_len": length, "validation.tokens": 8 * length,
        **more
    })


def fill(model: torch.nn.Module, values: dict[str, np.ndarray]) -> None:
    """Copy {our name: array} into the model; every parameter must be given."""
    golden_records.fill(model, values)
