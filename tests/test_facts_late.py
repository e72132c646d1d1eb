"""Settings of records 34 to 92, of results of the optimizer track and of medium records 2 to 16 as their
sources and logs have them.

A table reads "from this record on". What golden numbers hold already is here for the records between them.
"""

import math

import pytest

from model import without_values
from settings import deltas, schema

SHORT = range(58, 93)
CLAIMED = (15,)  # a result of the optimizer track whose rule is not here


def at(n, changes):
    """What a table of (first record, value) says of record n; None before its first line."""
    return next((value for first, value in reversed(changes) if first <= n), None)


def settings(ref):
    return deltas.resolve(ref).settings


# ----- records 58 to 92

STEPS = [  # of the whole run, extension
    (58, (1775, 40)), (61, (1765, 40)), (62, (1600, 40)), (63, (1575, 40)), (64, (1555, 40)),
    (70, (1547, 40)), (72, (1530, 40)), (73, (1490, 40)), (80, (1480, 40)), (81, (1415, 10)),
    (82, (1385, 10)), (84, (1390, 10)), (85, (1300, 15)), (88, (1285, 15)), (90, (1315, 45)),
    (91, (1290, 45)), (92, (1194, 20))
]
COOLDOWN = [(58, 0.5), (62, 0.55), (73, 0.6), (92, 0.8)]
FLOOR = [(58, 0.1), (72, 0.15), (92, 0.3)]
DOCUMENTS = [(58, 2048), (72, (896, 2048, 2048)), (92, (896, 2048, 3072, 3072))]  # longest, by stage


@pytest.mark.parametrize("n", SHORT)
def test_schedule(n):
    s = settings(f"short/{n}")
    assert (s.schedule.steps, s.schedule.extension) == at(n, STEPS)
    assert (s.schedule.cooldown_frac, s.schedule.lr_floor) == (at(n, COOLDOWN), at(n, FLOOR))
    assert s.data.max_doc_len == at(n, DOCUMENTS) and s.model.attn.segment == at(n, [(92, 2560)])


# Rate, betas and factor of the decay 0.005 of AdamW's groups; None: it is not there, or does not count.
ADAM = {
    "lm_head": ("lm_head", [(58, (0.008, 0.5, 0.95, 150))]),
    "embed": ("embed", [(58, (0.008, 0.5, 0.95, 150))]),
    "value_embed": ("embed", [(58, (0.6, 0.75, 0.95, 5)), (92, (0.56, 0.75, 0.95, 5))]),
    "bigram": ("embed", [(62, (0.6, 0.75, 0.95, 5)), (92, (0.56, None, 0.95, 5))]),  # by rows: no beta1
    "sa_lambdas": ("scalar", [(58, (0.04, 0.9, 0.99, 0))]),
    "x0_lambdas": ("scalar", [(58, (0.04, 0.65, 0.95, 0)), (73, (0.008, 0.9, 0.95, 0)), (85, None)]),
    "bigram_lambdas": ("scalar", [(62, (0.04, 0.9, 0.99, 0)), (73, (0.008, 0.9, 0.95, 0)), (85, None)]),
    "resid_lambdas": ("scalar", [(58, (0.04, 0.9, 0.99, 0)), (73, (0.04, 0.9, 0.95, 0))]),
    "post_lambdas": ("scalar", [(73, (0.008, 0.9, 0.95, 0))]),
    "smear_gate": ("matrix", [(58, (0.00008, 0.9, 0.99, 0))]),
    "skip_gate": ("matrix", [(58, (0.0004, 0.9, 0.99, 0)), (85, None)]),
    "gate": ("matrix", [(58, (0.008, 0.9, 0.99, 1)), (85, None)]),
    "ve_gate": ("matrix", [(58, (0.008, 0.9, 0.99, 1))]),
    "mudd": ("matrix", [(81, (0.002, 0.9, 0.99, 1))]),
    "mudd_bias": ("scalar", [(81, (0.002, 0.9, 0.99, 0))]),
    "xsa": ("scalar", [(82, (0.008, 0.9, 0.95, 0)), (85, None)]),
    "token_gate": ("matrix", [(85, (0.0008, 0.9, 0.99, 1))]),
    "token_gate_bias": ("scalar", [(85, (0.0008, 0.9, 0.99, 0))]),
    "token_gate_scale": ("scalar", [(85, (0.0008, 0.9, 0.99, 0))])
}
WIDE = math.sqrt(2816 / 768)  # sqrt(rows / cols) of record 92's c_fc
# Factors of the update of q, k, v, o; of c_fc; of c_proj
MUON_FACTORS = [(58, (2, 2, 4)), (61, (1, 2, 4)), (92, (1, WIDE, 2 * WIDE))]
MUON = [  # cautious decay, NorMuon's beta2, highest momentum, steps of its warm-up
    (58, (1.2, 0.95, 0.95, 300)), (78, (1.2, 0.9, 0.95, 300)), (92, (2.25, 0.9, 0.93, 240))
]


