"""Laws of latent attention: the paper's equations, the absorbed form, caches, parameters, Muon, and sampling
with it."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

import sample
import schedule
from kernels.attention import CAUSAL, Window, attend, attend_cached, view, visible
from kernels.newton_schulz import newton_schulz
from layers.attention import AttnMeta
from layers.latent import LatentAttention
from layers.specs import layer_specs
from model import GPT, without_values
from optim import Optimizer
from common.errors import UserError
from settings import deltas, schema
from settings.declare import lookup
from settings.model import query_dim, value_dim

BOS = 1256
# no two widths equal
ODD = ["model.attn.num_heads=3",
       "model.attn.latent={kv_lora_rank = 24, qk_nope_head_dim = 10, qk_rope_head_dim = 4, v_head_dim = 7}"]
# a record without latents
ONTO = {"with_": ["model.attn.latent={kv_lora_rank = 256, qk_nope_head_dim = 96, qk_rope_head_dim = 32, "
                  "v_head_dim = 128}"]}
ONTO_33 = {**ONTO, "without": ["model.attn.rope.half_truncated", "model.attn.value_embed"]}
ORDERS = [None, "before_rope", "after_rope"]


def settings(ref, *sets, precision="float64", scale="micro", **changes):
    return deltas.resolve(ref, scale=scale, sets=[f"system.precision={precision}", *sets], **changes).settings


def build(ref, *sets, **changes):
    """A small float64 model whose parameters are all random and non-zero, so that no term hides behind a
    zero."""
    model = GPT(settings(ref, *sets, **changes))
    model.initialise(0)
    for name, p in sorted(model.named_parameters()):
        p.data += 0.3 * torch.randn(
            p.shape, generator=torch.Generator().manual_seed(len(name)), dtype=p.dtype
        )
    return model


def qk_norm(order):
    """Changes that give this order of QK norm and rotation."""
    return (
        {"without": ["model.attn.qk_norm"]} if order is None
        else {"with_": [f'model.attn.qk_norm.order="{order}"']}
    )


def tokens(rows=2, length=24, seed=1):
    return torch.randint(1256, (rows, length), generator=torch.Generator().manual_seed(seed))


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ----- the paper's equations

def normed(x, eps):
    return x / (x.square().mean() + eps).sqrt()


def turned(x, t, base):
    """Channels j and j + n/2 of x (n,) as a complex number, turned by -t base^(-2j/n)."""
    a, b = x.chunk(2)
    angle = t * base ** (-2 * torch.arange(len(a), dtype=x.dtype) / len(x))
    z = torch.complex(a, b) * torch.polar(torch.ones_like(angle), -angle)
    return torch.cat([z.real, z.imag])


def by_the_paper(attn, s, x, scale):
    """DeepSeek-V2, arXiv 2405.04434, eq. 9-19, of one row x (T, D), by loops; plus QK norm and head gate."""
    a, eps, qk_eps = s.model.attn, s.numerics.norm_eps, s.numerics.qk_norm_eps  # 2^-7 in record 8
    heads, dims = a.num_heads, a.latent
    order = a.qk_norm.order if a.qk_norm else None

    def placed(still, turning, t):
        if order == "before_rope":
            still, turning = normed(torch.cat([still, turning]), qk_eps).split(
                [dims.qk_nope_head_dim, dims.qk_rope_head_dim]
            )
        whole = torch.cat([still, turned(turning, t, a.rope.base)])
        return normed(whole, qk_eps) if order == "after_rope" else whole

    c = [normed(attn.kv_down @ h, eps) for h in x]
    out = []
    for t, h in enumerate(x):
        from_ = h if dims.q_lora_rank is None else normed(attn.q_down @ h, eps)
        heads_out = []
        for i in range(heads):
            w_q = attn.q.view(heads, -1, len(from_))[i]
            q = placed((w_q @ from_)[:dims.qk_nope_head_dim], (w_q @ from_)[dims.qk_nope_head_dim:], t)
            w_uk, w_uv = (
                attn.k_up.view(heads, dims.qk_nope_head_dim, dims.kv_lora_rank)[i],
                attn.v_up.view(heads, dims.v_head_dim, dims.kv_lora_rank)[i],
            )
            keys = [placed(w_uk @ c[j], attn.k_rope @ x[j], j) for j in range(t + 1)]
            p = torch.stack([q @ k * scale for k in keys]).softmax(0)
            o = sum(p[j] * (w_uv @ c[j]) for j in range(t + 1))
            heads_out.append(o * torch.sigmoid(attn.gate[i] @ h[:a.gate.channels]) if a.gate else o)
        out.append(attn.o @ torch.cat(heads_out))
    return torch.stack(out)


@pytest.mark.feature("model.attn.latent", "model.attn.latent.q_lora_rank")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("query, gate, scale", [(None, False, None), (20, True, 0.3)])
def test_the_module_equals_the_papers_equations(order, query, gate, scale):
    sets = ODD + ([f"model.attn.latent.q_lora_rank={query}"] if query else [])
    sets = sets + (["model.attn.gate={channels = 5}"] if gate else [])
    model = build("variants/5", *sets, **qk_norm(order))
    attn, x = model.blocks[1].attn, noise(2, 9, 48)
    with torch.no_grad():
        y = attn(x, model.rotaries[0], None, AttnMeta(None, scale))
        expected = torch.stack(
            [by_the_paper(attn, model.settings, row, scale or 1 / math.sqrt(14)) for row in x]
        )
    assert (attn.q_down is not None, attn.gate is not None) == (bool(query), gate)
    assert y.abs().max() > 0.1 and (y - expected).abs().max() < 1e-12


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("absorbed", [False, True])
def test_shifting_all_positions_changes_nothing_and_the_distances_matter(order, absorbed):
    model = build("variants/5", *ODD, **qk_norm(order))
    attn, x = model.blocks[0].attn, noise(1, 8, 48)

    def run(rotary):
        cache = [None] * (3 if absorbed else 2)
        parts = [attn(x[:, :3], rotary, None, AttnMeta(None, None), cache)]
        return torch.cat(
            parts + [attn(x[:, t : t + 1], rotary, None, AttnMeta(None, None), cache) for t in range(3, 8)],
            dim=1,
        )

    with torch.no_grad():
        here, there = run(model.rotaries[0]), run(lambda y, at: model.rotaries[0](y, at + 11))
        # every distance doubled
        wider = run(lambda y, at: model.rotaries[0](y.repeat_interleave(2, dim=1), 2 * at)[:, ::2])
    assert (here - there).abs().max() < 1e-12 < 1e-3 < (here - wider).abs().max()


# ----- the absorbed form

def decoded(model, x, absorbed, windows, prompt=5):
    """(logits of each token given those before it, the first `prompt` at once and the others through a cache;
    the cache)."""
    cache = model.new_cache(absorbed)
    parts = [model(x[:, :prompt], context=model.context(x[:, :prompt], BOS, windows), cache=cache)]
    for t in range(prompt, x.size(1)):
        context = model.context(x[:, :t + 1], BOS, windows, cached=True)
        parts.append(model(x[:, t:t + 1], context=context, cache=cache))
    return torch.cat(parts, dim=1), cache


WINDOW = ["model.attn.document_mask=true", "model.attn.window={start = 6}"]
DECODING = {
    "QK norm before the rotation": ("variants/5", ODD, {}),
    "QK norm after it": ("variants/5", ODD, qk_norm("after_rope")),
    "no QK norm": ("variants/5", ODD, qk_norm(None)),
    "latent of the queries": ("variants/7", [], {}),
    "own softmax scale": ("variants/6", ["model.attn.scale=0.9"], {}),
    "documents and a window of tokens": ("variants/5", [*ODD, *WINDOW], {}),
    "documents and a window of blocks": (
        "variants/5",
        [*ODD, "model.attn.document_mask=true", 'model.attn.window={rule = "blocks", start = 8, block = 4}'],
        {},
    ),
    "record 33: gate, scale, YaRN, skips, windows by layer": (
        "short/33",
        ["model.attn.window.block=2", "model.attn.window.stages=[3]", "model.attn.window.final=5"],
        ONTO_33,
    ),
}


@pytest.mark.parametrize("case", DECODING)
def test_absorbed_and_naive_decoding_equal_the_whole_forward(case):
    ref, sets, changes = DECODING[case]
    model, x = build(ref, *sets, **changes).eval(), tokens()
    s = model.settings
    x[0, 9] = x[1, 3] = x[1, 17] = BOS
    windows = schedule.windows(s, s.schedule.steps, final=True)
    model.update_yarn(windows)
    with torch.no_grad():
        whole = model(x, context=model.context(x, BOS, windows))
        latent, cache = decoded(model, x, True, windows)
        dense, _ = decoded(model, x, False, windows)
    rank = s.model.attn.latent.kv_lora_rank
    assert {layer[0].size(-1) for layer in cache if layer[0] is not None} == {rank}
    assert (latent - whole).abs().max() < 1e-10 and (dense - whole).abs().max() < 1e-10
    assert (whole[:, 1:] - whole[:, :-1]).abs().max() > 0.1


def test_the_windows_and_documents_of_that_test_hide_something():
    on, off = (build("variants/5", *ODD, *extra).eval() for extra in (WINDOW, []))
    x = tokens()
    assert not torch.allclose(
        on(x, context=on.context(x, BOS, schedule.windows(on.settings, 0)))[:, 7:], off(x)[:, 7:]
    )
    x[:, 3] = BOS
    y = x.clone()
    y[:, 0] += 1
    a, b = (on(z, context=on.context(z, BOS, schedule.windows(on.settings, 0))) for z in (x, y))
    assert torch.equal(a[:, 3:], b[:, 3:]) and not torch.allclose(a[:, :3], b[:, :3])


@pytest.mark.parametrize("order", ORDERS)
def test_decoding_from_a_16_bit_cache_of_a_long_context_is_only_rounded_at_the_end(order):
    """Against the same operands in float64; logits and weights of bfloat16, as plain products have, lose
    several times more."""
    attn = build("variants/5", **qk_norm(order)).blocks[0].attn
    for p in attn.parameters():
        p.data = p.data.to(torch.bfloat16).double()
    context, heads, width = 3000, attn.spec.heads, attn.qk_nope + attn.qk_rope
    kv = attn.k_up.size(1)
    q, c, turned = (noise(*shape, seed=i).bfloat16() for i, shape in enumerate(
        ((1, 1, heads, width), (1, context, kv), (1, context, attn.qk_rope))))
    inverse = None if order is None else (1 + 0.1 * noise(1, context, heads, seed=3)).float()
    wide = None if inverse is None else inverse.double()
    exact = attn.attend_latent(q.double(), c.double(), turned.double(), wide, AttnMeta(None, 2.0))
    found = attn.attend_latent(q, c, turned, inverse, AttnMeta(None, 2.0))
    assert found.dtype == torch.bfloat16
    still, turning = q[:, 0].split([attn.qk_nope, attn.qk_rope], dim=-1)
    absorbed = torch.einsum("rhs,hsc->rhc", still, attn.k_up.bfloat16().unflatten(0, (heads, -1)))
    logits = absorbed @ c.mT + turning @ turned.mT
    logits = logits if inverse is None else logits * inverse.mT
    plain = (logits * 2.0).softmax(-1).to(c.dtype) @ c
    plain = torch.einsum("rhc,hvc->rhv", plain, attn.v_up.bfloat16().unflatten(0, (heads, -1)))[:, None]
    rounding, ours, theirs = (
        (y.double() - exact).square().mean().sqrt() for y in (exact.bfloat16(), found, plain)
    )
    assert ours < 1.1 * rounding and 3 * ours < theirs


@pytest.mark.parametrize(
    "ref, changes",
    [("variants/5", {}), ("variants/7", {}), ("variants/6", qk_norm(None)), ("short/33", ONTO_33)],
)
def test_causality_nothing_before_a_changed_token_moves(ref, changes):
    model, x = build(ref, **changes), tokens()
    y = x.clone()
    y[0, 13] = (y[0, 13] + 1) % 1256
    a, b = (model(z, context=model.context(z, BOS, schedule.windows(model.settings, 0))) for z in (x, y))
    assert (
        torch.equal(a[0, :13], b[0, :13]) and not torch.allclose(a[0, 13:], b[0, 13:])
        and torch.equal(a[1], b[1])
    )


# kv + turning, heads, dense
CACHES = {"variants/5": (288, 6, 1536), "variants/6": (288, 12, 1920), "variants/7": (224, 12, 1920)}


@pytest.mark.parametrize("ref", CACHES)
@pytest.mark.parametrize("order", [None, "before_rope"])
def test_numbers_that_a_cache_holds_per_token_and_layer(ref, order):
    latent, heads, dense = CACHES[ref]
    s = settings(ref, scale="full", precision="float32", **qk_norm(order))
    assert dense == s.model.attn.num_heads * (query_dim(s) + value_dim(s))
    attn = LatentAttention(s, layer_specs(s)[0].attn)
    for p in attn.parameters():
        p.data.normal_(0, 0.02)
    for width, expected in ((3, latent + (heads if order else 0)), (2, dense)):
        cache = [None] * width
        with torch.no_grad():
            for x in noise(2, 5, 768).float().split([4, 1], dim=1):
                attn(x, lambda y, at: y, None, AttnMeta(None, None), cache)
        assert sum(c.numel() for c in cache if c is not None) == 2 * 5 * expected


# ----- value widths unlike query widths

def by_loops(q, k, v, documents, window, scale):
    """attend by loops over rows, heads and queries."""
    out = []
    for row in range(len(q)):
        for i, head in itertools.product(range(q.size(1)), range(q.size(2))):
            seen = [
                j for j in range(i + 1) if documents[row, j] == documents[row, i] and visible(i, j, window)
            ]
            p = (k[row, seen, head] @ q[row, i, head] * scale).softmax(0)
            out.append(p @ v[row, seen, head])
    return torch.stack(out).view(*q.shape[:3], -1)


@pytest.mark.parametrize("backend", ["dense", "banded", "documents"])
@pytest.mark.parametrize("window", [CAUSAL, Window(20), Window(None, 3, 8)])
@pytest.mark.parametrize("heads, width, value", [(12, 96, 64), (2, 5, 9)])
def test_value_widths_unlike_query_widths_on_every_cpu_backend(backend, window, heads, width, value):
    tokens = 20 if heads == 12 else 75
    documents = (torch.rand(2, tokens, generator=torch.Generator().manual_seed(0)) < 1 / 12).long().cumsum(1)
    inputs = [
        noise(2, tokens, heads, n, seed=i).requires_grad_() for i, n in enumerate((width, width, value))
    ]
    scale, seed = 1 / math.sqrt(width), noise(2, tokens, heads, value, seed=9)
    y, expected = (
        attend(*inputs, view(documents, window, backend)),
        by_loops(*inputs, documents, window, scale),
    )
    assert y.shape == (2, tokens, heads, value) and (y - expected).abs().max() < 1e-12
    for ours, theirs in zip(
        torch.autograd.grad(y, inputs, seed), torch.autograd.grad(expected, inputs, seed)
    ):
        assert (ours - theirs).abs().max() < 1e-11
    newest = attend_cached(inputs[0][:, -1:], *inputs[1:], documents, window)
    assert (newest - expected[:, -1:]).abs().max() < 1e-12


@pytest.mark.parametrize("width, value", [(96, 64), (64, 96)])
def test_varlen_gets_one_width_and_what_pads_it_is_cut_off(width, value, monkeypatch):
    def flash(q, k, v, ends, _, max_seqlen, __, *, scale, window_size):
        assert q.shape == k.shape == v.shape and window_size == (-1, 0)
        return by_loops(*(x[None] for x in (q, k, v)), torch.zeros(1, len(q)), CAUSAL, scale)[0]

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", flash)
    q, k, v = (noise(1, 7, 2, n, seed=i) for i, n in enumerate((width, width, value)))
    y = attend(q, k, v, view(None, CAUSAL, "varlen", rows=1, tokens=7))
    assert (y - attend(q, k, v)).abs().max() < 1e-12


# ----- parameters and their update

TABLE = {"variants/5": "1.74", "variants/6": "2.09", "variants/7": "1.79"}  # millions in a layer's attention


@pytest.mark.feature("model.attn.latent")
@pytest.mark.parametrize("ref", TABLE)
def test_parameters_of_a_layer_by_formula(ref):
    s = settings(ref, scale="full")
    d, heads, latent = s.model.model_dim, s.model.attn.num_heads, s.model.attn.latent
    query = heads * (latent.qk_nope_head_dim + latent.qk_rope_head_dim)
    expected = d * query if latent.q_lora_rank is None else latent.q_lora_rank * (d + query)
    expected += d * (latent.kv_lora_rank + latent.qk_rope_head_dim)
    expected += heads * (latent.qk_nope_head_dim + latent.v_head_dim) * latent.kv_lora_rank
    expected += heads * latent.v_head_dim * d
    with torch.device("meta"):
        assert sum(p.numel() for p in LatentAttention(s, layer_specs(s)[0].attn).parameters()) == expected
    assert f"{expected / 1e6:.2f}" == TABLE[ref]
    ordinary = without_values(settings("short/8", scale="full")).num_parameters()
    assert without_values(s).num_parameters() == ordinary - 12 * (4 * d * d - expected)


@pytest.mark.parametrize("ref", ["variants/6", "variants/7"])
def test_muon_orthogonalises_each_matrix_apart(ref):
    """Also those that lie in one bank: in variants/6 W_uk and W_uv have one shape."""
    model = build(ref)
    s, x = model.settings, tokens(8, 17)
    optimizer = Optimizer(model, s)
    optimizer.expect(last=True)
    model(x[:, :-1], x[:, 1:]).mean().backward()
    optimizer.accumulate()
    matrices = {name: p for name, p in model.named_parameters() if ".attn." in name}
    before = {name: (p.detach().clone(), p.grad.clone()) for name, p in matrices.items()}
    plan = schedule.plan(s)[0]
    optimizer.step(plan)
    banks = {name: bank for bank in optimizer.banks for name, _ in bank.members}
    assert ref != "variants/6" or banks["blocks.0.attn.k_up"] is banks["blocks.0.attn.v_up"]
    assert {name.split(".")[-1] for name in matrices} >= {"q", "kv_down", "k_rope", "k_up", "v_up", "o"}
    for name, p in matrices.items():
        old, grad = before[name]
        direction = newton_schulz((1 + plan.momentum) * grad, dtype=torch.float64, norm_dtype=torch.float64)
        rate = s.optim.muon.lr * plan.lr_factor * math.sqrt(max(1, p.size(0) / p.size(1)))
        assert grad.abs().max() > 0 and (old - p - rate * direction).abs().max() < 1e-9 * rate, name


# ----- with other features, and settings that do not go together

BEHIND = {"model.attn.value_residual": "short/11", "model.attn.value_embed": "short/15"}


@pytest.mark.feature("model.attn.latent")
@pytest.mark.parametrize("feature", BEHIND)
def test_values_mixed_behind_the_latents_train_and_have_no_latent_cache(feature):
    model = GPT(settings(BEHIND[feature], **ONTO))
    model.initialise(0)
    s, x = model.settings, tokens(4, 17)
    assert lookup(s, feature) and s.model.attn.latent
    optimizer, losses, windows = Optimizer(model, s), [], schedule.windows(s, 0)
    for _ in range(4):
        optimizer.expect(last=True)
        losses.append(model(x[:, :-1], x[:, 1:], model.context(x[:, :-1], BOS, windows)).mean())
        losses[-1].backward()
        optimizer.accumulate()
        optimizer.step(schedule.plan(s)[0])
    assert torch.isfinite(torch.stack(losses)).all() and losses[-1] < losses[0] - 0.1
    losses[0] = model(x[:, :-1], x[:, 1:], model.context(x[:, :-1], BOS, windows)).mean()
    for p, grad in zip(model.parameters(), torch.autograd.grad(losses[0], list(model.parameters()))):
        assert torch.isfinite(grad).all() and grad.any(), p.shape
    with pytest.raises(ValueError, match="neither value_residual nor value_embed"):
        model.new_cache(absorbed=True)
    model.eval()
    with torch.no_grad():
        whole = model(x, context=model.context(x, BOS, windows))
        dense, cache = decoded(model, x, None, windows)
    assert {len(layer) for layer in cache} == {2} and (dense - whole).abs().max() < 1e-10


def test_a_model_without_latents_has_no_latent_cache():
    model = GPT(settings("short/8"))
    assert {len(layer) for layer in model.new_cache()} == {2}
    with pytest.raises(ValueError, match="needs model.attn.latent"):
        model.new_cache(absorbed=True)


BAD = [
    (["model.bias=true"], {}, "model.attn.latent has no bias vectors: set model.bias=false"),
    ([], {"without": ["model.attn.rope"]}, "it needs model.attn.rope"),
    (["model.attn.rope.half_truncated=true"], {}, "add --without model.attn.rope.half_truncated"),
    (
        ["model.attn.latent.qk_rope_head_dim=3"], {},
        "turns pairs and gets 3 channels of a head: change model.attn.latent.qk_rope_head_dim"
    ),
    (["model.attn.latent.kv_lora_rank=0"], {}, "model.attn.latent.kv_lora_rank = 0: must be at least 1"),
    (["model.attn.latent.q_lora_rank=0"], {}, "model.attn.latent.q_lora_rank = 0: must be at least 1"),
    (
        ["model.attn.latent.v_head_dim=7", f"model.attn.value_embed={{tables = {[0] * 12}}}"], {},
        "change model.attn.latent.v_head_dim"
    ),
]


@pytest.mark.feature("model.attn.latent")
@pytest.mark.parametrize("sets, changes, message", BAD, ids=[message[-30:] for *_, message in BAD])
def test_settings_that_do_not_go_with_latents_are_one_clear_line(sets, changes, message):
    with pytest.raises(UserError) as error:
        settings("variants/5", *sets, **changes)
    assert message in str(error.value) and "\n" not in str(error.value)


# ----- sample.py

def checkpoint(folder, ref, *sets, **changes):
    model = build(ref, *sets, **changes)
    path = folder / "checkpoint.pt"
    torch.save(
        {"model": model.full_state_dict(), "settings": schema.plain(model.settings),
         "tokenizer": "sample"}, path
    )
    return str(path)


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by four seconds each time it is looked at."""
    ticks = itertools.count(0, 4)
    monkeypatch.setattr(sample, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))


