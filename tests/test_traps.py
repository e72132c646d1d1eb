"""Where the sources of records 22 to 57 differ from what was written about them: one named test for each."""

import csv
import math
from types import SimpleNamespace

import pytest
import torch

import schedule
from model import GPT, without_values
from optim import Optimizer
from settings import deltas
from settings.model import padded_vocab

ROOT = deltas.RECORDS.parent


def settings(n, *sets, scale="micro", **changes):
    return deltas.resolve(f"short/{n}", scale=scale, sets=sets, **changes).settings


def built(n, *sets, seed=0, precision="float64", **changes):
    """(settings, model with initial weights) of a record at scale micro."""
    s = settings(n, f"system.precision={precision}", *sets, **changes)
    model = GPT(s)
    model.initialise(seed)
    return s, model


def scrambled(model, seed=1):
    """The model, no parameter of which is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype))
    return model


def of(plan, **changes):
    """A step plan with other values, without its record's rests and cadences."""
    known = {"lr_factor": 1.0, "momentum": 0.0, "due": None, "frozen": frozenset(), "step": 0, "events": ()}
    changed = SimpleNamespace(**{**vars(plan), **known, **changes})
    changed.of_role = lambda role: changed
    return changed


def moved(n, labels, gradients="random", lr_factor=1.0, **changes):
    """{label: what the first update adds to the parameters of the label}, as one flat vector each."""
    s, model = built(n, **changes)
    generator = torch.Generator().manual_seed(2)
    for name, p in sorted(model.named_parameters()):
        p.data.normal_(generator=torch.Generator().manual_seed(len(name)))
        p.grad = None
    optimizer, before = Optimizer(model, s), {}
    for bank in optimizer.banks:
        before[id(bank)] = bank.param.detach().clone()
        bank.grad.zero_()
        if gradients == "random":
            bank.grad.normal_(generator=generator)
    optimizer.step(of(schedule.plan(s)[0], lr_factor=lr_factor))
    found = {label: [b for b in optimizer.banks if b.label == label] for label in labels}
    return {label: torch.cat([(b.param.detach() - before[id(b)]).flatten() for b in banks])
            for label, banks in found.items()}


# ----- 1, 2, 3, 4

def test_1_the_curve_of_record_48_is_its_own_and_not_that_of_the_linked_log():
    """The linked log holds record 47's source and ends at 3.2798 after 132.7 s."""
    last = (deltas.find_record("short/48").folder / "reference.csv").read_text().split()[-1].split(",")
    assert last == ["2160", "3.2757", "131157"]
    with open(ROOT / "evidence/published/groups.csv", encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if (r["track"], r["record"]) == ("short", "48")]
    row, = (r for r in rows if r["role"] == "record")
    assert row["linked_log"] == "82edf6be-f343-475d-b93a-47c32acf4de2.txt" and row["runs"] == "10"
    assert "linked" in row["note"]


FACTORS = {26: (1, 2, 1), 27: (1, 1, 1), 41: (1, 1, 1), 42: (1, 2, 1), 47: (1, 2, 1), 48: (2, 2, 4),
           57: (2, 2, 4)}


@pytest.mark.feature("optim.qkvo.lr_mul", "optim.c_fc.lr_mul", "optim.c_proj.lr_mul")
@pytest.mark.parametrize("n", FACTORS)
def test_2_record_27_halves_the_update_of_the_mlp_s_first_matrix_and_42_doubles_it_again(n):
    """Of an orthogonalised update the Frobenius norm is about sqrt(rank): (q, k, v and o; c_fc; c_proj)."""
    without = ["optim.muon.cautious_decay"] if n >= 43 else []
    labels = ("qkvo", "c_fc", "c_proj")
    sizes = moved(n, labels, without=without)
    lr = settings(n).optim.muon.lr
    for label, factor in zip(labels, FACTORS[n]):
        flat = sizes[label] / lr / factor
        matrices = flat.numel() // (48 * 48 if label == "qkvo" else 4 * 48 * 48)
        assert 0.75 < flat.norm() / math.sqrt(48 * matrices) < 1.1, label


