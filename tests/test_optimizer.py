"""Laws of the optimizer: rules, Muon's slots, groups and labels, cadence, accumulation, CUDA graphs, memory,
reset.

Golden numbers of the rules and of whole trainings through the Optimizer are in test_golden.py.
"""

import contextlib
import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import optim
import process_group
import schedule
from common.errors import UserError
from kernels.newton_schulz import newton_schulz
from model import GPT, without_values
from optim import RULES, Optimizer, Tree
from settings import deltas
from settings.muon import Muon as OptimMuon
from settings.optim import LABELS, Label, MatrixLabel, Optim
from step_hooks import begin_step
from small_models import Toy, build, forward_all, plan, settings, step, tokens, update
from system.comm import communication
from system.place import local_ranks
from updates.adam import AdamW, adamw_
from updates.muon import Muon
from updates.slots import Slot
from updates.views import Views

ROOT = Path(__file__).parent.parent
F64 = torch.float64


def noise(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_optim(s, **changes):
    """Settings with other values in their section optim."""
    return dataclasses.replace(s, optim=dataclasses.replace(s.optim, **changes))


def reference(value, gradients, hyper):
    """A parameter after torch's AdamW with the settings of a group."""
    p = torch.nn.Parameter(value.clone())
    adam = torch.optim.AdamW(
        [p], lr=hyper.lr, betas=(hyper.beta1, hyper.beta2), eps=hyper.eps, weight_decay=hyper.weight_decay
    )
    for g in gradients:
        p.grad = g
        adam.step()
    return p.detach()


# ----- rules

@pytest.mark.feature("optim.adam")
def test_adamw_equals_torch():
    s = settings("short/1")
    rule = AdamW.of(s, s.optim.group("embed", "embed"))
    start, gradients = noise(7, 5), [noise(7, 5, seed=i) for i in range(1, 5)]
    p = start.clone()
    kinds = rule.state((), F64, Views())
    state = {name: torch.zeros(7, 5, dtype=dtype) for name, (_, dtype) in kinds.items()}
    for t, g in enumerate(gradients, 1):
        rule.update_(p, g, state, rule.numbers(plan(), t), Views())
    assert torch.allclose(p, reference(start, gradients, s.optim.group("embed", "embed")), rtol=1e-12, atol=0)


def adamw_as_written(
    p, g, m, v, *, lr, decay, beta1, beta2, eps, eps_after_correction, correction1, correction2, math_dtype
):
    """The formula without anything in place: what adamw_ must equal bit by bit."""
    p, g, m, v = (x.to(math_dtype) for x in (p, g, m, v))
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    p = p - (lr * decay) * p
    if eps_after_correction:
        return p - (lr / correction1) * m / ((v / correction2).sqrt() + eps), m, v
    return p - (lr * correction2 ** 0.5 / correction1) * m / (v.sqrt() + eps), m, v


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("stored, moments", [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16),
                                             (torch.float32, torch.bfloat16)])
def test_adamw_in_place_gives_the_bits_of_the_formula_and_leaves_the_gradient(stored, moments, after):
    p, g = noise(999, dtype=stored), noise(999, seed=1, dtype=stored)
    m, v = noise(999, seed=2, dtype=moments), noise(999, seed=3, dtype=moments).abs()
    hyper = dict(
        lr=0.01, decay=0.1, beta1=0.8, beta2=0.95, eps=1e-8, eps_after_correction=after, correction1=0.2,
        correction2=0.05, math_dtype=torch.float32
    )
    expected, before = adamw_as_written(p, g, m, v, **hyper), g.clone()
    adamw_(p, g, m, v, **hyper)
    for got, value in zip((p, m, v), expected):
        assert torch.equal(got, value.to(got.dtype))
    assert torch.equal(g, before)


def test_compiled_adamw_is_one_pass_over_its_tensors(tmp_path):
    """One kernel: nothing between is written, which is all that a kernel of our own could save."""
    script = (f"import os\nos.environ['TORCHINDUCTOR_CACHE_DIR'] = {str(tmp_path)!r}\n"
              "import torch\nfrom torch._inductor import metrics\nfrom updates.adam import adamw_\n"
              "number = lambda x: torch.tensor(x, dtype=torch.float64)\n"
              "tensors = [torch.ones(4096) for _ in range(4)]\n"
              "torch.compile(adamw_, dynamic=False)(*tensors, lr=number(0.1), decay=0.1, beta1=0.9, "
              "beta2=0.95, eps=1e-8,\n    eps_after_correction=True, correction1=number(0.1), "
              "correction2=number(0.05), math_dtype=torch.float32)\nprint(metrics.generated_kernel_count, "
              "tensors[0].eq(tensors[0][0]).all().item(), tensors[0][0].item())")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    count, equal, value = done.stdout.split()
    p, _, _ = adamw_as_written(
        *(torch.ones(1) for _ in range(4)), lr=0.1, decay=0.1, beta1=0.9, beta2=0.95, eps=1e-8,
        eps_after_correction=True, correction1=0.1, correction2=0.05, math_dtype=torch.float32
    )
    assert (count, equal) == ("1", "True") and abs(float(value) - p.item()) < 1e-6


