"""Laws of the medium track: its features are neutral when their numbers say so and do what their equations
say; tokens, scales and what can be switched off.

The numbers of the original code are in test_golden_medium.py.
"""

import numpy as np
import pytest
import torch

import schedule
from common.errors import UserError
from optim import Optimizer
from settings import Settings, deltas, schema
from settings.declare import lookup
from small_models import BOS, Toy, build, plan, tokens, update
from updates import views

RECORDS = [ref for ref in deltas.load_records() if ref.startswith("medium/")]
# billions of training tokens, by the published logs; record 11 has none
TOKENS = {1: 31.457, 2: 3.932, 3: 3.749, 4: 3.696, 5: 3.644, 6: 3.518, 7: 3.382, 8: 3.125, 9: 3.051,
          10: 2.983, 12: 2.957, 13: 2.941, 14: 2.931, 15: 2.910, 16: 2.902, 17: 3.125, 18: 2.177}


def logits(model, x):
    return model(x, context=model.context(x, BOS, schedule.windows(model.settings, 0)))


def same(a, b):
    return torch.allclose(a, b, rtol=0, atol=1e-12)


def shared(model, other):
    """The model with the parameters of the other, as far as it has those names."""
    theirs = dict(other.named_parameters())
    for name, p in model.named_parameters():
        p.data.copy_(theirs[name].data)
    return model


# ----- the lineage

@pytest.mark.parametrize("ref", [ref for ref in RECORDS if ref != "medium/11"])
def test_a_record_trains_on_as_many_tokens_as_its_log(ref):
    s = deltas.resolve(ref).settings
    total = schedule.tokens_before(s, s.schedule.steps)
    assert round(total / 1e9, 3) == TOKENS[int(ref.split("/")[1])] and s.validation.target == 2.92


def test_the_parents_are_those_on_which_the_originals_were_built():
    parents = {ref: record.parent for ref, record in deltas.load_records().items() if ref in RECORDS}
    assert parents == {
        "medium/1": None, "medium/2": "short/20", **{f"medium/{i}": f"medium/{i - 1}" for i in range(3, 17)},
        "medium/12": "medium/10", "medium/13": "medium/10", "medium/14": "medium/12", "medium/17": "medium/8",
        "medium/18": "short/55"
    }
    assert deltas.resolve("medium/17").settings == deltas.resolve("medium/8").settings
    assert deltas.resolve("medium/11").settings == deltas.resolve("medium/10").settings


@pytest.mark.parametrize("ref", [ref for ref in RECORDS if deltas.load_records()[ref].delta])
def test_each_line_of_a_delta_is_switched_off_or_refused_with_a_remedy(ref):
    record = deltas.load_records()[ref]
    for path in record.delta:
        try:
            s = deltas.resolve(ref, without=[path]).settings
        except UserError as error:
            assert path in str(error) and "\n" not in str(error), (path, error)
        else:
            assert lookup(s, path) != lookup(record.settings, path), path


@pytest.mark.parametrize("ref", ["medium/2", "medium/14", "medium/18"])
@pytest.mark.parametrize("scale", ["tiny", "micro"])
def test_a_scale_shrinks_the_record_s_own_sizes(ref, scale):
    full, s = deltas.resolve(ref).settings, deltas.resolve(ref, scale=scale).settings
    divisor = {"tiny": 8, "micro": 16}[scale]
    assert s.model.model_dim == 1024 // divisor and s.model.num_layers == 16 and s.model.attn.num_heads == 8
    assert s.model.attn.window.block == 8 and s.validation.target is None
    muon = s.optim.muon
    if muon.smoothing and muon.smoothing.start is not None:
        assert muon.smoothing.ramp_steps == round(3000 * s.schedule.steps / full.schedule.steps)
    if full.model.attn.window.growth == "cubic":
        assert s.model.attn.window.end == 3456 // 16


def test_no_setting_of_this_track_is_on_in_the_defaults():
    s = Settings()
    for path in ("model.embed.second", "model.residual.layer_reuse", "model.head.smear", "model.attn.v_norm",
                 "model.attn.raw_input", "optim.muon", "optim.embed2"):
        assert not lookup(s, path)


# ----- the model

@pytest.mark.feature("model.embed.second")
def test_a_second_embedding_is_neutral_at_zero_and_otherwise_enters_every_block():
    on = build("medium/10", seed=1)
    off, x = shared(build("medium/10", without=["model.embed.second"]), on), tokens()
    assert not same(logits(on, x), logits(off, x))
    mine, rows = on.residual.x02_lambdas.value, on.embed.second_rows(x)
    assert rows.square().mean(-1).sub(1).abs().max() < 0.02 and mine.shape == (16,)
    for layer in (0, 9):
        mine.data.zero_()
        mine.data[layer] = 0.7
        seen = {}
        for name, model in (("on", on), ("off", off)):
            hook = model.blocks[layer].attn_norm.register_forward_pre_hook(
                lambda module, args, name=name: seen.update({name: args[0]}))
            found = logits(model, x)
            hook.remove()
        assert torch.allclose(seen["on"], seen["off"] + 0.7 * rows, rtol=0, atol=1e-9)
        assert not same(logits(on, x), found)
    mine.data.zero_()
    assert same(logits(on, x), logits(off, x))