def test_2_record_42_keeps_the_step_of_the_first_matrix_and_halves_the_others():
    a, b = (moved(n, ("c_fc", "c_proj")) for n in (41, 42))
    assert torch.allclose(a["c_fc"], b["c_fc"], rtol=1e-9, atol=1e-12)
    assert torch.allclose(a["c_proj"], 2 * b["c_proj"], rtol=1e-9, atol=1e-12)


def test_3_record_26_is_the_retimed_log_whose_rate_ends_at_a_tenth():
    plans = schedule.plan(settings(26, scale="full"))
    assert plans[-1].lr_factor == pytest.approx(0.1 + 0.9 / (0.45 * 1750), rel=1e-9)
    assert "0.05" in deltas.find_record("short/26").notes


def test_4_adam_s_eps_rises_in_32_and_falls_in_57_which_nobody_announced():
    eps = {n: settings(n, scale="full").optim.adam.eps for n in (22, 31, 32, 56, 57)}
    assert eps == {22: 1e-10, 31: 1e-10, 32: 1e-8, 56: 1e-8, 57: 1e-10}
    s = settings(57, scale="full")
    assert {group.eps for group in s.optim.groups().values() if group.rule == "adamw"} == {1e-10}


# of scalars in the original's vectors
SLOTS = {34: 72, 35: 72, 40: 64, 49: 48, 51: 48, 52: 51, 53: 51, 54: 51, 55: 51, 56: 51, 57: 51}
COUNTED = {34: 271_025_004, 35: 268_665_636, 40: 268_665_628, 49: 268_665_612, 51: 230_032_140,
           52: 230_032_143, 53: 268_665_615, 54: 268_665_615, 55: 268_665_987, 56: 268_665_987,
           57: 268_665_987}


@pytest.mark.parametrize("n", COUNTED)
def test_the_parameters_are_those_of_the_original_without_the_unused_scalars(n):
    """The original pads its vector of scalars to a multiple of the ranks; nothing is padded here."""
    model = without_values(settings(n, scale="full"))
    scalars = sum(p.numel() for p in model.parameters() if p.role == "scalar")
    assert model.num_parameters() + SLOTS[n] - scalars == COUNTED[n]


# ----- 5, 6: schedules

@pytest.mark.feature("optim.muon.momentum_warmup.reaches_end")
def test_5_the_momentum_of_39_and_40_stays_below_its_end_until_41():
    for n, plateau in ((38, 0.95), (39, 0.85 + 0.1 * 299 / 300), (40, 0.85 + 0.1 * 299 / 300), (41, 0.95)):
        plans = schedule.plan(settings(n, scale="full"))
        assert {round(p.momentum, 12) for p in plans[300:1000]} == {round(plateau, 12)}


@pytest.mark.feature("schedule.lr_spans_extension")
def test_6_the_rate_of_41_falls_over_the_extension_too_and_its_windows_do_not():
    a, b = (schedule.plan(settings(41, scale="full", without=without))
            for without in ([], ["schedule.lr_spans_extension"]))
    assert len({p.lr_factor for p in a[-41:]}) == 41 and len({p.lr_factor for p in b[-40:]}) == 1
    # the last of 2315 steps has 1/2315 of the run before it
    assert a[-1].lr_factor == pytest.approx(0.1 + 0.9 * (1 / 2315) / 0.45, rel=1e-9)
    assert [p.shape.windows for p in a] == [p.shape.windows for p in b]
    assert schedule.plan(settings(42, scale="full"))[2245].lr_factor == pytest.approx(0.10018, rel=1e-12)


# ----- 7, 8