@pytest.mark.parametrize("ref", ["short/3", "short/11", "short/33"])
def test_a_compiled_rule_is_one_graph_and_updates_as_the_plain_one(ref):
    """Through aot_eager: the whole of update_ is traced, with numbers that are tensors, and gives the same
    parameters."""
    s = settings(ref)
    for label in ("qkvo", "c_fc", "embed"):
        model = GPT(s)
        p = next(p for p in model.parameters() if p.label == label)
        group = s.optim.group(p.role, label)
        rule, ends = RULES[group.rule](s, group), []
        unit = rule.unit(p.shape, p.views)
        for function in (
            rule.update_,
            torch.compile(rule.update_, backend="aot_eager", fullgraph=True, dynamic=False),
        ):
            x, g = noise(3, *unit), noise(3, *unit, seed=1)
            state = {
                name: torch.zeros((3, *shape), dtype=dtype)
                for name, (shape, dtype) in rule.state(unit, F64, p.views).items()
            }
            for t in (1, 2):
                numbers = {
                    name: torch.tensor(value, dtype=F64) for name, value in rule.numbers(plan(), t).items()
                }
                with torch.no_grad():
                    function(x, g, state, numbers, p.views)
            ends.append([x, *state.values()])
        assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-15) for a, b in zip(*ends)), label


# ----- Muon's slots and views

def test_views_split_units_without_a_copy_and_join_them_again():
    x = noise(2, 4, 6, 6)
    joint = Views(pieces=(("qkv", 0, 3), ("o", 3, 4)))
    assert joint.unit((4, 6, 6)) == (4, 6, 6)
    assert [part.shape for part in joint.split(x)] == [(2, 18, 6), (2, 6, 6)]
    assert all(part.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for part in joint.split(x))
    assert torch.equal(joint.join(joint.split(x)), x)
    apart = Views(pieces=tuple((name, i, i + 1) for i, name in enumerate("qkvo")))
    assert apart.unit((4, 6, 6)) == (6, 6) and Views().unit((8, 3, 5)) == (3, 5)


@pytest.mark.feature("optim.muon.split_qkv")
def test_joined_pieces_are_orthogonalised_as_one_matrix():
    s, model = settings("short/3"), build("short/3")
    before, g = model.blocks[0].attn.qkvo.detach().clone(), noise(4, 48, 48, seed=3)
    update(Optimizer(model, s), model, {"blocks.0.attn.qkvo": g}, plan(momentum=0.9))
    moved = (before - model.blocks[0].attn.qkvo.detach()) / s.optim.muon.lr
    u = 1.9 * g  # of the first step, whose buffer is the gradient
    for part, got in ((u[:3].flatten(0, 1), moved[:3].flatten(0, 1)), (u[3], moved[3])):
        expected = newton_schulz(part, dtype=F64, norm_dtype=F64, form=s.numerics.newton_schulz_form)
        assert torch.allclose(got, expected, rtol=0, atol=1e-9)


@dataclasses.dataclass(frozen=True)
class RowVariance(Slot):
    """A slot that is not in the tree: NorMuon (arXiv 2510.05491), a second moment per neuron; the norm of the
    matrix stays."""
    beta2: float

    each_matrix = True

    def state(self, unit, dtype, views):
        return {"row_variance": ((*unit[:-1], 1), dtype)}

    def __call__(self, u, step):
        axis, variance = -1, step.state["row_variance"]
        variance.lerp_(u.square().mean(axis, keepdim=True), 1 - self.beta2)
        out = u / (variance.sqrt() + 1e-10)
        return out * (u.norm(dim=(-2, -1), keepdim=True) / out.norm(dim=(-2, -1), keepdim=True))


def with_variance(s, group):
    """Muon with the slot before its last one."""
    rule = Muon.of(s, group)
    return dataclasses.replace(rule, slots=(*rule.slots[:-1], RowVariance(0.9), rule.slots[-1]))