def check_groups(o, n, table):
    """Compare the groups of record n with a table like ADAM."""
    for label, (role, changes) in table.items():
        expected = at(n, changes)
        group = o.group(role, label)
        found = (group.lr, group.beta1, group.beta2, group.decay_mul)
        for got, wanted in zip(found, expected or ()):
            assert wanted is None or got == pytest.approx(wanted, rel=1e-9), (label, found)
        assert expected is None or (group.eps, group.every) == (1e-8 if n < 57 else 1e-10, 2), label


@pytest.mark.parametrize("n", SHORT)
def test_optimizer(n):
    o = settings(f"short/{n}").optim
    check_groups(o, n, ADAM)
    assert o.adam.cautious_decay.weight_decay == 0.005 and o.adam.cautious_decay.strict
    m = o.muon
    assert (m.lr, m.momentum_warmup.start, m.momentum_cooldown.end, m.momentum_cooldown.steps) == (
        0.023, 0.85, 0.85, 50
    )
    found = m.cautious_decay.weight_decay, m.normuon.beta2, m.momentum, m.momentum_warmup.steps
    assert found == at(n, MUON)
    factors = [o.group("matrix", label).lr_mul for label in ("qkvo", "c_fc", "c_proj")]
    assert factors == pytest.approx(at(n, MUON_FACTORS), rel=1e-12)


