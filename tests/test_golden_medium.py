"""The medium track equals the original code in float64: losses, gradients, updates, training, schedules."""

import dataclasses

import numpy as np
import pytest
import torch

import golden_medium
import schedule
from golden_medium import block_windows, fixture
from golden_records import fill, load, originals, token_windows
from kernels.fp8_linear import fp8_linear
from layers.rotary import Rotary, RotaryTables
from layers.specs import RotarySpec, layer_specs
from model import without_values
from optim import Optimizer
from settings import deltas
from small_models import Toy, update
from system.wrappers import Outer
from test_golden import check_gradients, inputs, relative
from updates import views
from updates.muon import Muon
from updates.slots import Scale, Slot


# ----- models

@pytest.fixture(scope="module", params=[2, 14])
def blocked(request):
    """(number, numbers, config, model with the numbers) of a record whose windows are in whole blocks."""
    golden, config, _, model = fixture(request.param)
    fill(model, getattr(golden_medium, f"record{request.param}")(golden, "param/"))
    return request.param, golden, config, model


@pytest.mark.feature("model.attn.v_norm", "model.attn.raw_input", "model.embed.second",
                     "model.residual.unet_skips.pairs", "model.head.softcap.form")
def test_losses_and_gradients_of_records_2_and_14(blocked):
    number, golden, config, model = blocked
    x, y = inputs(golden)
    for case, told in config["cases"].items():
        if "eps" in told:
            continue
        with torch.set_grad_enabled(case == config["gradient_case"]):
            losses = model(x, y, model.context(x, config["bos"], block_windows(told["window_blocks"])))
        assert relative(losses.mean().item(), golden[f"case/{case}/loss"].item()) < 1e-12, case
        assert np.abs(losses.detach().numpy().ravel() - golden[f"case/{case}/token_loss"]).max() < 1e-11, case
        if case == config["gradient_case"]:
            model.zero_grad()
            losses.mean().backward()
            check_gradients(model, getattr(golden_medium, f"record{number}")(golden, "grad/"))


@pytest.mark.parametrize("number", [2, 14])
def test_losses_of_records_2_and_14_with_the_eps_of_an_older_torch(number):
    golden, config, _, model = fixture(number, numerics__norm_eps=0.0078125)
    fill(model, getattr(golden_medium, f"record{number}")(golden, "param/"))
    x, y = inputs(golden)
    with torch.no_grad():
        losses = model(x, y, model.context(x, config["bos"], block_windows(5)))
    assert relative(losses.mean().item(), golden["case/eps_2^-7/loss"].item()) < 1e-12


# short window of record 18's cases -> sizes of the long one so far
HISTORY = {1: (3,), 3: (3, 7), 6: (3, 7, 11, 13)}


@pytest.mark.feature("model.embed.second", "model.residual.unet_skips.gate", "model.attn.value_embed.gate",
                     "model.attn.rope.yarn.last")
def test_losses_gradients_and_yarn_of_record_18():
    golden, config, _, model = fixture(18)
    fill(model, golden_medium.record18(golden, "param/"))
    x, y = inputs(golden)
    for case, told in config["cases"].items():
        short, long = told["ws"]
        windows, trains = token_windows(long, long, HISTORY[short]), told.get("train", True)
        assert windows.short.tokens == short * config["block"] + 1
        model.tied, weights = "split" not in told, told.get("mtp", [1.0]) if trains else None
        model.update_yarn(windows)
        f, factor = model.rotaries[0].frequencies(HISTORY[short])
        changes = len(HISTORY[short]) - 1
        assert np.abs(f.numpy() - golden[f"yarn/{changes}/angular_freq"]).max() < 1e-7  # float32 there
        assert abs(0.1 * factor - golden[f"yarn/{changes}/attn_scale"]) < 1e-15
        model.zero_grad()
        losses = model(x, y, model.context(x, config["bos"], windows), target_weights=weights)
        total = losses.sum() if trains else losses.mean()
        assert relative(total.item(), golden[f"case/{case}/loss"].item()) < 1e-9, case
        if case == config["gradient_case"]:
            total.backward()
            check_gradients(model, golden_medium.record18(golden, "grad/"))


def test_parameter_counts_at_full_size():
    """The originals have 13 skip weights and two attention factors more than they use in records 7 to 16."""
    models = {i: without_values(deltas.resolve(f"medium/{i}").settings) for i in (1, 2, 10, 16, 18)}
    counts = {i: model.num_parameters() for i, model in models.items()}
    assert [round(counts[i] / 1e6, 1) for i in (2, 18)] == [454.5, 613.4]
    assert counts[1] == 354_823_168  # GPT-2 medium
    assert counts[10] - counts[2] == 3 * 50257 * 1024 + 16 - 5  # three tables, 16 factors, five skips less
    assert counts[16] - counts[10] == 3


