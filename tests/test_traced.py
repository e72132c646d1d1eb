"""Laws of what torch.compile traces: no question to the environment, and one graph for each kernel.

A question to the environment (a package, a variable, a file) breaks the graph of the model where dynamo
cannot follow it. Kernels are launched by custom operators, which are not traced.
"""

import ast
from pathlib import Path

import pytest
import torch

from layers import losses
from kernels import (
    cross_entropy, device, fp8_linear, fp8_mlp, linear_relu_sq, newton_schulz, qk_rotary, symmetric, transpose
)

ROOT = Path(__file__).parent.parent
FILES = ["model.py", *sorted(str(f.relative_to(ROOT)) for room in ("kernels", "layers", "updates")
                             for f in (ROOT / room).glob("*.py"))]
SOURCES = {file: (ROOT / file).read_text(encoding="utf-8") for file in FILES}
# by the last part of their name
QUESTIONS = {"find_spec", "environ", "getenv", "which", "import_module", "Path", "open", "Popen", "version",
             "default_cache", "exists", "get_device_name"}
# what the compiler is handed: forwards of modules, autograd functions, update rules and their slots
ROOTS = {"forward", "backward", "update_", "direction", "__call__"}


# ----- no question to the environment -----------------------------------------------------------------------

def definitions_of(texts):
    """{(file, name): [its definitions]} of sources {file: text}: functions, methods under their own name, and
    what a file assigns to a name at its top, such as a table of functions."""
    found = {}
    for file, text in texts.items():
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                found.setdefault((file, node.name), []).append(node)
        for node in tree.body:
            for target in node.targets if isinstance(node, ast.Assign) else ():
                if isinstance(target, ast.Name) and isinstance(node.value, ast.Dict):
                    found.setdefault((file, target.id), []).append(node.value)
    return found


def operators_of(texts):
    """(file, name) of the functions that become custom operators."""
    found = set()
    for file, text in texts.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "custom_op":
                found.add((file, node.args[1].id))
    return found


def imports_of(text):
    """{name in a file: (file, name there or None for a module)} of what it imports from the project."""
    found = {}
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        for alias in node.names:
            inside = f"{node.module.replace('.', '/')}/{alias.name}.py"
            module = f"{node.module.replace('.', '/')}.py"
            if inside in FILES:
                found[alias.asname or alias.name] = (inside, None)
            elif module in FILES:
                found[alias.asname or alias.name] = (module, alias.name)
    return found


def questions_in_traced_code(texts):
    """Lines "file:line function name" where a function that may be traced asks the environment, and (file,
    name) of all that may be.

    A function is traced if it is a root, or if the name of it stands in a traced one: also one that is only
    handed on. Tracing ends at operators.
    """
    functions, operators = definitions_of(texts), operators_of(texts)
    imports = {file: imports_of(text) for file, text in texts.items()}
    todo, seen, asked = [key for key in functions if key[1] in ROOTS], set(), []
    while todo:
        key = todo.pop()
        if key in seen or key in operators:
            continue
        seen.add(key)
        file, name = key
        for node in (n for definition in functions[key] for n in ast.walk(definition)):
            word = getattr(node, "attr", getattr(node, "id", None))
            if word in QUESTIONS and not isinstance(getattr(node, "ctx", None), ast.Store):
                asked.append(f"{file}:{node.lineno} {name} {word}")
            todo += [k for k in targets(node, file, imports[file], functions) if k in functions]
    return sorted(asked), seen


def targets(node, file, imported, functions):
    """Keys of the functions that a name or attribute may mean."""
    if isinstance(node, ast.Name):
        yield imported.get(node.id, (file, node.id))
    elif isinstance(node, ast.Attribute):
        owner = imported.get(getattr(node.value, "id", None))
        if owner is not None and owner[1] is None:
            yield owner[0], node.attr
        elif getattr(node.value, "id", None) == "self":
            yield file, node.attr


def test_traced_code_asks_the_environment_nothing():
    asked, traced = questions_in_traced_code(SOURCES)
    assert asked == [] and traced >= {
        ("kernels/device.py", "refusal"), ("kernels/fp8_linear.py", "in_tiles"),
        ("kernels/transpose.py", "transpose_copy"), ("kernels/symmetric.py", "step"),
        ("kernels/qk_rotary.py", "check"), ("kernels/attention.py", "attend_varlen")
    }


@pytest.mark.parametrize("file, old, new, line", [
    ("kernels/device.py", "if not HAS_TRITON:", 'if importlib.util.find_spec("triton") is None:',
     "missing find_spec"),
    ("layers/mlp.py", "if self.fused:", 'if self.fused and os.environ.get("X"):', "forward environ"),
    ("kernels/fp8_linear.py", "if x.is_contiguous():", 'if Path("x").exists():', "row_major Path"),
])
def test_a_question_in_traced_code_is_found(file, old, new, line):
    assert SOURCES[file].count(old) == 1
    found, _ = questions_in_traced_code({**SOURCES, file: SOURCES[file].replace(old, new)})
    assert any(file in where and line in where for where in found)


# ----- one graph --------------------------------------------------------------------------------------------