@pytest.mark.feature("model.residual.layer_reuse", "model.head.smear")
def test_the_head_reads_two_normed_streams_and_a_part_of_the_previous_token_s():
    model, x, seen = build("medium/16"), tokens(), []
    mine = model.residual.start

    def start(*given):
        stream = mine(*given)
        seen.append(stream)
        return stream

    model.residual.start = start
    model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    found = logits(model, x)
    stream, last, earlier = seen
    assert earlier is stream.sources["saved.11"]
    (a, b), c, eps = model.residual.layer_reuse.value, model.smear.lam.value, model.settings.numerics.norm_eps
    normed = [y / (y.square().mean(-1, keepdim=True) + eps).sqrt() for y in (last, earlier)]
    mixed = a * normed[0] + b * normed[1]
    rows = torch.stack([mixed[:, t] + (c * mixed[:, t - 1] if t else 0) for t in range(x.size(1))], 1)
    assert same(found, model.lm_head(rows, model.embed.weight))


@pytest.mark.feature("model.residual.layer_reuse", "model.head.smear")
def test_layer_reuse_and_smear_begin_neutral():
    x = tokens()
    on, off = (build("medium/16", without=off, scramble=False)
               for off in ((), ("model.residual.layer_reuse", "model.head.smear")))
    generator = torch.Generator().manual_seed(3)
    for name, p in off.named_parameters():
        if p.dim() > 1:
            p.data.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
            on.get_parameter(name).data.copy_(p.data)
    assert same(logits(on, x), logits(off, x)) and logits(on, x).abs().max() > 1


@pytest.mark.feature("model.embed.second.learned", "model.residual.layer_reuse.learned",
                     "model.head.smear.learned")
def test_coefficients_that_are_not_learned_are_their_initial_values():
    sets = ("model.embed.second.init=0.25", "model.residual.layer_reuse.y=0.5", "model.head.smear.init=0.125")
    learned = build("medium/16", *sets, scramble=False)
    fixed = build("medium/16", *sets, *(
        f"model.{path}.learned=false" for path in ("embed.second", "residual.layer_reuse", "head.smear")
    ), scramble=False)
    gone = set(dict(learned.named_parameters())) - set(dict(fixed.named_parameters()))
    assert gone == {"residual.x02_lambdas.value", "residual.layer_reuse.value", "smear.lam.value"}
    for p in (*learned.parameters(), *fixed.parameters()):
        if p.dim() > 1:
            p.data.normal_(generator=torch.Generator().manual_seed(p.numel()))
    x = tokens()
    assert same(logits(learned, x), logits(fixed, x))


