"""Golden numbers of records 58, 62, 77, 83, 85, 89 and 90: names and shapes of the originals -> ours.

The originals keep the matrices of all layers in banks; attention's have no slot for layer 6, and those of the
MLPs one more than layers.
"""

import numpy as np

from golden_records import fill, load, originals, small

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


def record58(golden, prefix, _):
    """Before the banks: a tensor of each layer, the head's weight as ours."""
    get = lambda name: golden[prefix + name]
    scalars = get("scalars")
    ours = {"embed.weight": get("embed.weight"), "lm_head.weight": get("lm_head.weight"),
            "embed.smear.gate": get("smear_gate.weight"), "residual.skip_gate": get("skip_gate.weight")}
    ours |= {f"values.tables.{k}": get(f"value_embeds.{k}.weight") for k in range(3)}
    for i in range(LAYERS):
        ours |= {f"blocks.{i}.mlp.c_fc": get(f"blocks.{i}.mlp.c_fc"),
                 f"blocks.{i}.mlp.c_proj": get(f"blocks.{i}.mlp.c_proj").T}
    for k, i in enumerate(WITH_ATTENTION):
        qkvo = get(f"blocks.{i}.attn.qkvo_w")
        ours |= {f"blocks.{i}.attn.qkvo": qkvo.reshape(4, -1, qkvo.shape[-1]),
                 f"blocks.{i}.attn.gate": get("attn_gate_bank")[k]}
    return ours | value_gates(get, (0, 1, 8, 9, 10)) | pairs(scalars[11:33]) | {
        "residual.resid_lambdas.value": scalars[:11], "residual.x0_lambdas.value": get("x0_lambdas"),
        "embed.smear.lam.value": scalars[33:34], "residual.backout.value": scalars[34:35],
        "residual.skip_weights.value": scalars[35:36]}


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


def with_heads_apart(get, last):
    """Records 80 on: head pairs of q and k in one bank, v and o in another; factors of the layers up to
    `last`."""
    qk, vo, dim = get("qk_bank"), get("vo_bank"), get("vo_bank").shape[-1]
    ours = tables(get, 5) | pairs(get("scalars")[:22])
    factors = ("resid_lambdas", "post_lambdas")
    ours |= {f"residual.{name}.value": sublayers(get, name, last) for name in factors}
    for k, i in enumerate(WITH_ATTENTION):  # six pairs of heads a layer, of q and then of k
        ours |= {f"blocks.{i}.attn.qk": qk[6 * k:6 * k + 6].reshape(2, -1, dim),
                 f"blocks.{i}.attn.v": vo[2 * k], f"blocks.{i}.attn.o": vo[2 * k + 1]}
    return ours


def static(get, layers):
    """Before record 85: gates of the heads, and learned factors of the shortcuts of these layers."""
    ours = {f"blocks.{i}.attn.gate": get("attn_gate_bank")[k] for k, i in enumerate(WITH_ATTENTION)}
    ours |= {f"residual.{name}.value": get(name)[layers] for name in ("x0_lambdas", "bigram_lambdas")}
    return ours | {"residual.skip_gate": get("skip_gate.weight")}


def with_mudd(get, model):
    """Records 81 on: the last layer's factors come from a network."""
    scalars = get("scalars")
    ours = with_heads_apart(get, 9) | value_gates(get, (1, 2, 8, 9)) | {
        "embed.smear.lam.value": scalars[22:23], "residual.skip_weights.value": scalars[23:24]}
    for name, bank, number, columns in NETS:
        if not hasattr(model.residual, name):
            continue
        places = np.cumsum([0] + [width for _, width in columns])
        start = {column: place for (column, _), place in zip(columns, places)}
        rows = [start[c.name] + j for c in getattr(model.residual, name).columns for j in range(c.width)]
        ours |= {f"residual.{name}.w1": get(f"{bank}_w1")[number],
                 f"residual.{name}.w2": get(f"{bank}_w2")[number][rows],
                 f"residual.{name}.bias": get(f"{bank}_b2")[number][rows]}
    return ours


def record83(golden, prefix, model):
    get = lambda name: golden[prefix + name]
    xsa = {f"blocks.{i}.attn.xsa.value": get("xsa_alphas")[i] for i in (1, 3, 4, 7, 8, 10)}
    return with_mudd(get, model) | xsa | static(get, WITH_ATTENTION[:-1])


def record85(golden, prefix, model):
    get = lambda name: golden[prefix + name]
    return with_mudd(get, model) | {"residual.token_scale": get("_mudd_gate_scale").reshape(1)}


def record90(golden, prefix, model):
    """Record 85's, with o stored the other way round."""
    ours = record85(golden, prefix, model)
    return ours | {f"blocks.{i}.attn.o": ours[f"blocks.{i}.attn.o"].T for i in WITH_ATTENTION}


def log83(golden, prefix, model):
    """Of record 83's log, on record 80: the gates of record 77 and no MUDD."""
    get = lambda name: golden[prefix + name]
    scalars = get("scalars")
    return with_heads_apart(get, 10) | {
        **value_gates(get, (1, 2, 8, 9, 10)), "embed.smear.lam.value": scalars[22:23],
        "residual.backout.value": scalars[23:24], "residual.skip_weights.value": scalars[24:25],
        **static(get, WITH_ATTENTION)
    }


CONVERT = {62: record62, 77: record77, 85: record85}
# Programs whose parameters are drawn by `drawn`: their numbers are in late_more.npz.
DRAWN = {"58": record58, "83": record83, "83log": log83, "89": record85, "90": record90}


def drawn(name, shape):
    """The value of a parameter by its name in the original, in steps of float16."""
    x = np.random.RandomState(sum(map(ord, name)) * 7919 % 2 ** 31).standard_normal(shape)
    return np.asarray(x * (0.15 if len(shape) > 1 else 0.5)).astype(np.float16).astype(np.float64)


def drawn_fixture(program):
    """(numbers with the parameters, model filled with them) of one of DRAWN."""
    numbers, _ = load("late_more")
    golden = {key.partition("/")[2]: x for key, x in numbers.items() if key.startswith(f"{program}/")}
    golden |= {key: x for key, x in numbers.items() if key.startswith("in/")}
    for name in [key.partition("/")[2] for key in golden if key.startswith("gradient/")]:
        golden[f"param/{name}"] = drawn(name, tuple(golden[f"shape/{name}"]))
    more = {"model.attn.window.block": 16, "data.max_doc_len": 256, "numerics.norm_eps": 1.1920929e-07}
    if program != "58":
        more |= {"model.embed.bigram.rows": 320, "model.embed.bigram.signs": 64}
    if program in ("83", "83log"):
        more |= {"model.embed.bigram.dim": 12}
    if program == "83log":
        more |= {"revert": ["short/81", "short/82"]}
    if program == "90":  # heads of 16 channels, queries and keys of 12
        more |= {"model.attn.qk_dim": 12}
    sizes = {"dim": 96 if program == "90" else 48, "heads": HEADS, "vocab_rows": 128}
    _, model = small(f"short/{program[:2]}", sizes, 256, **more)
    if program != "58":
        signs = np.sign(drawn("signs", tuple(model.bigram.signs.shape)))
        model.bigram.signs.copy_(model.bigram.signs.new_tensor(signs))
    converted = DRAWN[program](golden, "param/", model)
    fill(model, {name: np.ascontiguousarray(x, np.float64) for name, x in converted.items()})
    model.tied = False
    return golden, model


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
    convert = lambda places, prefix: (CONVERT | DRAWN)[number](places, prefix, model)
    return {name: np.nan_to_num(x) for name, x in originals(found, golden, convert).items()}
