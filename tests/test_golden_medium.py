"""The medium track equals the original code in float64: losses, gradients, updates, training, schedules."""

import dataclasses

import numpy as np
import pytest
import torch

import deltas
import golden_medium
import schedule
from golden_medium import block_windows, fixture
from golden_records import fill, load, originals, token_windows
from kernels.fp8_linear import fp8_linear
from model import count_parameters
from optim import Optimizer
from small_models import Toy, plan as step_plan, update
from test_golden import check_gradients, inputs, relative
from updates import mantissa, views


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


HISTORY = {1: (3,), 3: (3, 7), 6: (3, 7, 11, 13)}  # short window of record 18's cases -> sizes of the long one


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
    counts = {i: count_parameters(deltas.resolve(f"medium/{i}").settings) for i in (1, 2, 10, 16, 18)}
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
    head, records = deltas.resolve("medium/2").settings, [deltas.resolve(f"medium/{i}").settings for i in (2, 3)]
    assert config["scales"] == [2.0, 32.0, 65536 * head.numerics.fp8_head.grad]
    three = records[1].numerics.fp8_head  # record 3 divides by 0.5, 2^-9 and 2^-19
    assert (three.x, three.w, 65536 * three.grad) == (2.0, 2.0 ** 9, 2.0 ** 19)
    assert np.array_equal(out.detach().float().numpy(), golden["out"])
    assert np.array_equal(x.grad.float().numpy(), golden["grad_x"])
    assert np.abs(w.grad.numpy() - golden["grad_w"]).max() <= 4e-7 * np.abs(golden["grad_w"]).max()