@pytest.mark.parametrize("ref", ["short/3", "short/33"])  # q, k, v as one matrix, and apart
def test_a_slot_with_state_needs_nothing_but_itself(ref):
    """Per matrix, also where one unit has several; against the same written out in plain torch."""
    ratio = "optim.muon.scale=sqrt_ratio"
    s, model = settings(ref, ratio), build(ref, ratio)
    optimizer = Optimizer(model, s, rules={**RULES, "muon": with_variance})
    name = "blocks.1.attn.qkvo"
    expected = model.get_parameter(name).detach().clone()
    parts = [slice(0, 3), slice(3, 4)] if ref == "short/3" else [slice(i, i + 1) for i in range(4)]
    buffer, variances = torch.zeros_like(expected), [0.0] * len(parts)
    for i in range(3):
        g = noise(4, 48, 48, seed=i)
        update(optimizer, model, {name: g}, plan(i))
        g = (1 - 0.9) * g if s.optim.muon.momentum_ema else g
        buffer = 0.9 * buffer + g
        u = 0.9 * buffer + g
        for k, part in enumerate(parts):
            x = newton_schulz(
                u[part].flatten(0, 1), dtype=F64, norm_dtype=F64, form=s.numerics.newton_schulz_form
            )
            variances[k] = 0.9 * variances[k] + 0.1 * x.square().mean(1, keepdim=True)
            y = x / (variances[k].sqrt() + 1e-10)
            y = y * x.norm() / y.norm() * max(1, x.size(0) / x.size(1)) ** 0.5
            expected[part] -= s.optim.muon.lr * y.view(expected[part].shape)
    assert torch.allclose(model.get_parameter(name), expected, rtol=0, atol=1e-9)
    assert any(name.endswith("row_variance") and x.any() for name, x in optimizer.tensors().items())
    optimizer.reset()
    assert not any(x.any() for x in optimizer.tensors().values())


# ----- rules that are not in the tree

class KeptMantissa:
    """AdamW on bfloat16 weights whose lower 16 bits of a float32 are state: the weight in use is truncated,
    nothing is lost."""
    name, shared, skips_idle = "adamw with mantissa", False, False

    def __init__(self, s, group):
        self.inner = AdamW.of(s, group)
        self.numbers, self.unit = self.inner.numbers, self.inner.unit

    def __hash__(self):
        return hash(self.inner)

    def __eq__(self, other):
        return isinstance(other, KeptMantissa) and self.inner == other.inner

    def state(self, unit, dtype, views):
        return {**self.inner.state(unit, torch.float32, views), "mantissa": (unit, torch.int16)}

    def update_(self, p, g, state, numbers, views):
        whole = (p.view(torch.int16).int() << 16 | state["mantissa"].int() & 0xFFFF).view(torch.float32)
        self.inner.update_(whole, g.float(), state, numbers, views)
        state["mantissa"].copy_(whole.view(torch.int32).bitwise_and(0xFFFF).to(torch.int16))
        p.view(torch.int16).copy_((whole.view(torch.int32) >> 16).to(torch.int16))


def test_a_bfloat16_weight_with_its_mantissa_as_state_trains_as_a_float32_one():
    s = settings("short/11", precision="float32")
    start, gradients = (
        noise(40, 8, dtype=torch.bfloat16),
        [noise(40, 8, seed=i, dtype=torch.bfloat16) for i in range(1, 30)],
    )
    narrow, wide = Toy(x=(start, "embed", "embed")), Toy(x=(start.float(), "embed", "embed"))
    optimizers = Optimizer(narrow, s, rules={**RULES, "adamw": KeptMantissa}), Optimizer(wide, s)
    for i, g in enumerate(gradients):
        for model, optimizer in zip((narrow, wide), optimizers):
            update(optimizer, model, {"x": g}, plan(i, lr_factor=0.01))
    bits = wide.x.detach().view(torch.int32)
    assert torch.equal(narrow.x.detach().view(torch.int16), (bits >> 16).to(torch.int16))
    mantissa = next(x for name, x in optimizers[0].tensors().items() if name.endswith("mantissa"))
    assert torch.equal(mantissa.view(40, 8), bits.bitwise_and(0xFFFF).to(torch.int16)) and mantissa.any()


@dataclasses.dataclass(frozen=True)
class RowAdam:
    """RMSprop with one second moment per row of a table, whose unit is the row."""
    lr: float

    name, shared, skips_idle = "row_adam", False, False

    def unit(self, shape, views):
        return tuple(shape[-1:])

    def state(self, unit, dtype, views):
        return {"row_moment": ((1,), dtype)}

    def numbers(self, plan, t):
        return {"lr": self.lr * plan.lr_factor, "correction": 1 - 0.9 ** t}

    def update_(self, p, g, state, numbers, views):
        moment = state["row_moment"].lerp_(g.square().mean(-1, keepdim=True), 0.1)
        p.sub_(numbers["lr"] * g / ((moment / numbers["correction"]).sqrt() + 1e-10))


def test_a_rule_by_rows_needs_nothing_but_itself():
    s = settings("short/11")
    start, gradients = noise(30, 8), [noise(30, 8, seed=i) for i in range(1, 4)]
    model = Toy(x=(start, "embed", "embed"))
    optimizer = Optimizer(model, s, rules={**RULES, "adamw": lambda s, group: RowAdam(0.1)})
    expected, moment = start.clone(), torch.zeros(30, 1, dtype=F64)
    for t, g in enumerate(gradients, 1):
        update(optimizer, model, {"x": g}, plan(t))
        moment = 0.9 * moment + 0.1 * g.square().mean(1, keepdim=True)
        expected -= 0.1 * g / ((moment / (1 - 0.9 ** t)).sqrt() + 1e-10)
    assert torch.allclose(model.x, expected, rtol=1e-12, atol=0)
    assert optimizer.state_bytes() == 30 * 8