HALF = math.sqrt(3) / 2  # bound of a uniform distribution with half the standard deviation of 1
FACTS = {  # path -> what it is in the records, where the feature is there
    "model.init.bound": [(58, HALF)],  # q, k, v and c_fc
    "model.init.qkv_bound": [(58, math.sqrt(3)), (64, None)],
    "model.init.o_bound": [(64, HALF)],
    "model.init.head_std": [(58, 0.005)],
    "model.attn.paired_layers": [(58, (0, 2, 5, 9)), (92, (0, 2, 5))],
    "model.attn.window.long_layers": [(58, (3, 10))],
    "model.attn.drop_layers": [(58, (6,)), (92, (4, 6, 7, 9))],
    "model.attn.scale": [(58, 0.1), (90, 0.1 * math.sqrt(128 / 96)), (92, 0.085)],
    "model.attn.gate.layers": [(58, None), (85, (3, 10))],
    "model.attn.value_embed.tables": [
        (58, (1, 2, -1, -1, -1, -1, -1, -1, 0, 1, 2)), (63, (0, 1, -1, -1, -1, -1, -1, -1, 2, 3, 4)),
        (70, (-1, 0, 1, -1, -1, -1, -1, -1, 2, 3, 4)), (92, (-1, 0, 1, -1, -1, -1, -1, -1, 2, -1, 3))
    ],
    "model.attn.value_embed.table_init": [(58, "zero"), (70, "normal")],
    "model.attn.value_embed.table_std": [(70, 0.01)],
    "model.attn.value_embed.gate.channels": [(58, 12)],
    "model.attn.value_embed.gate.own_channels": [(70, "unpaired"), (81, "all")],
    "model.attn.xsa.layers": [(82, (1, 3, 4, 7, 8, 10)), (85, (1, 3, 4, 7)), (92, (1, 3))],
    "model.attn.compose.layers": [(85, (10,)), (92, None)],
    "model.attn.compose.window": [(85, 112), (92, None)],
    "model.attn.saved_input": [(77, 7)],
    "model.embed.bigram.rows": [(62, 251_520), (83, 754_560), (85, 377_280), (92, 84_602_880)],
    "model.embed.bigram.dim": [(83, 192), (85, None)],
    "model.embed.bigram.signs": [(83, 8192)],
    "model.embed.bigram.init": [(62, 0.1), (73, 0.05)],
    "model.embed.bigram.second_token": [(62, "reserved"), (68, "pair"), (71, "reserved")],
    "model.residual.backout.layer": [(58, 7), (81, None)],
    "model.residual.backout.init": [(58, 0.5), (81, None)],
    "model.residual.unet_skips.pairs": [(58, ((3, 6),))],
    "model.residual.x0_mix.x": [(58, 1.1), (73, None)],
    "model.residual.sublayers.resid": [(73, math.sqrt(1.1))],
    "model.residual.sublayers.attn_post_from": [(73, 0), (74, 7), (77, 0)],
    "model.residual.lanes.start": [(73, 7), (77, None)],
    "model.residual.lanes.attn_post": [(73, 1.5), (77, None)],
    "model.residual.mudd.layer": [(81, 10)],
    "model.residual.mudd.hidden": [(81, 64)],
    "model.residual.mudd.scale": [(81, 0.1)],
    "model.token_gates.layer": [(85, 4)],
    "model.token_gates.hidden": [(85, 64)],
    "model.head.softcap.shift": [(58, 5.0)],
    "numerics.fp8_head.w": [(58, 448 / 1.6), (92, 224.0)],
    "numerics.fp8_head.grad": [(58, 448 / 0.75), (92, 8 * 448 / 0.75)],
    "numerics.loss": [(58, "bfloat16"), (60, "float32")],
    "numerics.softcap_sigmoid": [(58, "unrounded"), (79, "bfloat16"), (92, "float16")],
    "validation.every": [(58, 250), (92, 1194)],  # 92 validates after its last step only
}
TAIL = {  # of record 92
    "optim.tail.long": 298, "optim.tail.short": 250, "optim.tail.short_rate": 4 / 53, "optim.tail.head": 0.65,
    "optim.tail.qk": 0.55, "optim.tail.matrices": 0.3493
}
OFF = {"model.residual.x0_mix.x", "model.attn.value_embed.table_std"}  # settings without effect where None


def check(s, n, facts):
    """Compare the settings of record n with a table of facts; None in it: off, or something above it is."""
    for path, changes in facts.items():
        node, expected = s, at(n, changes)
        for name in path.split("."):
            node = None if node is None else getattr(node, name)
        if expected is None and (path in OFF or n < changes[0][0]):
            continue
        number = isinstance(expected, float)
        assert node == (pytest.approx(expected, rel=1e-12) if number else expected), path


@pytest.mark.parametrize("n", SHORT)
def test_model(n):
    check(settings(f"short/{n}"), n, FACTS)


def test_shares_of_the_averages_of_record_92():
    check(settings("short/92"), 92, {path: [(92, value)] for path, value in TAIL.items()})


# Logs of records whose source is not the merged one: record -> (the record that the log is on, those of the
# chain that it lacks, its steps).
LOGS = {
    65: (63, (64,), 1575), 71: (67, (68, 70), 1555), 72: (67, (68, 70, 71), 1555),
    73: (67, (68, 70, 71, 72), 1510), 82: (80, (81,), 1450), 83: (80, (81, 82), 1480),
    84: (80, (81, 82, 83), 1485), 88: (84, (85,), 1375), 89: (84, (85, 88), 1390)
}
ON_THE_WAY = {"schedule.steps", "model.embed.bigram.second_token"}  # the second: set by 68, taken back by 71