@pytest.mark.feature("numerics.fp8_head")
def test_the_fp8_head_operator_of_record_2():
    golden, config = load("m02_fp8head")
    x, w = (torch.from_numpy(golden[k]) for k in ("x", "w"))
    x, w = x.bfloat16().requires_grad_(), w.requires_grad_()
    out = fp8_linear(x, w, *config["scales"])
    out.backward(torch.from_numpy(golden["grad_out"]).bfloat16())
    two, three = (deltas.resolve(f"medium/{i}").settings.numerics.fp8_head for i in (2, 3))
    assert config["scales"] == [two.x, two.w, 65536 * two.grad]
    # record 3 divides by 0.5, 2^-9 and 2^-19
    assert (three.x, three.w, 65536 * three.grad) == (2.0, 2.0 ** 9, 2.0 ** 19)
    assert np.array_equal(out.detach().float().numpy(), golden["out"])
    assert np.array_equal(x.grad.float().numpy(), golden["grad_x"])
    assert np.abs(w.grad.numpy() - golden["grad_w"]).max() <= 4e-7 * np.abs(golden["grad_w"]).max()


# ----- updates

def toy(s, values):
    """A Toy of {name: (array, role, label)} with the views that matrices have under these settings."""
    cut = {"qkvo": views.qkvo(s), "c_fc": views.c_fc(s), "c_proj": views.c_proj(s)}
    cut |= {label: views.gate(s) for label in ("gate", "ve_gate", "smear_gate", "skip_gate")}
    return Toy(**{
        name: (torch.from_numpy(np.array(value)).double(), role, label, cut.get(label, views.Views()))
        for name, (value, role, label) in values.items()
    })


def tensors_2(get):
    """Record 2: {our name: (array of a call or of the start, role, label)}."""
    qkvo = np.concatenate([get("blocks.0.attn.qkv_w"), get("blocks.0.attn.c_proj.weight")[None]])
    return {"qkvo": (qkvo, "matrix", "qkvo"), "c_fc": (get("blocks.0.mlp.c_fc.weight"), "matrix", "c_fc"),
            "c_proj": (get("blocks.0.mlp.c_proj.weight"), "matrix", "c_proj"),
            "embed": (get("embed.weight"), "embed", "embed"),
            "table": (get("value_embeds.embed.0.weight"), "embed", "value_embed"),
            "head": (get("lm_head.weight"), "lm_head", "lm_head"),
            "skips": (get("skip_weights"), "scalar", "skip_weights"),
            "lambdas": (get("blocks.0.lambdas"), "scalar", "resid_lambdas"),
            "attn_lambdas": (get("blocks.0.attn.lambdas"), "scalar", "sa_lambdas")}


def tensors_14(get):
    """Records 7 to 16, likewise."""
    return {"qkvo": (get("blocks.0.attn.qkvo_w"), "matrix", "qkvo"),
            "c_fc": (get("blocks.0.mlp.fc_w"), "matrix", "c_fc"),
            "c_proj": (get("blocks.0.mlp.proj_w"), "matrix", "c_proj"),
            "embed": (get("embed1.weight"), "embed", "embed"),
            "second": (get("embed2.weight"), "embed", "embed2"),
            "table": (get("value_embeds.0.weight"), "embed", "value_embed"),
            "head": (get("lm_head_w"), "lm_head", "lm_head"),
            "scalars": (get("scalars"), "scalar", "sa_lambdas")}


def tensors_18(get):
    """Record 18, likewise."""
    block = "blocks.0."
    skips = np.concatenate([get(f"skip_gates.{k}.weight") for k in range(3)])
    return {"qkvo": (get(block + "attn.qkvo_w").reshape(4, 8, 8), "matrix", "qkvo"),
            "c_fc": (get(block + "mlp.c_fc"), "matrix", "c_fc"),
            "c_proj": (get(block + "mlp.c_proj").T, "matrix", "c_proj"),
            "gate": (get(block + "attn.attn_gate.weight"), "matrix", "gate"),
            "ve_gate": (get(block + "attn.value_embed_gate.weight"), "matrix", "ve_gate"),
            "smear_gate": (get("smear_gate.weight"), "matrix", "smear_gate"),
            "skip_gates": (skips, "matrix", "skip_gate"), "embed": (get("embed.weight"), "embed", "embed"),
            "second": (get("embed2.weight"), "embed", "embed2"),
            "table": (get("value_embeds.0.weight"), "embed", "value_embed"),
            "head": (get("lm_head.weight"), "lm_head", "lm_head"),
            "x0_lambdas": (get("x0_lambdas"), "scalar", "x0_lambdas"),
            "scalars": (get("scalars"), "scalar", "sa_lambdas")}