# ----- groups, labels, cadence

def table_toy():
    return Toy(embed=(noise(6, 4), "embed", "embed"), value=(noise(6, 4, seed=1), "embed", "value_embed"))


@pytest.mark.feature("optim.value_embed")
def test_a_label_has_its_own_rate_betas_eps_and_decay_and_the_others_keep_the_role_s():
    s = deltas.resolve(
        "short/20", scale="micro", sets=["system.precision=float64", "optim.adam.eps_after_correction=true"],
        with_=["optim.value_embed"]
    ).settings
    own = dataclasses.replace(s.optim.value_embed, lr=0.05, weight_decay=0.2, beta1=0.5, beta2=0.8, eps=0.001)
    s, model = with_optim(s, value_embed=own), table_toy()
    gradients = [
        {name: noise(6, 4, seed=5 * i + k) for k, name in enumerate(("embed", "value"))} for i in range(4)
    ]
    starts, optimizer = (
        {name: p.detach().clone() for name, p in model.named_parameters()},
        Optimizer(model, s),
    )
    for i, g in enumerate(gradients):
        update(optimizer, model, g, plan(i))
    for name, label in (("embed", "embed"), ("value", "value_embed")):
        hyper = s.optim.group("embed", label)
        assert (hyper.lr, hyper.beta1, hyper.every) == ((0.05, 0.5, 1) if name == "value" else
                                                        (s.optim.embed.lr, s.optim.adam.beta1, 1))
        expected = reference(starts[name], [g[name] for g in gradients], hyper)
        assert torch.allclose(model.get_parameter(name), expected, rtol=1e-12, atol=0), name


@pytest.mark.feature("optim.scalar.every")
@pytest.mark.parametrize("stored", [F64, torch.bfloat16])
def test_a_label_that_is_updated_every_second_step_takes_the_sum_of_both_gradients_and_counts_its_own_updates(
    stored,
):
    """Steps 1, 3, ... update it, with its own bias correction; the other group goes on every step."""
    s = deltas.resolve(
        "short/20", scale="micro", sets=["system.precision=float64", "optim.adam.eps_after_correction=true"],
        with_=["optim.value_embed"]
    ).settings
    s = with_optim(s, value_embed=dataclasses.replace(s.optim.value_embed, every=2))
    plans = [plan(i, due=schedule.due(s.optim.cadences(), i)) for i in range(6)]
    assert [("value_embed" in p.due, "embed" in p.due) for p in plans] == [(False, True), (True, True)] * 3
    model = Toy(
        embed=(noise(6, 4), "embed", "embed"),
        value=(noise(6, 4, seed=1, dtype=stored), "embed", "value_embed"),
    )
    gradients = [
        {"embed": noise(6, 4, seed=i), "value": noise(6, 4, seed=9 + i, dtype=stored)} for i in range(6)
    ]
    starts, optimizer, still = (
        {n: p.detach().clone() for n, p in model.named_parameters()}, Optimizer(model, s), []
    )
    for p, g in zip(plans, gradients):
        before = model.value.detach().clone()
        update(optimizer, model, g, p)
        still.append(torch.equal(before, model.value))
    assert still == [True, False] * 3
    hyper = s.optim.group("embed", "value_embed")
    assert torch.allclose(
        model.embed,
        reference(starts["embed"], [g["embed"] for g in gradients], s.optim.group("embed", "embed")),
        rtol=1e-12, atol=0
    )
    sums = [
        a["value"].to(torch.promote_types(stored, torch.float32)) + b["value"]
        for a, b in zip(gradients[::2], gradients[1::2])
    ]
    expected = reference(starts["value"].double(), [g.double() for g in sums], hyper)
    assert torch.allclose(
        model.value.double(), expected, rtol=1e-9 if stored == F64 else 0.02,
        atol=0 if stored == F64 else 0.01
    )
    counts = {x.item() for name, x in optimizer.tensors().items() if name.endswith("updates")}
    assert counts == {6, 3}


def test_a_whole_model_trains_with_a_cadence_and_its_plan_is_the_settings():
    s = deltas.resolve("short/33", scale="micro", sets=["schedule.steps=6", "optim.scalar.every=2"]).settings
    plans, model = schedule.plan(s), GPT(s)
    assert [("scalar" in p.due, "matrix" in p.due) for p in plans] == [(False, True), (True, True)] * 3
    model.initialise(0)
    optimizer, moved = Optimizer(model, s), []
    for i in range(4):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        step(optimizer, model, s, tokens(8, 33, seed=i), i)
        moved.append(
            [not torch.equal(before[name], p) for name, p in model.named_parameters() if p.role == "scalar"]
        )
    assert not any(moved[0]) and not any(moved[2]) and all(moved[3])


OWN = {"lr": 0.5, "weight_decay": 0.25, "beta1": 0.125, "beta2": 0.75, "eps": 0.5, "every": 3, "adamw": True,
       "decay_mul": 0.5, "freeze_steps": 7, "lr_mul": 2.0, "bias_correction": False}