@pytest.mark.parametrize("n", LOGS)
def test_the_program_of_a_log_is_the_record_on_the_log_s_parent(n):
    """--revert of the records between gives it: it differs from its parent by what the record changes."""
    parent, lacking, steps = LOGS[n]
    log = deltas.resolve(
        f"short/{n}", revert=[f"short/{k}" for k in lacking], sets=[f"schedule.steps={steps}"]
    ).settings
    changed = {path for path, *_ in schema.difference(settings(f"short/{parent}"), log)}
    own = {path for path, *_ in schema.difference(settings(f"short/{n - 1}"), settings(f"short/{n}"))}
    assert changed - ON_THE_WAY == own - ON_THE_WAY and log.schedule.steps == steps


def test_the_log_of_record_83_is_on_record_80():
    """Its gates of value embeddings, backout, the extension of 40 steps; the embedding holds the bigram."""
    log = deltas.resolve("short/83", revert=["short/81", "short/82"]).settings
    m = log.model
    assert m.attn.value_embed.gate.own_channels == "unpaired" and m.residual.backout.layer == 7
    assert m.residual.mudd is None and m.attn.xsa is None and log.schedule.extension == 40
    assert m.embed.bigram.in_x0 and (m.embed.bigram.dim, m.embed.bigram.signs) == (192, 8192)


# ----- all parameters of records 89, 90 and 92 at their full size

V, D, HEADS = 50_304, 768, 6
SCALARS = {"embed.smear.lam.value": 1, "residual.skip_weights.value": 1, "residual.token_scale": 1}


def shapes(rows, qk, hidden, attention, mlps, value_layers, coefficients, factors):
    """{parameter: shape}, from what the notes say of a record.

    Args:
        rows: of the bigram table. qk: rows of all heads of q, and of k. hidden: width of the MLPs.
        attention, mlps: layers that have them.
        value_layers: those with a value table; the last one's gate comes from MUDD.
        coefficients: of the early and the late gates, of MUDD's layer and of its sum at the end.
        factors: of the stream before sublayers, and of the branches.
    """
    found = {
        "embed.weight": (V, D), "lm_head.weight": (V, D), "bigram.table": (rows, D),
        "embed.smear.gate": (1, 12), "residual.resid_lambdas.value": (factors[0],),
        "residual.post_lambdas.value": (factors[1],)
    }
    found |= {name: (n,) for name, n in SCALARS.items()}
    found |= {f"sa_lambdas.{name}.value": (len(attention),) for name in ("qkv", "o")}
    found |= {f"values.tables.{k}": (V, D) for k in range(len(value_layers))}
    found |= {f"values.gates.{i}": (HEADS, 12) for i in value_layers[:-1]}
    for name, n in zip(("early_gates", "late_gates", "mudd_layer_net", "mudd_out_net"), coefficients):
        for part, shape in (("w1", (64, D)), ("w2", (n, 64)), ("bias", (n,))):
            found[f"residual.{name}.{part}"] = shape
    for i in attention:
        found |= {f"blocks.{i}.attn.{name}": (D, D) for name in ("v", "o")}
        found[f"blocks.{i}.attn.qk"] = (2, qk, D)
    for i in mlps:
        found |= {f"blocks.{i}.mlp.c_fc": (hidden, D), f"blocks.{i}.mlp.c_proj": (D, hidden)}
    return found


WITHOUT_6 = tuple(i for i in range(11) if i != 6)
# early: XSA 12, gate 6, 4 pairs; late: XSA 12, gate 6, 5 pairs, skip 1, composition 12
GATES = (26, 41, 14, 5)
# 10 layers, of which layer 6 lacks attention's
OF_89 = shapes(377_280, D, 3072, WITHOUT_6, range(11), (1, 2, 8, 9, 10), GATES, (19, 19))
OF_90 = shapes(377_280, HEADS * 96, 3072, WITHOUT_6, range(11), (1, 2, 8, 9, 10), GATES, (19, 19))
# early: XSA 12, gate 6, x0 3, pairs 2; late: gate 6, x0 3, pairs 3, skip 1
OF_92 = shapes(84_602_880, D, 2816, (0, 1, 2, 3, 5, 8, 10), [i for i in range(11) if i != 7], (1, 2, 8, 10),
               (23, 13, 14, 10), (19, 15)) | {
    "residual.mudd_out_net.by_group": (10, 12, 64), "blocks.8.parallel.c_fc": (2816, D),
    "blocks.8.parallel.c_proj": (D, 2816)}