@pytest.mark.feature("optim.muon.smoothing", "optim.outer", "optim.embed2", "optim.muon.weight_decay")
@pytest.mark.parametrize("number, tensors, sets", [
    (2, tensors_2, ()), (14, tensors_14, ("optim.outer.period=4",)), (18, tensors_18, ())])
def test_updates_of_every_parameter_through_the_optimizer(number, tensors, sets):
    """Learning rates, momenta, cadences and the untying come from the record's own step plans."""
    golden, config = load(f"m{number:02d}_optim")
    s = deltas.resolve(f"medium/{number}", sets=["system.precision=float64", *sets]).settings
    plans, kept = schedule.plan(s), config["kept_calls"]
    model = toy(s, tensors(lambda name: golden[f"init/{name}"]))
    optimizer = Optimizer(model, s)
    outer = Outer(model, s.optim.outer) if s.optim.outer else None
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for call, (step, told) in enumerate(zip(config["step_index"], config["per_call"])):
        plan = plans[step]
        assert relative(plan.lr_factor, told["lr_factor"]) < 1e-14
        assert relative(plan.momentum, told.get("momentum", told.get("muon_momentum"))) < 1e-14
        gradients = {
            name: torch.from_numpy(np.array(g)).double()
            for name, (g, *_) in tensors(lambda name: golden[f"grad/{name}"][call]).items()
            if name != "embed" or not plan.shape.tied  # a tied embedding is not read
        }
        update(optimizer, model, gradients, plan)
        if outer is not None:
            outer.after_update(plan)
        if "untie" in plan.events:
            optimizer.copy_parameter("lm_head", "embed")
        if call in kept:
            expected = tensors(lambda name: golden[f"f64/param/{name}"][kept.index(call)])
            for name, (value, *_) in expected.items():
                got = model.get_parameter(name).detach()
                moved = (got - start[name]).abs().max().item()
                assert np.abs(got.numpy() - value).max() <= 1e-9 * max(moved, 1e-9), (name, call)


@dataclasses.dataclass(frozen=True)
class Given(Slot):
    """The update is a given one."""
    update: torch.Tensor

    def __call__(self, u, step):
        return self.update


@pytest.mark.feature("numerics.matrix_mantissa")
def test_the_step_of_a_bfloat16_weight_with_its_mantissa_is_the_original_s_bit_for_bit():
    """From weight and mantissa after a call, and the next smoothed update, to the next ones, where Snoo does
    not act."""
    golden, config = load("m14_optim")
    s, compared = deltas.resolve("medium/14").settings, 0
    plans = schedule.plan(s)
    theirs = {"attn.qkvo_w": ("qkvo", views.qkvo(s)), "mlp.fc_w": ("c_fc", views.c_fc(s)),
              "mlp.proj_w": ("c_proj", views.c_proj(s))}
    for name, (label, cut) in theirs.items():
        weights = torch.from_numpy(golden[f"orig/param/blocks.0.{name}"]).bfloat16()
        halves = golden[f"orig/state/blocks.0.{name}/mantissa"].astype(np.uint16)
        halves = torch.from_numpy(halves.view(np.int16))
        smoothed = torch.from_numpy(golden[f"orig/state/blocks.0.{name}/update_smoothing_buffer"])
        rule = Muon.of(s, s.optim.group("matrix", label))
        scale = [slot for slot in rule.slots if isinstance(slot, Scale)]
        for call in (1, 2, 3, 5, 6, 7, 9, 10, 11):
            plan = plans[config["step_index"][call]]
            p, state = weights[call - 1].clone()[None], {"mantissa": halves[call - 1].clone()[None]}
            p, state = (p[0], {"mantissa": state["mantissa"][0]}) if p[0].dim() == 3 else (p, state)
            v = smoothed[call].float().view(p.shape)
            dataclasses.replace(rule, slots=(Given(v), *scale)).update_(
                p, torch.zeros_like(p), state, rule.numbers(plan, call + 1), views.Views()
            )
            assert torch.equal(p.view(weights[call].shape), weights[call]), (name, call)
            assert torch.equal(state["mantissa"].view(halves[call].shape), halves[call]), (name, call)
            compared += p.numel()
    assert compared == 9 * (4 * 64 + 2 * 256)


