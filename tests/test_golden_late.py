"""Records 58, 62, 77, 83, 85, 89 and 90 against numbers of the original code, in float64: losses, gradients,
hashed rows."""

import numpy as np
import pytest
import torch

import schedule
from golden_late import CONVERT, DRAWN, drawn_fixture, fixture, gradients, projections
from golden_records import fill, load, originals, token_windows
from layers.bigram import bigram_ids
from optim import Optimizer
from schedule import Shape, StepPlan
from settings import deltas
from system.hooks import hooks_of

# case: long window in blocks, its history, weights of the targets
CASES = {"A_eval_ws1_3": (3, (3,), None), "A_train_ws1_3_mtp2": (3, (3,), (1.0, 0.3)),
         "A_train_ws1_3_mtp3": (3, (3,), (1.0, 0.5, 0.2)), "B_eval_ws3_7": (7, (3, 7), None),
         "B_train_ws3_7_mtp1": (7, (3, 7), (1.0,)), "B_train_ws3_7_mtp2": (7, (3, 7), (1.0, 0.3)),
         "B_train_ws3_7_mtp3": (7, (3, 7), (1.0, 0.5, 0.2))}
WITH_GRADIENTS = {62: "B_train_ws3_7_mtp3", 77: "B_train_ws3_7_mtp2", 85: "B_train_ws3_7_mtp2"}


@pytest.fixture(scope="module", params=CONVERT)
def record(request):
    """(number, golden numbers, model with the fixture's parameters, function case -> losses)."""
    number = request.param
    golden, config, model = fixture(number)
    converted = CONVERT[number](golden, "param/", model)
    fill(model, {name: np.ascontiguousarray(x, np.float64) for name, x in converted.items()})
    x, y = (torch.from_numpy(golden[f"in/{name}"].astype(np.int64))[None] for name in ("tokens", "targets"))

    def losses(case):
        long, history, weights = CASES[case]
        windows = token_windows(long, long, history)
        model.update_yarn(windows)
        return model(x, y, model.context(x, config["bos"], windows), target_weights=weights)

    return number, golden, model, losses


LATE = pytest.mark.feature(
    "model.attn.paired_layers", "model.attn.rope.adjacent", "model.embed.bigram", "model.residual.sublayers",
    "model.attn.saved_input", "model.residual.mudd", "model.token_gates", "model.attn.xsa",
    "model.attn.compose", "model.attn.value_embed.gate.own_channels", "model.attn.gate.layers",
    "model.embed.bigram.signs"
)


@LATE
def test_losses(record):
    number, golden, _, losses = record
    found = 0
    for case, (_, _, weights) in CASES.items():
        for name, reduced in (("loss", "mean" if weights is None else "sum"), ("loss_sum", "sum")):
            if (key := f"out/{case}/{name}") in golden:
                with torch.no_grad():
                    got = getattr(losses(case), reduced)().item()
                assert abs(got / golden[key].item() - 1) < 1e-12, (number, case)
                found += 1
    assert found == 5


@LATE
def test_gradients(record):
    """Largest entry and four weighted sums of every tensor; the originals' gradients are float32."""
    number, golden, model, losses = record
    model.zero_grad()
    losses(WITH_GRADIENTS[number]).sum().backward()
    compared = 0
    for name, ours in gradients(model, golden, number).items():
        theirs = golden[f"gradient/{name}"]
        assert np.abs(projections(ours) - theirs).max() <= 1e-7 * theirs[0] * max(1, len(ours) ** 0.5), name
        compared += 1
    assert compared == len([key for key in golden if key.startswith("param/")])


@LATE
@pytest.mark.feature("model.attn.key_offset_halves", "model.embed.bigram.in_x0", "model.embed.bigram.dim",
                     "model.head.prefix", "model.attn.qk_dim")
@pytest.mark.parametrize("program", DRAWN)
def test_losses_and_gradients_with_parameters_by_formula(program):
    """Of the merged sources and of record 83's log; of record 90 that of 89 with the changes of its log in
    attention. In record 58 rotating channels of keys move, in 83 the embedding holds the bigram, in 89 the
    loss counts prefixes."""
    golden, model = drawn_fixture(program)
    tokens = torch.from_numpy(golden["in/tokens"].astype(np.int64))[None]
    x, y = tokens[:, :-1], tokens[:, 1:]
    more = {"prefix": torch.from_numpy(golden["in/prefix"].astype(np.int64))[y], "prefix_weight": 0.15}

    def losses(long, history, **terms):
        windows = token_windows(long, long, history)
        model.update_yarn(windows)
        return model(x, y, model.context(x, 99, windows), **terms).sum()

    with torch.no_grad():
        found = [losses(3, (3,)).item(), losses(7, (3, 7)).item()]
    trained = losses(7, (3, 7), target_weights=(1.0, 0.3), **(more if program in ("89", "90") else {}))
    trained.backward()
    for value, case in zip((*found, trained.item()), ("eval", "eval7", "train")):
        assert abs(value / golden[case].item() - 1) < 1e-12, case
    theirs = gradients(model, golden, program)
    assert len(theirs) == len([key for key in golden if key.startswith("gradient/")]) > 15
    for name, ours in theirs.items():
        expected = golden[f"gradient/{name}"]
        limit = 1e-10 * expected[0] * max(1, len(ours) ** 0.5)
        assert np.abs(projections(ours) - expected).max() <= limit, name


def test_rows_of_the_bigram_table(record):
    _, golden, model, _ = record
    tokens = torch.from_numpy(golden["in/tokens"].astype(np.int64))[None]
    assert np.array_equal(bigram_ids(tokens, len(model.bigram.table))[0].numpy(), golden["in/bigram_ids"])