# What the published numbers count and no layer reads: padding of the banks on eight ranks; rows of gates,
# networks and factors.
UNREAD_89 = 4 * 256 * D + 4 * D * D + 2 * 3072 * D + 72 + 975 + 585 + 3 + 3 + 2
UNREAD_92 = 6 * 256 * D + 2 * D * D + 2 * 2816 * D + 650 + 260 + 3072 + 8 + 7 + 3
LESS_OF_90 = 10 * 2 * HEADS * 32 * D  # channels of q and k


@pytest.mark.parametrize("n, table, count", [
    (89, OF_89, 643_751_335 - UNREAD_89), (90, OF_90, 643_751_335 - UNREAD_89 - LESS_OF_90),
    (92, OF_92, 302_792_179 + 84_602_880 * D - UNREAD_92)])
def test_every_parameter_at_full_size(n, table, count):
    """On the meta device, by name."""
    model = without_values(settings(f"short/{n}"))
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == table
    assert sum(math.prod(shape) for shape in table.values()) == model.num_parameters() == count
    buffers = {name: tuple(b.shape) for name, b in model.named_buffers()}
    assert buffers["bigram.signs"] == (8192, D)
    # two positions a token of the longest row, that of validation, and half of a head's channels
    rotary = sorted(shape for name, shape in buffers.items() if name.endswith(".cos"))
    assert rotary == [(2 * 262_144, pairs) for pairs in {89: (64,), 90: (48,), 92: (32, 64)}[n]]


# ----- records 34 to 57

EARLIER = {
    "model.embed.smear.channels": [(34, 12)],
    "model.attn.window.final_long": [(35, 20)],
    "model.attn.window.extension": [(42, 13)],
    "model.residual.backout.layer": [(40, 8), (49, 7)],
    "model.residual.backout.init": [(40, 0.5)],
    "model.residual.unet_skips.pairs": [(45, ((4, 7),)), (49, ((3, 6),))],
    "model.residual.unet_skips.gate.channels": [(55, 12)],
    "model.residual.x0_mix.x": [(34, 1.0), (45, 1.1)],
    "model.attn.sa_lambdas.qkv": [(47, 0.5)],
    "model.attn.value_embed.tables": [
        (34, (0, 1, 2, -1, -1, -1, -1, -1, -1, 0, 1, 2)), (49, (1, 2, -1, -1, -1, -1, -1, -1, 0, 1, 2))
    ],
    "model.attn.value_embed.table_init": [(34, "normal"), (49, "zero")],
    "model.attn.sa_lambdas.o": [(48, 1.0)],
    "model.attn.value_embed.gate.channels": [(55, 12)],
    "model.head.softcap.cap": [(34, 30.0), (54, 23.0)],
    "model.head.softcap.shift": [(34, 0.0), (54, 5.0)],
    "model.init.qkv_bound": [(53, math.sqrt(3))],
    "model.init.head_std": [(51, 0.005)],
    "numerics.fp8_head.x": [(34, 448 / math.sqrt(768)), (51, 4.48)],
    "numerics.fp8_head.w": [(34, 512.0), (51, 448 / 1.5), (55, 448 / 1.6)],
    "numerics.fp8_head.grad": [(34, 448.0), (51, 448 / 0.75)],
    "numerics.loss": [(34, "float32"), (37, "bfloat16")],
    "numerics.muon_decay": [(43, "bfloat16"), (48, "float32")],
    "numerics.adam_state": [(42, "parameter"), (56, "float32")],
    "numerics.matrix_mantissa": [(34, False), (57, True)],
    "optim.muon.polar_express": [(34, False), (38, True)],
    "optim.muon.normuon.beta2": [(41, 0.95)],
    "optim.muon.normuon.floor": [(41, 1e-20), (42, 1e-10)],
    "optim.muon.normuon.attn": [(41, "mixed"), (42, "input"), (48, "output")],
    "optim.muon.cautious_decay.weight_decay": [(43, 1.2)],
    "optim.adam.cautious_decay.weight_decay": [(50, 0.005)],
    "optim.adam.cautious_decay.strict": [(50, False), (53, True)],
    "optim.scalar.beta1": [(52, 0.9)],
    "optim.scalar.beta2": [(52, 0.99)],
    "optim.scalar.freeze_steps": [(52, 40), (54, 0)],
    "optim.value_embed.decay_mul": [(55, 5.0)],
    "optim.embed.decay_mul": [(55, 150.0)],
    "optim.lm_head.decay_mul": [(55, 150.0)],
    "schedule.lr_spans_extension": [(34, False), (41, True), (42, False)],
}


