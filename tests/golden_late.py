"""Golden numbers of records 62, 77 and 85: names and shapes of the originals -> ours.

The originals keep the matrices of all layers in banks; attention's have no slot for layer 6, and those of the
MLPs one more than layers.
"""

import numpy as np

from golden_records import load, originals, small

LAYERS = 11
WITH_ATTENTION = [i for i in range(LAYERS) if i != 6]
HEADS = 6


def fixture(number, **more):
    """(numbers, config, model) of record 62, 77 or 85 at the sizes of its fixture."""
    golden, config = load(f"r{number}")
    sizes = {"dim": config["model_dim"], "heads": HEADS, "vocab_rows": config["vocab_padded"]}
    more = {"model.attn.window.block": 16, "data.max_doc_len": 256, "numerics.norm_eps": config["rms_eps"],
            "model.embed.bigram.rows": config["bigram_vocab_size"], **more}
    if number == 85:
        more |= {
            "model.embed.bigram.signs": config["sign_rows"],
            "model.attn.compose.window": config["dc_window"],
        }
    _, model = small(f"short/{number}", sizes, 256, **more)
    if number == 85:
        model.bigram.signs.copy_(model.bigram.signs.new_tensor(golden["in/bigram_sign_table"]))
    model.tied = False  # the fixtures' evaluations read the embedding
    return golden, config, model


def tables(get, count):
    """What all of them have: embedding, head, bigram, smear, MLPs, value tables."""
    mlps = get("mlp_bank")
    values = [get(f"value_embeds.{k}.weight") for k in range(count)] if count == 3 else \
        list(get("value_embeds").reshape(count, -1, get("embed.weight").shape[1]))
    ours = {"embed.weight": get("embed.weight"), "lm_head.weight": get("lm_head.weight").T,
            "bigram.table": get("bigram_embed.weight"), "embed.smear.gate": get("smear_gate.weight")}
    ours |= {f"values.tables.{k}": table for k, table in enumerate(values)}
    for i in range(LAYERS):
        ours |= {f"blocks.{i}.mlp.c_fc": mlps[i, 0], f"blocks.{i}.mlp.c_proj": mlps[i, 1].T}
    return ours


def attention(get):
    """q, k, v and o of each layer below each other, and the gates of the heads."""
    ours = {}
    for k, i in enumerate(WITH_ATTENTION):
        bank = get("attn_bank")[k]
        ours |= {f"blocks.{i}.attn.qkvo": bank.reshape(4, -1, bank.shape[-1]),
                 f"blocks.{i}.attn.gate": get("attn_gate_bank")[k]}
    return ours


def value_gates(get, layers):
    return {f"values.gates.{i}": get("ve_gate_bank")[k] for k, i in enumerate(layers)}


def pairs(scalars):
    """The factors of attention's projections, in pairs for every layer."""
    both = scalars.reshape(LAYERS, 2)[WITH_ATTENTION]
    return {"sa_lambdas.qkv.value": both[:, 0], "sa_lambdas.o.value": both[:, 1]}


def record62(golden, prefix, _):
    get = lambda name: golden[prefix + name]
    scalars = get("scalars")
    return tables(get, 3) | attention(get) | value_gates(get, (0, 1, 8, 9, 10)) | pairs(scalars[11:33]) | {
        "residual.resid_lambdas.value": scalars[:11], "residual.x0_lambdas.value": get("x0_lambdas"),
        "residual.bigram_lambdas.value": scalars[33:44], "embed.smear.lam.value": scalars[44:45],
        "residual.backout.value": scalars[45:46], "residual.skip_weights.value": scalars[46:47],
        "residual.skip_gate": get("skip_gate.weight")}


def sublayers(get, name, last):
    """One factor for each sublayer of the layers up to `last`, in their order."""
    return np.array([get(name)[i, k] for i in range(last + 1) for k in (0, 1) if (i, k) != (6, 0)])


