"""Load golden numbers into our models: names and shapes of the originals -> ours."""

import json
from pathlib import Path

import numpy as np
import torch

import deltas
from model import GPT

HERE = Path(__file__).parent / "golden"


def load(name):
    z = np.load(HERE / f"{name}.npz")
    return {k: z[k] for k in z}, json.loads(str(z["config"])) if "config" in z else {}


def build(ref, config, **extra):
    """(settings, float64 model) of a record at the fixture's dimensions; `extra`: further settings by path."""
    values = {"model.model_dim": config["dim"], "model.attn.num_heads": config["heads"], "system.precision": "float64",
              "model.vocab_size": config["vocab_rows"], "data.seq_len": 128, "data.tokens_per_rank": 256,
              "validation.seq_len": 128, "numerics.norm_eps": 2.220446049250313e-16, **extra}
    s = deltas.resolve(ref, sets=[f"{path}={value}" for path, value in values.items()]).settings
    model = GPT(s)
    model.initialise(0)
    return s, model


def fill(model, numbers, prefix="param/"):
    """Copy the original's parameters into ours (or return a dict of ours from a dict of theirs)."""
    with torch.no_grad():
        for name, value in convert(numbers, prefix, len(model.blocks)).items():
            model.get_parameter(name).copy_(torch.from_numpy(value))


def convert(numbers, prefix, layers):
    """{our parameter name: float64 array} from the original's separate tensors."""
    get = lambda name: numbers[prefix + name].astype(np.float64)
    ours = {"embed.table": get("transformer.wte.weight")}
    for i in range(layers):
        h = f"transformer.h.{i}."
        ours[f"blocks.{i}.attn.qkvo"] = np.stack([get(h + f"attn.c_{x}.weight") for x in ("q", "k", "v", "proj")])
        ours[f"blocks.{i}.mlp.up"] = get(h + "mlp.c_fc.weight")
        ours[f"blocks.{i}.mlp.down"] = get(h + "mlp.c_proj.weight")
    if prefix + "lm_head.weight" in numbers:
        ours["head.weight"] = get("lm_head.weight")
    if prefix + "transformer.h.0.lambdas" in numbers:
        pairs = np.stack([get(f"transformer.h.{i}.lambdas") for i in range(layers)])
        ours["residual.x.value"], ours["residual.x0.value"] = pairs[:, 0], pairs[:, 1]
        ours["value_mix.value"] = np.stack([get(f"transformer.h.{i}.attn.lamb") for i in range(layers)])
    if prefix + "skip_weights" in numbers:
        ours["residual.skip.value"] = get("skip_weights")
    return ours
