"""Record 92 against numbers of the original code, in float64: model, ANVIL, tables, schedules, hashes,
candidates."""

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import schedule
from data.candidates import Sweep
from data.shards import write_shard
from data.stream import Shards, document_steps
from golden_late import HEADS, projections
from golden_records import build, fill, load, originals
from layers.bigram import ngram_ids, ngram_sign_ids
from model import segments, without_values
from optim import Optimizer
from schedule import Span, Windows
from settings import deltas
from small_models import Toy, plan, update
from system.tail_average import TailAverages
from updates import views
from updates.adam import AdamW
from updates.views import Views

SLOTS = (0, 2, 5, 1, 8, 3, 10)  # the layers in the order of attention's bank
SETS = {  # the fixture's sizes
    "model.model_dim": 48,
    "model.attn.num_heads": HEADS,
    "model.vocab_size": 128,
    "data.seq_len": 256,
    "data.tokens_per_rank": 256,
    "validation.seq_len": 256,
    "validation.tokens": 2048,
    "data.max_doc_len": 256,
    "numerics.norm_eps": 1.1920928955078125e-07,
    "numerics.qk_norm_eps": "false",
    "model.attn.window.block": 16,
    "model.attn.narrow.qk_dim": 4,
    "model.attn.narrow.v_dim": 4,
    "model.mlp.hidden": 176,
    "model.embed.bigram.rows": 640,
    "model.embed.bigram.signs": 64,
    "model.head.candidates": "false",
}
NETS = (  # our network, its bank, its number there, its columns in order
    (
        "early_gates",
        "mudd_gate",
        0,
        [
            ("xsa.1", HEADS), ("xsa.3", HEADS), ("attn.3", HEADS), *((f"x0.{i}", 1) for i in (0, 1, 2)),
            *((f"bigram.{i}", 1) for i in (0, 1))
        ],
    ),
    (
        "late_gates",
        "mudd_gate",
        1,
        [
            ("attn.10", HEADS), *((f"x0.{i}", 1) for i in (4, 5, 7)),
            *((f"bigram.{i}", 1) for i in (4, 5, 9)), ("skip.0", 1)
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
        "mudd_out_net",
        "mudd",
        1,
        [
            (name, 1)
            for name in (
                "start", "saved.7", "saved.9", "table.1", "saved.3", "table.2", "table.10", "table.8",
                "mlp_in.10", "attn_in.10"
            )
        ],
    ),
)


def ours(golden, prefix, model):
    """{our parameter: its array} from the original's banks."""
    def get(name):
        return golden[prefix + name]

    scalars, qk, vo, mlps = get("scalars"), get("qk_bank"), get("vo_bank"), get("mlp_bank")
    dim, both = vo.shape[-1], scalars[:22].reshape(11, 2)[sorted(SLOTS)]
    factors = [(i, k) for i in range(10) for k in (0, 1) if (i, k) != (6, 0)]
    branches = [place for place in factors if place not in ((4, 0), (7, 0), (7, 1), (9, 0))]
    found = {
        "embed.weight": get("embed.weight"), "lm_head.weight": get("lm_head.weight").T,
        "bigram.table": get("ngram_table"), "embed.smear.gate": get("smear_gate.weight"),
        "embed.smear.lam.value": scalars[22:23], "residual.skip_weights.value": scalars[23:24],
        "sa_lambdas.qkv.value": both[:, 0], "sa_lambdas.o.value": both[:, 1],
        "residual.token_scale": get("_mudd_gate_scale").reshape(1),
        "residual.resid_lambdas.value": np.array([get("resid_lambdas")[place] for place in factors]),
        "residual.post_lambdas.value": np.array([get("post_lambdas")[place] for place in branches]),
        "blocks.8.parallel.c_fc": mlps[11, 0], "blocks.8.parallel.c_proj": mlps[11, 1].T}
    found |= {f"values.tables.{k}": t for k, t in enumerate(get("value_embeds").reshape(4, -1, dim))}
    found |= {f"values.gates.{i}": get("ve_gate_bank")[k] for k, i in enumerate((1, 2, 8))}
    for j, i in enumerate(SLOTS):
        found |= {f"blocks.{i}.attn.qk": qk[6 * j:6 * j + 6].reshape(2, dim, dim),
                  f"blocks.{i}.attn.v": vo[2 * j], f"blocks.{i}.attn.o": vo[2 * j + 1]}
    for i in (i for i in range(11) if i != 7):
        found |= {f"blocks.{i}.mlp.c_fc": mlps[i, 0], f"blocks.{i}.mlp.c_proj": mlps[i, 1].T}
    for name, bank, number, columns in NETS:
        places = dict(
            zip((column for column, _ in columns), np.cumsum([0] + [width for _, width in columns]))
        )
        rows = [places[c.name] + j for c in getattr(model.residual, name).columns for j in range(c.width)]
        found |= {
            f"residual.{name}.w1": get(f"{bank}_w1")[number],
            f"residual.{name}.w2": get(f"{bank}_w2")[number][rows],
            f"residual.{name}.bias": get(f"{bank}_b2")[number][rows]
        }
        if name == "mudd_out_net":
            found[f"residual.{name}.by_group"] = get("mudd_w2g")[rows]
    return found


def filled(golden, **sets):
    """The model with the fixture's parameters and signs, after the heads have parted."""
    _, model = build("short/92", **SETS, **sets)
    fill(
        model,
        {name: np.ascontiguousarray(x, np.float64) for name, x in ours(golden, "param/", model).items()},
    )
    model.bigram.signs.copy_(torch.from_numpy(golden["in/sign_pool"].astype(np.float64)))
    model.tied = False
    return model


def losses_of(golden, model):
    """Function (long window, history, ...) -> losses of the fixture's tokens."""
    x, y = (torch.from_numpy(golden[f"in/{name}"].astype(np.int64))[None] for name in ("tokens", "targets"))
    documents = torch.zeros(1, 257, dtype=torch.int32)  # attention stops inside a document too
    documents[0, golden["in/cu_seqlens"].astype(np.int64)] = 1
    documents = documents.cumsum(1, dtype=torch.int32)[:, :256]

    def losses(long, history, masked=False, short=None, **more):
        windows = Windows(*(Span(w * 16 + 1, None) for w in (long, short or long // 2, long)), history)
        model.update_yarn(windows)
        context = model.context(x, 99, windows, documents=documents)
        if masked:
            context.impossible = torch.from_numpy(golden["in/canon_mask_bits"])
        return model(x, y, context, **more)

    return losses


@pytest.fixture(scope="module")
def record():
    """(golden numbers, model with the fixture's parameters, its losses_of, prefix of each target)."""
    golden, _ = load("r92")
    golden["param/ngram_table"] = golden["in/ngram_table"]
    model = filled(golden)
    prefix = torch.from_numpy(golden["in/prefix_table"].astype(np.int64))
    targets = torch.from_numpy(golden["in/targets"].astype(np.int64))
    return golden, model, losses_of(golden, model), prefix[targets[None]]


CASES = {"A_eval_ws1_3": (3, (3,), None, None, False), "B_eval_ws3_7": (7, (3, 7), None, None, False),
         "A_train_mtp3_prefix_full": (3, (3,), (1.0, 0.5, 0.2), 0.25, False),
         "B_train_mtp2_prefix_full": (7, (3, 7), (1.0, 0.3), 0.15, False),
         "A_train_mtp3_prefix_sampled": (3, (3,), (1.0, 0.5, 0.2), 0.25, True)}
MODEL = pytest.mark.feature(
    "model.attn.narrow", "model.mlp.hidden", "model.mlp.parallel_layers", "model.embed.bigram.trigrams",
    "model.embed.bigram.layers", "model.residual.x0_mix.layers", "model.residual.sublayers.keep_layers",
    "model.residual.mudd.groups", "model.residual.mudd.mlp_input", "model.residual.mudd.attn_input",
    "model.head.prefix", "model.head.candidates"
)


def case_losses(record, case):
    golden, _, losses, prefix = record
    long, history, weights, prefix_weight, sampled = CASES[case]
    more = {} if prefix_weight is None else {"prefix": prefix, "prefix_weight": prefix_weight}
    if sampled:
        more["candidates"] = torch.from_numpy(golden["in/candidates"].astype(np.int64))
    return losses(long, history, target_weights=weights, **more)


@MODEL
@pytest.mark.parametrize("case", CASES)
def test_losses(record, case):
    with torch.no_grad():
        assert (
            abs(case_losses(record, case).sum().item() / record[0][f"out/{case}/loss_sum"].item() - 1) < 1e-12
        )


@pytest.mark.feature("validation.canonical_mask")
def test_losses_under_the_canonical_mask(record):
    """Some targets are masked on purpose, which shows the logit of -60. The final long window is not
    YaRN's."""
    golden, model, losses, _ = record
    with torch.no_grad():
        short = losses(3, (3,), masked=True)
        final = losses(20, (3, 7, 11, 13), masked=True, short=6)
    for found, case in ((short, "A_eval_canonical"), (final, "C_eval_final_ws6_20_canonical")):
        assert abs(found.sum().item() / golden[f"out/{case}/loss_sum"].item() - 1) < 1e-12, case


def gradients(golden, model, losses):
    """{the original's tensor: its gradient, flat} of the sum of losses, zero where we have no number."""
    model.zero_grad()
    losses.sum().backward()
    found = {
        name: np.zeros(p.shape) if p.grad is None else p.grad.numpy() for name, p in model.named_parameters()
    }
    theirs = originals(found, golden, lambda places, prefix: ours(places, prefix, model))
    return {name: np.nan_to_num(x) for name, x in theirs.items()}


@MODEL
def test_gradients(record):
    """Largest entry and four weighted sums of every tensor, those of rows without gradient among them."""
    golden, model, _, _ = record
    theirs = gradients(golden, model, case_losses(record, "A_train_mtp3_prefix_sampled"))
    assert len(theirs) == len([key for key in golden if key.startswith("gradient/")])
    for name, x in theirs.items():
        expected = golden[f"gradient/{name}"]
        assert np.abs(projections(x) - expected).max() <= 1e-7 * expected[0] * len(x) ** 0.5, name


KERNEL_NORMS = {  # of the gradient that the original's kernel gives: all weights count in the last two rows
    "lm_head.weight": 99.2478078422, "value_embeds": 12.708634364, "ve_gate_bank": 2.22034727266,
    "qk_bank": 52.3478170471, "vo_bank": 203.622536454, "mlp_bank": 468.961735303,
    "post_lambdas": 20.580938967, "resid_lambdas": 276.500312178, "scalars": 14.0102871484,
    "mudd_w1": 377.533774782, "mudd_w2": 96.7507609098, "mudd_b2": 4.27152761453, "mudd_w2g": 46.6120882879,
    "_mudd_gate_scale": 176.026491487, "mudd_gate_w1": 404.970918959, "mudd_gate_w2": 121.653624871,
    "mudd_gate_b2": 14.9711168679, "embed.weight": 154.071118171, "smear_gate.weight": 6.97610422032,
    "ngram_table": 82.5149532254
}


@pytest.mark.feature("model.head.mtp.full_mass")
@pytest.mark.parametrize("kernel", ["whole", "chunks"])
def test_gradients_of_the_original_s_kernel(record, kernel):
    golden, _, _, prefix = record
    model = filled(golden, **{"model.head.mtp.full_mass": "true", "system.kernels.loss": kernel})
    case = "A_train_mtp3_prefix_sampled"
    losses = case_losses((golden, model, losses_of(golden, model), prefix), case)
    assert abs(losses.sum().item() / golden[f"out/{case}/loss_sum"].item() - 1) < 1e-12
    norms = {name: np.linalg.norm(x) for name, x in gradients(golden, model, losses).items()}
    assert norms == pytest.approx(KERNEL_NORMS, rel=1e-10)


def test_softmax_scales_follow_the_window_of_their_heads(record):
    golden, model, losses, _ = record
    for state, long, history in (("A", 3, (3,)), ("B", 7, (3, 7)), ("C", 13, (3, 7, 11, 13))):
        with torch.no_grad():
            losses(long, history)
        narrow, wide = (model.rotary_tables.scales[i] for i in (0, 3))
        assert abs(narrow - golden[f"yarn/{state}/narrow_scale"]) < 1e-15
        assert abs(wide - golden[f"yarn/{state}/wide_scale"]) < 1e-15


# ----- optimizer

@pytest.mark.feature("optim.muon.slow", "optim.muon.anvil_maps", "optim.muon.cautious_decay.gate")
def test_ten_updates_of_anvil():
    golden, config = load("r92_anvil")
    s = deltas.resolve("short/92", sets=["system.precision=float64"]).settings
    matrices = {  # wide, square, and two tall ones, of which we store the second transposed
        "qk": ("qk_bank", lambda x: x, "qkvo", Views(variance_axis=-2)),
        "vo": ("vo_bank", lambda x: x, "qkvo", Views(variance_axis=-1)),
        "c_fc": ("mlp_bank", lambda x: x[..., 0, :, :], "c_fc", views.c_fc(s)),
        "c_proj": ("mlp_bank", lambda x: x[..., 1, :, :].swapaxes(-1, -2), "c_proj", views.c_proj(s))}

    def tensor(name, x):
        return torch.from_numpy(np.ascontiguousarray(matrices[name][1](x), np.float64))

    model = Toy(**{name: (tensor(name, golden[f"init/{bank}"]), "matrix", *rest)
                   for name, (bank, _, *rest) in matrices.items()})
    optimizer = Optimizer(model, s)
    for i, step in enumerate(config["steps"]):
        gradients = {name: tensor(name, golden[f"grad/{matrices[name][0]}"][i]) for name in matrices}
        update(
            optimizer, model, gradients, plan(step, lr_factor=config["lr"][i], momentum=config["momentum"][i])
        )
        for name in matrices if step in config["stored"] else ():
            expected = tensor(name, golden[f"param/{step}/{matrices[name][0]}"])
            assert (model.get_parameter(name) - expected).abs().max() <= 1e-12 * expected.abs().max(), (
                name,
                step,
            )


@pytest.mark.feature("optim.bigram.row_moment", "optim.bigram.slower", "optim.value_embed.slower")
@pytest.mark.parametrize("key, label, result", [("ve", "value_embed", "param"), ("ngram", "bigram", "table")])
def test_updates_of_tables_across_the_change_of_cadence(key, label, result):
    """Dense AdamW of the value tables, row-wise Adam of the n-gram table with rows that no token touches."""
    golden, rates = load("r92_adam")[0], load("r92_schedules")[0]["lr"]
    s = deltas.resolve("short/92", sets=["system.precision=float64"]).settings
    model = Toy(table=(torch.from_numpy(golden[f"{key}/init"].astype(np.float64)), "embed", label))
    optimizer = Optimizer(model, s)
    for i, step in enumerate(golden[f"{key}/events"].tolist()):
        if key == "ve":
            gradient = golden["ve/grad"][i].astype(np.float64)
        else:  # the mean over eight ranks
            gradient = np.zeros_like(golden["ngram/init"], dtype=np.float64)
            gradient[golden[f"ngram/step{step}/rows"]] = golden[f"ngram/step{step}/grad_sum"] / 8
        update(
            optimizer, model, {"table": torch.from_numpy(gradient)}, plan(step, lr_factor=float(rates[step]))
        )
        expected = golden[f"{key}/step{step}/{result}"]
        assert np.abs(model.table.detach().numpy() - expected).max() <= 1e-12 * np.abs(expected).max(), step
        if key == "ngram":
            moment = optimizer.banks[0].state["row_moment"].numpy().ravel()
            assert np.abs(moment - golden[f"ngram/step{step}/v_current"]).max() < 1e-15, step


LABELS = {  # of the parameters that every rank keeps whole: role, labels in our model
    "scalars": ("scalar", "sa_lambdas", "smear_lambda", "skip_weights"),
    "smear_gate": ("matrix", "smear_gate"),
    "ve_gate_bank": ("matrix", "ve_gate"), "post_lambdas": ("scalar", "post_lambdas"),
    "resid_lambdas": ("scalar", "resid_lambdas"), "mudd_w1": ("matrix", "mudd"),
    "mudd_w2": ("matrix", "mudd"), "mudd_w2g": ("matrix", "mudd"), "mudd_b2": ("scalar", "mudd_bias"),
    "mudd_gate_w1": ("matrix", "token_gate"), "mudd_gate_w2": ("matrix", "token_gate"),
    "mudd_gate_b2": ("scalar", "token_gate_bias"), "_mudd_gate_scale": ("scalar", "token_gate_scale")}


def test_four_updates_of_every_small_parameter():
    """By AdamW, of all labels of record 92; gradients are sums of two steps already."""
    golden, rates = load("r92_adam")[0], load("r92_schedules")[0]["lr"]
    s = deltas.resolve("short/92", sets=["system.precision=float64"]).settings
    of = {f"{name} {label}": (name, role, label)
          for name, (role, *labels) in LABELS.items() for label in labels}

    def tensor(x, role):
        x = torch.from_numpy(x.astype(np.float64))
        return x[None] if role == "matrix" else x

    model = Toy(**{key: (tensor(golden[f"rep/{name}/init"], role), role, label)
                   for key, (name, role, label) in of.items()})
    optimizer = Optimizer(model, s)
    for i, step in enumerate((1, 3, 5, 7)):
        gradients = {key: tensor(golden[f"rep/{name}/grad"][i], role) for key, (name, role, _) in of.items()}
        due = schedule.due(s.optim.cadences(), step)
        update(optimizer, model, gradients, plan(step, lr_factor=float(rates[step]), due=due))
        for key, (name, role, _) in of.items():
            expected = tensor(golden[f"rep/{name}/param"][i], role)
            found = model.get_parameter(key).detach()
            assert (found - expected).abs().max() <= 1e-12 * expected.abs().max(), (key, step)


@pytest.mark.feature("model.head.untied.tied_until")
def test_head_and_embedding_around_the_step_at_which_they_part():
    """One matrix up to step 1175; its gradients are the sums of both uses, and of two steps."""
    golden, rates = load("r92_adam")[0], load("r92_schedules")[0]["lr"]
    s = deltas.resolve("short/92", sets=["system.precision=float64"]).settings
    last, start = schedule.untie_step(s), torch.from_numpy(golden["head/init"].T.astype(np.float64))
    model = Toy(**{name: (start.contiguous(), name, name) for name in ("lm_head", "embed")})
    optimizer, compared = Optimizer(model, s), 0
    for i, step in enumerate(golden["head/steps"].tolist()):
        gradients = {"lm_head": torch.from_numpy(golden["head/grad_lm_head"][i].T.astype(np.float64)),
                     "embed": torch.from_numpy(golden["head/grad_embed"][i].astype(np.float64))}
        if step <= last:
            gradients["lm_head"] = gradients["lm_head"] + gradients.pop("embed")
        due = schedule.due(s.optim.cadences(), step)
        update(optimizer, model, gradients, plan(step, lr_factor=float(rates[step]), due=due))
        if step == last:
            optimizer.copy_parameter("lm_head", "embed")
        for name in ("lm_head", "embed"):
            if (key := f"head/step{step}/{name}/param") in golden:
                expected = golden[key].T if name == "lm_head" else golden[key]
                found = model.get_parameter(name).detach().numpy()
                assert np.abs(found - expected).max() <= 1e-12 * np.abs(expected).max(), key
                compared += 1
    assert last == 1175 and compared == 5


# ----- schedules

@pytest.mark.feature("schedule.whole_steps", "model.head.prefix.levels", "model.head.candidates",
                     "optim.bigram.slower")
def test_every_number_of_every_step():
    golden, s = load("r92_schedules")[0], deltas.resolve("short/92").settings
    plans = schedule.plan(s)
    weights = np.zeros((len(plans), 3))
    for one in plans:
        weights[one.step, :len(one.target_weights)] = one.target_weights
    found = {
        "lr": [one.lr_factor for one in plans], "rail_beta": [one.momentum for one in plans],
        "batch_tokens": [one.tokens for one in plans],
        "max_seq_len": [one.shape.max_doc_len for one in plans],
        "prefix": [one.prefix_weight for one in plans], "P": [one.shape.candidates or 0 for one in plans],
        "mtp": weights, "ws_long": [(one.shape.windows.long.tokens - 1) // 128 for one in plans],
        "ws_short": [(one.shape.windows.short.tokens - 1) // 128 for one in plans],
        "adam_step": ["lm_head" in one.due for one in plans],
        "table_event": ["bigram" in one.due for one in plans]
    }
    for name, values in found.items():
        assert np.abs(np.array(values, float) - golden[name][:len(plans)].astype(float)).max() < 1e-15, name
    assert schedule.untie_step(s) == golden["split_step"] and sum(one.tokens for one in plans) == 328_663_040


@pytest.mark.feature("optim.bigram.slower", "optim.value_embed.slower")
def test_the_tables_take_longer_averages_and_more_decay_once_they_are_updated_more_rarely():
    golden, s = load("r92_schedules")[0], deltas.resolve("short/92").settings
    for label, theirs in (("bigram", "table"), ("value_embed", "ve")):
        group = s.optim.group("embed", label)
        numbers = [AdamW.of(s, group).numbers(one, 1) for one in schedule.plan(s)[:s.schedule.steps]]
        found = {"wd_mul": [group.decay_mul * step["stretch"] for step in numbers],
                 "beta1": [step["beta1"] for step in numbers], "beta2": [step["beta2"] for step in numbers]}
        for name, values in found.items():
            if (key := f"{theirs}_{name}") in golden:  # the table has no first moment
                assert np.abs(np.array(values) - golden[key]).max() < 1e-15, key


@pytest.mark.feature("model.attn.rope.yarn", "model.attn.narrow")
@pytest.mark.parametrize("step", [0, 320, 681, 1174])
def test_rotary_frequencies_and_softmax_scales_of_the_real_widths(step):
    golden, _ = load("r92_schedules")
    s = deltas.resolve("short/92", sets=["system.precision=float64"]).settings
    history, attn = schedule.plan(s)[step].shape.windows.long_blocks, s.model.attn
    tables = without_values(s).rotary_tables.rotaries
    for rotary, kind, scale, i in zip(tables, ("narrow", "wide"), (attn.narrow.scale, attn.scale), (0, 1)):
        found, factor = rotary.frequencies(history)
        theirs = torch.from_numpy(golden[f"yarn/f64/step{step}/{kind}_freq"])
        assert (found.repeat_interleave(2) - theirs).abs().max() <= 1e-15  # both of a pair turn alike
        assert abs(scale * factor - golden[f"yarn/f64/step{step}/scales"][i]) <= 1e-15


TICKS = {"head": (896, 150), "matrices": (945, 63), "values": (947, 62), "blend": (897, 76)}  # first, number


@pytest.mark.feature("optim.tail")
def test_the_averages_tick_when_the_originals_do(monkeypatch):
    golden, s = load("r92_schedules")[0], deltas.resolve("short/92").settings
    averages, ticks = TailAverages.__new__(TailAverages), {}
    averages.settings, averages.steps = s.optim.tail, s.schedule.steps
    for one in schedule.plan(s):
        for name in ("head", "matrices", "values", "blend"):
            note = lambda rate, name=name: ticks.setdefault(name, {}).setdefault(one.step, rate)
            setattr(averages, name, type("Noted", (), {"tick": staticmethod(note)}))
        averages.tick(one)
    for name, theirs in {"head": "tail-ema", "matrices": "tail-avg", "values": "value-embed-avg",
                         "blend": "bank-blend"}.items():
        expected = golden[f"tick/{theirs}"]
        assert list(ticks[name]) == np.flatnonzero(~np.isnan(expected)).tolist()
        first = min(ticks[name])  # takes the weights, at whatever rate
        assert (first, len(ticks[name])) == TICKS[name], name
        assert all(
            abs(rate - expected[step]) < 1e-15 for step, rate in ticks[name].items() if step > first
        ), name


# ----- rows and candidates, at the real size

@pytest.mark.feature("model.embed.bigram.trigrams", "model.embed.bigram.signs")
def test_rows_of_pairs_and_triples():
    golden, _ = load("r92_candidates")
    tokens = torch.from_numpy(golden["tokens"].astype(np.int64))[None]
    for found, names in ((ngram_ids(tokens, 84_602_880), "rows"), (ngram_sign_ids(tokens, 8192), "sign")):
        for ids, kind in zip(found, ("bigram", "trigram")):
            assert np.array_equal(ids[0].numpy(), golden[f"{kind}_{names}"])


@pytest.mark.feature("model.head.candidates")
@pytest.mark.parametrize("rank", [0, 3, 7])
def test_candidates_of_four_batches_of_a_rank(rank):
    golden, sweep = load("r92_candidates")[0], Sweep(50_304, rank)
    for i in range(4):
        targets = golden[f"cand/targets{i}"].astype(np.int64)
        found = sweep.candidates(targets, int(golden[f"cand/P{i}"]))
        said = hashlib.sha256(found.astype("<i8").tobytes()).hexdigest()
        assert said == str(golden[f"cand/rank{rank}/{i}/candidates_sha256_i64"])
        assert sweep.offset == golden[f"cand/rank{rank}/{i}/sweep_offset_after"]


def test_candidates_are_evenly_spaced_where_the_sweep_has_too_few():
    golden, sweep = load("r92_candidates")[0], Sweep(4096, 5)
    found = sweep.candidates(golden["cand_fallback/targets"].astype(np.int64), int(golden["cand_fallback/P"]))
    assert np.array_equal(found, golden["cand_fallback/candidates"])
    assert sweep.offset == golden["cand_fallback/sweep_offset_after"]


# ----- documents

def pieces_of(ends):
    """Of each position up to the last end, the number of the piece that holds it."""
    return np.searchsorted(ends, np.arange(ends[-1]), side="right")


def attended_pieces(s, lengths, size):
    """Numbers from 0 of what attention keeps apart in the first `size` tokens of documents so long."""
    begins = torch.zeros(1, sum(lengths), dtype=torch.bool)
    begins[0, np.cumsum([0, *lengths[:-1]])] = True
    return segments(begins[:, :size], s.model.attn.segment)[0].numpy() - 1


@pytest.mark.feature("model.attn.segment")
def test_attention_cuts_documents_every_2560_tokens():
    golden, s = load("r92_candidates")[0], deltas.resolve("short/92").settings
    ends = golden["seg/cum_lengths"]
    found = attended_pieces(s, np.diff(ends, prepend=0), ends[-1])
    assert np.array_equal(found, pieces_of(golden["seg/split_2560"]))


@pytest.mark.feature("data.loader", "data.max_doc_len", "model.attn.segment")
def test_batches_of_five_stages_from_a_shard_of_three_million_tokens(tmp_path):
    """Taken one after the other: where the documents of the first and the last rank begin, and where
    attention stops."""
    golden, s, bos = load("r92_candidates")[0], deltas.resolve("short/92").settings, 50_256
    tokens = np.zeros(3_000_000, np.uint16)
    tokens[golden["loader/bos"]] = bos
    write_shard(tmp_path / "a.bin", tokens)
    corpus = SimpleNamespace(train=[tmp_path / "a.bin"], bos=bos, train_tokens=[3_000_000], folder=tmp_path)
    plans, steps = schedule.plan(s), (0, 320, 681, 1107, 1174)
    sizes = [plans[step].tokens // 8 for step in steps]
    shards = Shards(corpus, [plans[step].shape.max_doc_len for step in steps])
    batches = document_steps(shards, loader="packed", tokens_per_rank=sizes, wrap=False)
    for step, size, (_, _, pieces) in zip(steps, sizes, batches):
        for rank in (0, 7):
            starts, ends = map(np.array, pieces[rank])
            at = f"loader/step{step}/rank{rank}"
            assert np.array_equal(starts, golden[f"{at}/starts"])
            found = attended_pieces(s, ends - starts, size)
            assert np.array_equal(found, pieces_of(golden[f"{at}/segment_ends"]))
