"""Load golden numbers into our models: names and shapes of the originals -> ours."""

import json
from pathlib import Path

import numpy as np
import torch

from model import GPT
from schedule import Span, Windows
from settings import deltas

HERE = Path(__file__).parent / "golden"


def load(name):
    z = np.load(HERE / f"{name}.npz")
    return {k: z[k] for k in z}, json.loads(str(z["config"])) if "config" in z else {}


def build(ref, revert=(), **values):
    """(settings, float64 model) of a record; `values`: further settings, dots in paths written as they are or
    as double underscores. revert: records whose deltas are left out."""
    values = {"system.precision": "float64", **{k.replace("__", "."): v for k, v in values.items()}}
    sets = [f"{path}={value}" for path, value in values.items()]
    s = deltas.resolve(ref, sets=sets, revert=revert).settings
    model = GPT(s)
    model.initialise(0)
    return s, model


def small(ref, config, length, rows=1, **more):
    """build() at the dimensions of a fixture whose rows have `length` tokens."""
    return build(
        ref, model__model_dim=config["dim"], model__attn__num_heads=config["heads"],
        model__vocab_size=config["vocab_rows"], data__seq_len=length, data__tokens_per_rank=rows * length,
        validation__seq_len=length, validation__tokens=8 * length,
        **{"numerics__norm_eps": 2.220446049250313e-16, "numerics__qk_norm_eps": "false", **more}
    )


def fill(model, values):
    """Copy {our name: array} into the model; every parameter must be given."""
    ours = dict(model.named_parameters())
    assert set(ours) == set(values)
    with torch.no_grad():
        for name, value in values.items():
            ours[name].copy_(torch.from_numpy(value))


def reader(numbers, prefix):
    return lambda name: numbers[prefix + name].astype(np.float64)


def early(numbers, prefix, layers=12):
    """Records 5 and 12: {our parameter name: float64 array} from the original's separate tensors."""
    get = reader(numbers, prefix)
    ours = {"embed.weight": get("transformer.wte.weight")}
    for i in range(layers):
        h = f"transformer.h.{i}."
        ours[f"blocks.{i}.attn.qkvo"] = np.stack(
            [get(h + f"attn.c_{x}.weight") for x in ("q", "k", "v", "proj")]
        )
        ours[f"blocks.{i}.mlp.c_fc"] = get(h + "mlp.c_fc.weight")
        ours[f"blocks.{i}.mlp.c_proj"] = get(h + "mlp.c_proj.weight")
    if prefix + "lm_head.weight" in numbers:
        ours["lm_head.weight"] = get("lm_head.weight")
    if prefix + "transformer.h.0.lambdas" in numbers:
        pairs = np.stack([get(f"transformer.h.{i}.lambdas") for i in range(layers)])
        ours["residual.resid_lambdas.value"], ours["residual.x0_lambdas.value"] = pairs[:, 0], pairs[:, 1]
        ours["values.lam.value"] = np.stack([get(f"transformer.h.{i}.attn.lamb") for i in range(layers)])
    if prefix + "skip_weights" in numbers:
        ours["residual.skip_weights.value"] = get("skip_weights")
    return ours


def record20(numbers, prefix, layers=12):
    get = reader(numbers, prefix)
    ours = {"embed.weight": get("embed.weight"), "lm_head.weight": get("lm_head.weight"),
            "residual.skip_weights.value": get("skip_weights")}
    ours |= {f"values.tables.{k}": get(f"value_embeds.embed.{k}.weight") for k in range(3)}
    mix = np.stack([get(f"blocks.{i}.lambdas") for i in range(layers)])
    ours["residual.resid_lambdas.value"], ours["residual.x0_lambdas.value"] = mix.T
    ours["values.v_lambdas.value"], ours["values.ve_lambdas.value"] = np.stack(
        [get(f"blocks.{i}.attn.lambdas") for i in range(layers) if i != 7]
    ).T
    for i in range(layers):
        if i != 7:
            ours[f"blocks.{i}.attn.qkvo"] = np.concatenate([get(f"blocks.{i}.attn.qkv_w"),
                                                            get(f"blocks.{i}.attn.c_proj.weight")[None]])
        ours[f"blocks.{i}.mlp.c_fc"] = get(f"blocks.{i}.mlp.c_fc.weight")
        ours[f"blocks.{i}.mlp.c_proj"] = get(f"blocks.{i}.mlp.c_proj.weight")
    return ours