EARLIER_ADAM = {  # like ADAM
    "lm_head": ("lm_head", [(39, (0.008, 0.7, 0.95, None)), (40, (0.008, 0.65, 0.95, None)),
                            (55, (0.008, 0.65, 0.95, 150)), (57, (0.008, 0.5, 0.95, 150))]),
    "value_embed": ("embed", [(39, (0.6, 0.7, 0.95, None)), (40, (0.6, 0.65, 0.95, None)),
                              (55, (0.6, 0.65, 0.95, 5)), (57, (0.6, 0.75, 0.95, 5))]),
    "sa_lambdas": ("scalar", [(39, (0.04, 0.7, 0.95, None)), (40, (0.04, 0.65, 0.95, None)),
                              (50, (0.04, 0.65, 0.95, 0)), (52, (0.04, 0.9, 0.99, 0))]),
    "x0_lambdas": ("scalar", [(50, (0.04, 0.65, 0.95, 0))]),
    "smear_gate": ("matrix", [(52, (0.00008, 0.65, 0.95, 0)), (57, (0.00008, 0.9, 0.99, 0))]),
    "skip_gate": ("matrix", [(55, (0.0004, 0.65, 0.95, 0)), (57, (0.0004, 0.9, 0.99, 0))]),
    "gate": ("matrix", [(56, (0.008, 0.65, 0.95, 1)), (57, (0.008, 0.9, 0.99, 1))]),
    "ve_gate": ("matrix", [(56, (0.008, 0.65, 0.95, 1)), (57, (0.008, 0.9, 0.99, 1))]),
}


@pytest.mark.parametrize("n", range(34, 58))
def test_settings_of_records_34_to_57(n):
    s = settings(f"short/{n}")
    check(s, n, EARLIER)
    check_groups(s.optim, n, EARLIER_ADAM)


# ----- the optimizer track

