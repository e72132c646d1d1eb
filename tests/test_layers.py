"""Laws of the parts in layers/: specifications by layer, residual terms, terms of the loss, and what imports
what."""

import ast
import dataclasses
import functools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import schedule
from common.errors import UserError
from kernels import eager
from layers.attention import AttnMeta
from layers.primitives import Learned, linear
from layers.residual import Entry, Term
from layers.specs import AttnSpec, LayerSpec, RotarySpec, layer_specs
from model import GPT
from settings import deltas

ROOT = Path(__file__).parent.parent
BOS = 1256


def built(ref, *sets, specs=None, **options):
    """A float64 model at scale micro whose parameters are all random, so that no term hides behind a zero."""
    s = deltas.resolve(ref, scale="micro", sets=["system.precision=float64", *sets], **options).settings
    return filled(GPT(s, specs))


def filled(model):
    model.initialise(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model


def text(rows=2, tokens=64):
    ids = torch.randint(BOS, (rows, tokens), generator=torch.Generator().manual_seed(2))
    ids[:, ::20] = BOS
    return ids


def losses_of(model, x, **more):
    return model(x, x.roll(-1, 1), model.context(x, BOS, schedule.windows(model.settings, 0)), **more)


# ----- specifications

def test_the_specifications_say_what_the_lists_of_the_settings_say():
    s = deltas.resolve("short/33").settings
    specs, a = layer_specs(s), s.model.attn
    assert [i for i, spec in enumerate(specs) if spec.attn is None] == list(a.drop_layers)
    assert [i for i, spec in enumerate(specs) if spec.mlp is None] == list(s.model.mlp.drop_layers)
    assert {i for i, spec in enumerate(specs) if spec.attn and spec.attn.window == "long"} == {
        *a.window.long_layers
    } - {7}
    assert specs[1].attn == AttnSpec(
        heads=6, qk=128, v=128, rotary=RotarySpec(128, 32), window="short", gate=12, value_table=1, scale=0.1
    )
    routed = layer_specs(deltas.resolve("variants/4").settings)
    assert routed[0] == LayerSpec(routed[0].attn, 3072, False) and routed[1] == LayerSpec(
        routed[0].attn, None, True
    )


@pytest.mark.parametrize("ref", ["short/11", "short/33"])
def test_layers_may_have_different_numbers_of_heads(ref):
    """Forward and backward with 6 heads of 8 channels and 3 heads of 16, in turn; each width has its rotary
    tables."""
    plain = built(ref)
    narrow = plain.specs
    turned = RotarySpec(16, 4 if plain.settings.model.attn.rope.half_truncated else None)
    wide = [
        spec.attn and dataclasses.replace(spec.attn, heads=3, qk=16, v=16, rotary=turned) for spec in narrow
    ]
    mixed = tuple(
        dataclasses.replace(spec, attn=attn) if i % 2 else spec
        for i, (spec, attn) in enumerate(zip(narrow, wide))
    )
    model, x = built(ref, specs=mixed), text()
    assert sorted(rotary.width for rotary in model.rotaries) == [8, 16]
    losses = losses_of(model, x)
    losses.mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert not torch.allclose(losses, losses_of(plain, x))
    assert torch.equal(losses_of(built(ref, specs=narrow), x), losses_of(plain, x))


# ----- residual terms

def test_a_skip_and_a_backout_are_terms_of_their_own():
    """The stream after layer 3 comes back before layer 6, and part of the stream after layer 7 leaves at the
    end."""
    x = text()
    plain, model = built("short/9"), built("short/9")
    model.residual.skip_weight = Learned(1, 0.0, "float64", sigmoid=False, label="skip_weights")
    model.residual.backout = Learned(1, 0.0, "float64", sigmoid=False, label="skip_weights")
    model.residual.add(
        Term("skip", 6, "saved.3", Entry("skip_weight", 0)), Term("out", 12, "saved.7", Entry("backout", 0))
    )
    weights = [model.residual.skip_weight.value, model.residual.backout.value]
    for skip, backout in ((0.0, 0.0), (0.3, 0.0), (0.0, -0.5), (0.3, -0.5)):
        for weight, value in zip(weights, (skip, backout)):
            weight.data.fill_(value)
        assert (losses_of(model, x) - by_hand(model, x, skip, backout)).abs().max() < 1e-12
        assert torch.equal(losses_of(model, x), losses_of(plain, x)) == (skip == backout == 0)
    losses_of(model, x).mean().backward()
    assert all(weight.grad.abs() > 0 for weight in weights)


def by_hand(model, x, skip, backout):
    """The losses of a record 9 with the two terms, the stream written out."""
    context, values = model.context(x, BOS, None), model.values.begin(x)
    x0 = stream = model.embed(x)
    a, b, after = model.residual.resid_lambdas(), model.residual.x0_lambdas(), {}
    for i, block in enumerate(model.blocks):
        stream = stream + skip * after[3] if i == 6 else stream
        stream = a[i] * stream + b[i] * x0
        meta = AttnMeta(None, None) if context is None else context.layers[i]
        stream = stream + block.attn(
            block.attn_norm(stream), block.rotary, functools.partial(values, i), meta
        )
        stream = stream + block.mlp(block.mlp_norm(stream))
        after[i] = stream
    return model.lm_head.losses(model.norm(stream + backout * after[7]), model.embed.weight, x.roll(-1, 1))


def test_terms_that_are_absent_or_constant_zero_are_not_computed():
    def operations(model):
        found, seen, stack = [], set(), [losses_of(model, text()).grad_fn]
        while stack:
            node = stack.pop()
            if node is not None and node not in seen:
                seen.add(node)
                found.append(node.name())
                stack += [next_node for next_node, _ in node.next_functions]
        return found

    plain, with_zero, with_one = built("short/3"), built("short/3"), built("short/3")
    with_zero.residual.add(Term("skip", 6, "saved.3", 0.0))
    with_one.residual.add(Term("skip", 6, "saved.3", 1.0))
    assert operations(with_zero) == operations(plain)
    assert len(operations(with_one)) == len(operations(plain)) + 1


# ----- losses

def written_out(model, x, weights, prefix=None, prefix_weight=0.0, candidates=None):
    """The losses (R, T) of x, token by token, from the model's logits over all classes."""
    targets, logits = x.roll(-1, 1), model(x)
    classes = range(logits.size(-1)) if candidates is None else candidates.tolist()
    log_p = {c: z for c, z in zip(classes, logits[..., list(classes)].log_softmax(-1).unbind(-1))}
    rows = []
    for r in range(len(x)):
        for t in range(x.size(1)):
            ahead = [(w, targets[r, t + n].item()) for n, w in enumerate(weights) if t + n < x.size(1)]
            if prefix is not None and prefix[r, t].item() in log_p:
                ahead.append((prefix_weight, prefix[r, t].item()))
            rows.append(sum(-w * log_p[target][r, t] for w, target in ahead))
    return torch.stack(rows).view(x.shape)


def loss_terms(x, *names):
    """Arguments of the loss: weights of two targets, a prefix target of some tokens, a set of candidates
    that holds the targets of x but not every prefix target."""
    prefix = torch.randint(BOS, x.shape, generator=torch.Generator().manual_seed(3))
    prefix[:, ::3] = -1
    candidates = torch.cat([x.flatten(), prefix[:, 1::6].flatten(), torch.arange(40)]).unique()
    candidates = candidates[candidates >= 0]
    held = torch.isin(prefix, candidates)
    assert held.any() and not held[prefix >= 0].all() and len(candidates) < 300
    every = {"weights": (0.75, 0.5), "prefix": prefix, "prefix_weight": 0.25, "candidates": candidates}
    wanted = {*names, *(["prefix_weight"] if "prefix" in names else [])}
    return {name: value for name, value in every.items() if name in wanted}


@pytest.mark.feature(
    "system.kernels.loss", "model.head.softcap", "model.head.prefix", "model.head.candidates"
)
@pytest.mark.parametrize("backend", ["whole", "chunks"])
@pytest.mark.parametrize("names", [
    ["weights"], ["prefix"], ["candidates"], ["weights", "prefix"], ["weights", "prefix", "candidates"]
])
def test_a_loss_of_several_terms_is_the_sum_of_their_cross_entropies(names, backend):
    """Values and gradients against logits over all classes, taken apart token by token."""
    model, x = built("short/11", f"system.kernels.loss={backend}"), text()
    terms = loss_terms(x, *names)
    expected = written_out(model, x, **({"weights": (1.0,)} | terms))
    if "weights" in terms:
        terms["target_weights"] = terms.pop("weights")
    losses = losses_of(model, x, **terms)
    assert (losses - expected).abs().max() < 1e-12
    assert (losses - losses_of(model, x)).abs().max() > 0.01
    upstream = torch.rand(x.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    found, wanted = (torch.autograd.grad((upstream * y).mean(), list(model.parameters()))
                     for y in (losses, expected))
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(found, wanted))


@pytest.mark.parametrize("backend", ["whole", "chunks"])
def test_terms_of_the_loss_that_say_nothing_change_nothing(backend):
    """One target of weight 1, a prefix of weight 0 or of no token, all classes as candidates."""
    model, x = built("short/11", f"system.kernels.loss={backend}"), text()
    plain, prefix = losses_of(model, x), loss_terms(x, "prefix")["prefix"]
    for terms in ({"target_weights": (1.0,)},
                  {"target_weights": torch.tensor([1.0, 0.0], dtype=torch.float64)},
                  {"prefix": prefix, "prefix_weight": 0.0},
                  {"prefix": torch.full_like(x, -1), "prefix_weight": 0.25},
                  {"candidates": torch.arange(len(model.lm_head.weight))}):
        assert torch.allclose(losses_of(model, x, **terms), plain, rtol=1e-12), terms


@pytest.mark.parametrize("backend", ["whole", "chunks"])
def test_a_target_that_is_no_candidate_is_refused(backend):
    model, x = built("short/11", f"system.kernels.loss={backend}"), text()
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        losses_of(model, x, candidates=x.unique()[:-2])


# ----- what imports what

def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_parts_import_nothing_above_them_and_specifications_no_torch():
    above = ("model", "optim", "train_gpt", "system", "sample", "records", "evidence", "sweeps", "page")
    for path in (ROOT / "layers").glob("*.py"):
        assert not [name for name in imports(path) if name.split(".")[0] in above], path
    assert {name.split(".")[0] for name in imports(ROOT / "layers/specs.py")} == {
        "dataclasses", "typing", "settings"
    }


# ----- products in bfloat16

class Products(TorchDispatchMode):
    """Notes (dtype, sizes of both operands) of every matrix product."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten._grouped_mm):
            a, b = [x for x in args if isinstance(x, torch.Tensor) and x.is_floating_point()][-2:]
            self.found.append((a.dtype, {*a.shape, *b.shape}))
        return function(*args, **(kwargs or {}))


@pytest.mark.feature("numerics.products", "system.precision")
@pytest.mark.parametrize("ref", ["short/1", "short/11", "short/33", "variants/1", "variants/7"])
def test_products_in_bfloat16_are_all_but_those_of_gates_and_routers_and_nothing_else_is(ref):
    s = deltas.resolve(ref, scale="micro", sets=["system.precision=bf16_matmul"]).settings
    model = filled(GPT(s))
    narrow = {s.model.mlp.moe.num_experts if s.model.mlp.moe else 12, 12}  # experts; channels of a gate
    with Products() as products:
        losses = losses_of(model, text())
        losses.mean().backward()
    wide = [sizes for dtype, sizes in products.found if dtype != torch.bfloat16]
    assert all(sizes & narrow for sizes in wide) and (ref not in ("short/1", "short/11") or not wide)
    assert len(products.found) - len(wide) >= 3 * 3 * s.model.num_layers
    assert losses.dtype == torch.float32
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}

    plain = filled(GPT(deltas.resolve(ref, scale="micro", sets=["system.precision=float32"]).settings))
    apart = (losses - losses_of(plain, text())).abs()
    assert 0 < apart.mean() < 0.1  # rounding of 1 in 256


@pytest.mark.feature("numerics.products")
@pytest.mark.parametrize("bias", [False, True])
def test_operands_are_rounded_and_the_result_and_the_bias_are_not(bias):
    noise = torch.Generator().manual_seed(0)
    x, w = (torch.randn(5, n, generator=noise).requires_grad_() for n in (24, 24))
    b = torch.randn(5, generator=noise) if bias else torch.zeros(5)
    g = torch.randn(5, 5, generator=noise)
    y = linear(x, w, b if bias else None, torch.bfloat16)
    y.backward(g)
    narrow = lambda t: t.detach().bfloat16().double()
    ulp = 2.0 ** -8  # the result arrives in bfloat16
    for found, exact in ((y - b, narrow(x) @ narrow(w).T), (x.grad, narrow(g) @ narrow(w)),
                         (w.grad, narrow(g).T @ narrow(x))):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=ulp, atol=1e-6)
        assert not torch.equal(found.double(), exact)


@pytest.mark.feature("numerics.products", "system.precision")
def test_bf16_matmul_is_float32_with_rounded_products_and_refused_where_it_does_nothing():
    lifted = {p: deltas.resolve("short/33", scale="tiny", sets=[f"system.precision={p}"]).settings.numerics
              for p in ("float32", "float64", "bf16_matmul")}
    assert lifted["bf16_matmul"] == dataclasses.replace(lifted["float32"], products="bfloat16")
    assert lifted["float64"].products == "matmul"
    for sets, message in ((["numerics.products=bfloat16"], "has no effect: matmul and eval_matmul are"),
                          (["system.precision=bf16_matmul", "system.kernels.mlp=triton"],
                           "does not round its operands")):
        with pytest.raises(UserError, match=message):
            deltas.resolve("short/11", sets=sets)


# ----- the same bits in fewer passes

def plain_rotate(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)


TURN = torch.rand(7, 1, 8, generator=torch.Generator().manual_seed(3)) * 7
PAIRS = {
    "relu_sq": (eager.ReluSq.apply, lambda x: F.relu(x).square()),
    "rms_norm": (lambda x: eager.RMSNorm.apply(x, 1e-5), lambda x: F.rms_norm(x, x.shape[-1:], eps=1e-5)),
    "rotate": (lambda x: eager.Rotate.apply(x, TURN.cos().to(x.dtype), TURN.sin().to(x.dtype)),
               lambda x: plain_rotate(x, TURN.cos().to(x.dtype), TURN.sin().to(x.dtype)))
}


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", list(PAIRS))
def test_an_operation_in_fewer_passes_has_the_bits_of_autograd(name, dtype, strided):
    noise = torch.Generator().manual_seed(4)
    base = torch.randn(3, 7, 2, 5, 16, generator=noise, dtype=dtype)
    base[0, :2] = 0.0
    base[1] *= 1e-3
    g = torch.randn(3, 7, 5, 16, generator=noise, dtype=dtype)
    results = []
    for function in PAIRS[name]:
        x = base.clone().requires_grad_()
        y = function(x[:, :, 1] if strided else x[:, :, 1].contiguous())
        y.backward(g)
        results.append((y.detach(), x.grad))
    for ours, plain in zip(*results):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("ref", ["short/5", "short/11", "short/33", "variants/7"])
def test_a_step_in_fewer_passes_has_the_bits_of_the_plain_one(ref, monkeypatch):
    def step():
        model = filled(GPT(deltas.resolve(ref, scale="micro").settings))
        losses = losses_of(model, text())
        losses.mean().backward()
        return [losses.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    ours = step()
    asked = []
    monkeypatch.setattr(eager, "applies", lambda x: bool(asked.append(x)))
    plain = step()
    assert asked and len(ours) == len(plain) and all(map(torch.equal, ours, plain))


def test_operations_in_fewer_passes_are_for_wide_numbers_of_the_cpu_outside_the_compiler():
    assert eager.applies(torch.zeros(1)) and eager.applies(torch.zeros(1, dtype=torch.float64))
    assert not eager.applies(torch.zeros(1, dtype=torch.bfloat16))
    assert not eager.applies(torch.zeros(1, device="meta"))
    inside = torch.compile(lambda x: x + eager.applies(x), backend="eager")
    assert inside(torch.zeros(1)).item() == 0
