"""Our records equal the original code: loss, gradients, optimizer, training, schedules, in float64."""

import numpy as np
import pytest
import torch

import deltas
import model as model_module
import schedule
from golden_records import build, convert, fill, load
from model import GPT
from optim import Cut, Engine, adamw, muon_direction


def relative(a, b):
    return abs(a - b) / abs(b)


def check_gradients(model, golden, exceptions=()):
    for name, expected in convert(golden, "grad/", len(model.blocks)).items():
        got = model.get_parameter(name).grad.numpy()
        assert np.abs(got - expected).max() <= 1e-7 * np.abs(expected).max(), name


def test_record_5_loss_and_gradients():
    golden, config = load("record05")
    s, model = build("short/5", config)
    fill(model, golden)
    x, y = (torch.from_numpy(golden[f"in/{k}"]).long() for k in ("tokens", "targets"))
    losses = model(x, y)
    losses.mean().backward()
    assert relative(losses.mean().item(), golden["out/loss"].item()) < 1e-12
    assert np.abs(losses.detach().numpy().ravel() - golden["out/token_loss"]).max() < 1e-11
    check_gradients(model, golden)


def test_record_6_equals_record_5_in_exact_arithmetic():
    """QK norm on the other side of the rotation is the same function (eps aside)."""
    golden, config = load("record05")
    _, model = build("short/6", config)
    fill(model, golden)
    x, y = (torch.from_numpy(golden[f"in/{k}"]).long() for k in ("tokens", "targets"))
    assert relative(model(x, y).mean().item(), golden["out/loss"].item()) < 1e-12


@pytest.mark.parametrize("case, eps", [("eps_1.19e-7", 1.1920929e-07), ("eps_2^-7", 0.0078125)])
def test_record_5_with_other_norm_eps(case, eps):
    golden, config = load("record05")
    _, model = build("short/5", config, **{"numerics.norm_eps": eps})
    fill(model, golden)
    x, y = (torch.from_numpy(golden[f"in/{k}"]).long() for k in ("tokens", "targets"))
    assert relative(model(x, y).mean().item(), golden[f"case/{case}/loss_mean"].item()) < 1e-9


def record_12_attention(documents, window):
    """The visibility of record 12, which our record-11 model gets in place of plain causal attention."""
    t = torch.arange(len(documents))
    visible = (t[:, None] >= t) & (documents[:, None] == documents) & (t[:, None] - t < window)

    def attend(q, k, v):
        y = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=visible)
        return y.transpose(1, 2)

    return attend


def test_record_11_model_with_record_12_attention(monkeypatch):
    golden, config = load("record12")
    _, model = build("short/11", config, **{"data.seq_len": 640, "data.tokens_per_rank": 640})
    fill(model, golden)
    monkeypatch.setattr(model_module, "attend", record_12_attention(torch.from_numpy(golden["in/doc_id"]), 192))
    x, y = (torch.from_numpy(golden[f"in/{k}"]).long()[None] for k in ("tokens", "targets"))
    losses = model(x, y)
    losses.mean().backward()
    assert relative(losses.mean().item(), golden["out/loss"].item()) < 1e-12
    assert np.abs(losses.detach().numpy().ravel() - golden["out/token_loss"]).max() < 1e-11
    check_gradients(model, golden)
    assert model.value_mix.value.grad[0] == 0  # block 0 mixes v1 with itself


@pytest.mark.parametrize("name, ref, tensors", [("record05_optim", "short/5", {"wide": 0, "tall": 0, "square": 0}),
                                                ("record12_optim", "short/11", {"wide": 0, "tall": 0, "square": 0})])
def test_muon_states_after_four_calls(name, ref, tensors):
    golden, config = load(name)
    s = deltas.resolve(ref, sets=["system.precision=float64"]).settings
    assert s.optim.muon.lr == config["muon_lr"]
    for tensor in tensors:
        p = torch.from_numpy(golden[f"init/{tensor}"]).double()
        buffer = torch.zeros_like(p)
        for call in range(4):
            g = torch.from_numpy(golden[f"grad/{tensor}"][call]).double()
            update, buffer = muon_direction(g[None], buffer[None], momentum=golden["step_muon_momentum"][call].item(),
                                            cut=Cut(joint=False), scale=s.optim.muon.scale, ns=(5, s.numerics, False))
            buffer = buffer[0]
            p = p - s.optim.muon.lr * golden["step_lr_factor"][call].item() * update[0]
            for got, key in ((p, "param"), (buffer, "momentum_buffer")):
                expected = golden[f"fp64/{key}/{tensor}"][call]
                assert np.abs(got.numpy() - expected).max() <= 1e-12 * max(1, np.abs(expected).max()), (tensor, key, call)


@pytest.mark.parametrize("name, tensors", [("record05_optim", ["tied_table"]), ("record12_optim", ["table", "head", "scalar"])])
def test_adam_states_after_four_calls(name, tensors):
    golden, config = load(name)
    b1, b2 = config["adam_betas"]
    for tensor in tensors:
        p = torch.from_numpy(golden[f"init/{tensor}"]).double()
        m, v = torch.zeros_like(p), torch.zeros_like(p)
        for call in range(4):
            lr = config["adam_lr"][tensor] * golden["step_lr_factor"][call].item()
            p, m, v = adamw(p, torch.from_numpy(golden[f"grad/{tensor}"][call]).double(), m, v, lr=lr, decay=0.0, beta1=b1,
                            beta2=b2, eps=config["adam_eps"], correction1=1 - b1 ** (call + 1),
                            correction2=1 - b2 ** (call + 1), math_dtype=torch.float64)
            for got, key in ((p, "param"), (m, "exp_avg"), (v, "exp_avg_sq")):
                expected = golden[f"fp64/{key}/{tensor}"][call]
                assert np.abs(got.numpy() - expected).max() <= 1e-12 * max(1, np.abs(expected).max()), (tensor, key, call)


def test_six_training_steps_of_record_5():
    golden, config = load("record05")
    train, _ = load("record05_train")
    s, model = build("short/5", config)
    fill(model, golden)
    engine = Engine(model, s)
    for i, step in enumerate(train["step_index"]):
        engine.expect(last=True)
        loss = model(torch.from_numpy(train["tokens"][i]).long(), torch.from_numpy(train["targets"][i]).long()).mean()
        loss.backward()
        engine.collect()
        engine.step(schedule.plan(s)[step])
        assert relative(loss.item(), train["loss"][i].item()) < 1e-11


@pytest.mark.parametrize("name, ref, steps", [("record05_optim", "short/5", None), ("record12_optim", "short/11", [
    "schedule.steps=1875", "schedule.cooldown_steps=562"])])
def test_schedules_at_every_step(name, ref, steps):
    golden, _ = load(name)
    s = deltas.resolve(ref, sets=steps or []).settings
    plans = schedule.plan(s)
    assert np.array_equal([p.lr_factor for p in plans], golden["schedule/lr_factor"])
    assert np.allclose([p.momentum for p in plans], golden["schedule/muon_momentum"], rtol=1e-15, atol=0)