RESULT_STEPS = [
    3600, 5625, 3500, 4875, 3325, 3375, 3325, 3250, 3250, 3250, 3225, 3325, 3210, 3150, 3275, 3125,
    3175, 3225, 3125, 3030, 4100, 8225, 3075, 3175, 3040, 3090, 3125, 3175, 2990, 2930, 2995, 3000,
    3375, 2925, 3375, 3250, 3250, 2900, 3125, 2890, 2875, 2860, 2850, 2750, 2720, 2690
]
NORMAL = math.sqrt(3 * 0.33)  # of N(0, 0.33 / fan_in)
RESULTS = {  # of those whose rule has no golden numbers, and of what stands around the others
    16: {"optim.muon.soap.matrices": ("c_fc", "c_proj", "o"), "optim.muon.soap.attn_floor": 0.2,
         "optim.muon.soap.every": 10, "optim.muon.soap.trust.agree": 0.2, "optim.muon.soap.trust.least": 0.45,
         "optim.muon.soap.trust.most": 0.85, "optim.muon.soap.trust.release_start": 1375,
         "optim.muon.soap.trust.release_end": 1625, "optim.muon.floor.ratio": 0.35},
    20: {"optim.muon.soap.trust": None, "optim.muon.soap.v_share": 0.95, "schedule.horizon": 3105},
    24: {"schedule.cooldown_frac": 0.4, "schedule.matrix.cooldown_frac": 0.8},
    25: {"schedule.horizon": 3125, "schedule.lr_floor": 0.04, "schedule.matrix.floor": 0.017,
         "schedule.cooldown_power": 1.5, "schedule.matrix.cooldown_power": 1.5},
    26: {"optim.muon.lr": 0.04, "optim.muon.weight_decay": 0.025, "schedule.horizon": 3125,
         "optim.muon.normuon.square": False, "optim.muon.normuon.beta2": 0.95,
         "optim.muon.sinksoap.beta": 0.95, "optim.muon.sinksoap.rounds": 10},
    31: {"optim.muon.lr": 0.0045, "optim.muon.momentum": 0.946, "schedule.horizon": 3045,
         "optim.muon.muown.norm_power": 0.9, "optim.muon.muown.norm_steps": 3005,
         "optim.muon.muown.o_mul": 1.5, "optim.muon.muown.c_fc_mul": 1.5, "optim.muon.contra.strength": 0.325,
         "optim.muon.contra.steps": 1925, "optim.muon.normuon.beta2": 0.8},
    32: {"optim.muon.soda.start": 2000, "optim.muon.soda.steps": 750, "optim.muon.floor.ratio": 0.3825},
    37: {"model.init.bound": NORMAL, "model.init.o_bound": 1.25 * NORMAL,
         "model.init.c_fc_bound": 1.5 * NORMAL, "model.init.c_proj_bound": 3 * NORMAL,
         "model.init.bias": "zero"},
    38: {"optim.reference_readout.reference": 2375, "optim.reference_readout.push": -0.075,
         "optim.reference_readout.at": "validation", "optim.reference_readout.start": 2900,
         "optim.tail_velocity.start": 2500, "optim.tail_velocity.push": -6.0,
         "optim.tail_velocity.cap": 0.01, "optim.muon.contra.steps": 2750, "optim.muon.tempered.most": 0.05,
         "optim.muon.tempered.start": 2600, "optim.muon.tempered.end": 2800,
         "optim.muon.floor.ratio": 0.3825, "optim.muon.floor.late.ratio": 0.4,
         "optim.muon.floor.late.end": 2800, "optim.muon.late_brake.factor": 0.4,
         "optim.muon.late_brake.end": 2900, "schedule.horizon": 3020},
    40: {"optim.ema_nesterov.beta": 0.3, "optim.ema_nesterov.decay": 0.99, "optim.ema_nesterov.start": 300,
         "optim.ema_nesterov.stop": 1950, "schedule.horizon": 2980},
    42: {"optim.reference_readout.reference": 2375, "optim.reference_readout.push": -0.075,
         "optim.reference_readout.start": 2850, "optim.reference_readout.at": "validation",
         "model.init.signed_gains": None, "model.init.bias": "zero", "model.init.c_fc_fall": 0.3},
    43: {"optim.ema_nesterov.stop": 1900, "optim.muon.momentum_cooldown.until": 2850,
         "optim.muon.momentum_cooldown.steps": 100, "optim.broad_delta.start": 2000,
         "optim.broad_delta.stop": 2400, "optim.broad_delta.first": -0.005,
         "optim.broad_delta.scope": "other_matrices", "optim.trail_delta.start": 2650,
         "optim.trail_delta.every": 100, "optim.trail_delta.first": -0.04, "optim.trail_delta.push": -0.12,
         "optim.trail_delta.momentum": 1.0, "optim.trail_delta.scope": "all",
         "optim.phase_readout.first": 2650, "optim.phase_readout.second": 2750,
         "optim.phase_readout.push": 0.01, "optim.reference_readout.reference": 2400,
         "optim.reference_readout.push": -0.08, "optim.reference_readout.embed": False,
         "schedule.horizon": 2950, "schedule.late_horizon.start": 2600, "schedule.late_horizon.steps": 3010},
    45: {"optim.tail_ema.start": 2000, "optim.tail_ema.tau": 150, "optim.tail_ema.share": 0.6,
         "optim.tail_ema.embed": False, "optim.tail_ema.at": "end"},
    46: {"optim.tail_ema.start": 2400, "optim.tail_ema.at": "validation", "optim.muon.late_decay": 0.025}
}