LATENT, DENSE = 12 * (24 + 4 + 3) * 8, 12 * 3 * (14 + 7) * 8  # layers, numbers, bytes of a float64
HEADER = "cache     tokens/s  bytes/token"


@pytest.mark.parametrize(
    "choice, lines",
    [
        (
            "auto",
            [
                f"latent        19.0{LATENT:>13,}", f"dense         19.0{DENSE:>13,}",
                "both caches give the same tokens"
            ],
        ),
        ("latent", [f"latent        19.0{LATENT:>13,}"]),
        ("dense", [f"dense         19.0{DENSE:>13,}"]),
    ],
)
def test_sampling_prints_the_text_and_what_each_cache_costs(choice, lines, tmp_path, capsys, clock):
    """76 tokens in four seconds; more tokens than validation.seq_len, so that the cache is refilled."""
    path = checkpoint(tmp_path, "variants/5", *ODD)
    sample.main([path, "--prompt", "The people", "--tokens", "76", "--cache", choice])
    got = capsys.readouterr()
    assert sample.load(path)[0].settings.validation.seq_len <= 76
    assert got.out.startswith("The people") and len(got.out) > 76
    assert got.err.splitlines() == [HEADER, *lines]


@pytest.mark.parametrize("ref, changes, reason", [("short/11", ONTO, True), ("short/8", {}, False)])
def test_sampling_without_a_latent_cache_prints_the_dense_line_and_why(
    ref, changes, reason, tmp_path, capsys, clock
):
    path = checkpoint(tmp_path, ref, **changes)
    sample.main([path, "--tokens", "8"])
    header, dense, *rest = capsys.readouterr().err.splitlines()
    assert header == HEADER and dense == f"dense          2.0{12 * 6 * 16 * 8:>13,}"
    assert len(rest) == reason and all(line.startswith("dense only: a latent cache needs") for line in rest)
    with pytest.raises(SystemExit) as stopped:
        sample.main([path, "--cache", "latent"])
    got = capsys.readouterr()
    assert stopped.value.code == 2 and not got.out
    assert got.err.count("\n") == 1 and got.err.startswith("error: --cache latent: ")


def test_sampling_says_where_the_tokens_of_the_caches_part():
    assert sample.agreement([4, 5, 6], [4, 5, 6]) == "both caches give the same tokens"
    assert "from number 2 of 3 on" in sample.agreement([4, 5, 6], [4, 7, 6])