def shaped(*shape, dtype=torch.bfloat16, grad=True):
    """A tensor without values: operators give shapes, kernels are not run."""
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def table(tokens, half):
    return shaped(tokens, half, dtype=torch.float32, grad=False)


def ids(*shape):
    return shaped(*shape, dtype=torch.int64, grad=False)


def loss_of(fp8):
    return lambda x, w, y: cross_entropy.linear_cross_entropy(
        x, w, y, backend="triton", fp8=(1.0, 2.0, 3.0) if fp8 else None, transpose="triton"
    )


def mlp_in_fp8(ranks):
    scales = shaped(ranks, dtype=torch.float32, grad=False), shaped(dtype=torch.float32, grad=False)
    return lambda x, up, down: fp8_mlp.fp8_mlp(x, up, down, ranks, scales, fused=True)[0]


ENTRIES = {
    "linear_relu_sq": (linear_relu_sq.linear_relu_sq, shaped(2, 16, 32), shaped(64, 32)),
    "mlp_relu_sq": (linear_relu_sq.mlp_relu_sq, shaped(2, 16, 32), shaped(64, 32), shaped(32, 64)),
    "qk_rotary": (
        lambda *x: sum(qk_rotary.qk_rotary(*x, order="before_rope", eps=1e-6)),
        shaped(2, 16, 2, 32), shaped(2, 16, 2, 32), table(16, 16), table(16, 16)
    ),
    "qkv_rotary": (
        lambda *x: sum(qk_rotary.qkv_rotary(*x, order="after_rope", eps=1e-6)),
        shaped(2, 16, 3, 2, 32), table(16, 16), table(16, 16)
    ),
    "transpose_copy": (transpose.transpose_copy, shaped(32, 48, grad=False)),
    "symmetric.step": (lambda x: symmetric.step(x, 1.0, 2.0, 3.0), shaped(2, 32, 48, grad=False)),
    "newton_schulz": (lambda x: newton_schulz.newton_schulz(x, fused=True), shaped(2, 48, 32, grad=False)),
    "cross_entropy": (loss_of(False), shaped(2, 16, 32), shaped(64, 32), ids(2, 16)),
    "cross_entropy in FP8": (loss_of(True), shaped(2, 16, 32), shaped(64, 32), ids(2, 16)),
    "FP8 head": (
        lambda x, w: fp8_linear.fp8_linear(x, w, 1.0, 2.0, 3.0, "triton"), shaped(2, 16, 32), shaped(64, 32)
    ),
    **{
        f"FP8 MLP, {ranks} ranks": (mlp_in_fp8(ranks), shaped(16 * ranks, 32), shaped(64, 32), shaped(32, 64))
        for ranks in (1, 2, 8)
    },
}


@pytest.mark.parametrize("name", ENTRIES)
def test_each_kernel_is_one_graph_forward_and_backward(name, monkeypatch):
    """With Triton and 8-bit units said to be there, on tensors without values; FP8 products get scales
    (1,)."""
    monkeypatch.setattr(device, "HAS_TRITON", True)
    monkeypatch.setattr(device, "INTERPRETED", True)
    monkeypatch.setattr(fp8_linear, "has_fp8_units", lambda x: True)
    # here, because it loads the compiler: 2 s of every collection
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    graphs, (entry, *tensors) = [], ENTRIES[name]

    def kept(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    compiled = torch.compile(entry, fullgraph=True, backend=aot_autograd(fw_compiler=kept, bw_compiler=kept))
    y = compiled(*tensors)
    if y.requires_grad:
        y.backward(torch.empty_like(y))
    torch._dynamo.reset()
    nodes = [node for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    scaled = [node for node in nodes if node.target is torch.ops.aten._scaled_mm.default]
    assert any("speedrun::" in str(getattr(node.target, "_schema", "")) for node in nodes)
    assert all(scale.meta["val"].shape == (1,) for node in scaled for scale in node.args[2:4])
    assert len(graphs) == 1 + y.requires_grad and bool(scaled) == name.startswith("FP8")


@pytest.mark.parametrize("prefix", [False, True])
def test_a_compiled_loss_of_several_targets_scatters_nothing(prefix):
    """Inductor would make a float32 tensor of all logits for each scatter; the gradients stay the eager ones."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    graphs, generator = [], torch.Generator().manual_seed(0)
    logits = torch.randn(2, 9, 31, generator=generator, requires_grad=True)  # (R, T, V)
    targets, others = torch.randint(31, (2, 2, 9), generator=generator)  # (R, T)
    others[:, ::3] = -1  # no second target
    terms = (others, torch.tensor([0.25])) if prefix else ()

    def loss(logits, targets, weights):
        return losses.weighted_losses(logits, targets, weights, *terms).square().sum()

    def kept(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=aot_autograd(fw_compiler=kept, bw_compiler=kept))
    found = [torch.autograd.grad(run(logits, targets, torch.tensor([1.0, 0.5, 0.25])), logits)[0]
             for run in (loss, compiled)]
    torch._dynamo.reset()
    torch.testing.assert_close(*found)
    called = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert len(graphs) == 2 and not any("scatter" in name for name in called)