def test_steps_of_the_results():
    steps = {n: settings(f"optimizer/{n}").schedule.steps for n in range(1, 47) if n not in CLAIMED}
    assert steps == {n: RESULT_STEPS[n - 1] for n in steps}


@pytest.mark.parametrize("n", RESULTS)
def test_settings_of_results(n):
    check(settings(f"optimizer/{n}"), n, {path: [(n, value)] for path, value in RESULTS[n].items()})


# ----- the medium track

FIVE = (  # triples of Newton-Schulz from record 4 on
    (4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012)
)
THREE_TABLES = (0, 1, 2, *10 * (-1,), 0, 1, 2)
FIVE_TABLES = (0, 1, 2, 3, 4, *6 * (-1,), 0, 1, 2, 3, 4)
MEDIUM = {
    "schedule.steps": [(2, 7500), (3, 7150), (4, 7050), (5, 6950), (6, 6710), (7, 6450), (8, 5960), (9, 5820),
                       (10, 5690), (12, 5640), (13, 5610), (14, 5590), (15, 5550), (16, 5535)],
    "schedule.cooldown_frac": [(2, 0.4), (5, 0.6), (8, 0.7)],
    "schedule.lr_floor": [(2, 0.1), (3, 0.0), (13, 0.01)],
    "optim.muon.lr": [(2, 0.025), (12, 0.027), (13, 0.03)],
    "optim.muon.weight_decay": [(2, 0.0), (3, 0.01)],
    "optim.muon.coefficients": [(2, ()), (4, FIVE)],
    "optim.c_fc.weight_decay": [(6, 0.02)],
    "optim.c_proj.weight_decay": [(6, 0.02)],
    "optim.embed.lr": [(2, 0.3)],
    "optim.lm_head.lr": [(2, 0.003), (3, 0.003125)],
    "optim.scalar.lr": [(2, 0.015)],
    "optim.muon.smoothing.coef": [(13, 0.2)],
    "optim.muon.smoothing.start": [(13, 0.5), (14, None)],
    "optim.muon.smoothing.ramp_steps": [(13, 3000)],
    "optim.muon.smoothing.lookahead": [(13, True), (14, False)],
    "optim.outer.period": [(12, 28), (13, None), (14, 28)],
    "optim.outer.lr": [(12, 0.68), (13, None), (14, 0.68)],
    "optim.outer.momentum": [(12, 0.37), (13, None), (14, 0.37)],
    "optim.outer.first_step": [(12, True), (13, None), (14, True)],
    "model.attn.window.end": [(2, 1728), (8, 3456)],
    "model.attn.window.long_layers": [(2, (0, 4, 11, 15))],
    "model.attn.value_embed.tables": [(2, THREE_TABLES), (9, FIVE_TABLES)],
    "model.attn.v_norm": [(2, False), (6, True)],
    "model.attn.raw_input": [(2, False), (6, True)],
    "model.residual.unet_skips.pairs": [(2, None), (6, ((6, 9), (4, 10), (2, 11)))],
    "model.residual.layer_reuse.layer": [(15, 11)],
    "model.embed.second.init": [(10, 0.0)],
    "model.head.softcap.form": [(2, "sigmoid"), (7, "rsqrt")],
    "model.head.softcap.cap": [(2, 30.0), (7, 15.0)],
    "model.head.smear.init": [(16, 0.0)],
    "numerics.fp8_head.w": [(2, 32.0), (3, 512.0), (7, None)],
    "numerics.matrix_mantissa": [(2, False), (7, True)],
}


@pytest.mark.parametrize("n", [n for n in range(2, 17) if n != 11])
def test_settings_of_medium_records(n):
    check(settings(f"medium/{n}"), n, MEDIUM)