LABELLED = [
    (f"optim.{label}.{field.name}", role, label, field.name) for role, labels in LABELS.items()
    for label in labels for field in dataclasses.fields(MatrixLabel if role == "matrix" else Label)
]


@pytest.mark.feature(path="path")
@pytest.mark.parametrize("path, role, label, field", LABELLED)
def test_each_setting_of_a_label_replaces_the_role_s_and_leaves_the_other_labels_alone(
    path, role, label, field
):
    plain = Optim(muon=OptimMuon())
    section = (MatrixLabel if role == "matrix" else Label)(**{field: OWN[field]})
    labelled = dataclasses.replace(plain, **{label: section})
    before, after = plain.group(role, label), labelled.group(role, label)
    name, value = ("rule", "adamw") if field == "adamw" else (field, OWN[field])
    assert getattr(before, name) != getattr(after, name) == value
    for other in LABELS[role]:
        assert other == label or labelled.group(role, other) == plain.group(role, other)


@pytest.mark.feature("optim.gate.adamw", "optim.gate")
def test_a_label_of_matrices_goes_to_adamw_if_asked():
    s = deltas.resolve(
        "short/33", scale="micro", sets=["system.precision=float64", "optim.adam.eps_after_correction=true"],
        with_=["optim.gate"]
    ).settings
    s = with_optim(s, gate=dataclasses.replace(s.optim.gate, adamw=True, lr=0.03, weight_decay=0.1))
    start = noise(6, 12)
    model = Toy(gate=(start, "matrix", "gate"), down=(noise(4, 6), "matrix", "c_proj"))
    optimizer, gradients = Optimizer(model, s), [noise(6, 12, seed=i) for i in range(3)]
    assert [bank.rule.name for bank in optimizer.banks] == ["adamw", "muon"]
    for i, g in enumerate(gradients):
        update(optimizer, model, {"gate": g}, plan(i))
    assert torch.allclose(
        model.gate, reference(start, gradients, s.optim.group("matrix", "gate")), rtol=1e-12, atol=0
    )


def test_a_label_under_muon_can_decay():
    s = deltas.resolve(
        "short/33", scale="micro", sets=["system.precision=float64"], with_=["optim.c_proj"]
    ).settings
    ends = {}
    for decay in (0.0, 0.3):
        s = with_optim(s, c_proj=dataclasses.replace(s.optim.c_proj, weight_decay=decay, lr=0.1))
        model = Toy(down=(noise(4, 6), "matrix", "c_proj"))
        update(Optimizer(model, s), model, {"down": noise(4, 6, seed=1)}, plan())
        ends[decay] = model.down.detach()
    assert torch.allclose(ends[0.3], ends[0.0] - 0.1 * 0.3 * noise(4, 6), rtol=0, atol=1e-15)


@pytest.mark.parametrize("ref, sets, message", [
    ("short/33", ["optim.qkvo={beta1=0.9}"], "optim.qkvo.beta1 is AdamW's"),
    ("short/33", ["optim.gate={lr=-1}"], "optim.gate.lr = -1.0: must be at least 0"),
    ("short/33", ["optim.embed.every=0"], "optim.embed.every = 0: must be at least 1"),
    ("short/33", ["optim.norm=true"], "optim.norm needs model.norm=layernorm"),
    ("short/33", ["optim.value_embed={beta2=1.0}"], "must lie in 0 <= x < 1"),
    ("short/33", ["optim.embed.every=2", "system.reduction=ordered"], "leave every optim"),
    ("short/2", ["optim.qkvo={adamw=true}"], "optim.qkvo.adamw needs optim.muon")])
def test_labels_that_mean_nothing_are_refused(ref, sets, message):
    with pytest.raises(UserError, match=message):
        deltas.resolve(ref, scale="micro", sets=sets)


def test_every_label_of_a_model_has_its_section_or_is_that_of_a_role():
    for ref in ("short/1", "short/11", "short/33", "variants/1", "variants/6"):
        s = settings(ref)
        for name, p in GPT(s).named_parameters():
            assert hasattr(s.optim, p.label) and hasattr(s.optim, p.role), name


def test_the_table_has_every_parameter_once_with_its_communication():
    s = settings("short/33", "optim.value_embed={lr=0.3, every=2}")
    model = GPT(s)
    rows = Optimizer(model, s, communication(s, 0, 8)).table()
    assert sum(int(row[2].split(" x ")[0]) for row in rows) == len(list(model.parameters()))
    row, = (row for row in rows if row[0] == "value_embed")
    assert row[3:5] == ("adamw", "0.3") and row[-2:] == ("reduce-scatter", "every 2 steps")


def test_the_table_says_what_a_rule_by_rows_reads_and_when_its_updates_become_rarer():
    s = deltas.resolve("short/92", scale="micro").settings
    group = s.optim.group("embed", "bigram")
    row, = (row for row in Optimizer(without_values(s), s).table() if row[0] == "bigram")
    assert row[3] == "row_adam" and row[6] == f"beta2 {group.beta2:g} eps {group.eps:g}"
    assert row[-1] == f"every {group.every} steps, from {group.slower.start} on every 4" and group.every == 2


