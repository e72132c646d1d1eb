"""Laws of what mixes streams and tokens (records 58 to 92), each against the formula written out in a few
lines.

Where only the wiring is in question, attention and MLP of a model are cheap functions of their inputs.
"""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import schedule
from common.errors import UserError
from kernels.qk_rotary import offset_keys
from layers.compose import composed, excluded
from layers.specs import layer_specs
from model import GPT, segments
from optim import Optimizer
from sample import generate
from settings import deltas
from settings.optim import TailAverage
from small_models import BOS, Toy, build, plan, tokens, update
from system.tail_average import TailAverages
from updates import adam, views
from updates.views import Views


def same(a, b, within=1e-12):
    """Equal up to float64 rounding."""
    return torch.allclose(a, b, rtol=0, atol=within)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.no_grad()
def logits(model, x, **more):
    """Logits with the windows of the first step."""
    windows = schedule.windows(model.settings, 0)
    model.update_yarn(windows)
    return model(x, context=model.context(x, BOS, windows, **more))


def copied(model, other, **names):
    """`model` with the parameters of `other` that it has; names: {ours: theirs} where they differ."""
    theirs = dict(other.named_parameters())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if theirs.get(name) is not None and theirs[name].shape == p.shape:
                p.copy_(theirs[name])
    return model


# ----- the wiring of the stream

def norm(x):
    return F.rms_norm(x, x.shape[-1:], eps=1.1920929e-07)


def wired(ref, *sets):
    """(model whose branches are functions of their inputs; x0 and bigram of its text; branches by (site,
    layer); the stream before the final norm)."""
    model, x = build(ref, "numerics.norm_eps=1.1920929e-07", *sets), tokens()
    model.requires_grad_(False)
    branches = {}
    for i, block in enumerate(model.blocks):
        for k, site in enumerate(("attn", "mlp", "parallel")):
            if (part := getattr(block, site)) is not None:
                weight = random(48, 48, seed=3 * i + k) / 4
                branches[site, i] = lambda h, *_, weight=weight, **__: torch.tanh(h @ weight)
                part.forward = branches[site, i]
    seen = []
    model.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    logits(model, x)
    table = model.lm_head.weight if model.tied else None
    return model, model.embed(x, 0, table), model.bigram(x), branches, seen[0]


def factors(model):
    """(r, p, p of the second lane, x0 factor, bigram factor) of the settings' layers, by (site, layer)."""
    r, s = model.residual, model.settings
    whole = [(site, i) for i in range(11) for site in ("attn", "mlp") if (site, i) != ("attn", 6)]
    posted = [(site, i) for site, i in whole
              if site == "mlp" or i >= s.model.residual.sublayers.attn_post_from]
    resid = dict(zip(whole, r.resid_lambdas.value, strict=True))
    post = defaultdict(lambda: 1.0, zip(posted, r.post_lambdas.value, strict=True))
    lane = {} if r.lane_start is None else dict(
        zip([key for key in whole if key[1] >= 7], r.lane_lambdas.value, strict=True)
    )
    attending = [i for i in range(11) if i != 6]
    x0, bigram = (dict(zip(attending, module.value, strict=True))
                  for module in (r.x0_lambdas, r.bigram_lambdas))
    return resid, post, lane, x0, bigram


def skip_gate(model, x0):
    """(R, T, 1) of the one skip, which reads 12 channels of the embedding."""
    r = model.residual
    gate = 2 * torch.sigmoid((x0[..., :12] @ r.skip_gate[0])[..., None])
    return torch.sigmoid(r.skip_weights.value[0]) * gate


@pytest.mark.feature("model.residual.lanes", "model.residual.sublayers",
                     "model.residual.unet_skips.after_attention")
