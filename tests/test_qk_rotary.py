"""Laws of the fused QK norm, rotation and key offset: equal to float64 in Triton's interpreter, and what it
needs of a GPU.

Run as a program it prints JSON: `interpret` (errors in the interpreter, which must be switched on before
Triton is imported), `compile 90` (resources of the kernels on sm_90). In programs of their own, so that no
other test sees Triton.
"""

import dataclasses
import json
import re
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import schedule
from kernels import device, qk_rotary
from kernels.qk_rotary import qk_rotary_reference
from layers.rotary import Rotary
from model import GPT
from model import Rotary
from settings import deltas
from system import preflight
from program import program_of
from layers.specs import rotary_spec
from common.errors import UserError

# Of the largest element: one rounding of the dtype. bfloat16 can be tested, as the kernels calculate in
# float32 only; the interpreter cuts it off instead of rounding it.
LIMIT = {"float32": 1e-6, "float16": 6e-4, "bfloat16": 8e-3}


program = program_of(__file__)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tables(tokens, width, dtype=torch.float32):
    """cos and sin (T, K/2) of random angles. In bfloat16 cos^2 + sin^2 is not 1, and the orders differ."""
    angle = 3 * random(tokens, width // 2, seed=9)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def by_complex_numbers(q, k, cos, sin, order, eps, offset):
    """The operation in float64: a pair is a complex number, a rotation a product, the offset a loop."""
    def place(x):
        half = x.size(-1) // 2
        z = torch.complex(x[..., :half], x[..., half:])
        turn = torch.complex(cos.double(), -sin.double())[None, :, None]
        mean = (z * turn if order == "after_rope" else z).abs().square().sum(-1, keepdim=True) / x.size(-1)
        z = z * turn / (1 if order is None else (mean + eps).sqrt())
        return torch.cat([z.real, z.imag], -1)

    q, k = place(q), place(k)
    out, half = k.clone(), k.size(-1) // 2
    for t in range(1, k.size(1)):
        for j in range(half - offset, half):
            out[:, t, :, j], out[:, t, :, j + half] = k[:, t - 1, :, j], k[:, t - 1, :, j + half]
    return q, out


def error(found, expected):
    """Largest difference, relative to the largest element of the float64 expected."""
    assert found.shape == expected.shape and expected.dtype == torch.float64
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


# ----- in the interpreter: a program

# rows, tokens, heads, width, dtype, order, offset, dtype of the tables; tiles hold 2048 bytes of half a head
CASES = [
    (2, 37, 2, 64, "float32", "after_rope", 16, "bfloat16"),
    (1, 17, 2, 128, "float32", "before_rope", 32, "bfloat16"), (2, 67, 1, 16, "float32", None, 3, "float32"),
    (1, 33, 5, 64, "float16", "before_rope", 0, "float32"),
    (2, 9, 1, 128, "float16", "after_rope", 64, "float32"),
    (1, 1, 2, 16, "bfloat16", "after_rope", 8, "float32"),
    (2, 21, 2, 96, "bfloat16", "before_rope", 24, "bfloat16"),
    (1, 5, 1, 6, "float32", "after_rope", 1, "float32")
]
STRIDES = {  # the values of (R, T, H, K) in other strides
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every other channel": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    "inside": lambda x: torch.nn.functional.pad(x, (3, 5, 1, 2, 2, 1), value=float("nan"))[
        :, 2:-1, 1:-2, 3:-5
    ],
}