# ----- a tied head that splits

def test_a_tied_head_splits_with_its_state():
    """While tied, the head takes both gradients and the table, which is not due, follows it; then both go on
    from one state."""
    s = deltas.resolve(
        "short/20",
        scale="micro",
        sets=[
            "system.precision=float64", "optim.adam.eps_after_correction=true", "optim.embed.lr=0.01",
            "optim.lm_head.lr=0.01"
        ],
    ).settings
    start = noise(6, 4)
    model = Toy(table=(start, "embed", "embed"), head=(start, "lm_head", "lm_head"))
    optimizer = Optimizer(model, s)
    gradients = [(noise(6, 4, seed=i), noise(6, 4, seed=9 + i)) for i in range(5)]
    for i, (of_table, of_head) in enumerate(gradients):
        tied = i < 3
        if i == 3:
            optimizer.copy_parameter("lm_head", "embed")
        update(
            optimizer, model, {"head": of_head + of_table} if tied else {"head": of_head, "table": of_table},
            plan(i, due=frozenset({"lm_head"}) if tied else None)
        )
        if tied:
            model.table.data.copy_(model.head.data)
    together = [a + b for a, b in gradients[:3]]
    for p, k, group in (
        (model.table, 0, s.optim.group("embed", "embed")),
        (model.head, 1, s.optim.group("lm_head", "lm_head")),
    ):
        assert torch.allclose(
            p, reference(start, together + [g[k] for g in gradients[3:]], group), rtol=1e-12, atol=0
        )


# ----- accumulation