def record33(numbers, prefix, layers=12):
    """Record 34 without its smear: tensors of layers whose gradients are not stored are left out."""
    get, scalars = reader(numbers, prefix), numbers[prefix + "scalars"].astype(np.float64)
    ours = {
        "embed.weight": get("embed.weight"), "lm_head.weight": get("lm_head.weight"),
        "residual.skip_weights.value": scalars[:6]
    }
    ours |= {f"values.tables.{k}": get(f"value_embeds.{k}.weight") for k in range(3)}
    ours["residual.resid_lambdas.value"], ours["residual.x0_lambdas.value"] = scalars[12:36].reshape(12, 2).T
    sa_lambdas = np.delete(scalars[36:60].reshape(12, 2), 7, axis=0)
    ours["values.v_lambdas.value"], ours["values.ve_lambdas.value"] = sa_lambdas.T
    theirs = {"attn.qkvo": ("attn.qkvo_w", False), "attn.gate": ("attn.attn_gate.weight", False),
              "mlp.c_fc": ("mlp.c_fc", True), "mlp.c_proj": ("mlp.c_proj", False)}
    for i in range(layers):
        for name, (key, turned) in theirs.items():
            if f"{prefix}blocks.{i}.{key}" in numbers:
                value = get(f"blocks.{i}.{key}")
                ours[f"blocks.{i}.{name}"] = value.T.copy() if turned else value
    return ours


def record34(numbers, prefix):
    """Record 34: record 33 and the smear."""
    gate = numbers[prefix + "smear_gate.weight"].astype(np.float64)
    strength = numbers[prefix + "scalars"][60:61].astype(np.float64)
    return record33(numbers, prefix) | {"embed.smear.gate": gate, "embed.smear.lam.value": strength}


SMEAR = {"model.embed.smear": "true"}  # record 34 on record 33, as far as the model goes
RECORD_53 = SMEAR | {  # likewise record 53
    "model.num_layers": 11, "model.attn.drop_layers": "[6]", "model.mlp.drop_layers": "[]",
    "model.attn.window.long_layers": "[3, 10]", "model.attn.window.final_last_layer": "false",
    "model.residual.backout": "{layer = 7}", "model.residual.unet_skips.pairs": "[[3, 6]]",
    "model.residual.x0_mix.x": 1.1, "model.attn.sa_lambdas": "{qkv = 0.5, o = 1.0}",
    "model.attn.value_embed.tables": "[1, 2, -1, -1, -1, -1, -1, -1, 0, 1, 2]",
    "model.attn.value_embed.mix": "sum", "model.attn.value_embed.table_init": "zero",
    "model.attn.key_offset": "true", "model.head.untied": "{tied_until = 0.6666666666666666}",
    "model.init.head_std": 0.005, "model.init.qkv_bound": 1.7320508075688772,
    "schedule.stages": "[0.25, 0.25, 0.5]",
    "model.head.mtp": "{start = [[1.0, 0.5, 0.25], [1.0, 0.5], [1.0]], "
                      "end = [[1.0, 0.5, 0.0], [1.0, 0.0], [1.0]]}",
}


def record53(numbers, prefix, layers=11):
    """Tensors of layers whose gradients are not stored are left out."""
    get, scalars = reader(numbers, prefix), numbers[prefix + "scalars"].astype(np.float64)
    attn = np.delete(scalars[11:33].reshape(11, 2), 6, axis=0)
    ours = {
        "embed.weight": get("embed.weight"), "lm_head.weight": get("lm_head.weight"),
        "embed.smear.gate": get("smear_gate.weight"), "embed.smear.lam.value": scalars[33:34],
        "residual.resid_lambdas.value": scalars[:11], "residual.x0_lambdas.value": get("x0_lambdas"),
        "residual.backout.value": scalars[34:35], "residual.skip_weights.value": scalars[35:36],
        "sa_lambdas.qkv.value": attn[:, 0], "sa_lambdas.o.value": attn[:, 1]
    }
    ours |= {f"values.tables.{k}": get(f"value_embeds.{k}.weight") for k in range(3)}
    for i in range(layers):
        block = f"blocks.{i}."
        if prefix + block + "attn.qkvo_w" in numbers:
            qkvo = get(block + "attn.qkvo_w")
            ours[block + "attn.qkvo"] = qkvo.reshape(4, -1, qkvo.shape[1])
            ours[block + "attn.gate"] = get(block + "attn.attn_gate.weight")
        if prefix + block + "mlp.c_fc" in numbers:
            ours[block + "mlp.c_fc"] = get(block + "mlp.c_fc")
            ours[block + "mlp.c_proj"] = get(block + "mlp.c_proj").T.copy()
    return ours


def originals(values, golden, convert):
    """{original name: flat array} from {our name: array}: `convert` undone by following the place of every
    number."""
    names = [key for key in golden if key.startswith("param/")]
    bounds = np.cumsum([0] + [golden[name].size for name in names])
    places = {
        name: np.arange(a, b).reshape(golden[name].shape) for name, a, b in zip(names, bounds, bounds[1:])
    }
    flat = np.full(bounds[-1], np.nan)
    for name, place in convert(places, "param/").items():
        flat[place.astype(int)] = values[name]
    return {name.removeprefix("param/"): flat[a:b] for name, a, b in zip(names, bounds, bounds[1:])}


def block_windows(blocks):
    """Windows of records 20 to 28 with a long window of so many blocks."""
    return Windows(Span(None, blocks), Span(None, max(1, blocks // 2)), Span(None, blocks), ())


def token_windows(long, last, history, block=16):
    """Windows of record 29 on, in blocks: FlashAttention's left window of w tokens shows w + 1 keys."""
    return Windows(*(Span(w * block + 1, None) for w in (long, long // 2, last)), history)
