"""Laws of the Triton matrix products: equal to float64 in Triton's interpreter, and what they need of a GPU.

Run as a program it prints JSON: `symmetric` and `linear` (errors in the interpreter, which must be switched
on before Triton is imported), `compile 90` (resources of every kernel on sm_90). In programs of their own, so
that no other test sees Triton.
"""

import itertools
import json
import sys

import pytest
import torch
import torch.nn.functional as F

from kernels import device, linear_relu_sq, newton_schulz, symmetric
from program import program_of

# Of the largest element. float16: its rounding is 5e-4, gradients are rounded twice. Not in bfloat16: the
# interpreter multiplies its bit patterns (triton issues 4972 and 11584). The kernels treat it as float16, and
# below it is compiled.
LIMIT = {"float32": 3e-6, "float16": 1.5e-3}


program = program_of(__file__)


def random(*shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def error(found, expected):
    """Largest difference, relative to the largest element of the float64 expected."""
    assert found.shape == expected.shape and expected.dtype == torch.float64
    return ((found.double() - expected).abs().max() / expected.abs().max()).item() if found.numel() else 0.0


# ----- in the interpreter: programs

LAYOUTS = {  # float64 (..., m, k) cast -> the same values in other strides
    "rows": lambda x: x,
    "columns": lambda x: x.mT.contiguous().mT,
    "strided": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    "inside": lambda x: F.pad(x, (3, 5, 1, 2), value=float("nan"))[..., 1:-2, 3:-5],
}
SYMMETRIC = [  # shape, dtype, layout; tiles have a side of 64 in float32, else of 128
    ((2, 150, 70), "float32", "rows"),
    ((150, 33), "float32", "columns"),
    ((3, 65, 40), "float32", "inside"),
    ((2, 300, 130), "float16", "rows"),
    ((2, 129, 65), "float16", "columns"),
    ((1, 2, 40, 200), "float16", "strided"),
    ((5, 1, 1), "float32", "rows"),
    ((2, 3, 12, 6), "float32", "inside"),
    ((0, 4, 4), "float32", "rows"),
]


def measure_symmetric():
    loaded = "triton" in sys.modules
    errors = []
    for shape, name, layout in SYMMETRIC:
        x = LAYOUTS[layout](random(*shape, dtype=getattr(torch, name)))
        wide = x.double()
        s = wide @ wide.mT / shape[-1]
        a = LAYOUTS[layout](s.to(x.dtype))
        s = a.double()
        errors.append(
            {
                "gram": error(symmetric.gram(x), wide @ wide.mT),
                "gram_t": error(symmetric.gram_t(x), wide.mT @ wide),
                "quadratic": error(symmetric.quadratic(a, -4.775, 2.0315), -4.775 * s + 2.0315 * (s @ s))
            }
        )
    steps = []
    for shape in ((2, 70, 90), (90, 70)):
        x = random(*shape, dtype=torch.float32)
        x /= torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
        expected = newton_schulz.newton_schulz(x, dtype=torch.float64, norm_dtype=torch.float64)
        for _ in range(5):
            x = symmetric.step(x, *newton_schulz.COEFFICIENTS)
        steps.append(error(x, expected))
    x = LAYOUTS["columns"](random(2, 40, 30, dtype=torch.float32))
    compiled = torch.compile(lambda x: symmetric.step(x, 1.0, 2.0, 3.0), backend="aot_eager", fullgraph=True)
    return {"loaded": loaded, "errors": errors, "steps": steps,
            "compiled": torch.equal(compiled(x), symmetric.step(x, 1.0, 2.0, 3.0))}


# shape of x, hidden, out, dtype, layout of all tensors; tiles are 64 x 64 in float32, else 128 x 128.
LINEAR = [
    # The last has more tiles of rows than are done together.
    ((2, 65, 33), 130, 40, "float32", "rows"),
    ((70, 40), 65, 7, "float32", "columns"),
    ((3, 1, 20), 1, 1, "float32", "inside"),
    ((2, 75, 70), 150, 64, "float16", "rows"),
    ((129, 130), 40, 30, "float16", "strided"),
    ((1, 16), 8, 5, "float16", "rows"),
    ((700, 5), 6, 4, "float32", "rows"),
]


def gradients(f, x, *weights, upstream):
    """Output and gradients of all arguments."""
    leaves = [v.detach().clone(memory_format=torch.preserve_format).requires_grad_() for v in (x, *weights)]
    out = f(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def measure_linear():
    errors = []
    for shape, hidden, out, name, layout in LINEAR:
        dtype, move = getattr(torch, name), LAYOUTS[layout]
        x, up, down = (
            move(random(*s, dtype=dtype) / s[-1] ** 0.5) for s in (shape, (hidden, shape[-1]), (out, hidden))
        )
        g, h = (
            move(random(*shape[:-1], hidden, dtype=dtype, seed=1)),
            move(random(*shape[:-1], out, dtype=dtype, seed=2)),
        )
        wide = [v.double() for v in (x, up, down)]
        formula = lambda x, up: (x @ up.mT).clamp(min=0) ** 2  # noqa: E731
        pairs = [(linear_relu_sq.linear_relu_sq, formula, 2, g),
                 (linear_relu_sq.mlp_relu_sq, lambda x, up, down: formula(x, up) @ down.mT, 3, h)]
        errors.append(
            [
                [
                    error(a, b)
                    for a, b in zip(
                        gradients(f, *(x, up, down)[:n], upstream=upstream),
                        gradients(exact, *wide[:n], upstream=upstream.double()), strict=True
                    )
                ]
                for f, exact, n, upstream in pairs
            ]
        )
    return {"errors": errors, **linear_corners()}


def linear_corners():
    x, up, down = (
        random(*shape, dtype=torch.float32).requires_grad_() for shape in ((20, 30), (40, 30), (10, 40))
    )
    f, mlp = linear_relu_sq.linear_relu_sq, linear_relu_sq.mlp_relu_sq
    compiled = torch.compile(lambda *a: (f(*a[:2]), mlp(*a)), backend="aot_eager", fullgraph=True)
    results = []
    for run in (lambda *a: (f(*a[:2]), mlp(*a)), compiled):
        a, b = run(x, up, down)
        results.append([a, b, *torch.autograd.grad(a.sum() + b.square().sum(), (x, up, down))])
    bad = x.detach().clone()
    bad[3, 4] = float("nan")
    half = f(x.detach().half(), up)
    return {"compiled": all(torch.equal(a, b) for a, b in zip(*results, strict=True)),
            "nan_rows": f(bad, up).isnan().all(1).nonzero().flatten().tolist(),
            "no_rows": list(mlp(x[:0], up, down).shape),
            "half": [str(half.dtype), str(torch.autograd.grad(half.sum(), up)[0].dtype)]}


# ----- ahead of time: a program

def resources(arch, folder):
    """{label: shared bytes, registers, spilled bytes, which instructions, grid} of the kernels as launched on
    sm_`arch`."""
    import aot
    for module in (symmetric, linear_relu_sq):
        module.refusal, module.capability = lambda *a: None, lambda device: arch
    s, f = symmetric, linear_relu_sq
    dtypes = {"": torch.bfloat16, " float32": torch.float32}
    if arch == 89:  # as on 80
        del dtypes[" float32"]
    found = {}

    def note(label, module, kernels, call):
        (kernel, grid, args, kwargs), = aot.launches({module: kernels}, call)
        built = aot.build(kernel, *args, arch=arch, folder=folder, **kwargs)
        instructions = [i for i in ("wgmma", "mma.sync", "cp.async") if i in built.ptx]
        found[label] = {**built._asdict(), "grid": grid, "ptx": instructions}

    for suffix, dtype in dtypes.items():
        def empty(*shape):
            return torch.empty(*shape, dtype=dtype, device="meta")

        x, up, p = empty(4096, 768), empty(3072, 768), empty(4096, 3072)
        note("quadratic" + suffix, s, "kernel", lambda: s.quadratic(empty(3, 768, 768), 1.0, 2.0))
        note("linear backward" + suffix, f, "kernels", lambda: f.product_gradient(x, empty(768, 3072).t(), p))
        if not suffix:
            note("gram", s, "kernel", lambda: s.gram(empty(3, 768, 3072)))
            note("gram_t", s, "kernel", lambda: s.gram_t(empty(3, 3072, 768)))
            note("linear", f, "kernels", lambda: f.forward(x, up))
            note("elementwise", f, "kernels", lambda: f.gradient(p, p))
            note("gram of gates", s, "kernel", lambda: s.gram(empty(6, 12)))
            note("linear of a row", f, "kernels", lambda: f.forward(empty(1, 768), up))
    if arch == 80:
        f.FLOAT32 = f.Tile(128, 128, 32, 4, 2)
        note("too large", f, "kernels", lambda: f.forward(x, up))  # in float32
    return found


# ----- tests

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter is for machines without a GPU"
)


@interpreted
def test_symmetric_products_equal_float64_in_any_strides_and_shapes():
    pytest.importorskip("triton")
    found = program("symmetric", TRITON_INTERPRET="1")
    assert not found["loaded"]  # importing the kernels imports no Triton
    for (_, name, _), errors in zip(SYMMETRIC, found["errors"], strict=True):
        assert all(e < LIMIT[name] for e in errors.values()), errors  # NaN fails
    assert all(e < 1e-5 for e in found["steps"])  # five Newton-Schulz steps, wide and tall
    assert found["compiled"]


@interpreted
def test_linear_relu_sq_and_its_gradients_equal_float64():
    pytest.importorskip("triton")
    found = program("linear", TRITON_INTERPRET="1")
    for (*_, name, _), errors in zip(LINEAR, found["errors"], strict=True):
        assert [len(e) for e in errors] == [3, 4] and all(
            e < LIMIT[name] for e in itertools.chain(*errors)
        ), errors
    assert found["compiled"]
    assert found["nan_rows"] == [3] and found["no_rows"] == [0, 10]
    # the gradient of a weight has the weight's dtype
    assert found["half"] == ["torch.float16", "torch.float32"]


@pytest.mark.parametrize("arch", [80, 89, 90])
def test_kernels_compile_ahead_of_time_within_the_shared_memory_and_without_spills(arch, tmp_path):
    pytest.importorskip("triton")
    import aot
    found = program("compile", str(arch), str(tmp_path))
    # the measure sees spills
    assert (found.pop("too large")["spilled"] > 0) if arch == 80 else "too large" not in found
    assert len(found) == (8 if arch == 89 else 10)
    for label, built in found.items():
        assert built["shared"] <= aot.SHARED[arch] and built["registers"] <= 255 and built["spilled"] == 0, (
            label,
            built,
        )
        if label != "elementwise":  # the tile of gates is smaller than a wgmma
            assert ("wgmma" if arch == 90 and "gates" not in label else "mma.sync") in built["ptx"], (
                label,
                built,
            )
        if label not in ("elementwise", "gram of gates"):
            assert "cp.async" in built["ptx"], (label, built)  # loads run ahead of the products
    assert found["gram"]["grid"] == found["quadratic"]["grid"] == [21, 3]  # of 6 x 6 tiles each, batch of 3
    assert found["linear"]["grid"] == [4096 // 128 * 3072 // (256 if arch == 90 else 128)]


@pytest.mark.parametrize(
    "call, line",
    [
        (lambda x: symmetric.gram(x), "the Triton symmetric product needs CUDA, and this is cpu; use torch"),
        (lambda x: symmetric.quadratic(x, 1.0, 1.0), "quadratic wants symmetric matrices, not (3, 4)"),
        (
            lambda x: linear_relu_sq.linear_relu_sq(x, x),
            "the Triton linear_relu_sq needs CUDA, and this is cpu; use torch",
        ),
    ],
)
def test_what_cannot_run_is_one_line(call, line, monkeypatch):
    monkeypatch.setattr(device, "INTERPRETED", False)
    with pytest.raises(ValueError) as caught:
        call(torch.ones(3, 4))
    assert str(caught.value) == line


def test_refusals_and_shapes_that_do_not_fit(monkeypatch):
    gpu, f = torch.device("cuda"), linear_relu_sq
    monkeypatch.setattr(device, "HAS_TRITON", True)
    monkeypatch.setattr(device, "capability", lambda device: 75)
    assert device.refusal(gpu, torch.float64) == "has no float64"
    assert device.refusal(gpu, torch.bfloat16) == "needs compute capability 8.0, and this is 7.5"
    monkeypatch.setattr(device, "capability", lambda device: 80)
    assert device.refusal(gpu, torch.bfloat16) is None
    monkeypatch.setattr(device, "HAS_TRITON", False)
    assert device.refusal(gpu, torch.bfloat16) == "needs the package triton"
    for module in (f, symmetric):
        monkeypatch.setattr(module, "refusal", lambda *a: None)
    with pytest.raises(ValueError, match="has no gradient"):
        symmetric.gram(torch.ones(3, 4, requires_grad=True))
    x, w = torch.ones(2, 3), torch.ones(4, 3)
    for bad in (
        lambda: f.linear_relu_sq(x, w.mT), lambda: f.linear_relu_sq(x[0], w), lambda: f.mlp_relu_sq(x, w, w)
    ):
        with pytest.raises(ValueError, match="do not fit"):
            bad()


@pytest.mark.parametrize("shape", [(3, 5), (2, 7, 4), (2, 4, 7)])
def test_references_are_the_formulas_and_the_step_is_newton_schulz(shape):
    x = random(*shape, dtype=torch.float64)
    pairs = torch.einsum("...mk,...nk->...mn", x, x)
    assert torch.allclose(symmetric.gram_reference(x), pairs, rtol=1e-12)
    assert torch.allclose(symmetric.gram_t_reference(x), torch.einsum("...km,...kn->...mn", x, x), rtol=1e-12)
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
    assert torch.allclose(
        symmetric.step_reference(x, *newton_schulz.COEFFICIENTS),
        newton_schulz.newton_schulz(x, steps=1, dtype=torch.float64, norm_dtype=torch.float64), rtol=1e-6
    )
    w, v = random(6, shape[-1], dtype=torch.float64), random(2, 6, dtype=torch.float64)
    z = torch.einsum("...i,oi->...o", x, w)
    assert torch.allclose(
        linear_relu_sq.linear_relu_sq_reference(x, w), torch.where(z > 0, z * z, 0.0), rtol=1e-12
    )
    assert torch.allclose(
        linear_relu_sq.mlp_relu_sq_reference(x, w, v), torch.where(z > 0, z * z, 0.0) @ v.T, rtol=1e-12
    )


if __name__ == "__main__":
    measure = {"symmetric": measure_symmetric, "linear": measure_linear,
               "compile": lambda: resources(int(sys.argv[2]), sys.argv[3])}[sys.argv[1]]
    print(json.dumps(measure()))