@pytest.mark.feature("model.head.untied.tied_until", "model.embed.bigram", "optim.bigram")
def test_eight_steps_of_record_62():
    """AdamW on odd steps with summed gradients, the tied embedding and its split, and a change of YaRN's
    window."""
    numbers, config, model = fixture(62)
    golden, told = load("r62_train")
    start = CONVERT[62](numbers, "param/", model)
    start["embed.weight"] = start["lm_head.weight"]
    fill(model, {name: np.ascontiguousarray(x, np.float64) for name, x in start.items()})
    optimizer = Optimizer(model, model.settings)
    hooks, cadences, losses = hooks_of(model, optimizer), model.settings.optim.cadences(), []
    for i, tokens in enumerate(torch.from_numpy(golden["in/tokens_plus_one"].astype(np.int64))):
        long = told["windows_blocks_of_16"][i][1]
        windows = token_windows(long, long, (3,) if long == 3 else (3, long))
        plan = StepPlan(
            i, 0, Shape(256, 256, 256, windows, tied=i <= 5), 256, 256 * i, told["lr_factor"][i],
            told["muon_momentum"][i], False, schedule.due(cadences, i), ("untie",) if i == 5 else ()
        )
        for hook in hooks:
            hook.before_forwards(plan)
        optimizer.expect(last=True, due=plan.due)
        x, y = tokens[None, :-1], tokens[None, 1:]
        loss = model(x, y, model.context(x, config["bos"], windows), target_weights=told["mtp"][i]).sum()
        loss.backward()
        optimizer.accumulate()
        optimizer.step(plan)
        for hook in hooks:
            hook.after_update(plan)
        losses.append(loss.item())
    assert np.abs(np.array(losses) / golden["out/loss_before_step"] - 1).max() < 1e-9
    ours = {name: p.detach().numpy() for name, p in model.named_parameters()}
    final = originals(ours, numbers, lambda places, prefix: CONVERT[62](places, prefix, model))
    for name, x in final.items():
        if not np.isnan(x).any():
            theirs = golden[f"final/{name}"]
            assert np.abs(projections(x) - theirs).max() <= 1e-7 * theirs[0] * len(x) ** 0.5, name
            assert abs(np.linalg.norm(x) / golden[f"norm_final/{name}"] - 1) < 1e-9, name


# ----- schedules

@pytest.mark.feature("schedule.whole_steps", "schedule.stage_peaks", "model.head.prefix")
@pytest.mark.parametrize("key, ref", [("r62", "short/62"), ("r77", "short/77"), ("r83_lineage", "short/83"),
                                      ("r85_lineage", "short/85"), ("r89_head", "short/89")])
def test_every_number_of_every_step(key, ref):
    golden = {
        name.partition("/")[2]: x for name, x in load("schedules")[0].items() if name.startswith(f"{key}/")
    }
    plans = schedule.plan(deltas.resolve(ref).settings)
    weights = np.zeros((len(plans), 3))
    for plan in plans:
        weights[plan.step, :len(plan.target_weights)] = plan.target_weights
    found = {
        "lr": [plan.lr_factor for plan in plans], "momentum": [plan.momentum for plan in plans],
        "mtp": weights, "batch_tokens": [plan.tokens for plan in plans],
        "prefix": [plan.prefix_weight for plan in plans],
        "max_seq_len": [plan.shape.max_doc_len for plan in plans],
        "ws_long": [(plan.shape.windows.long.tokens - 1) // 128 for plan in plans],
        "ws_short": [(plan.shape.windows.short.tokens - 1) // 128 for plan in plans]
    }
    assert golden.keys() <= found.keys() and len(golden["lr"]) == len(plans)
    for name, x in golden.items():
        assert np.abs(np.array(found[name]) - np.nan_to_num(x[:len(plans)])).max() < 1e-15, name


TOKENS = {  # of a whole run, from this record on, as the logs and schedules of the originals have them
    58: 470_417_408, 61: 467_927_040, 62: 424_673_280, 63: 417_988_608, 64: 412_876_800, 70: 410_779_648,
    72: 406_323_200, 73: 395_837_440, 80: 393_216_000, 81: 372_244_480, 82: 364_380_160, 84: 365_690_880,
    85: 342_753_280, 88: 338_821_120}
UNTIED = {
    58: 1157, 61: 1151, 62: 1041, 63: 1025, 64: 1011, 70: 1005, 72: 993, 73: 967, 80: 961, 81: 937, 82: 917,
    84: 921, 85: 857, 88: 847
}  # last step in which embedding and head are one, likewise


@pytest.mark.feature("schedule.whole_steps", "model.head.untied.tied_until")
@pytest.mark.parametrize("number", range(58, 90))
def test_tokens_and_the_step_at_which_embedding_and_head_part(number):
    s = deltas.resolve(f"short/{number}").settings
    tokens, untied = (table[max(n for n in table if n <= number)] for table in (TOKENS, UNTIED))
    assert schedule.tokens_before(s, s.schedule.steps) == tokens and schedule.untie_step(s) == untied
    # the update of the last step is still one for both, after its forward with one table
    assert [schedule.shape(s, step).tied for step in (0, untied, untied + 1)] == [True, True, False]


@pytest.mark.parametrize("rows", [251_520, 377_280, 754_560])
def test_rows_of_pairs_at_the_real_size(rows):
    """The product of the reserved row wraps around in 32 bits."""
    golden, _ = load("schedules")
    tokens = torch.from_numpy(golden["hash/tokens"].astype(np.int64))[None]
    assert np.array_equal(bigram_ids(tokens, rows)[0].numpy(), golden[f"hash/ids_rows_{rows}"])