@pytest.mark.parametrize("ref", ["short/73", "short/74"])
def test_two_lanes(ref):
    model, x0, pairs, branch, found = wired(ref)
    r, p, p1, of_x0, of_pairs = factors(model)
    first = ref == "short/74"
    a = x0 + of_pairs[0] * pairs
    for i in range(11):
        if i == 7:
            b = a
        if i == 6:
            a = a + skip_gate(model, x0) * skip
        else:
            y, inject = branch["attn", i](norm(a)), of_x0[i] * x0
            if i:
                inject = inject + of_pairs[i] * pairs
            if not first:
                y, inject = y + inject, 0.0
            a = r["attn", i] * a + p["attn", i] * y + inject
            if i >= 7:
                b = r["attn", i] * b + p1["attn", i] * y
        if i == 3:
            skip = a
        m = branch["mlp", i](norm(a if i < 7 else b))
        a = r["mlp", i] * a + p["mlp", i] * m
        if i >= 7:
            b = r["mlp", i] * b + p1["mlp", i] * m
        if i == 7:
            back = a
    assert same(found, (a + b) / 2 - model.residual.backout.value * back)


@pytest.mark.feature("model.attn.saved_input", "model.residual.sublayers", "model.embed.bigram.in_x0",
                     "model.residual.unet_skips.after_attention")
@pytest.mark.parametrize("setting", [
    "", "model.embed.bigram.in_x0=true", "model.residual.unet_skips.after_attention=true",
    "model.residual.sublayers.attn_post_from=7", "model.attn.saved_input=4"
])
def test_one_stream_whose_last_layers_attend_to_a_saved_one(setting):
    model, x0, pairs, branch, found = wired("short/77", *([setting] if setting else []))
    r, p, _, of_x0, of_pairs = factors(model)
    x, saved = x0 + of_pairs[0] * pairs, {}
    if "in_x0" in setting:
        x0 = x
    last = 4 if "saved_input" in setting else 7
    for i in range(11):
        if i == 6:
            x = x + skip_gate(model, x0) * saved["attn" if "after_attention" in setting else "mlp", 3]
        else:
            y = branch["attn", i](norm(x if i <= last else saved["mlp", last]))
            x = r["attn", i] * x + p["attn", i] * y + of_x0[i] * x0
            if i:
                x = x + of_pairs[i] * pairs
        saved["attn", i] = x
        saved["mlp", i] = x = r["mlp", i] * x + p["mlp", i] * branch["mlp", i](norm(x))
    assert same(found, x - model.residual.backout.value * saved["mlp", 7])