def record77(golden, prefix, _):
    get = lambda name: golden[prefix + name]
    scalars = get("scalars")
    return tables(get, 5) | attention(get) | value_gates(get, (1, 2, 8, 9, 10)) | pairs(scalars[:22]) | {
        "residual.resid_lambdas.value": sublayers(get, "resid_lambdas", 10),
        "residual.post_lambdas.value": sublayers(get, "post_lambdas", 10),
        "residual.x0_lambdas.value": get("x0_lambdas")[WITH_ATTENTION],
        "residual.bigram_lambdas.value": get("bigram_lambdas")[WITH_ATTENTION],
        "embed.smear.lam.value": scalars[22:23], "residual.backout.value": scalars[23:24],
        "residual.skip_weights.value": scalars[24:25], "residual.skip_gate": get("skip_gate.weight")}


def shortcuts(layers):
    return [(f"{source}.{i}", 1) for i in layers for source in ("x0", "bigram")]


# (our network, its two weights and bias there, number in their bank, their columns in order)
NETS = (
    (
        "early_gates", "mudd_gate", 0,
        [("xsa.1", HEADS), ("xsa.3", HEADS), ("attn.3", HEADS), *shortcuts(range(4))]
    ),
    (
        "late_gates",
        "mudd_gate",
        1,
        [
            ("xsa.4", HEADS), ("xsa.7", HEADS), ("attn.10", HEADS), *shortcuts((4, 5, 7, 8, 9)),
            ("skip.0", 1), ("w1.10", HEADS), ("w2.10", HEADS)
        ],
    ),
    (
        "mudd_layer_net",
        "mudd",
        0,
        [
            ("value.start", 1), ("value.cached", 1), ("value.x", 1), ("in.start", 1), ("in.cached", 1),
            ("in.x", 1), ("table", 2), ("attn.x", 1), ("attn.branch", 1), ("attn.start", 1),
            ("attn.bigram", 1), ("mlp.x", 1), ("mlp.branch", 1)
        ],
    ),
    (
        "mudd_out_net", "mudd", 1,
        [(name, 1) for name in ("start", "saved.7", "saved.9", "table.1", "saved.3")]
    ),
)


def record85(golden, prefix, model):
    get = lambda name: golden[prefix + name]
    scalars, qk, vo, dim = get("scalars"), get("qk_bank"), get("vo_bank"), get("vo_bank").shape[-1]
    ours = tables(get, 5) | value_gates(get, (1, 2, 8, 9)) | pairs(scalars[:22]) | {
        "residual.resid_lambdas.value": sublayers(get, "resid_lambdas", 9),
        "residual.post_lambdas.value": sublayers(get, "post_lambdas", 9),
        "residual.token_scale": get("_mudd_gate_scale").reshape(1), "embed.smear.lam.value": scalars[22:23],
        "residual.skip_weights.value": scalars[23:24]}
    for k, i in enumerate(WITH_ATTENTION):  # six pairs of heads a layer, of q and then of k
        ours |= {f"blocks.{i}.attn.qk": qk[6 * k:6 * k + 6].reshape(2, dim, dim),
                 f"blocks.{i}.attn.v": vo[2 * k], f"blocks.{i}.attn.o": vo[2 * k + 1]}
    for name, bank, number, columns in NETS:
        places = np.cumsum([0] + [width for _, width in columns])
        start = {column: place for (column, _), place in zip(columns, places)}
        rows = [start[c.name] + j for c in getattr(model.residual, name).columns for j in range(c.width)]
        ours |= {f"residual.{name}.w1": get(f"{bank}_w1")[number],
                 f"residual.{name}.w2": get(f"{bank}_w2")[number][rows],
                 f"residual.{name}.bias": get(f"{bank}_b2")[number][rows]}
    return ours


CONVERT = {62: record62, 77: record77, 85: record85}


def projections(x):
    """Largest size of the entries of x, and four sums of them with weights cos((k + 1) i + k^2)."""
    x = np.asarray(x, np.float64).ravel()
    i = np.arange(x.size)
    return np.array([np.abs(x).max(), *(x @ np.cos((k + 1) * i + k * k) for k in range(4))])


def gradients(model, golden, number):
    """{original name: its gradient, flat} of the model's; entries that the model does not have are zero
    there."""
    found = {
        name: np.zeros(p.shape) if p.grad is None else p.grad.numpy() for name, p in model.named_parameters()
    }
    convert = lambda places, prefix: CONVERT[number](places, prefix, model)
    return {name: np.nan_to_num(x) for name, x in originals(found, golden, convert).items()}