@pytest.mark.feature("model.init.qkv_bound")
def test_7_record_53_doubles_the_initial_weights_of_q_k_and_v_that_its_text_halves():
    stds = {}
    for n in (52, 53):
        model = built(n)[1]
        weights = [p.detach() for name, p in model.named_parameters() if name.endswith("qkvo")]
        stds[n] = torch.cat([w[:3].flatten() for w in weights]).std().item()
        up = [p.detach().flatten() for name, p in model.named_parameters() if name.endswith("mlp.c_fc")]
        assert torch.cat(up).std() == pytest.approx(0.5 / math.sqrt(48), rel=0.02)
        assert all(w[3].count_nonzero() == 0 for w in weights)
    assert stds[52] == pytest.approx(0.5 / math.sqrt(48), rel=0.02)
    assert stds[53] == pytest.approx(1 / math.sqrt(48), rel=0.02)


@pytest.mark.feature("optim.scalar.freeze_steps", "optim.x0_lambdas.freeze_steps")
def test_8_record_54_lets_the_scalars_move_after_a_change_and_shortens_the_cooldown():
    rests = {n: [p.step for p in schedule.plan(settings(n, scale="full")) if p.frozen]
             for n in (51, 52, 53, 54)}
    assert rests == {51: [], 54: [], 52: [*range(654, 694), *range(1307, 1347), *range(1960, 2000)],
                     53: [*range(627, 667), *range(1254, 1294), *range(1880, 1920)]}
    resting = {group for p in schedule.plan(settings(53, scale="full")) for group in p.frozen}
    assert resting == {"scalar"}
    assert [settings(n, scale="full").schedule.cooldown_frac for n in (53, 54)] == [0.55, 0.5]


@pytest.mark.feature("optim.scalar.freeze_steps")
def test_8_a_group_that_rests_is_in_no_update_and_the_x0_factors_go_on():
    for plan in schedule.plan(settings(53, scale="full")):
        assert ("scalar" in plan.due) == (plan.step % 2 == 1 and not plan.frozen)
        assert ("x0_lambdas" in plan.due) == ("lm_head" in plan.due) == (plan.step % 2 == 1)


# ----- 9: decay

@pytest.mark.feature("optim.muon.cautious_decay", "optim.adam.cautious_decay")
@pytest.mark.parametrize("n, label", [(43, "c_proj"), (50, "embed"), (57, "c_proj")])
def test_9_weight_decay_is_quadratic_in_the_learning_rate(n, label):
    """Without a gradient a step is the decay alone."""
    full, half = (moved(n, [label], gradients="none", lr_factor=x)[label] for x in (1.0, 0.5))
    assert full.norm() > 0 and torch.allclose(full, 4 * half, rtol=1e-9, atol=0)


# ----- 10: across documents

@pytest.mark.feature("model.embed.smear", "model.attn.key_offset")
def test_10_smear_and_key_offset_look_over_the_border_of_documents():
    def logits(before, *off):
        model = scrambled(built(57, without=list(off))[1]).eval()
        x = torch.full((1, 24), 7)
        x[0, 11], x[0, 12] = before, 1256  # the last token of a document, and the first of the next
        windows = schedule.windows(model.settings, model.settings.schedule.steps - 1)
        model.update_yarn(windows)
        return model(x, context=model.context(x, 1256, windows))[0, 12:]

    both = ["model.embed.smear", "model.attn.key_offset"]
    assert not torch.equal(logits(3), logits(4))
    assert torch.equal(logits(3, *both), logits(4, *both))
    for one in both:
        assert not torch.equal(logits(3, one), logits(4, one)), one


@pytest.mark.feature("model.head.mtp")
def test_10_further_targets_cross_documents_and_end_with_the_row():
    model = scrambled(built(57)[1]).train()
    windows = schedule.windows(model.settings, 0)
    x = torch.full((1, 24), 7)
    x[0, 12] = 1256

    def losses(targets, weights):
        return model(x, targets, model.context(x, 1256, windows), target_weights=weights)[0]

    y = torch.roll(x, -1, 1)
    other = y.clone()
    other[0, 12] = 9  # the token after the border, second target of the token before it
    one = [losses(t, (1.0, 0.0)) for t in (y, other)]
    two = [losses(t, (0.0, 1.0)) for t in (y, other)]
    assert [i for i in range(24) if one[0][i] != one[1][i]] == [12]
    assert [i for i in range(24) if two[0][i] != two[1][i]] == [11]
    assert two[0][-1] == 0  # no second target behind the row


