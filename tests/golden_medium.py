"""Golden numbers of the medium track's records 2, 14 and 18: names and shapes of the originals -> ours."""

import numpy as np

from golden_records import build, load, reader, record20
from schedule import Span, Windows

LAYERS = 16
SKIPPED = (6, 4, 2)  # layers whose outputs skips add; their weights have these places in the vector of 16


def fixture(number, **more):
    """(numbers, config, settings, float64 model) of a record at the sizes of its fixture."""
    golden, config = load(f"m{number:02d}")
    length = config["tokens"]
    rows = {"data__max_doc_len": length} if number == 18 else {}
    s, model = build(
        f"medium/{number}", model__model_dim=config["model_dim"], model__attn__num_heads=config["num_heads"],
        model__vocab_size=config["vocab"], model__attn__window__block=config["block"], **{
            "data__seq_len": length, "data__tokens_per_rank": length, "validation__seq_len": length,
            "validation__tokens": 8 * length, "numerics__norm_eps": 1.1920929e-07, **short(number, config),
            **rows, **more
        }
    )
    return golden, config, s, model


def short(number, config):
    """Window settings in whole blocks of the fixture, which are shorter than 128 tokens."""
    if number == 18:
        return {}
    end = {2: 1728, 14: 3456}[number] * config["block"] // 128
    return {"model__attn__window__grain": config["block"], "model__attn__window__end": end}


def record2(numbers, prefix):
    """Record 2 has the tensors of short/20 in 16 layers."""
    return record20(numbers, prefix, LAYERS)


def record14(numbers, prefix):
    """Records 10 to 14; those from 15 on have three more scalars in the end (record 16: smear, a, b)."""
    get, scalars = reader(numbers, prefix), numbers[prefix + "scalars"].astype(np.float64)
    skips, lambdas = scalars[:LAYERS], scalars[LAYERS:4 * LAYERS].reshape(LAYERS, 3)
    attn = np.delete(scalars[4 * LAYERS:6 * LAYERS].reshape(LAYERS, 2), 7, axis=0)
    ours = {
        "embed.weight": get("embed1.weight"), "embed.second": get("embed2.weight"),
        "lm_head.weight": get("lm_head_w"), "residual.skip_weights.value": skips[list(SKIPPED)],
        "residual.resid_lambdas.value": lambdas[:, 0], "residual.x0_lambdas.value": lambdas[:, 1],
        "residual.x02_lambdas.value": lambdas[:, 2], "values.v_lambdas.value": attn[:, 0],
        "values.ve_lambdas.value": attn[:, 1]
    }
    ours |= {f"values.tables.{k}": get(f"value_embeds.{k}.weight") for k in range(5)}
    for i in range(LAYERS):
        if i != 7:
            ours[f"blocks.{i}.attn.qkvo"] = get(f"blocks.{i}.attn.qkvo_w")
        ours[f"blocks.{i}.mlp.c_fc"] = get(f"blocks.{i}.mlp.fc_w")
        ours[f"blocks.{i}.mlp.c_proj"] = get(f"blocks.{i}.mlp.proj_w")
    return ours


def record18(numbers, prefix):
    """The embedding is left out where the numbers have none, as among the gradients of a tied head."""
    get, scalars = reader(numbers, prefix), numbers[prefix + "scalars"].astype(np.float64)
    attn, x0 = scalars[LAYERS:3 * LAYERS].reshape(LAYERS, 2), get("x0_lambdas").reshape(LAYERS, 2)
    ours = {
        "lm_head.weight": get("lm_head.weight"), "embed.second": get("embed2.weight"),
        "embed.smear.gate": get("smear_gate.weight"), "embed.smear.lam.value": scalars[48:49],
        "residual.resid_lambdas.value": scalars[:LAYERS], "residual.x0_lambdas.value": x0[:, 0],
        "residual.x02_lambdas.value": x0[:, 1], "residual.backout.value": scalars[49:50],
        "residual.skip_weights.value": scalars[50:53], "sa_lambdas.qkv.value": attn[:, 0],
        "sa_lambdas.o.value": attn[:, 1],
        "residual.skip_gate": np.concatenate([get(f"skip_gates.{k}.weight") for k in range(3)])
    }
    if prefix + "embed.weight" in numbers:
        ours["embed.weight"] = get("embed.weight")
    ours |= {f"values.tables.{k}": get(f"value_embeds.{k}.weight") for k in range(5)}
    for i in range(LAYERS):
        block = f"blocks.{i}."
        qkvo = get(block + "attn.qkvo_w")
        ours[block + "attn.qkvo"] = qkvo.reshape(4, -1, qkvo.shape[1])
        ours[block + "attn.gate"] = get(block + "attn.attn_gate.weight")
        if prefix + block + "attn.value_embed_gate.weight" in numbers:
            ours[f"values.gates.{i}"] = get(block + "attn.value_embed_gate.weight")
        ours[block + "mlp.c_fc"] = get(block + "mlp.c_fc")
        ours[block + "mlp.c_proj"] = get(block + "mlp.c_proj").T.copy()
    return ours


def block_windows(blocks):
    """Windows of records 2 to 17: the short one has half as many blocks, at least the query's own."""
    return Windows(Span(None, blocks), Span(None, max(1, blocks // 2)), Span(None, blocks), ())
