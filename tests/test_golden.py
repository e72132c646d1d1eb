"""Our records equal the original code: loss, gradients, optimizer, training, schedules, in float64."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import schedule
from golden_records import (
    block_windows, early, fill, load, originals, record20, record34, record53, small,
    token_windows
)
from kernels.fp8_linear import fp8_linear
from layers.rotary import Rotary
from layers.specs import RotarySpec
from optim import Optimizer
from schedule import Span, Windows
from settings import deltas
from settings.model import rotary_dim
from small_models import Toy, plan as step_plan, update
from updates.adam import AdamW
from updates.muon import Muon
from updates.views import Views


def relative(a, b):
    return abs(a - b) / abs(b)


def inputs(golden):
    x, y = (torch.from_numpy(golden[f"in/{k}"]).long() for k in ("tokens", "targets"))
    return (x, y) if x.dim() == 2 else (x[None], y[None])


def check_gradients(model, expected):
    for name, value in expected.items():
        got = model.get_parameter(name).grad.numpy()
        assert np.abs(got - value).max() <= 1e-7 * np.abs(value).max(), name


def check_losses(losses, golden, total, each, reduced="mean"):
    assert relative(getattr(losses, reduced)().item(), golden[total].item()) < 1e-12
    assert np.abs(losses.detach().numpy().ravel() - golden[each]).max() < 1e-11


def test_record_5_loss_and_gradients():
    golden, config = load("record05")
    _, model = small("short/5", config, 128, rows=2)
    fill(model, early(golden, "param/"))
    losses = model(*inputs(golden))
    losses.mean().backward()
    check_losses(losses, golden, "out/loss", "out/token_loss")
    check_gradients(model, early(golden, "grad/"))


def test_record_6_equals_record_5_in_exact_arithmetic():
    """QK norm on the other side of the rotation is the same function (eps aside)."""
    golden, config = load("record05")
    _, model = small("short/6", config, 128, rows=2)
    fill(model, early(golden, "param/"))
    assert relative(model(*inputs(golden)).mean().item(), golden["out/loss"].item()) < 1e-12


@pytest.mark.parametrize("name, ref, length", [("record05", "short/5", 128), ("record12", "short/12", 640),
                                               ("record20", "short/20", 640)])
@pytest.mark.parametrize("case, eps", [("eps_1.19e-7", 1.1920929e-07), ("eps_2^-7", 0.0078125)])
def test_other_norm_eps(name, ref, length, case, eps):
    golden, config = load(name)
    _, model = small(ref, config, length, rows=2 if name == "record05" else 1, numerics__norm_eps=eps)
    fill(model, record20(golden, "param/") if name == "record20" else early(golden, "param/"))
    x, y = inputs(golden)
    windows = {
        "record05": None, "record12": Windows(*3 * [Span(192, None)], ()), "record20": block_windows(4)
    }[name]
    loss = model(x, y, model.context(x, 249, windows)).mean().item()
    assert relative(loss, golden[f"case/{case}/loss_mean"].item()) < 1e-9


def test_record_12_loss_and_gradients():
    golden, config = load("record12")
    _, model = small("short/12", config, 640)
    fill(model, early(golden, "param/"))
    x, y = inputs(golden)
    losses = model(x, y, model.context(x, 249, Windows(*3 * [Span(192, None)], ())))
    losses.mean().backward()
    check_losses(losses, golden, "out/loss", "out/token_loss")
    check_gradients(model, early(golden, "grad/"))
    assert model.values.lam.value.grad[0] == 0  # block 0 mixes v1 with itself


@pytest.mark.parametrize("case, window", [("window64", 64), ("window1024", 1024), ("window1024_T1280", 1024)])
def test_record_12_with_other_windows_and_with_documents_longer_than_the_window(case, window):
    golden, config = load("record12")
    key = f"case/{case}/" if f"case/{case}/tokens" in golden else "in/"
    x, y = (torch.from_numpy(golden[key + name]).long()[None] for name in ("tokens", "targets"))
    s, model = small("short/12", config, x.size(1), model__attn__window__start=window)
    fill(model, early(golden, "param/"))
    with torch.no_grad():
        losses = model(x, y, model.context(x, config["bos_id"], schedule.windows(s, 7)))
    assert np.abs(losses.numpy().ravel() - golden[f"case/{case}/token_loss"]).max() < 1e-11
    assert relative(losses.mean().item(), golden[f"case/{case}/loss_mean"].item()) < 1e-12


@pytest.mark.parametrize("name, ref, length", [("record05", "short/5", 128), ("record12", "short/12", 640)])
def test_rotary_tables_rounded_to_bfloat16(name, ref, length):
    golden, config = load(name)
    _, model = small(ref, config, length, rows=config["batch"])
    fill(model, early(golden, "param/"))
    for table in (model.rotaries[0].cos, model.rotaries[0].sin):
        table.copy_(table.bfloat16())
    x, y = inputs(golden)
    windows = Windows(*3 * [Span(192, None)], ()) if name == "record12" else None
    with torch.no_grad():
        losses = model(x, y, model.context(x, 249, windows))
    assert np.abs(losses.numpy().ravel() - golden["case/rope_tables_bf16/token_loss"]).max() < 1e-11
    assert relative(losses.mean().item(), golden["case/rope_tables_bf16/loss_mean"].item()) < 1e-12


def test_record_20_loss_gradients_and_other_windows():
    golden, config = load("record20")
    _, model = small("short/20", config, 640)
    fill(model, record20(golden, "param/"))
    x, y = inputs(golden)
    losses = model(x, y, model.context(x, 249, block_windows(4)))
    losses.mean().backward()
    check_losses(losses, golden, "out/loss", "out/token_loss")
    check_gradients(model, record20(golden, "grad/"))
    for blocks in config["windows_extra"]:
        with torch.no_grad():
            losses = model(x, y, model.context(x, 249, block_windows(blocks)))
        assert np.abs(losses.numpy().ravel() - golden[f"case/window{blocks}/token_loss"]).max() < 1e-11


def fixture_34_on(name):
    """(numbers, config, model) of the fixture of record 34 or 53, at blocks of 16 tokens."""
    golden, config = load(name)
    sizes = {"dim": config["model_dim"], "heads": config["num_heads"],
             "vocab_rows": config.get("vocab_padded", config["vocab"])}
    _, model = small(f"short/{name[1:]}", sizes, 256, model__attn__window__block=16, data__max_doc_len=256,
                     numerics__norm_eps=config["rms_eps"])
    return golden, config, model


@pytest.mark.feature("model.embed.smear")
def test_record_34_loss_and_gradients():
    golden, config, model = fixture_34_on("r34")
    fill(model, record34(golden, "param/"))
    x, y = inputs(golden)

    def losses(long, last, history):
        windows = token_windows(long, last, history)
        model.update_yarn(windows)
        return model(x, y, model.context(x, config["bos"], windows))

    check_losses(losses(3, 3, (3,)), golden, "out/A_train_ws3/loss", "out/A_train_ws3/per_token", "sum")
    check_losses(
        losses(7, 11, (3, 7)), golden, "out/B_eval_ws7_final11/loss", "out/B_eval_ws7_final11/per_token"
    )
    assert abs(model.rotary_tables.scales[0] - golden["yarn/B_attn_scale"]) < 1e-15
    f, _ = model.rotaries[0].frequencies((3, 7))
    assert (
        np.abs(f.numpy()[: len(golden["yarn/B_angular_freq"])] - golden["yarn/B_angular_freq"]).max() < 1e-15
    )
    loss = losses(7, 7, (3, 7))
    loss.sum().backward()
    check_losses(loss, golden, "out/B_train_ws7/loss", "out/B_train_ws7/per_token", "sum")
    check_gradients(model, record34(golden, "grad/"))


CASES_53 = {  # case: long window in blocks, its history, weights of the targets, tied, reduction of the loss
    "A_eval_tied_ws1_3": (3, (3,), None, True, "mean"),
    "A_train_tied_ws1_3_mtp2": (3, (3,), (1.0, 0.3), True, "sum"),
    "B_train_tied_ws3_7_mtp1": (7, (3, 7), (1.0,), True, "sum"),
    "B_train_tied_ws3_7_mtp3": (7, (3, 7), (1.0, 0.5, 0.2), True, "sum"),
    "C_eval_untied_ws6_13": (13, (3, 7, 13), None, False, "mean"),
    "C_train_untied_ws3_7_mtp1": (7, (3, 7, 13), None, False, "sum"),
}


@pytest.fixture(scope="module")
def of_record_53():
    """(numbers, model of record 53 with them, function case -> its losses)."""
    golden, config, model = fixture_34_on("r53")
    fill(model, record53(golden, "param/"))
    x, y = inputs(golden)

    def losses(case):
        long, history, weights, model.tied, _ = CASES_53[case]
        model.zero_grad()
        windows = token_windows(long, long, history)
        model.update_yarn(windows)
        return model(x, y, model.context(x, config["bos"], windows), target_weights=weights)

    return golden, model, losses


@pytest.mark.feature("model.attn.key_offset", "model.attn.sa_lambdas", "model.attn.sa_lambdas.o",
                     "model.residual.backout", "model.residual.unet_skips.pairs", "model.head.mtp",
                     "model.head.untied.tied_until")
@pytest.mark.parametrize("case", CASES_53)
def test_record_53_losses(case, of_record_53):
    golden, _, losses = of_record_53
    _, _, weights, _, reduced = CASES_53[case]
    each = losses(case)
    assert relative(getattr(each, reduced)().item(), golden[f"out/{case}/loss"].item()) < 1e-12
    by_offset = np.nan_to_num(golden[f"out/{case}/ce_by_offset"]) @ np.array(weights or [1.0])
    assert np.abs(each.detach().numpy().ravel() - by_offset).max() < 1e-11


def test_record_53_gradients(of_record_53):
    golden, model, losses = of_record_53
    losses("C_train_untied_ws3_7_mtp1").sum().backward()
    theirs = {"lm_head.weight": "lm_head", "embed.weight": "embed"}
    check_gradients(model, {
        ours: golden[f"out/C_train_untied_ws3_7_mtp1/grad/{name}.weight"] for ours, name in theirs.items()
    })
    losses("B_train_tied_ws3_7_mtp3").sum().backward()
    expected = record53(golden, "grad/")
    assert not expected.pop("embed.weight").any() and model.embed.weight.grad is None
    check_gradients(model, expected)


@pytest.mark.feature("model.attn.rope.yarn")
def test_yarn_states_at_real_size():
    golden, _ = load("schedules")
    s = deltas.resolve("short/33", sets=["system.precision=float64"]).settings
    rotary = Rotary(s, RotarySpec(rotary_dim(s), rotary_dim(s) // 4))
    history = (3, 7, 11, 13)
    for i, blocks in enumerate(history):
        f, factor = rotary.frequencies(history[:i + 1])
        # stored from float32 tables
        assert np.abs(f.numpy() - golden[f"yarn/half_{blocks}/angular_freq"]).max() < 1e-9
        assert abs(0.1 * factor - golden[f"yarn/half_{blocks}/attn_scale"]) < 1e-15
    assert [round(0.1 * rotary.frequencies(history[: i + 1])[1], 6) for i in range(4)] == [
        0.1, 0.116946, 0.127518, 0.131778
    ]


@pytest.mark.feature("numerics.fp8_head")
def test_the_fp8_head_operator_is_the_original():
    golden, config = load("record20_fp8head")
    x, w = (torch.from_numpy(golden[k]) for k in ("x", "w"))
    x, w = x.bfloat16().requires_grad_(), w.requires_grad_()
    scales = config["scales"]
    out = fp8_linear(x, w, scales["x_s"], scales["w_s"], scales["grad_s"])
    out.backward(torch.from_numpy(golden["grad_out"]).bfloat16())
    assert np.array_equal(out.detach().float().numpy(), golden["out"])
    assert np.array_equal(x.grad.float().numpy(), golden["grad_x"])
    assert np.abs(w.grad.numpy() - golden["grad_w"]).max() <= 4e-7 * np.abs(golden["grad_w"]).max()


def states(rule, golden, tensor, factors, momenta, calls=4):
    """(call, {name: array}) of parameter and state after each update of a fixture's free-standing tensor by a
    rule."""
    p = torch.from_numpy(golden[f"init/{tensor}"]).double()
    unit = rule.unit(p.shape, Views())
    units = p.reshape(-1, *unit).clone()  # (N, *unit)
    state = {name: torch.zeros((len(units), *shape), dtype=dtype)
             for name, (shape, dtype) in rule.state(unit, p.dtype, Views()).items()}
    for call in range(calls):
        g = torch.from_numpy(golden[f"grad/{tensor}"][call]).double().view(units.shape)
        plan = SimpleNamespace(lr_factor=factors[call].item(), momentum=momenta[call].item())
        rule.update_(units, g, state, rule.numbers(plan, call + 1), Views())
        yield call, {name: x.view(p.shape).numpy() for name, x in {"param": units, **state}.items()}


def muon(s):
    return Muon.of(s, s.optim.group("matrix", "c_proj"))


def adam(s, lr):
    return AdamW.of(s, dataclasses.replace(s.optim.group("embed", "embed"), lr=lr, weight_decay=0.0))


def close(got, expected):
    return np.abs(got - expected).max() <= 1e-12 * np.abs(expected).max()


@pytest.mark.feature("optim.muon", "optim.muon.momentum_ema")
@pytest.mark.parametrize(
    "name, ref, tensors",
    [
        ("record05_optim", "short/5", ["wide", "tall", "square"]),
        ("record12_optim", "short/12", ["wide", "tall", "square"]),
        ("record20_optim", "short/20", ["wide", "tall", "square", "batch3"])
    ],
)
def test_muon_states_after_four_calls(name, ref, tensors):
    golden, config = load(name)
    s = deltas.resolve(ref, sets=["system.precision=float64"]).settings
    assert s.optim.muon.lr == config["muon_lr"]
    for tensor in tensors:
        for call, found in states(
            muon(s), golden, tensor, golden["step_lr_factor"], golden["step_muon_momentum"]
        ):
            assert set(found) == {"param", "momentum_buffer"}
            for key, got in found.items():
                assert close(got, golden[f"fp64/{key}/{tensor}"][call]), (tensor, key, call)


@pytest.mark.parametrize(
    "name, ref, tensors",
    [
        ("record05_optim", "short/5", ["tied_table"]),
        ("record12_optim", "short/12", ["table", "head", "scalar"]),
        ("record20_optim", "short/20", ["table", "head", "scalar"])
    ],
)
def test_adam_states_after_four_calls(name, ref, tensors):
    golden, config = load(name)
    s = deltas.resolve(ref, sets=["system.precision=float64"]).settings
    assert (s.optim.adam.beta1, s.optim.adam.beta2) == tuple(
        config["adam_betas"]
    ) and s.optim.adam.eps == config["adam_eps"]
    for tensor in tensors:
        rule = adam(s, config["adam_lr"][tensor])
        for call, found in states(rule, golden, tensor, golden["step_lr_factor"], golden["step_lr_factor"]):
            assert set(found) == {"param", "exp_avg", "exp_avg_sq"}
            for key, got in found.items():
                assert close(got, golden[f"fp64/{key}/{tensor}"][call]), (tensor, key, call)


@pytest.mark.feature("optim.muon.momentum_ema", "optim.adam.eps_after_correction")
def test_optimizer_of_records_32_to_34():
    """Batched Muon over q, k, v, o; gates in Muon; Adam with eps before the correction."""
    golden, config = load("r34_optim")
    s = deltas.resolve("short/34", sets=["system.precision=float64"]).settings
    factors, momenta, compared = np.array(config["lr_factor"]), np.array(config["muon_momentum"]), 0
    for tensor in ("qkvo", "tall", "wide", "square", "smear_gate"):
        for call, found in states(muon(s), golden, tensor, factors, momenta):
            if f"f64/step{call + 1}/param/{tensor}" in golden:
                assert close(found["param"], golden[f"f64/step{call + 1}/param/{tensor}"]), (tensor, call)
                assert close(
                    found["momentum_buffer"], golden[f"f64/step{call + 1}/state/{tensor}/momentum_buffer"]
                ), (tensor, call)
                compared += 1
    for tensor, mul in config["lr_mul"].items():
        for call, found in states(adam(s, config["adam"]["lr"] * mul), golden, tensor, factors, momenta):
            if f"f64/step{call + 1}/param/{tensor}" in golden:
                assert close(found["param"], golden[f"f64/step{call + 1}/param/{tensor}"]), (tensor, call)
                assert close(found["exp_avg"], golden[f"f64/step{call + 1}/state/{tensor}/exp_avg"]), (
                    tensor,
                    call,
                )
                assert close(found["exp_avg_sq"], golden[f"f64/step{call + 1}/state/{tensor}/exp_avg_sq"]), (
                    tensor,
                    call,
                )
                compared += 1
    assert compared == 2 * 8  # the fixture holds the states after the first and the last call


def test_four_updates_of_record_34_through_the_optimizer():
    """Banks, groups and rules by the roles of record 34's tensors; from its learning rates to the states
    after the last call."""
    golden, config = load("r34_optim")
    s = deltas.resolve("short/34", sets=["system.precision=float64"]).settings
    roles = {"qkvo": ("matrix", "qkvo"), "tall": ("matrix", "c_proj"), "wide": ("matrix", "c_proj"),
             "square": ("matrix", "latent"), "smear_gate": ("matrix", "gate"), "embed": ("embed", "embed"),
             "head": ("lm_head", "lm_head"), "scalars": ("scalar", "sa_lambdas")}
    model = Toy(
        **{name: (torch.from_numpy(golden[f"init/{name}"]).double(), *role) for name, role in roles.items()}
    )
    optimizer, compared = Optimizer(model, s), 0
    for call, (lr_factor, momentum) in enumerate(zip(config["lr_factor"], config["muon_momentum"])):
        gradients = {name: torch.from_numpy(golden[f"grad/{name}"][call]).double() for name in roles}
        update(optimizer, model, gradients, step_plan(call, lr_factor=lr_factor, momentum=momentum))
        for name in roles:
            if f"f64/step{call + 1}/param/{name}" in golden:
                assert close(
                    model.get_parameter(name).detach().numpy(), golden[f"f64/step{call + 1}/param/{name}"]
                ), (name, call)
                compared += 1
    assert compared == 2 * 8


# ----- six training steps

def train(model, s, steps, windows):
    """Make the six training steps of a fixture; yields (index, loss) when the gradients are there, before the
    update."""
    optimizer, plans = Optimizer(model, s), schedule.plan(s)
    for i, step in enumerate(steps["step_index"]):
        assert plans[step].lr_factor == steps["lr_factor"][i]
        assert relative(plans[step].momentum, steps["muon_momentum"][i]) < 1e-15
        x, y = (torch.from_numpy(steps[k][i]).long() for k in ("tokens", "targets"))
        x, y = (x, y) if x.dim() == 2 else (x[None], y[None])
        optimizer.expect(last=True)
        loss = model(x, y, model.context(x, 249, windows)).mean()
        loss.backward()
        optimizer.accumulate()
        yield i, loss.item()
        optimizer.step(plans[step])


@pytest.mark.parametrize(
    "name, ref, length, convert, windows",
    [
        ("record05", "short/5", 128, early, None),
        ("record12", "short/12", 640, early, Windows(*3 * [Span(192, None)], ())),
        ("record20", "short/20", 640, record20, block_windows(4))
    ],
)
def test_losses_and_gradients_of_six_training_steps_and_the_parameters_after_the_last(
    name, ref, length, convert, windows
):
    golden, config = load(name)
    steps, order = load(f"{name}_train")
    s, model = small(ref, config, length, rows=config["batch"])
    fill(model, convert(golden, "param/"))

    def numbers(tensor_of):
        theirs = originals(
            {n: tensor_of(p).detach().numpy() for n, p in model.named_parameters()}, golden, convert
        )
        return [theirs[n] for n in order["param_names"]]

    start = numbers(lambda p: p)
    for i, loss in train(model, s, steps, windows):
        assert relative(loss, steps["loss"][i].item()) < 1e-11
        norms = [np.linalg.norm(g) for g in numbers(lambda p: p.grad)]
        assert np.allclose(norms, steps["grad_l2"][i], rtol=1e-10, atol=1e-14)
    final = numbers(lambda p: p)
    assert np.allclose(
        [np.linalg.norm(b - a) for a, b in zip(start, final)], steps["param_delta_l2"], rtol=0, atol=1e-10
    )
    assert np.allclose(
        [b @ np.cos(np.arange(b.size)) for b in final], steps["param_cosdot"], rtol=0, atol=1e-10
    )


# ----- schedules

@pytest.mark.feature("optim.muon.momentum_warmup", "schedule")
@pytest.mark.parametrize("name, ref", [("record05_optim", "short/5"), ("record12_optim", "short/12"),
                                       ("record20_optim", "short/20")])
def test_schedules_at_every_step(name, ref):
    golden, _ = load(name)
    s = deltas.resolve(ref).settings
    plans = schedule.plan(s)
    assert np.array_equal([p.lr_factor for p in plans], golden["schedule/lr_factor"])
    assert np.allclose([p.momentum for p in plans], golden["schedule/muon_momentum"], rtol=1e-15, atol=0)
    if ref == "short/20":
        windows = [schedule.windows(s, i) for i in range(len(plans) + 1)]
        assert np.array_equal([w.long.blocks for w in windows], golden["schedule/window"])
        assert all(w.short.blocks == max(1, w.long.blocks // 2) for w in windows)


@pytest.mark.feature("optim.muon.momentum_warmup", "model.attn.window.final",
                     "model.attn.window.final_last_layer")
def test_schedules_of_records_28_and_34_at_every_step():
    golden, _ = load("schedules")
    for key, s in (("r28", deltas.resolve("short/28").settings),
                   ("r34", deltas.resolve("short/34").settings)):
        plans = schedule.plan(s)
        assert np.array_equal([p.lr_factor for p in plans], golden[f"{key}/lr"])
        assert np.allclose([p.momentum for p in plans], golden[f"{key}/momentum"], rtol=1e-15, atol=0)
        windows = [schedule.validation_windows(s, i) for i in range(len(plans) + 1)]
        blocks = [w.long.blocks or (w.long.tokens - 1) // 128 for w in windows]
        assert np.array_equal(blocks, golden[f"{key}/ws"])
        if key == "r34":
            assert np.array_equal([(w.last.tokens - 1) // 128 for w in windows], golden["r34/ws_final_layer"])