@pytest.mark.feature("model.head.smear", "model.embed.second", "model.attn.v_norm")
def test_a_cached_token_has_the_logits_of_a_whole_pass():
    model, x = build("medium/16").eval(), tokens(rows=1, length=16)
    windows = schedule.windows(model.settings, 0)
    with torch.no_grad():
        whole, cache = model(x, context=model.context(x, BOS, windows)), model.new_cache()
        parts = [model(x[:, :13], context=model.context(x[:, :13], BOS, windows), cache=cache)]
        for i in range(13, 16):
            context = model.context(x[:, :i + 1], BOS, windows, cached=True)
            parts.append(model(x[:, i:i + 1], context=context, cache=cache))
    assert same(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("ref, sets, message", [
    ("medium/5", ["model.attn.raw_input=true"], "model.attn.raw_input needs model.attn.qk_norm and"),
    ("medium/16", ["model.residual.layer_reuse.layer=16"], "the model has layers 0 to 15"),
    ("short/77", ["model.embed.second=true"], "model.residual.sublayers replaces"),
    ("medium/4", ["optim.muon.polar_express=true"], "optim.muon.coefficients and optim.muon.polar_express"),
    ("medium/4", ["optim.muon.ns_steps=4"], "has 5 triples for optim.muon.ns_steps = 4")])
def test_contradictions_are_refused_with_their_reason(ref, sets, message):
    with pytest.raises(UserError) as refused:
        deltas.resolve(ref, sets=sets)
    assert message in str(refused.value) and "\n" not in str(refused.value)


# ----- the optimizer

@pytest.mark.feature("optim.muon.smoothing", "optim.muon.smoothing.start", "optim.muon.smoothing.lookahead")
@pytest.mark.parametrize("ref, ahead, decays", [
    ("medium/13", True, (0.5, 0.5 - 0.3 / 3, 0.5 - 2 * 0.3 / 3, 0.2, 0.2)), ("medium/14", False, (0.2,) * 5)])
def test_smoothed_updates_are_a_moving_average_of_those_without(ref, ahead, decays):
    """Without decay of the weights, which would tell the two runs' weights apart."""
    sets = ["system.precision=float64", "optim.muon.weight_decay=0.0", "optim.c_fc.weight_decay=0.0"]
    ramp = ["optim.muon.smoothing.ramp_steps=3"] if ahead else []
    smooth = deltas.resolve(ref, sets=[*sets, *ramp]).settings
    rough = deltas.resolve(ref, sets=sets, without=["optim.muon.smoothing"]).settings
    start = torch.randn(16, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ways = {}
    for name, s in (("smooth", smooth), ("rough", rough)):
        model = Toy(c_fc=(start, "matrix", "c_fc", views.c_fc(s)))
        optimizer, before, ways[name] = Optimizer(model, s), start, []
        for i in range(len(decays)):
            g = torch.randn(16, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(9 + i))
            update(optimizer, model, {"c_fc": g}, plan(i))
            ways[name].append((model.c_fc.detach() - before).numpy())
            before = model.c_fc.detach().clone()
    buffer = np.zeros((16, 4))
    for s, v, found in zip(decays, ways["rough"], ways["smooth"]):
        buffer = s * buffer + (1 - s) * v
        expected = s * buffer + (1 - s) * v if ahead else buffer
        assert np.abs(found - expected).max() <= 1e-12


def test_coefficients_of_newton_schulz_are_applied_in_their_order():
    own = deltas.resolve("medium/4", sets=["system.precision=float64"]).settings
    triples = own.optim.muon.coefficients
    assert triples[0] == (4.0848, -6.8946, 2.927) and len(triples) == 5
    start = torch.zeros(3, 3, dtype=torch.float64)
    g = torch.diag(torch.tensor([3.0, 4.0, 12.0], dtype=torch.float64))  # norm 13
    model = Toy(c_proj=(start, "matrix", "c_proj", views.c_proj(own)))
    update(Optimizer(model, own), model, {"c_proj": g}, plan())
    x = np.array([3.0, 4.0, 12.0]) * (1 - 0.9 ** 2)  # Nesterov: g + mu (M - g), M = (1 - mu) g
    x = x / (np.linalg.norm(x) + 1e-7)
    for a, b, c in triples:
        x = a * x + b * x ** 3 + c * x ** 5
    assert np.abs(np.diag(model.c_proj.detach()) + 0.025 * x).max() < 1e-14


@pytest.mark.feature("numerics.matrix_mantissa", "optim.muon.weight_decay")
def test_a_weight_with_a_mantissa_decays_like_a_float32_one():
    """Up to the rounding of one float32 number a step."""
    kept = deltas.resolve("medium/8").settings
    plain = deltas.resolve("medium/8", sets=["numerics.matrix=float32"],
                           without=["numerics.matrix_mantissa"]).settings
    start = torch.randn(8, 4, generator=torch.Generator().manual_seed(1)).bfloat16()
    ends = {}
    for name, s, dtype in (("kept", kept, torch.bfloat16), ("plain", plain, torch.float32)):
        model = Toy(c_fc=(start.to(dtype), "matrix", "c_fc", views.c_fc(s)))
        optimizer = Optimizer(model, s)
        for i in range(4):
            g = torch.randn(8, 4, generator=torch.Generator().manual_seed(5 + i)).bfloat16()
            update(optimizer, model, {"c_fc": g.to(dtype)}, plan(i))
        ends[name] = model.c_fc.detach().float()
    assert schema.plain(kept)["numerics"]["matrix_mantissa"]
    assert (ends["kept"] - ends["plain"]).abs().max() < 2 ** -7 * ends["plain"].abs().max()
    assert not torch.equal(ends["kept"], start.float())


@pytest.mark.feature("optim.embed2", "optim.embed2.slower", "optim.embed2.row_moment")
def test_the_second_table_takes_the_settings_of_a_table():
    sets = ["optim.embed2.row_moment=true", "optim.embed2.slower={start = 5, every = 4}"]
    optim = deltas.resolve("medium/18", sets=sets).settings.optim
    second, first = optim.group("embed", "embed2"), optim.group("embed", "embed")
    assert (second.rule, second.cadence(4), second.cadence(5), second.lr) == ("row_adam", 2, 4, 0.3)
    assert (first.rule, first.cadence(5), first.lr) == ("adamw", 2, 0.004)