def net(module, x, scale):
    """{column: coefficients (R, T, width)} of a network that reads the stream x."""
    hidden = x @ module.w1.T
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    values = scale * (hidden @ module.w2.T + module.bias)
    found, at = {}, 0
    for n, column in enumerate(module.columns):
        found[column.name], at = values[..., at:at + column.width], at + column.width
        if module.by_group is not None:
            group = scale * torch.einsum("rth,gh->rtg", hidden, module.by_group[n])
            found[column.name] = (found[column.name] + group).repeat_interleave(x.size(-1) // 12, -1)
    return found


@pytest.mark.feature("model.token_gates", "model.residual.mudd", "model.residual.mudd.groups",
                     "model.residual.mudd.mlp_input", "model.residual.mudd.attn_input",
                     "model.embed.bigram.layers", "model.residual.x0_mix.layers")
def test_coefficients_per_token_of_record_92():
    """Everything but what attention does with its coefficients, which the values and heads' laws have."""
    model, x0, pairs, branch, found = wired("short/92")
    res, scale = model.residual, model.residual.token_scale[0]
    rows = [F.embedding(tokens(), table) for table in model.values.tables]
    rows = dict(zip((1, 2, 8, 10), rows))
    kept = [(site, i) for i in range(10) for site in ("attn", "mlp") if (site, i) != ("attn", 6)]
    whole = [(site, i) for site, i in kept if (site, i) in branch]
    r, p = (dict(zip(keys, coef.value, strict=True)) for keys, coef in
            ((kept, res.resid_lambdas), (whole, res.post_lambdas)))
    gates = net(res.early_gates, x0, scale)
    x = start = x0 + gates["bigram.0"] * pairs
    saved = {}
    for i in range(10):
        if i == 4:
            gates |= net(res.late_gates, x, scale)
        if i == 6:
            x = x + torch.sigmoid(res.skip_weights.value[0]) * gates["skip.0"] * saved[3]
        else:
            read = norm(saved[7] if i > 7 else x)
            x = r["attn", i] * x
            if ("attn", i) in branch:
                x = x + p["attn", i] * branch["attn", i](read)
        if i in (0, 1, 2, 4, 5, 7):
            x = x + gates[f"x0.{i}"] * x0
        if i in (1, 4, 5, 9):
            x = x + gates[f"bigram.{i}"] * pairs
        h = norm(x)
        x = r["mlp", i] * x
        if i != 7:
            x = x + p["mlp", i] * branch["mlp", i](h)
        if i == 8:
            x = x + p["mlp", i] * branch["parallel", i](h)
        saved[i] = x
    mu = net(res.mudd_layer_net, x, 0.1)
    read = norm(saved[7])
    x = (1 + mu["in.x"]) * x + mu["in.start"] * start + mu["in.cached"] * saved[7]
    x = mu["attn.x"] * x + mu["attn.branch"] * branch["attn", 10](read) + mu["attn.start"] * start \
        + mu["attn.bigram"] * pairs
    h = norm(x)
    x = mu["mlp.x"] * x + mu["mlp.branch"] * branch["mlp", 10](h)
    mu = net(res.mudd_out_net, x, 0.1)
    sources = {"start": start, "mlp_in.10": h, "attn_in.10": read}
    sources |= {f"saved.{i}": saved[i] for i in (7, 9, 3)} | {f"table.{i}": rows[i] for i in rows}
    assert sources.keys() == mu.keys()
    assert same(found, x + sum(mu[name] * source for name, source in sources.items()))


@pytest.mark.feature(
    "model.residual.sublayers.learned", "model.embed.bigram.learned", "model.attn.xsa.learned"
)
@pytest.mark.parametrize("ref, section, init, labels", [
    ("short/77", "model.residual.sublayers", "post=0.75", ["optim.post_lambdas"]),
    ("short/73", "model.residual.lanes", "attn_post=1.25", ["optim.post_lambdas"]),
    ("short/62", "model.embed.bigram", "init=0.125", []),
    ("short/82", "model.attn.xsa", "init=0.375", ["optim.xsa"])
])
def test_a_coefficient_that_is_not_learned_is_its_initial_value(ref, section, init, labels):
    sets = [f"{section}.{init}", "model.residual.sublayers.resid=1.125"]
    if ref == "short/62":
        sets.pop()
    off = section.replace("lanes", "sublayers") + ".learned=false"
    learned = build(ref, *sets, scramble=False)
    fixed = build(ref, *sets, off, scramble=False, without=labels)
    assert fixed.num_parameters() < learned.num_parameters()
    for model in (learned, fixed):
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.data += 0.3 * random(*p.shape, seed=len(name))
    assert same(logits(learned, tokens()), logits(fixed, tokens()))


# ----- hashed rows

@pytest.mark.feature("model.embed.bigram.dim", "model.embed.bigram.signs")
def test_a_narrow_bigram_table_is_a_wide_one_with_zeros():
    narrow, x = build("short/83"), tokens()
    wide = copied(build("short/83", "model.embed.bigram.dim=false"), narrow)
    width = narrow.bigram.table.size(1)
    assert width < wide.bigram.table.size(1) == 48
    wide.bigram.table.data.zero_()[:, :width] = narrow.bigram.table.data
    wide.bigram.signs[:, :width] = narrow.bigram.signs
    assert same(logits(narrow, x), logits(wide, x))
    rows, before = narrow.bigram(x), x.roll(1, 1)
    assert not rows[..., width:].any()
    signs = narrow.bigram.signs
    assert signs.abs().eq(1).all() and abs(signs.mean()) < 0.01
    table, last = narrow.bigram.table, len(narrow.bigram.table) - 1
    for t in (0, 2, 9):  # in numbers this small nothing wraps around
        row = last if t == 0 else (36313 * x[1, t] ^ 27191 * before[1, t]) % last
        sign = 0 if t == 0 else (before[1, t] ^ x[1, t]) % len(signs)
        assert torch.equal(rows[1, t, :width], table[row] * signs[sign])


# ----- heads

@pytest.mark.feature("model.init.mimetic")
@pytest.mark.parametrize("ref", ["short/64", "short/92"])
def test_mimetic_values_and_outputs_are_opposite_identities_with_noise(ref):
    """The variant of record 64's log: sqrt(0.05) I and deviation 0.01; queries and keys stay."""
    plain, mimetic = build(ref, scramble=False), build(ref, "model.init.mimetic={}", scramble=False)
    for one, other in zip(plain.blocks, mimetic.blocks):
        if other.attn is None:
            continue
        (qk, _), (also, vo) = (
            (x.attn.qk, torch.stack([x.attn.v, x.attn.o])) if x.attn.apart else x.attn.qkvo.chunk(2)
            for x in (one, other)
        )
        assert torch.equal(qk, also)
        noise = vo - 0.05 ** 0.5 * torch.stack([torch.eye(48), -torch.eye(48)]).double()
        assert noise.std().item() == pytest.approx(0.01, rel=0.05) and noise.mean().abs() < 0.001
    with pytest.raises(UserError, match="model.init.mimetic is of v and o"):
        deltas.resolve("variants/5", with_=["model.init.mimetic"])


@pytest.mark.feature("model.attn.xsa")
def test_xsa_takes_away_what_lies_along_a_token_s_own_value():
    """By length and direction (records 82 to 85) and by the square of the length (record 86 on)."""
    y, v, strength = random(2, 5, 3, 8), random(2, 5, 3, 8, seed=1), random(2, 5, 3, seed=2)
    direction = v / v.norm(dim=-1, keepdim=True)
    along = (y * direction).sum(-1, keepdim=True) * direction
    assert same(excluded(y, v, strength), y - strength[..., None] * along)
    assert same((excluded(y, v, torch.ones(3)) * v).sum(-1), torch.zeros(2, 5, 3).double())
    tiny = 1e-6 * v  # below the least square
    assert same(excluded(y, tiny, torch.ones(3)), y - (y * tiny).sum(-1, keepdim=True) / 1e-8 * tiny)


@pytest.mark.feature("model.attn.xsa")
def test_xsa_of_strength_zero_is_off_and_its_strength_passes_a_tanh():
    on, off, x = build("short/82"), build("short/82", without=["model.attn.xsa"]), tokens()
    layers = [i for i, block in enumerate(on.blocks) if block.attn is not None and block.attn.xsa is not None]
    assert layers == [1, 3, 4, 7, 8, 10]
    copied(off, on)
    assert not same(logits(on, x), logits(off, x))
    attn, y, v = on.blocks[1].attn, random(1, 4, 6, 8), random(1, 4, 6, 8, seed=1)
    assert same(attn.exclude(y, v, None), excluded(y, v, torch.tanh(attn.xsa.value.detach())))
    for i in layers:
        on.blocks[i].attn.xsa.value.data.zero_()
    assert same(logits(on, x), logits(off, x))


@pytest.mark.feature("model.attn.compose")
@pytest.mark.parametrize("window, new", [(4, 13), (1, 13), (50, 13), (10 ** 9, 13), (4, 1), (20, 1)])
def test_composed_heads_are_the_loop_over_queries_and_keys(window, new):
    q, k, v = (random(2, 13, 3, 4, seed=i) for i in range(3))
    w1, w2 = random(2, new, 3, seed=4), random(2, new, 3, seed=5)
    documents = torch.tensor([[0] * 5 + [1] * 8, [0] * 13])
    expected = torch.zeros(2, new, 3, 4, dtype=torch.float64)
    for r in range(2):
        for n, t in enumerate(range(13 - new, 13)):
            keys = [u for u in range(t + 1) if t - u < window and documents[r, u] == documents[r, t]]
            p = torch.stack([(0.3 * (k[r, keys, h] @ q[r, t, h])).softmax(0) for h in range(3)])
            share = w1[r, n] / torch.sqrt((w1[r, n] ** 2).mean() + 1e-6)
            a = (share[:, None] * p).sum(0)
            for h in range(3):
                expected[r, n, h] = w2[r, n, h] * (a @ v[r, keys, h])
    assert same(composed(q[:, 13 - new:], k, v, w1, w2, window, documents, 0.3), expected)


@pytest.mark.feature("model.attn.paired_layers")
def test_paired_heads_are_streams_of_two_positions_a_token():
    """Heads h and h + H/2 alternate in one sequence; their rotary positions go by h mod 2 (record 58)."""
    model = build("short/62", without=["model.attn.document_mask"])
    attn, rotary = model.blocks[0].attn, model.rotaries[0]
    q, k, v = (random(1, 7, 6, 8, seed=i) for i in range(3))
    turned = rotary(random(1, 14, 1, 8, seed=3))
    one = random(1, 14, 1, 8, seed=3).unflatten(1, (7, 2))[:, :, :, 0]  # (1, T, 2, K): one vector a position
    heads = attn.rotate(one.repeat(1, 1, 3, 1), rotary, 0)
    assert all(same(heads[:, :, h], turned[:, h % 2::2, 0]) for h in range(6))
    found = attn.attend(
        q, k, v, model.context(tokens(1, 7), BOS, schedule.windows(model.settings, 0)).layers[0], 0, None
    )
    window = schedule.windows(model.settings, 0).short.tokens
    assert window - 1 == 8  # rows of two a token, so 8 positions are 4 tokens
    for h in range(6):
        for t in range(7):
            at = 2 * t + h // 3
            seen = [u for u in range(at + 1) if at - u < window]
            keys = torch.stack([k[0, u // 2, h % 3 + 3 * (u % 2)] for u in seen])
            values = torch.stack([v[0, u // 2, h % 3 + 3 * (u % 2)] for u in seen])
            scale = (
                1 / math.sqrt(8) if model.rotary_tables.scales[0] is None else model.rotary_tables.scales[0]
            )
            assert same(found[0, t, h], (scale * (keys @ q[0, t, h])).softmax(0) @ values)


@pytest.mark.feature("model.attn.key_offset_halves", "model.attn.rope.adjacent", "model.attn.key_offset")
def test_the_key_offset_moves_channels_that_rotate_until_record_62():
    """Channels 32 to 63 and 96 to 127 of 128, of which adjacent pairs rotate the first."""
    for ref, moved in (("short/57", [*range(32, 64), *range(96, 128)]),
                       ("short/61", [*range(32, 64), *range(96, 128)]), ("short/62", [*range(64, 128)])):
        s = deltas.resolve(ref, sets=["system.precision=float64"]).settings
        spec = layer_specs(s)[3].attn
        keys = random(1, 4, 1, 128)
        adjacent = build(ref).blocks[3].attn.offset_adjacent
        found = offset_keys(keys, spec.key_offset, adjacent)
        wanted = keys.clone()
        wanted[:, 1:, :, moved] = keys[:, :-1][..., moved]
        assert torch.equal(found, wanted), ref


@pytest.mark.feature("model.attn.qk_dim")
def test_queries_and_keys_of_96_channels():
    """48 channels rotate, in adjacent pairs; the key offset moves the other 48 (record 90)."""
    s = deltas.resolve("short/90", sets=["system.precision=float64", "model.num_layers=11"]).settings
    with torch.device("meta"):
        whole = GPT(s)
    attn = whole.blocks[3].attn
    assert attn.qk.shape == (2, 576, 768) and attn.v.shape == attn.o.shape == (768, 768)
    assert whole.rotary_tables.scales[3] == s.model.attn.scale == pytest.approx(0.1154700538)
    rotary = type(whole.rotaries[0])(s, layer_specs(s)[3].attn.rotary)
    f, _ = rotary.frequencies(())
    assert same(f[:24], torch.tensor([1024 ** (-j / 23) for j in range(24)], dtype=torch.float64))
    assert f.shape == (48,) and not f[24:].any() and rotary.rope.adjacent
    keys = random(1, 4, 1, 96)
    found = offset_keys(keys, attn.spec.key_offset, attn.offset_adjacent)
    assert torch.equal(found[..., :48], keys[..., :48])
    assert torch.equal(found[:, 1:, :, 48:], keys[:, :-1, :, 48:])


@pytest.mark.feature("model.attn.narrow")
def test_narrow_heads_read_the_first_channels_of_wide_ones():
    """Rows of Q, K and V and columns of O that no head reads change nothing; the others do."""
    model, x = build("short/92"), tokens()
    before = logits(model, x)
    for i, block in enumerate(model.blocks):
        spec = block.attn and block.attn.spec
        assert (spec is not None and spec.qk_stored is not None) == (i in (0, 1, 2, 5, 8))
        assert (spec is not None and spec.v_stored is not None) == (i in (1, 8))
        if i in (0, 1, 2, 5, 8):
            assert spec.rotary.width == 4 and spec.rotary.turning == 2 and spec.rotary.short
            block.attn.qk.data.view(12, 8, 48)[:, 4:] = 7.0
        if i in (1, 8):
            block.attn.v.data.view(6, 8, 48)[:, 4:] = 7.0
            block.attn.o.data.view(48, 6, 8)[..., 4:] = 7.0
    assert torch.equal(logits(model, x), before)
    model.blocks[1].attn.o.data.view(48, 6, 8)[..., 3] += 0.1
    assert not same(logits(model, x), before)


@pytest.mark.feature("model.attn.segment")
def test_segments_cut_documents_in_training_only():
    begins = torch.tensor([[0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0], [0] * 12], dtype=torch.bool)
    wanted = []
    for row in begins.tolist():
        start, number, numbers = 0, 0, []
        for t, begin in enumerate(row):
            start = t if begin else start
            number += begin or (t - start) % 3 == 0
            numbers.append(number)
        wanted.append(numbers)
    assert segments(begins, 3).tolist() == wanted
    cut, whole = (build("short/92", f"model.attn.segment={n}") for n in ("3", "false"))
    x = tokens()
    x[x == BOS] = 0
    x[0, 4] = BOS
    numbers = segments(x == BOS, 3)
    assert same(logits(cut, x), logits(whole, x, documents=numbers))
    assert not same(logits(cut, x), logits(whole, x))
    assert same(logits(cut.eval(), x), logits(whole.eval(), x))


# ----- initial values

@pytest.mark.feature("model.init.o_bound")
def test_the_output_projection_starts_like_the_others():
    """Uniform with half the standard deviation of 1 / sqrt(D) (record 64); off: zero."""
    model, off = (build(ref, scramble=False) for ref in ("short/64", "short/63"))
    q, k, v, o = model.blocks[2].attn.qkvo.detach()
    for w in (q, k, v, o):
        assert abs(w.std() * math.sqrt(48) / 0.5 - 1) < 0.05
        assert 0.98 < w.abs().max() * math.sqrt(48) / (0.5 * math.sqrt(3)) <= 1 + 1e-6
    assert not off.blocks[2].attn.qkvo[3].any() and not model.blocks[2].mlp.c_proj.any()


@pytest.mark.feature("optim.muon.head_pairs", "model.attn.narrow")
@pytest.mark.parametrize("ref", ["short/80", "short/92"])
def test_q_k_v_and_o_begin_with_the_same_values_however_they_are_stored(ref):
    one, apart = (build(x, "model.attn.drop_layers=[6]", "model.mlp.drop_layers=[]", scramble=False)
                  for x in ("short/79", ref))
    for a, b in zip(one.blocks, apart.blocks):
        if b.attn is not None:
            assert torch.equal(a.attn.qkvo, torch.stack([*b.attn.qk, b.attn.v, b.attn.o]))


def starts(ref, *sets):
    """{network and column: its coefficients in an initial model}, which are the same for every token."""
    model = build(ref, *sets, scramble=False)
    found = {}
    for names in model.residual.nets.values():
        for name in names:
            module = getattr(model.residual, name)
            values = module(random(1, 1, 48, seed=3), module.bias.new_tensor(0.1))
            assert module.w1.abs().max() <= 48 ** -0.5 and module.w1.std() > 0.5 * 48 ** -0.5
            found |= {f"{name}.{column}": value.flatten().tolist() for column, value in values.items()}
    return model, found


@pytest.mark.feature("model.residual.mudd", "model.token_gates", "model.attn.compose")
@pytest.mark.parametrize("ref", ["short/81", "short/89", "short/92"])
def test_first_coefficients_per_token(ref):
    """Of the notes on the originals: attention gates 0.25, skips 0.5, bigrams 0.05, w1 of composed heads
    1."""
    model, found = starts(ref)
    wanted = {"table": 2.0, "attn.x": 1.1 ** 0.5, "mlp.x": 1.1 ** 0.5, "attn.branch": 1.0, "mlp.branch": 1.0,
              "attn.bigram": 0.05, "saved.7": -0.5}
    if ref != "short/81":
        assert model.residual.token_scale.item() == pytest.approx(0.1)
        wanted |= {"attn.3": 0.25, "attn.10": 0.25, "skip.0": 0.5, "w1.10": 1.0}
        wanted |= {f"bigram.{i}": 0.05 for i in range(10)}
    for name, values in found.items():
        value = wanted.get(name.partition(".")[2], 0.0)
        assert values == pytest.approx([value] * len(values), abs=1e-6), name
    widths = {name.partition(".")[2]: len(values) for name, values in found.items()}
    assert widths["table"] == 2 and all(widths.get(name, 6) == 6 for name in ("xsa.1", "attn.3", "w2.10"))
    lanes = build("short/73", scramble=False).residual.lane_lambdas.value.tolist()
    assert lanes == [1.5, 1.0] * 4


# ----- updates

@pytest.mark.feature("optim.muon.normuon.o_input", "optim.muon.head_pairs")
def test_record_90_updates_o_as_its_transpose():
    s = deltas.resolve("short/90", sets=["system.precision=float64"]).settings
    before = deltas.resolve("short/89", sets=["system.precision=float64"]).settings
    o, g = random(12, 12), random(2, 12, 12, seed=1)
    model = Toy(o=(o, "matrix", "qkvo", views.o(s)), turned=(o.T, "matrix", "qkvo", Views(variance_axis=-1)),
                old=(o, "matrix", "qkvo", views.o(before)))
    optimizer = Optimizer(model, s)
    for i in range(2):
        update(optimizer, model, {"o": g[i], "turned": g[i].T.contiguous(), "old": g[i]}, plan(i))
    assert same(model.o, model.turned.T, 1e-10) and not same(model.o, model.old, 1e-6)


@pytest.mark.feature("optim.value_embed.row_moment", "optim.bigram.row_moment")
@pytest.mark.parametrize("label, rows", [("value_embed", None), ("bigram", None), ("bigram", 3)])
def test_row_wise_adam_row_by_row(label, rows, monkeypatch):
    """A large table goes through in pieces of some rows."""
    if rows is not None:
        monkeypatch.setattr(adam, "TABLE_CHUNK", rows * 6)
    sets = ["system.precision=float64", f"optim.{label}.row_moment=true", f"optim.{label}.slower=false"]
    s = deltas.resolve("short/92", sets=sets).settings
    p, g = random(4, 6), random(3, 4, 6, seed=1)
    g[:, 2] = 0.0
    model = Toy(table=(p, "embed", label))
    optimizer, moment = Optimizer(model, s), [0.0] * 4
    rule = optimizer.banks[0].rule
    for i in range(3):
        update(optimizer, model, {"table": g[i]}, plan(i, lr_factor=0.5))
        rate = 0.5 * rule.lr
        for row in range(4):
            moment[row] = rule.beta2 * moment[row] + (1 - rule.beta2) * float((g[i, row] ** 2).mean())
            root = math.sqrt(moment[row] / (1 - rule.beta2 ** (i + 1)))
            for c in range(6):
                u = rate * g[i, row, c] / (root + rule.eps / math.sqrt(1 - rule.beta2 ** (i + 1)))
                decay = rate * rate * rule.cautious * p[row, c] if u * p[row, c] > 0 else 0.0
                p[row, c] -= u + decay
    assert same(model.table, p) and torch.equal(model.table[2], random(4, 6)[2])


def average(history, ticks):
    """Of weights {step: (tensor)}, with the rate of each tick after the first, which takes the weights."""
    (first, _), *others = sorted(ticks.items())
    value = history[first]
    for step, rate in others:
        value = (1 - rate) * value + rate * history[step]
    return value


@pytest.mark.feature("optim.tail", "optim.tail.unread_mlp_square")
def test_tail_averages_are_the_replay_of_the_last_steps():
    """The last of 40 steps, in which every weight moves; head and embedding are due in odd ones, tables in
    every fourth. Up to step 27 the embedding is the head's weight, and its own parameter out of use."""
    model, unread = build("short/92").requires_grad_(False), 40.0
    told = TailAverage(long=16, short=12, unread_mlp_square=unread)
    averages = TailAverages(model, told, 40)
    moved = {name: p for name, p in model.named_parameters() if p.label != "bigram"}
    noise = {name: random(*p.shape, seed=len(name)) for name, p in moved.items()}
    history = {name: {} for name in moved}
    for i in range(23, 40):
        for name, p in moved.items():
            p += math.cos(i * i) * noise[name].roll(i)
            history[name][i] = p.clone()
        if i <= 27:
            history["embed.weight"][i] = history["lm_head.weight"][i]
        if i == 27:
            model.embed.weight.copy_(model.lm_head.weight)
        due = {"value_embed"} if i % 4 == 3 else set()
        averages.after_update(SimpleNamespace(step=i, due=frozenset(due | ({"lm_head"} if i % 2 else set())),
                                              events=("untie",) if i == 27 else ()))
    rate = 2 / 17
    head = {24: 1.0, **dict.fromkeys(range(25, 39, 2), 1 - (1 - rate) ** 2), 39: rate}
    blend = dict.fromkeys((25, 29, 33, 37, 38, 39), 2 / 5)
    short = tables = dict.fromkeys((31, 35, 39), 4 / 53)
    found, banks = {}, {}
    for name, weights in history.items():
        kind, end = name.rpartition(".")[2], weights[39]
        if name in ("embed.weight", "lm_head.weight"):
            end, bank = end + 0.65 * (average(weights, head) - end), name
        elif kind == "qk":
            end, bank = end + 0.55 * (average(weights, blend) - end), "qk"
        elif kind in ("v", "o", "c_fc", "c_proj"):
            end, bank = average(weights, short), "vo" if kind in ("v", "o") else "mlp"
            end = end + 0.3493 * (average(weights, blend) - end)
        else:
            if name.startswith("values.tables"):
                end = average(weights, tables)
            bank = None
        found[name] = end
        banks.setdefault(bank, []).append(name)
    squares = lambda tensors: sum(x.square().sum() for x in tensors)
    last = {name: weights[39] for name, weights in history.items()}
    for bank, names in banks.items():
        factor = 1.0
        if bank is not None:
            more = unread if bank == "mlp" else 0.0  # of weights that are stored and do not move
            before, after = (squares(x[n] for n in names) + more for x in (last, found))
            factor = (before / after).sqrt()
        for name in names:
            assert same(model.get_parameter(name), factor * found[name]), name
    assert {*banks} == {"embed.weight", "lm_head.weight", "qk", "vo", "mlp", None}


# ----- generation

@pytest.mark.feature("model.attn.paired_layers", "model.attn.saved_input", "model.residual.lanes",
                     "model.residual.mudd", "model.token_gates", "model.attn.compose", "model.attn.narrow",
                     "model.embed.bigram", "model.embed.bigram.trigrams", "model.attn.key_offset")
@pytest.mark.parametrize("ref, prompt", [
    ("short/61", 5), ("short/62", 1), ("short/74", 5), ("short/83", 2), ("short/90", 9), ("short/92", 1)
])
def test_a_cache_holds_all_that_a_new_token_needs(ref, prompt):
    """Logits of tokens that come one by one equal those of the whole text, across documents and windows."""
    model, x = build(ref).eval(), tokens(2, 20)
    x[0, 11] = x[1, 3] = x[1, 16] = BOS
    windows, cache = schedule.windows(model.settings, 0), model.new_cache()
    whole = logits(model, x)
    found = []
    with torch.no_grad():
        for start, end in ((0, prompt), *((t, t + 1) for t in range(prompt, 20))):
            context = model.context(x[:, :end], BOS, windows, cached=start > 0)
            found.append(model(x[:, start:end], context=context, cache=cache))
    assert same(torch.cat(found, 1), whole, 1e-10) and (whole[:, 1:] - whole[:, :-1]).abs().max() > 0.1


@pytest.mark.parametrize("ref", ["short/89", "short/92"])
def test_the_cache_changes_no_token_over_several_contexts(ref):
    model = build(ref, "validation.seq_len=16", "validation.tokens=512").eval()
    options = dict(vocab_size=BOS + 1, bos=BOS, temperature=0.8, seed=3)
    texts = [generate(model, [BOS, 5, 9], 37, cached=cached, **options)[0] for cached in (True, False)]
    assert texts[0] == texts[1] and len(set(texts[0])) > 10