# ----- 11, 12, 13

@pytest.mark.feature("numerics.fp8_head")
def test_11_the_range_of_the_fp8_head_grows_from_record_to_record():
    """The largest weight and activation that e4m3 represents, 448 over the factor."""
    largest = {n: (448 / s.numerics.fp8_head.w, 448 / s.numerics.fp8_head.x)
               for n in (22, 28, 50, 51, 54, 55, 57) for s in [settings(n, scale="full")]}
    root = math.sqrt(768)
    expected = {22: (24, root), 28: (0.875, root), 50: (0.875, root), 51: (1.5, 100), 54: (1.5, 100),
                55: (1.6, 100), 57: (1.6, 100)}
    assert {n: pytest.approx(pair, rel=1e-12) for n, pair in expected.items()} == largest
    grads = [settings(n, scale="full").numerics.fp8_head.grad for n in (50, 51, 57)]
    assert grads == pytest.approx([448, 448 / 0.75, 448 / 0.75], rel=1e-12)


@pytest.mark.feature("optim.embed.every", "optim.lm_head.every", "optim.scalar.every")
def test_12_adam_steps_on_odd_indices_and_the_last_half_gradient_of_an_odd_run_is_lost():
    lost = []
    for n in range(39, 58):
        plans = schedule.plan(settings(n, scale="full"))
        assert all(("lm_head" in p.due) == (p.step % 2 == 1) for p in plans)
        assert all("matrix" in p.due for p in plans)
        if "lm_head" not in plans[-1].due:
            lost.append(n)
    assert lost == [41, 42, 43, 44, 45, 51, 55, 56]


@pytest.mark.feature("model.init.head_std")
@pytest.mark.parametrize("n", [34, 45, 50, 51, 53, 57])
def test_13_the_first_loss_is_ln_of_the_classes_until_the_head_is_tied_again(n):
    losses = []
    for seed in (0, 1):
        s, model = built(n, seed=seed)
        x = torch.randint(1256, (1, 64), generator=torch.Generator().manual_seed(0))
        loss = model.eval()(x, torch.roll(x, -1, 1), model.context(x, 1256, schedule.windows(s, 0))).mean()
        losses.append(loss.item() - math.log(padded_vocab(s)))
    if n <= 50:
        assert losses == pytest.approx([0, 0], abs=1e-12)
    else:
        assert losses[0] != losses[1] and max(map(abs, losses)) < 0.05 and min(map(abs, losses)) > 1e-6


# ----- 14, 15

def test_14_the_batch_is_that_of_its_stage_also_where_the_original_forgets_it():
    """From 54 on the schedule object of the original never notes the new batch and tells the loader of it
    again in every step: nothing follows from that."""
    plans = schedule.plan(settings(54, scale="full"))
    assert [p.shape.tokens_per_rank for p in plans] == [16384] * 614 + [32768] * 613 + [49152] * 653


@pytest.mark.parametrize("n", [50, 51, 57])
def test_15_the_norm_of_a_small_embedding_is_one(n):
    """An eps of 2^-7, that of bfloat16, would crush embeddings of 0.005."""
    s, model = built(n, precision="record")
    x = torch.arange(1, 65)[None]
    stream = []
    model.embed.register_forward_hook(lambda module, args, out: stream.append(out))
    with torch.no_grad():
        model.eval()(x, x, model.context(x, 1256, schedule.windows(s, 0)))
    assert s.numerics.norm_eps == 1.1920929e-07
    assert stream[0].float().square().mean() == pytest.approx(1, rel=0.02)