def test_the_tree_sums_in_one_order_however_leaves_arrive():
    leaves = [torch.randn(50, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    whole = Tree()
    for leaf in leaves:
        whole.push(leaf)
    halves = [Tree(), Tree()]
    for i, leaf in enumerate(leaves):
        halves[i // 4].push(leaf)
    top = Tree()
    for half in halves:
        top.push(half.total())
    assert torch.equal(whole.total(), top.total())
    assert torch.allclose(whole.total(), sum(leaves), atol=1e-5)


@pytest.mark.parametrize("ref", ["short/1", "short/3", "short/11"])
def test_accumulated_forwards_equal_one_forward(ref):
    results = []
    for microbatch in (8, 2):
        s, model = settings(ref), build(ref, scramble=False)
        optimizer = Optimizer(model, s)
        for i in range(2):
            step(optimizer, model, s, tokens(8, 17, seed=i), i, microbatch)
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(*results, rtol=0, atol=1e-7)


def test_bf16_gradients_of_several_forwards_are_summed_in_float32():
    apart, model = (build("short/11", precision="record") for _ in range(2))
    parameter = next(p for p in apart.parameters() if p.role == "embed")
    alone = []
    for seed in range(3):
        loss = apart(tokens(seed=seed), tokens(seed=5)).mean()
        alone.append(torch.autograd.grad(loss, parameter)[0].float())
    assert parameter.dtype == torch.bfloat16 and all(g.abs().max() > 0 for g in alone)
    optimizer = Optimizer(model, model.settings)
    for _ in range(2):  # nothing of the first step is left in the second
        for seed in range(3):
            optimizer.expect(last=seed == 2)
            model(tokens(seed=seed), tokens(seed=5)).mean().backward()
            optimizer.accumulate()
        table = next(b for b in optimizer.banks if b.role == "embed")
        for _ in range(2):  # asking does not change the answer
            assert table.local_gradient().dtype == torch.float32
            assert torch.equal(table.local_gradient().view(-1)[:parameter.numel()], sum(alone).view(-1))
        for bank in optimizer.banks:
            bank.clear()


@pytest.mark.parametrize("ref", ["short/10", "short/33"])
def test_one_logical_rank_a_forward_updates_as_eight_do_in_the_records_precision(ref):
    """Up to the rounding of 16-bit gradients: a forward that was lost would show as an eighth of them."""
    sums = []
    for microbatch in (8, 1):
        model = build(ref, precision="record")
        optimizer = Optimizer(model, model.settings)
        forward_all(optimizer, model, model.settings, tokens(8, 33), 0, microbatch)
        sums.append({bank.name(): bank.local_gradient().float().clone() for bank in optimizer.banks})
    for name, whole in sums[0].items():
        assert (sums[1][name] - whole).norm() < 0.03 * whole.norm() + 1e-12, name


@pytest.mark.feature("optim.grad_clip")
def test_grad_clip_equals_torch():
    clipped = []
    for ours in (True, False):
        s, model = settings("short/1", "optim.grad_clip=0.01"), build("short/1", scramble=False)
        optimizer = Optimizer(model, s)
        optimizer.expect(last=True)
        F.cross_entropy(model(tokens()).flatten(0, 1), tokens(seed=9).flatten()).backward()
        optimizer.accumulate()
        if ours:
            factor = optimizer.clip_factor(
                optimizer.banks, [optimizer.reduced(bank)[1] for bank in optimizer.banks]
            )
            clipped.append(torch.cat([(p.grad * factor).flatten() for p in model.parameters()]))
        else:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            clipped.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.allclose(*clipped, rtol=1e-4, atol=0)


# ----- communication

class Reporting(optim.Local):
    """A bank's communication that writes down what it is asked for, and reduces nothing."""
    reduces = eager = True

    def __init__(self, number, said):
        super().__init__()
        self.number, self.said = number, said

    def reduce(self, grad):
        self.grad, self.work = grad, [self]
        self.said.append(("reduce", self.number))

    def wait(self, grad):
        self.said.append(("wait", self.number))
        return self.grad, self.grad

    def gather(self, param):
        self.said.append(("gather", self.number))


def test_banks_are_updated_in_the_order_in_which_their_reductions_began():
    """Each is gathered before the next one is waited for; reductions begin in the backward pass, on its last
    forward only."""
    model, said = build("short/11"), []
    numbers = iter(range(100))
    communication = SimpleNamespace(
        of=lambda shared, experts: Reporting(next(numbers), said), total=lambda x: x, gathers_last=False
    )
    optimizer = Optimizer(model, model.settings, communication)
    forward_all(optimizer, model, model.settings, tokens(8, 17), 0, 4)
    order = [n for _, n in said]
    assert {what for what, _ in said} == {"reduce"} and sorted(order) == sorted(set(order)) and len(order) > 2
    assert order != sorted(order)  # the backward pass ends with the embedding, which is the first bank
    optimizer.step(schedule.plan(model.settings)[0])
    later = said[len(order):]
    assert later == [(what, n) for n in order for what in ("wait", "gather")]


def test_a_bank_that_is_not_due_launches_nothing():
    model, said = build("short/11"), []
    numbers = iter(range(100))
    communication = SimpleNamespace(
        of=lambda shared, experts: Reporting(next(numbers), said), total=lambda x: x, gathers_last=False
    )
    optimizer = Optimizer(model, model.settings, communication)
    optimizer.expect(last=True, due=frozenset({"scalar"}))
    model(tokens(2, 17), tokens(2, 17)).mean().backward()
    optimizer.accumulate()
    optimizer.step(plan(due=frozenset({"scalar"})))
    asked = {n for _, n in said}
    assert [optimizer.banks[n].group for n in asked] == ["scalar"] * len(asked) and asked


def test_a_reduction_that_has_begun_for_a_bank_that_is_not_due_is_an_error():
    model = build("short/11")
    optimizer = Optimizer(
        model, model.settings, SimpleNamespace(
            of=lambda shared, experts: Reporting(0, []), total=lambda x: x, gathers_last=False
        )
    )
    forward_all(optimizer, model, model.settings, tokens(2, 17))
    with pytest.raises(ValueError, match="tell expect"):
        optimizer.step(plan(due=frozenset({"scalar"})))


PLANS = [f"system.comm={name}" for name in ("replicated", "bucketed", "sharded", "allreduce_updates")] + [
    "system.reduction=ordered"
]


def trained(sets, rank, world):
    """Parameters after two steps, the second by a part of the groups; each process has its share of eight
    gradients."""
    torch.set_num_threads(1)
    s = deltas.resolve(
        "short/33", scale="micro", sets=["system.precision=float64", "optim.grad_clip=0.5", sets]
    ).settings
    shapes = {"table": (10, 4), "gate": (3, 4), "down": (3, 4), "up": (5, 4)}
    kinds = {
        "table": ("embed", "embed"), "gate": ("matrix", "gate"), "down": ("matrix", "gate"),
        "up": ("matrix", "c_fc")
    }
    model = Toy(**{name: (noise(*shape), *kinds[name]) for name, shape in shapes.items()})
    optimizer = Optimizer(model, s, communication(s, rank, world))
    for i, due in enumerate((None, frozenset({"matrix"}))):
        for k in local_ranks(rank, world):
            optimizer.expect(last=k == local_ranks(rank, world)[-1], due=due)
            for n, (name, shape) in enumerate(shapes.items()):
                model.get_parameter(name).grad += noise(*shape, seed=100 * i + 10 * k + n)
            optimizer.accumulate()
        optimizer.step(plan(i, due=due))
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def member(folder):
    """One process of the next test: trains by every plan and writes what it ends with."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo")
    torch.save([trained(sets, rank, world) for sets in PLANS], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_every_communication_plan_ends_with_the_parameters_of_one_process(tmp_path):
    """With clipping, padding (5 units on 2 processes) and a step that updates a part of the groups; ordered,
    bit by bit."""
    process_group.call(2, member, tmp_path)
    alone = [trained(sets, 0, 1) for sets in PLANS]
    for rank in range(2):
        for sets, got, expected in zip(PLANS, torch.load(tmp_path / f"{rank}.pt"), alone):
            for name, p in expected.items():
                close = (
                    torch.equal(got[name], p) if "ordered" in sets
                    else torch.allclose(got[name], p, rtol=0, atol=1e-10)
                )
                assert close, (sets, name)


def test_processes_share_eight_logical_ranks():
    assert [list(local_ranks(r, 4)) for r in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    with pytest.raises(UserError, match="5 processes do not divide"):
        local_ranks(0, 5)


# ----- CUDA graphs

class Graph:
    """Stands for a CUDA graph on a CPU: it keeps what was captured, with the tensors of that moment, and runs
    that again."""
    captured = 0

    def __init__(self, update, pool):
        Graph.captured += 1
        self.replay = update


@pytest.mark.feature("system.cuda_graphs")
@pytest.mark.parametrize("microbatch", [2, 4])  # two forwards a step, or one
@pytest.mark.parametrize("ref, sets", [("short/1", []), ("short/11", ["system.precision=record"]),
                                       ("short/33", ["system.precision=record"]), ("variants/1", []),
                                       ("short/11", ["schedule.stages=[0.5,0.5]",
                                                     "data.tokens_per_rank=[64,128]"])])
def test_a_captured_update_replayed_equals_an_ordinary_one(ref, sets, microbatch, monkeypatch):
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(optim, "capture", lambda update, pool: Graph(update, pool).replay)
    # compiled rules get tensors, which round as those of a graph do
    monkeypatch.setattr(torch, "compile", lambda f, **kwargs: f)
    results = []
    for graphs in (False, True):
        s = deltas.resolve(
            ref, scale="micro", sets=[*sets, f"system.cuda_graphs={str(graphs).lower()}"]
        ).settings
        model = GPT(s)
        model.initialise(0)
        optimizer, Graph.captured = Optimizer(model, s, compiled=True), 0
        for i in (0, 2):  # as a warm-up, whose last step is the probe
            step(optimizer, model, s, tokens(4, 33, seed=9), i, microbatch, launch=i == 0)
        model.initialise(0)
        optimizer.reset()
        for i in range(4):
            begin_step(model)
            step(optimizer, model, s, tokens(4, 33, seed=i), 15 * i, microbatch)
        assert Graph.captured == (len(optimizer.banks) if graphs else 0)
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *results))


class Generator:
    """Stands for the random generator of a GPU: in capture mode after a capture that failed, as torch leaves
    it."""

    def __init__(self, state="before"):
        self.state = state

    def clone_state(self):
        return Generator(self.state)

    def graphsafe_set_state(self, other):
        self.state = other.state


@pytest.mark.feature("system.cuda_graphs")
@pytest.mark.parametrize("error, raised, line", [
    (RuntimeError("operation not permitted\nmore"), UserError, "captured .operation not permitted.: --set"),
    (RuntimeError(""), UserError, "captured .no reason given."),
    (torch.OutOfMemoryError("out of memory"), torch.OutOfMemoryError, "out of memory"),
    (KeyboardInterrupt("asked"), KeyboardInterrupt, "asked"),
])
def test_a_capture_that_fails_leaves_the_generator_as_it_was_and_says_why(error, raised, line, monkeypatch):
    generator = Generator()

    @contextlib.contextmanager
    def capturing(graph, **options):
        generator.state = "capturing"
        yield
        generator.state = "after"

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay="replay"))
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    monkeypatch.setattr(torch.cuda, "default_generators", (None, generator))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)

    def fails():
        raise error

    with pytest.raises(raised, match=line):
        optim.capture(fails, None)
    assert generator.state == "before"
    assert optim.capture(lambda: None, None) == "replay" and generator.state == "after"


# ----- memory and reset

def test_parameters_and_gradients_stay_views_of_their_banks():
    s, model = settings("short/11"), build("short/11", scramble=False)
    optimizer = Optimizer(model, s)
    for _ in range(2):
        step(optimizer, model, s, tokens(4, 17))
    for bank in optimizer.banks:
        for _, p in bank.members:
            assert p.untyped_storage().data_ptr() == bank.param.untyped_storage().data_ptr()
            assert p.grad.untyped_storage().data_ptr() == bank.grad.untyped_storage().data_ptr()


def test_state_stays_where_it_is_in_memory():
    s, model = settings("short/33"), build("short/33", scramble=False)
    optimizer = Optimizer(model, s)
    places = [x.data_ptr() for bank in optimizer.banks for x in bank.state.values()]
    for i in range(2):
        step(optimizer, model, s, tokens(4, 33), i)
    assert [x.data_ptr() for bank in optimizer.banks for x in bank.state.values()] == places


def test_reset_restores_the_initial_state():
    from system.warmup import state_hash
    s, model = settings("short/11"), build("short/11", scramble=False)
    optimizer = Optimizer(model, s)
    before = state_hash(model, optimizer)
    step(optimizer, model, s, tokens(4, 17))
    assert state_hash(model, optimizer) != before
    model.initialise(0)
    optimizer.reset()
    assert state_hash(model, optimizer) == before