def results(function, leaves, upstream):
    """Results and gradients of the leaves. The gradients of the results reach the operation in the strides
    they have."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = function(*leaves)
    return [x.detach() for x in out] + list(torch.autograd.grad(out, leaves, upstream))


def measure():
    out = {"loaded": "triton" in sys.modules, "joint": [], "apart": []}
    for rows, tokens, heads, width, name, order, offset, table in CASES:
        dtype, (cos, sin) = getattr(torch, name), tables(tokens, width, getattr(torch, table))
        plan = {"order": order, "eps": 0.01, "offset": offset}
        a, b, c = STRIDES.values()
        qkv = random(rows, tokens, 3, heads, width).to(dtype)
        g = [
            move(random(rows, tokens, heads, width, seed=i).to(dtype)) for i, move in ((1, a), (2, b), (3, c))
        ]
        exact = results(
            lambda x: (*by_complex_numbers(*x.unbind(2)[:2], cos, sin, **plan), x[:, :, 2]), [qkv.double()],
            [x.double() for x in g]
        )
        found = results(lambda x: qk_rotary.qkv_rotary(x, cos, sin, **plan), [qkv], g)
        out["joint"].append([error(x, y) for x, y in zip(found, exact, strict=True)])
        exact = [*exact[:2], exact[3][:, :, 0], exact[3][:, :, 1]]
        q, k, _ = qkv.unbind(2)
        found = []
        for x, y, up in ((q, k, (g[0], g[1])), (a(q), c(k), g[:2]), (c(q), b(k), g[:2])):
            found += results(lambda x, y: qk_rotary.qk_rotary(x, y, cos, sin, **plan), [x, y], up)
        out["apart"].append([error(x, y) for x, y in zip(found, 3 * exact, strict=True)])
    return out | corners() | {"model": [in_the_model(*case) for case in MODELS]}


def strides_as_promised(qkv, g, plan):
    """Whether the operators' results have the strides that the compiler is told, whatever those of q and k
    are."""
    tables, rest = (plan["cos"], plan["sin"]), (plan["order"], plan["eps"], plan["offset"])
    q, k, *_ = (STRIDES["heads first"](x) for x in qkv.unbind(2))
    same = []
    for op, inputs in (
        (qk_rotary.forward_op, (q, k, *tables)), (qk_rotary.gradient_op, (q, k, *tables, *g[:2])),
        (qk_rotary.joint_gradient_op, (qkv.transpose(1, 2).contiguous().transpose(1, 2), *tables, *g))
    ):
        with FakeTensorMode() as mode:
            told = op(*map(mode.from_tensor, inputs), *rest)
        made = op(*inputs, *rest)
        same += [
            x.stride() == y.stride()
            for x, y in (zip(told, made, strict=True) if isinstance(made, tuple) else [(told, made)])
        ]
    return len(same) == 5 and all(same)


def corners():
    """Compiled, kept for the backward pass, without rows, an expanded gradient, NaN."""
    cos, sin = tables(7, 16)
    plan = {"cos": cos, "sin": sin, "order": "after_rope", "eps": 0.01, "offset": 4}
    qkv = random(2, 7, 3, 2, 16).float()
    g = [random(2, 7, 2, 16, seed=i).float() for i in range(3)]
    joint, apart = (
        (lambda x: qk_rotary.qkv_rotary(2 * x, **plan)),
        (lambda q, k: qk_rotary.qk_rotary(2 * q, 3 * k, **plan)),
    )
    same = []
    for function, leaves, up in ((joint, [qkv], g), (apart, qkv.unbind(2)[:2], g[:2])):
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        pairs = zip(results(function, leaves, up), results(compiled, leaves, up), strict=True)
        same += [torch.equal(x, y) for x, y in pairs]
    kept, inputs = [], {x.untyped_storage().data_ptr() for x in (qkv, cos, sin)}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.untyped_storage().data_ptr()) or x, lambda x: x
    ):
        leaf = qkv.clone().requires_grad_()
        inputs.add(leaf.untyped_storage().data_ptr())
        q, k, v = qk_rotary.qkv_rotary(leaf, **plan)
        qk_rotary.qk_rotary(*leaf.unbind(2)[:2], **plan)
    ones = torch.autograd.grad(q.sum() + k.sum() + v.sum(), leaf)[0]  # gradients with strides of 0
    bad = qkv.clone()
    bad[1, 3, 1, 0, 2] = float("nan")
    lost = qk_rotary.qkv_rotary(bad, **plan)[1].isnan()
    return {
        "compiled": all(same), "strides": strides_as_promised(qkv, g, plan),
        "only_inputs_kept": len(kept) == 7 and set(kept) <= inputs,
        "v_is_a_view": v.data_ptr() == leaf[:, :, 2].data_ptr(),
        "ones": torch.equal(ones[:, :, 2], torch.ones_like(ones[:, :, 2]))
        and bool(ones[:, :, :2].abs().min() > 0),
        "no_rows": list(qk_rotary.qkv_rotary(qkv[:0], **plan)[0].shape),
        "nan": sorted({(r, t, h) for r, t, h, _ in lost.nonzero().tolist()})
    }


# layers; norm after the rotation; before it, with values of the first block; with value tables, gates and
# documents
MODELS = [("short/5", 2), ("short/9", 2), ("short/28", 8)]


def in_the_model(ref, layers):
    """[relative differences of losses and all gradients] of a float32 model on the kernel and on torch, in
    training."""
    found = []
    for kernel in ("torch", "triton"):
        sets = [f"system.kernels.qk={kernel}", f"model.num_layers={layers}"]
        if ref == "short/28":
            sets += [
                "model.attn.value_embed.tables=[0,1,2,-1,-1,0,1,2]",
                "model.attn.window.long_layers=[0,3,6]",
            ]
        s = deltas.resolve(ref, scale="micro", sets=sets).settings
        model = GPT(s)
        model.initialise(0)
        for name, p in sorted(model.named_parameters()):
            p.data += 0.1 * random(*p.shape, seed=len(name)).float()
        x = torch.randint(1257, (2, 16), generator=torch.Generator().manual_seed(0))
        losses = model(x, x.flip(1), model.context(x, 1256, schedule.plan(s)[0].shape.windows))
        found.append([losses, *torch.autograd.grad(losses.mean(), list(model.parameters()))])
    return [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*found, strict=True)]


# ----- ahead of time: a program

def resources(arch, folder):
    """{label: shared bytes, registers, spilled bytes, bytes of an access, grid} of the kernels as launched on
    sm_`arch`."""
    import aot
    found = {}
    for dtype, width, order, offset in (
        (torch.bfloat16, 128, "before_rope", 32), (torch.bfloat16, 64, "after_rope", 0),
        (torch.float32, 96, "after_rope", 24)
    ):
        def empty(*shape, dtype=dtype):
            return torch.empty(*shape, dtype=dtype, device="meta")

        qkv, cos = empty(2, 2000, 3, 6, width), empty(2000, width // 2, dtype=torch.float32)
        (q, k, _), g = qkv.unbind(2), empty(2, 2000, 6, width)
        plan = order, 1e-6, offset
        for name, call in (
            ("forward", lambda: qk_rotary.forward(q, k, cos, cos, *plan)),
            ("gradient", lambda: qk_rotary.gradient(q, k, cos, cos, g, g, *plan)),
            ("joint gradient", lambda: qk_rotary.joint_gradient(qkv, cos, cos, g, g, g, *plan))
        ):
            (kernel, grid, args, kwargs), = aot.launches({qk_rotary: "kernels"}, call)
            built = aot.build(kernel, *args, arch=arch, folder=folder, **kwargs)
            accesses = {4 * int(n or 1) for n in re.findall(r"(?:ld|st)\.global(?:\.v(\d))?\.b32", built.ptx)}
            narrow = len(re.findall(r"(?:ld|st)\.global\S*\.b(?:8|16|64)", built.ptx))
            label = f"{name}, {str(dtype).removeprefix('torch.')} {width} {order} {offset}"
            found[label] = {
                **built._asdict(), "ptx": None, "accesses": sorted(accesses), "narrow": narrow, "grid": grid
            }
    return found


# ----- tests

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter is for machines without a GPU"
)


@interpreted
def test_the_kernels_equal_float64_with_all_gradients_in_any_strides_and_in_the_model():
    pytest.importorskip("triton")
    found = program("interpret", TRITON_INTERPRET="1")
    assert not found["loaded"]  # importing the operation imports no Triton
    for (*_, name, _, _, _), joint, apart in zip(CASES, found["joint"], found["apart"], strict=True):
        assert len(joint) == 4 and len(apart) == 12
        assert all(e < LIMIT[name] for e in joint + apart), (joint, apart)  # NaN fails
    for case, errors in zip(MODELS, found["model"], strict=True):
        # 0: the model would not have used it
        assert len(errors) > 5 and 0 < max(errors) < 2e-5, (case, errors)
    assert found["compiled"] and found["only_inputs_kept"] and found["v_is_a_view"] and found["ones"]
    assert found["no_rows"] == [0, 7, 2, 16]
    # its head, and that of the next token, which gets channels of it
    assert found["nan"] == [[1, 3, 0], [1, 4, 0]]


@pytest.mark.parametrize("arch", [80, 89, 90])
def test_the_kernels_compile_ahead_of_time_without_spills_and_move_16_bytes_at_a_time(arch, tmp_path):
    pytest.importorskip("triton")
    import aot
    found = program("compile", str(arch), str(tmp_path))
    assert len(found) == 9
    for label, built in found.items():
        assert built["shared"] <= aot.SHARED[arch] // 16 and built["spilled"] == 0, (label, built)
        # at least 4 programs of 128 threads on a multiprocessor
        assert built["registers"] <= 128, (label, built)
        assert built["accesses"] == [16] and built["narrow"] == 0, (label, built)
    assert found["forward, bfloat16 128 before_rope 32"]["grid"] == [2 * 125]


@pytest.mark.parametrize("order", [None, "before_rope", "after_rope"])
def test_the_reference_is_a_complex_product_a_norm_and_a_shift(order):
    q, k, (cos, sin) = random(2, 5, 3, 8), random(2, 5, 3, 8, seed=1), tables(5, 8, torch.bfloat16)
    found = qk_rotary_reference(q, k, cos, sin, order=order, eps=0.1, offset=2, norm_dtype=torch.float64)
    for a, b in zip(found, by_complex_numbers(q, k, cos, sin, order, 0.1, 2), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ref, scale", [("short/4", "full"), ("short/5", "full"), ("short/20", "full"),
                                        ("short/33", "micro")])
def test_the_reference_has_the_bits_of_the_model(ref, scale):
    """In the precision plan of the record: rotation in bfloat16 and in float32, norms on both sides, none."""
    sets = ["model.model_dim=48", "model.attn.num_heads=3", "data.seq_len=64", "data.tokens_per_rank=64",
            "validation.seq_len=64"]
    s = deltas.resolve(ref, scale=scale, sets=sets).settings
    s = dataclasses.replace(s, model=dataclasses.replace(s.model, num_layers=2))
    model, n = GPT(s), s.numerics
    model.initialise(0)
    q, k = (random(2, 11, 3, 16, seed=i).to(getattr(torch, n.matmul)) for i in (0, 1))
    attn = next(block.attn for block in model.blocks if block.attn is not None)
    found = qk_rotary_reference(
        q, k, model.rotaries[0].cos[:11], model.rotaries[0].sin[:11], order=attn.qk_norm, eps=attn.qk_eps,
        norm_dtype=getattr(torch, n.norm), math_dtype=getattr(torch, n.rope_math)
    )
    assert torch.equal(found[0], attn.apply_rotary(q, model.rotaries[0], 0)) and torch.equal(
        found[1], attn.apply_rotary(k, model.rotaries[0], 0)
    )


def test_an_offset_shifts_the_still_pairs_of_keys_within_the_row_only():
    """Record 49 on its half rotation: half of the channels stand still, and only there keys are of the token
    before."""
    s = deltas.resolve("short/33", scale="micro", sets=["system.precision=float64"]).settings
    rotary = Rotary(s, rotary_spec(s, narrow=False))
    rotary.update_yarn()
    width = rotary.width
    cos, sin = rotary.cos[:6], rotary.sin[:6]
    plan = {"cos": cos, "sin": sin, "order": "after_rope", "eps": 1e-6, "norm_dtype": torch.float64}
    q, k = random(2, 6, 2, width), random(2, 6, 2, width, seed=1)
    (q0, k0), (q1, k1) = (
        qk_rotary_reference(q, k, **plan),
        qk_rotary_reference(q, k, offset=width // 4, **plan),
    )
    still = (cos == 1).all(0) & (sin == 0).all(0)
    moved = torch.cat([still, still])
    assert moved.sum() == width // 2 and torch.equal(q0, q1)
    assert torch.equal(k1[..., ~moved], k0[..., ~moved]) and torch.equal(k1[:, 0], k0[:, 0])
    assert torch.equal(k1[:, 1:][..., moved], k0[:, :-1][..., moved])


def test_generation_stays_with_torch(monkeypatch):
    monkeypatch.setattr(device, "INTERPRETED", False)
    x, found = torch.arange(10)[None], []
    for kernel in ("torch", "triton"):
        model = GPT(
            deltas.resolve("short/9", scale="micro", sets=[f"system.kernels.qk={kernel}"]).settings
        ).eval()
        model.initialise(0)
        cache = model.new_cache()
        with torch.no_grad():
            found.append([model(x[:, :9], cache=cache), model(x[:, 9:], cache=cache)])
    assert all(torch.equal(a, b) for a, b in zip(*found))
    with pytest.raises(ValueError, match="the Triton qk_rotary needs CUDA, and this is cpu; use torch"):
        model(x)


@pytest.mark.parametrize(
    "ref, sets, line",
    [
        ("short/20", [], None),
        ("short/33", [], None),
        ("short/11", ["numerics.norm=bfloat16"], None),
        (
            "short/20", ["numerics.eval_matmul=float64"],
            "computes in float32, and numerics.eval_matmul is float64"
        ),
        ("short/20", ["numerics.rope=float64"], "computes in float32, and numerics.rope is float64"),
    ],
)
def test_a_higher_precision_than_float32_is_refused_in_one_line(ref, sets, line, monkeypatch):
    monkeypatch.setattr(preflight, "refusal", lambda *a: None)
    s = deltas.resolve(ref, sets=["system.kernels.qk=triton", *sets]).settings
    if line is None:
        return preflight.check_kernels(s, torch.device("cuda"))
    with pytest.raises(UserError) as caught:
        preflight.check_kernels(s, torch.device("cuda"))
    assert str(caught.value) == f"system.kernels.qk=triton {line}: leave it at auto"


def test_shapes_dtypes_and_plans_that_do_not_fit_are_one_line(monkeypatch):
    monkeypatch.setattr(qk_rotary, "refusal", lambda *a: None)
    x, (cos, sin) = torch.ones(2, 5, 3, 8), tables(5, 8)
    plan = {"order": None, "eps": 1e-6}
    for call, line in [
        (lambda: qk_rotary.qk_rotary(x, x[:, :, :1], cos, sin, **plan), "q .* and k .* do not fit"),
        (lambda: qk_rotary.qk_rotary(x, x.half(), cos, sin, **plan), "q .* and k .* do not fit"),
        (lambda: qk_rotary.qk_rotary(x[..., :7], x[..., :7], cos, sin, **plan), "do not fit"),
        (lambda: qk_rotary.qk_rotary(x, x, cos[:4], sin[:4], **plan), "table .* does not fit"),
        (lambda: qk_rotary.qk_rotary(x, x, cos.double(), sin, **plan), "table .* does not fit"),
        (lambda: qk_rotary.qk_rotary(x, x, cos, sin, order="before", eps=0.1), "order before .* want one of"),
        (lambda: qk_rotary.qk_rotary(x, x, cos, sin, offset=5, **plan), "0 to 4 pairs"),
        (lambda: qk_rotary.qkv_rotary(x, cos, sin, **plan), "qkv .* does not fit")
    ]:
        with pytest.raises(ValueError, match=line) as caught:
            call()
        assert "\n" not in str(caught.value)


if __name__ == "__main__":
    print(json.dumps(measure() if sys.argv[1] == "interpret" else resources(int(sys.argv[2]), sys.argv[3])))