def test_losses_and_gradients_of_six_training_steps_of_record_2_and_the_parameters_after_the_last():
    steps, told = load("m02_train")
    golden, config, s, model = fixture(2)
    fill(model, golden_medium.record2(golden, "param/"))
    optimizer, plans = Optimizer(model, s), schedule.plan(s)

    def numbers(tensor_of):
        ours = {name: tensor_of(p).detach().numpy() for name, p in model.named_parameters()}
        theirs = originals(ours, golden, golden_medium.record2)
        return [theirs[name].copy() for name in told["param_names"]]

    start = numbers(lambda p: p)
    for i, step in enumerate(told["step_index"]):
        x, y = (torch.from_numpy(steps[name][i]).long()[None] for name in ("tokens", "targets"))
        optimizer.expect(last=True)
        loss = model(x, y, model.context(x, config["bos"], block_windows(told["window_blocks"]))).mean()
        loss.backward()
        optimizer.accumulate()
        assert relative(loss.item(), steps["loss"][i].item()) < 1e-11
        norms = [np.linalg.norm(g) for g in numbers(lambda p: p.grad)]
        assert np.allclose(norms, steps["grad_l2"][i], rtol=1e-9, atol=1e-14)
        optimizer.step(plans[step])
    final = numbers(lambda p: p)
    moved = [np.linalg.norm(b - a) for a, b in zip(start, final)]
    assert np.allclose(moved, steps["param_delta_l2"], rtol=1e-9, atol=0)
    assert np.allclose(
        [b @ np.cos(np.arange(b.size)) for b in final], steps["param_cosdot"], rtol=0, atol=1e-9
    )


# ----- schedules

@pytest.mark.feature("schedule.lr_floor", "schedule.cooldown_frac", "model.attn.window.growth",
                     "optim.muon.momentum_warmup", "optim.muon.smoothing.start")
@pytest.mark.parametrize("number", [2, 8, 13, 14, 16])
def test_schedules_of_records_2_to_16_at_every_step(number):
    golden, config = load("m_schedules")
    key, s = f"m{number:02d}", deltas.resolve(f"medium/{number}").settings
    plans, last = schedule.plan(s), config["steps"][f"m{number:02d}"]
    assert len(plans) == last
    assert np.allclose([p.lr_factor for p in plans], golden[f"{key}/lr_factor"], rtol=0, atol=1e-14)
    assert np.allclose([p.momentum for p in plans], golden[f"{key}/muon_momentum"], rtol=1e-14, atol=0)
    windows = [schedule.windows(s, i) for i in range(last + 1)]
    assert [w.long.blocks for w in windows] == golden[f"{key}/window_blocks"].tolist()
    assert all(w.short.blocks == max(1, w.long.blocks // 2) for w in windows)
    if f"{key}/update_smoothing" in golden:
        rule = Muon.of(s, s.optim.group("matrix", "c_fc"))
        found = [rule.numbers(plan, plan.step + 1)["smoothing"] for plan in plans]
        assert np.allclose(found, golden[f"{key}/update_smoothing"], rtol=0, atol=1e-14)


@pytest.mark.feature("schedule.stages", "schedule.lr_peaks", "schedule.extension_steps", "model.head.mtp",
                     "model.attn.window.final_long", "model.attn.rope.yarn.last")
def test_schedules_of_record_18_at_every_step():
    golden, config = load("m_schedules")
    s = deltas.resolve("medium/18", sets=["system.precision=float64", "validation.seq_len=65536"]).settings
    plans, last = schedule.plan(s), config["steps"]["m18"]
    assert np.allclose([p.lr_factor for p in plans], golden["m18/lr_factor"], rtol=0, atol=1e-14)
    assert np.allclose([p.momentum for p in plans], golden["m18/muon_momentum"], rtol=1e-14, atol=0)
    assert [p.tokens for p in plans] == golden["m18/batch_tokens"].tolist()
    assert [p.step for p in plans if "untie" in p.events] == [golden["m18/split_step"]]
    windows = [schedule.windows(s, i) for i in range(last + 1)]
    blocks = [[(w.short.tokens - 1) // 128, (w.long.tokens - 1) // 128] for w in windows]
    assert blocks == golden["m18/window_short_long"].tolist()
    final = schedule.validation_windows(s, last)
    assert final.long.tokens == final.last.tokens == 128 * golden["m18/validate_window_long"] + 1
    assert final.short == windows[-1].short
    for plan, weights, count in zip(plans, golden["m18/mtp_weights"], golden["m18/mtp_count"]):
        assert np.allclose(plan.target_weights, weights[:count], rtol=0, atol=2e-8)  # float32 there
    tables = RotaryTables(s, layer_specs(s), [Rotary(s, RotarySpec(128, 32))])
    tables.reset()
    changed = [0, *(i for i in range(1, last) if windows[i].long_blocks != windows[i - 1].long_blocks), last]
    for n, step in enumerate(changed):
        tables.update(windows[step])
        state = min(n, 3)  # YaRN is applied three times, up to a window of 13 blocks
        assert abs(tables.scales[0] - golden[f"m18/yarn/{state}/attn_scale"]) < 1e-14
        angles = torch.from_numpy(golden[f"m18/yarn/{state}/angular_freq"])
        assert (tables.rotaries[0].cos[1] - angles.cos()).abs().max() < 1e-7
    assert len(changed) == 10
