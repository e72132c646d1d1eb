"""Laws of the wrappers around the optimizer: the originals' numbers in float64, replays, resume, readouts."""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import process_group
import sample
import schedule
import test_resume
from common.errors import UserError
from data.corpus import sample_corpus
from data.stream import validation_rows
from evidence import run_laws
from golden_records import load
from golden_track3 import CHAIN
from model import GPT, without_values
from optim import RULES, Optimizer
from settings import deltas
from small_models import BOS, Toy, plan, step, tokens, update
from system import memory
from system.comm import communication
from system.dry_run import exchanged, wrapper_remarks
from system.hooks import hooks_of, reading
from system.microbatch import ranks_per_microbatch
from system.workers import Workers
from system.wrappers import wrappers_of
from train_gpt import train_step, validate

GOLDEN, _ = load("wrappers")
AUX = ("system.precision=float64", "optim.adam={beta1=0.8, beta2=0.95, eps=1e-10}", "optim.grad_clip=false",
       "optim.embed={lr=0.3, weight_decay=0.0}", "optim.scalar.lr=0.01",
       "optim.lm_head={lr=0.003125, weight_decay=0.0}")
LABELS = {"embed": ("embed", "embed"), "lm_head": ("lm_head", "lm_head"), "embed1": ("embed", "embed"),
          "proj": ("lm_head", "lm_head"), "lm_head_w": ("lm_head", "lm_head")}


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def settings(*sets, ref="short/11"):
    given = {text.partition("=")[0] for text in sets}
    aux = [text for text in AUX if text.partition("=")[0] not in given]
    return deltas.resolve(ref, sets=[*aux, *sets]).settings


# ----- the originals' numbers -------------------------------------------------------------------------------

def numbers(fixture, kind):
    """{parameter: array of float64} of a part of the golden file."""
    start = f"{fixture}/{kind}/"
    return {key.removeprefix(start): torch.from_numpy(x.astype(np.float64)) for key, x in GOLDEN.items()
            if key.startswith(start)}


def config(fixture):
    return json.loads(str(GOLDEN[f"{fixture}/config"]))


def label_of(name, x):
    """(role, label) of an original parameter."""
    if x.dim() == 1:
        return "scalar", "bias"
    head = name.partition(".")[0]
    return LABELS[head] if head in LABELS else ("matrix", "c_fc")


def toy(values, s):
    """A model of these parameters whose settings the hooks read; names without dots."""
    model = Toy(**{name.replace(".", "_"): (x, *label_of(name, x)) for name, x in values.items()})
    model.settings = s
    return model


def ns12(x):
    """Twelve iterations of track 3's Newton-Schulz."""
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(12):
        a = x @ x.mT
        x = 2 * x - 1.5 * a @ x + 0.5 * a @ a @ x
    return x.mT if tall else x


@dataclass(frozen=True)
class NorMuonH:
    """The hidden matrices' rule of result 13, with the learning rate of each step."""
    lr: tuple
    name, shared, skips_idle = "muon", True, False

    def unit(self, shape, views):
        return views.unit(shape)

    def state(self, unit, dtype, views):
        rows, cols = unit
        return {"momentum": (unit, dtype), "v": ((rows, 1) if rows >= cols else (1, cols), dtype)}

    def numbers(self, plan, t):
        return {"lr": dict(self.lr)[plan.step]}

    def update_(self, p, g, state, numbers, views):
        m, v, lr = state["momentum"], state["v"], numbers["lr"]
        rows, cols = p.shape[-2:]
        m.lerp_(g, 0.05)
        u = ns12(0.05 * g + 0.95 * m) * max(1, rows / cols) ** 0.5
        v.lerp_(u.square().mean(-1 if rows >= cols else -2, keepdim=True), 0.05)
        u = u * v.clamp(min=1e-10).rsqrt()
        length = lambda x: x.norm(dim=(-2, -1), keepdim=True)
        radius, moved = length(p), p - lr * length(p) * u / length(u).clamp(min=1e-10)
        p.copy_(moved * radius / length(moved).clamp(min=1e-10))


def play(fixture, *sets, hidden=None):
    """(model, hooks, parameters after each call) of a fixture's calls through Optimizer and wrappers.

    hidden: rule of the hidden matrices, made from their learning rates; None: the settings'.
    """
    about, start, gradients = config(fixture), numbers(fixture, "init"), numbers(fixture, "grad")
    start = {name: start[name] for name in gradients}
    model, rates = toy(start, s := settings(*sets)), about["lr"]
    rules = RULES
    if hidden is not None:
        own = tuple(zip(about["steps"], rates["blocks.0.mlp.fc.weight"]))
        rules = RULES | {"muon": lambda s, group: hidden(own)}
    optimizer, hooks, found = Optimizer(model, s, rules=rules), wrappers_of(model), []
    aux = next(x for name, x in rates.items() if label_of(name, start[name])[1] == "embed")
    for call, step in enumerate(about["steps"]):
        now = plan(step, lr_factor=aux[call] / aux[0], momentum=0.95)
        for hook in hooks:
            hook.before_forwards(now)
        update(optimizer, model, {name.replace(".", "_"): g[call] for name, g in gradients.items()}, now)
        for hook in hooks:
            hook.after_update(now)
        found.append({name: model.get_parameter(name.replace(".", "_")).detach().clone() for name in start})
    return model, hooks, found


def near(got, wanted, moved):
    """Equal to a billionth of what a parameter has moved."""
    return (got - wanted).abs().max() <= 1e-9 * moved.abs().max()


def assert_calls(fixture, found, calls):
    start, wanted = numbers(fixture, "init"), numbers(fixture, "param")
    for place, call in enumerate(calls):
        for name, x in wanted.items():
            if name in found[0]:
                assert near(found[call - 1][name], x[place], x[-1] - start[name]), (name, call)


@pytest.mark.feature("optim.ema_nesterov")
def test_ema_nesterov_is_that_of_result_39():
    """Look-aheads from step 500 to 2399, with the embedding's learning-rate factor of the call before."""
    _, (hook,), found = play("ema", *CHAIN, "optim.muon.lr=0.035", "optim.muon.weight_decay=0.025",
                             "optim.ema_nesterov={beta=0.6, start=500, stop=2400}")
    assert_calls("ema", found, config("ema")["calls"])
    for name in found[0]:
        for kind, key in (("mean", "lookahead_buffer.0"), ("before", "prev_params.0")):
            wanted = numbers("ema", f"state/{name}")[f"wrapper.{key}"]
            got = hook.tensors()[f"{kind}.{name.replace('.', '_')}"]
            assert near(got, wanted, wanted), (name, kind)


@pytest.mark.feature("optim.outer")
def test_the_outer_step_is_that_of_muloco_in_result_13():
    """After the calls 4, 8 and 12, around NorMuonH."""
    _, (hook,), found = play("muloco", "optim.outer={period=4, lr=0.7, momentum=0.5}", hidden=NorMuonH)
    assert_calls("muloco", found, config("muloco")["calls"])
    for name in found[0]:
        state, kept = numbers("muloco", f"state/{name}"), hook.tensors()
        mine = name.replace(".", "_")
        assert near(0.7 * kept[f"momentum.{mine}"], state["outer.u"], state["outer.u"]), name
        assert near(kept[f"slow.{mine}"], state["outer.snapshot"], state["outer.u"]), name


SNOO = "optim.outer={period=4, lr=0.68, momentum=0.37, first_step=true}"


@pytest.mark.feature("optim.outer.first_step")
def test_the_outer_step_is_that_of_snoo_in_medium_record_14():
    """After the calls 1, 5 and 9: AdamW's parameters through the Optimizer, Muon's by the step itself."""
    _, (hook,), found = play("snoo", SNOO, "optim.scalar.lr=0.015")
    assert_calls("snoo", found, range(1, 13))
    for name in found[0]:
        state, mine = numbers("snoo", f"state/{name}"), name.replace(".", "_")
        for kind, key in (("slow", "snoo.outer_buf"), ("momentum", "snoo.sgd_momentum")):
            assert near(hook.tensors()[f"{kind}.{mine}"], state[key], state["snoo.sgd_momentum"]), name
    name = "blocks.0.attn.qkvo_w"
    start, after = numbers("snoo", "init")[name], numbers("snoo", "param")[name]
    slow, b = (numbers("snoo", f"every/{name}")[f"snoo.{key}"] for key in ("outer_buf", "sgd_momentum"))
    model = toy({"w": start}, settings(SNOO))
    hook, = wrappers_of(model)
    for call in range(9):
        inner = after[call]
        if call % 4 == 0:  # where the inner updates had led
            before = (slow[call - 1], b[call - 1]) if call else (start, torch.zeros_like(start))
            inner = before[0] - (b[call] - 0.37 * before[1])
        model.w.data.copy_(inner)
        hook.after_update(plan(call))
        assert near(model.w.detach(), after[call], after[-1] - start), call


@pytest.mark.feature("optim.tail_ema")
def test_tail_ema_is_that_of_result_46():
    weights, steps = numbers("tail", "param"), config("tail")["steps"]
    model = toy({name: x[0] for name, x in weights.items()},
                settings("optim.tail_ema={start=2400, tau=150, share=0.6}", "schedule.steps=2690"))
    hook, = wrappers_of(model)
    for call, step in enumerate(steps):
        for name, x in weights.items():
            model.get_parameter(name.replace(".", "_")).data.copy_(x[call])
        hook.after_update(plan(step))
        assert hook.known(step + 1) == (step >= 2399)
    with reading([hook], 2690):
        read = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, wanted in numbers("tail", "readout").items():
        average = hook.tensors()[f"average.{name.replace('.', '_')}"]
        assert torch.allclose(average, numbers("tail", "average")[name], rtol=0, atol=1e-13)
        assert torch.allclose(read[name.replace(".", "_")], wanted, rtol=0, atol=1e-13)
    assert torch.equal(read["embed_weight"], weights["embed.weight"][-1])
    for name, x in weights.items():
        assert torch.equal(model.get_parameter(name.replace(".", "_")), x[-1])


@pytest.mark.feature("optim.rre")
def test_undoing_the_extrapolation_of_result_34_leaves_an_orthogonal_update():
    """What stood before it is where the extrapolation leads to what is stored.

    Two matrices are square, and their updates orthogonal up to the radius pin: with another order of the
    differences their singular values would spread by a third.
    """
    weights, steps = numbers("rre", "param"), config("rre")["steps"]
    for last in (2824, 2829):
        at = steps.index(last)
        end, inner = ({name: x[at] for name, x in weights.items()} for _ in range(2))
        model = toy(end, settings(f"optim.rre={{start={last - 2}}}", "schedule.steps=3000"))
        hook, = wrappers_of(model)
        parameters = {name: model.get_parameter(name.replace(".", "_")) for name in weights}
        for _ in range(60):
            hook.reset()
            for back in (3, 2, 1, 0):
                for name, x in weights.items():
                    parameters[name].data.copy_(x[at - back] if back else inner[name])
                hook.after_update(plan(last - back))
            led = {name: p.detach().clone() for name, p in parameters.items()}
            inner = {name: inner[name] + 0.5 * (end[name] - led[name]) for name in weights}
        assert all((end[name] - led[name]).abs().max() < 1e-13 for name in weights)
        for name in ("blocks.0.attn.v.weight", "blocks.0.attn.proj.weight"):
            spectrum = torch.linalg.svdvals(inner[name] - weights[name][at - 1])
            assert spectrum.std() < 1e-3 * spectrum.mean(), (last, name)


# ----- replays ----------------------------------------------------------------------------------------------

class Recorded(dict):
    """A hook that keeps the weights after each update, before the hooks behind it: {update: weights}."""

    def __init__(self, model):
        self.model = model

    def before_forwards(self, plan):
        pass

    def after_update(self, plan):
        self[plan.step + 1] = {name: p.detach().clone().numpy() for name, p in self.model.named_parameters()}


def walk(model, hooks, steps, read=lambda done: None):
    """A random walk in place of the optimizer's steps. read: called after each with their number."""
    for step in range(steps):
        for hook in hooks:
            hook.before_forwards(plan(step))
        for i, p in enumerate(model.parameters()):
            p.data += (0.1 * random(*p.shape, seed=100 * step + i)).to(p.dtype)
        for hook in hooks:
            hook.after_update(plan(step))
        read(step + 1)


def two(*sets, dtype=torch.float64):
    """A model of two matrices and an embedding, with the wrappers of these settings."""
    values = {"a": random(4, 6), "b": random(5, 3, seed=1), "embed": random(7, 3, seed=2)}
    model = toy({name: x.to(dtype) for name, x in values.items()}, settings("schedule.steps=12", *sets))
    return model, wrappers_of(model)


@pytest.mark.feature("optim.rre")
@pytest.mark.parametrize("cap", [1e9, 1e-3])
def test_an_extrapolation_is_its_replay_in_numpy(cap):
    model, (hook,) = two(f"optim.rre={{start=2, points=5, every=3, damping=0.6, cap={cap}}}")
    kept, seen = [], []

    def replay(done):
        flat = lambda: np.concatenate([model.get_parameter(n).detach().numpy().ravel() for n in "ab"])
        if done < 2:
            return
        kept.append(np.concatenate([inner_of[done][n].ravel() for n in "ab"]))
        del kept[:-5]
        if done % 3 == 0 and len(kept) == 5:
            d = np.diff(np.stack(kept), axis=0)
            gram = d @ d.T
            c = np.linalg.solve(gram + (1e-6 * np.trace(gram) / 4 + 1e-10) * np.eye(4), np.ones(4))
            c /= c.sum()
            delta = -0.6 * sum(c[a:].sum() * d[a] for a in range(4))
            longest = cap * np.linalg.norm(kept[-1])
            delta *= min(1, longest / np.linalg.norm(delta))
            kept[:] = [kept[-1] + delta]
            seen.append(done)
        assert np.abs(flat() - kept[-1]).max() < 1e-12, done

    inner_of = Recorded(model)
    walk(model, [inner_of, hook], 12, replay)
    assert seen == [6, 12] == schedule.extrapolations(model.settings.optim.rre, 12)


@pytest.mark.feature("optim.tail_velocity")
@pytest.mark.parametrize("at", ["validation", "end"])
@pytest.mark.parametrize("cap", [1e9, 1e-3])
def test_the_tail_velocity_is_its_replay_in_numpy(at, cap):
    """Of the block matrices alone, each slice of one with a cap of its own."""
    told = f"optim.tail_velocity={{start=3, decay=0.8, push=-2.0, cap={cap}, at={at!r}}}".replace("'", '"')
    values = {"a": random(2, 4, 6), "b": random(5, 3, seed=1), "embed": random(7, 3, seed=2)}
    model = toy(values, settings("schedule.steps=12", told))
    hooks, mean = wrappers_of(model), {n: 0.0 for n in "ab"}

    def replay(done):
        for n in "ab" if done > 3 else ():
            mean[n] = 0.8 * mean[n] + 0.2 * (inner_of[done][n] - inner_of[done - 1][n])
        read = [one.setting for one in schedule.readouts(model.settings, done)]
        assert bool(read) == (done > 3 if at == "validation" else done == 12)
        with reading(hooks, done):
            for n, p in model.named_parameters():
                want = inner_of[done][n]
                if n in mean and read:
                    norms = [np.linalg.norm(x, axis=(-2, -1), keepdims=True) for x in (want, mean[n])]
                    want = want - 2 * np.minimum(1, cap * norms[0] / norms[1]) * mean[n]
                assert np.abs(p.detach().numpy() - want).max() < 1e-13, (done, n)

    inner_of = Recorded(model)
    walk(model, [inner_of, *hooks], 12, replay)


def square(x):
    """The squared norm of each matrix."""
    return (x * x).sum((-2, -1), keepdims=True)


@pytest.mark.feature("optim.trail_delta", "optim.broad_delta", "optim.phase_readout",
                     "optim.reference_readout.embed")
def test_the_last_steps_of_result_43_are_their_replay_in_numpy():
    """A pulse of q, k and c_fc after update 6, which the reference has taken in; pulses of all but the
    embedding after 8, 10 and 12, each of the way since the last and of the ways before; then two readouts."""
    values = {"w": random(4, 5, 5), "c": random(4, 6, seed=1), "e": random(7, 3, seed=2), "h": random(6)}
    kinds = {"w": ("matrix", "qkvo"), "c": ("matrix", "c_fc"), "e": ("embed", "embed"),
             "h": ("scalar", "bias")}
    model = Toy(**{n: (x, *kinds[n]) for n, x in values.items()})
    model.settings = settings(
        "schedule.steps=12", "optim.broad_delta={start=2, every=4, stop=6, first=-0.3}",
        "optim.trail_delta={start=6, every=2, stop=12, first=-0.1, push=-0.2, momentum=0.5}",
        "optim.phase_readout={first=8, second=10, push=0.25}",
        'optim.reference_readout={reference=6, push=-0.4, start=12, at="end", embed=false}'
    )
    moved = {"w": slice(0, 2), "c": slice(None)}  # matrices but v and o
    way, kept, walked = dict.fromkeys("wch", 0.0), {}, {}

    def replay(done):
        theta = {n: x.copy() for n, x in walked[done].items()}
        for n, part in moved.items() if done == 6 else ():
            theta[n][part] += -0.3 * (theta[n][part] - kept[2][n][part])
        for n in "wch" if done in (8, 10, 12) else ():
            way[n] = theta[n] - kept[done - 2][n] + 0.5 * way[n]
            theta[n] = theta[n] + (-0.1 if done == 8 else -0.2) * way[n]
        kept[done] = {n: x.copy() for n, x in theta.items()}
        for n, part in moved.items() if done == 12 else ():
            v = (theta[n] - kept[10][n])[part]
            a = v - (kept[10][n] - kept[8][n])[part]
            b = a - (a * v).sum((-2, -1), keepdims=True) / square(v) * v
            theta[n][part] += 0.25 * b * np.sqrt(square(v) / square(b))
        for n in "wch" if done == 12 else ():
            theta[n] = theta[n] - 0.4 * (theta[n] - kept[6][n])
        for n, p in model.named_parameters():
            assert np.abs(p.detach().numpy() - theta[n]).max() < 1e-12, (done, n)
        read = [one.setting for one in schedule.readouts(model.settings, done)]
        pulse = {6: ["optim.broad_delta"]} | dict.fromkeys((8, 10, 12), ["optim.trail_delta"])
        ends = ["optim.phase_readout", "optim.reference_readout"] if done == 12 else []
        assert read == pulse.get(done, []) + ends

    walked = Recorded(model)
    walk(model, [walked, *wrappers_of(model)], 12, replay)
    assert [x.strip() for x in wrapper_remarks(model.settings)][:2] == [
        "pulses (optim.broad_delta) after the updates 6",
        "pulses (optim.trail_delta) after the updates 8, 10, 12"]


@pytest.mark.feature("optim.reference_readout", "optim.tail_ema", "optim.tail_ema.embed")
@pytest.mark.parametrize("at", ["validation", "end"])
def test_readouts_are_their_replay_and_leave_the_training_as_it_was(at):
    """Both together, the average first; a validation leaves every bit of the weights."""
    tail = f"optim.tail_ema={{start=4, tau=3, share=0.25, embed=true, at={at!r}}}".replace("'", '"')
    away = f"optim.reference_readout={{reference=3, push=-0.4, start=6, at={at!r}}}".replace("'", '"')
    model, hooks = two(tail, away)
    average, reads = {}, []

    def replay(done):
        last = done == 12
        theta = {n: inner_of[done][n] for n in inner_of[done]}
        for n, x in theta.items() if done >= 4 else ():
            average[n] = x if done == 4 else average[n] + (x - average[n]) / 3
        blend = {n: 0.75 * x + 0.25 * average[n] if done >= 4 else x for n, x in theta.items()}
        wanted = blend if done >= 4 and (last or at == "validation") else theta
        if done >= 6 and (last or at == "validation"):
            wanted = {n: x - 0.4 * (x - inner_of[3][n]) for n, x in wanted.items()}
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        with reading(hooks, done):
            for n, p in model.named_parameters():
                assert np.abs(p.detach().numpy() - wanted[n]).max() < 1e-13, (done, n)
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
        reads.append([one.setting for one in schedule.readouts(model.settings, done)])
        differs = any(np.abs(wanted[n] - theta[n]).max() > 1e-9 for n in theta)
        assert differs == bool(reads[-1] and done != 4)  # the average begins with the weights

    inner_of = Recorded(model)
    walk(model, [inner_of, *hooks], 12, replay)
    both = ["optim.tail_ema", "optim.reference_readout"]
    assert reads == ([[]] * 11 + [both] if at == "end" else [[]] * 3 + [both[:1]] * 2 + [both] * 7)


@pytest.mark.feature("optim.ema_nesterov", "optim.outer", "optim.rre", "optim.reference_readout")
@pytest.mark.parametrize("sets", [
    "optim.ema_nesterov={start=5, stop=5}", "optim.ema_nesterov={decay=0.0, beta=1e-30, start=0}",
    "optim.outer={period=3, lr=1.0, momentum=0.0}", "optim.outer={period=13}", "optim.rre={start=10}",
    "optim.rre={start=2, cap=1e-30}", "optim.tail_ema={start=13}",
    "optim.reference_readout={reference=2, start=3, push=0.0}"])
def test_a_wrapper_that_does_nothing_is_off(sets):
    model, hooks = two(sets)
    plain, _ = two()
    walk(plain, [], 12)
    walk(model, hooks, 12)
    with reading(hooks, 12):
        for name, p in model.named_parameters():
            assert torch.allclose(p, plain.get_parameter(name), rtol=0, atol=1e-14), name


@pytest.mark.parametrize("sets", [
    "optim.ema_nesterov={start=1}", "optim.outer={period=3}", SNOO, "optim.rre={start=2, every=2}",
    "optim.tail_ema={start=2, tau=2}", "optim.tail_velocity={start=2}",
    "optim.reference_readout={reference=2, start=3}", "optim.trail_delta={start=1, every=2, stop=9}",
    "optim.phase_readout={first=2, second=3}"])
def test_a_reset_wrapper_begins_anew_and_one_that_was_copied_goes_on(sets):
    model, (hook,) = two(sets)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    first = {name: x.clone() for name, x in hook.tensors().items()}
    walk(model, [hook], 6)
    assert any(not torch.equal(x, first[name]) for name, x in hook.tensors().items())
    twin, (other,) = two(sets)
    for name, p in twin.named_parameters():
        p.data.copy_(model.get_parameter(name))
    for name, x in other.tensors().items():
        x.copy_(hook.tensors()[name])
    other.restored()
    for step in range(6, 12):
        for one, its in ((model, hook), (twin, other)):
            its.before_forwards(plan(step))
            for i, p in enumerate(one.parameters()):
                p.data += random(*p.shape, seed=step + i)
            its.after_update(plan(step))
    for (_, p), (_, q) in zip(model.named_parameters(), twin.named_parameters()):
        assert torch.equal(p, q)
    for name, p in model.named_parameters():
        p.data.copy_(start[name])
    hook.reset()
    assert all(torch.equal(x, first[name]) for name, x in hook.tensors().items())


# ----- precision, the untying of the head, memory -----------------------------------------------------------

@pytest.mark.parametrize("dtype", ["parameter", "float32"])
def test_the_outer_step_rounds_in_its_dtype(dtype):
    """bfloat16 weights: after each operation, or once, where the slow weights are float32."""
    model, (hook,) = two(f'optim.outer={{period=2, lr=0.68, momentum=0.37, dtype="{dtype}"}}',
                         dtype=torch.bfloat16)
    kept = torch.bfloat16 if dtype == "parameter" else torch.float32
    assert {x.dtype for name, x in hook.tensors().items() if name != "count"} == {kept}
    slow = {name: p.detach().clone().to(kept) for name, p in model.named_parameters()}
    b = {name: torch.zeros_like(x) for name, x in slow.items()}
    for step in range(4):
        for i, (name, p) in enumerate(model.named_parameters()):
            p.data += random(*p.shape, seed=step + i).bfloat16()
            if step % 2:
                delta = slow[name] - p.detach().to(kept)
                b[name] = (0.37 * b[name].double()).to(kept) + delta
                move = (delta.double() + 0.37 * b[name].double()).to(kept)
                slow[name] = (slow[name].double() - 0.68 * move.double()).to(kept)
        hook.after_update(plan(step))
    for name, p in model.named_parameters():
        if dtype == "parameter":
            assert torch.equal(p.detach(), slow[name]), name
        else:
            assert torch.allclose(p.detach().float(), slow[name], rtol=2**-8), name


def test_wrappers_change_the_upper_half_of_a_matrix_with_kept_mantissa_alone():
    """Snoo in the medium records: the lower 16 bits stay as the inner updates made them."""
    s = deltas.resolve("short/57", scale="micro", sets=[
        "system.precision=record", "optim.outer={period=1, lr=0.68, momentum=0.37}"]).settings
    model = GPT(s)
    model.initialise(0)
    optimizer, now = Optimizer(model, s), schedule.plan(s)[0]
    hook = wrappers_of(model)[0]
    optimizer.expect(last=True, due=now.due)
    for i, (_, p) in enumerate(model.named_parameters()):
        p.grad += random(*p.shape, seed=i).to(p.dtype)
    optimizer.accumulate()
    optimizer.step(now)
    halves = {name: x.clone() for name, x in optimizer.full_tensors() if name.endswith("/mantissa")}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    hook.after_update(now)
    assert len(halves) > 20
    for name, x in optimizer.full_tensors():
        if name in halves:
            assert torch.equal(x, halves[name])
            assert not torch.equal(model.get_parameter(name.removesuffix("/mantissa")),
                                   before[name.removesuffix("/mantissa")])


def test_the_embedding_takes_over_the_head_s_buffers():
    values = {"embed": random(5, 3), "lm_head": random(5, 3, seed=1)}
    model = toy(values, settings("optim.ema_nesterov={start=0}", "optim.outer={period=4}"))
    hooks = wrappers_of(model)
    for step in range(3):
        model.lm_head.data += random(5, 3, seed=step)
        for hook in hooks:
            hook.after_update(plan(step, events=("untie",) if step == 2 else ()))
    for hook in hooks:
        found = hook.tensors()
        for kind in {name.partition(".")[0] for name in found if "." in name}:
            assert torch.equal(found[f"{kind}.embed"], found[f"{kind}.lm_head"]), kind
            assert found[f"{kind}.lm_head"].any() or kind == "momentum"


def test_memory_counts_the_buffers_and_experts_on_their_own_processes_are_refused():
    two_layers = dict(scale="micro", sets=["model.num_layers=2"])
    plain = deltas.resolve("short/2", **two_layers).settings
    s = deltas.resolve("short/2", **two_layers, with_=["optim.ema_nesterov", "optim.tail_ema"]).settings
    before, after = memory.estimate(plain, 8, 8), memory.estimate(s, 8, 8)
    assert 2 * before.parameters < after.state - before.state <= 3 * before.parameters + 64
    with pytest.raises(UserError, match="optim.outer keeps copies .* set system.expert_parallel=false"):
        deltas.resolve(
            "variants/4", scale="micro", with_=["optim.outer"], sets=["system.expert_parallel=true"]
        )


# ----- whole runs -------------------------------------------------------------------------------------------

ALL = ("optim.ema_nesterov={beta=0.3, start=1, stop=7}", "optim.outer={period=3}",
       "optim.rre={start=2, points=3, every=2}", "optim.tail_ema={start=3, tau=2}",
       "optim.broad_delta={start=1, every=3, stop=4}", "optim.trail_delta={start=2, every=3, stop=8}",
       "optim.tail_velocity={start=2}", "optim.phase_readout={first=2, second=5}",
       "optim.reference_readout={reference=2, start=4}",
       "optim.anchor={start=2, tau=2, ramp_start=3, ramp_end=5}")


def test_a_killed_run_with_all_wrappers_ends_with_the_bits_of_a_whole_one(tmp_path, monkeypatch):
    """bfloat16 matrices with kept mantissas, and a head that unties. The whole run keeps the laws of logs,
    and its checkpoint holds what the last validation read."""
    more = [part for x in (*ALL, "system.precision=record") for part in ("--set", x)]
    options, resolved = test_resume.options_of("short/57", tmp_path / "whole", *more)
    assert test_resume.train(options, resolved) == 0
    whole = next((tmp_path / "whole").glob("*/run.jsonl")).parent
    options, resolved = test_resume.options_of("short/57", tmp_path / "killed", *more)
    folder = test_resume.killed_at(7, monkeypatch, options, resolved)
    assert test_resume.go_on(folder) == 0
    (ours, losses, _), (theirs, expected, _) = test_resume.outcome(folder), test_resume.outcome(whole)
    assert losses == expected and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    the_log_says_what_was_read(whole, resolved.settings)


def the_log_says_what_was_read(folder, s):
    log, unread = run_laws.read_log(folder, "run")
    assert unread == [] and lawful(log)
    told = {v["step"]: v.get("readout") for v in log.validations}
    ends = ["optim.tail_ema", "optim.tail_velocity", "optim.reference_readout", "optim.anchor"]
    last = [*ends[:2], "optim.phase_readout", *ends[2:]]
    assert told == {0: None, 4: ["optim.rre", "optim.broad_delta", *ends],
                    8: ["optim.rre", "optim.trail_delta", *last]}
    last = log.validations[-1]
    assert last["val_loss"] != last["raw_val_loss"]
    assert "raw_val_loss:" in (folder / "log.txt").read_text() and "read at the weights of" in (
        folder / "log.txt").read_text()
    for event in ({k: v for k, v in last.items() if k != "readout"}, {**last, "readout": ["optim.tail"]},
                  {k: v for k, v in last.items() if k != "raw_val_loss"}):
        assert len(list(run_laws.check_readout(event, s, "x"))) == 1
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    model, _ = sample.load(folder)
    assert saved["val_loss"] == last["val_loss"] and abs(loss_of(model, s) - last["val_loss"]) < 1e-4
    assert sample.read_out(model) == [f"weights: read out by {', '.join(last['readout'])}"]


def lawful(log):
    """Whether a log keeps the laws of logs, but for times, which a busy machine bends."""
    return [problem for problem in run_laws.check_run(log) if "time taken off the clock" not in problem] == []


def loss_of(model, s):
    """Validation loss of a model, with the windows of the last validation."""
    corpus, windows = sample_corpus(), schedule.validation_windows(s, s.schedule.steps)
    rows = validation_rows(corpus, s.validation.tokens, s.validation.seq_len, range(8))
    world = SimpleNamespace(cuda=False, device=torch.device("cpu"), gather=lambda x: x)
    model.update_yarn(windows)
    return validate(model, rows, world, lambda tokens, read: model.context(tokens, corpus.bos, windows))


APART = "optim.outer={period=4, lr=0.7, momentum=0.5, workers=8}"


@pytest.mark.parametrize("wrappers", [ALL, (APART,)])
def test_two_processes_end_where_one_does(wrappers, tmp_path):
    """Every process keeps all buffers and computes the same; or its own four workers, between two outer steps
    at the first validation."""
    sets = ("schedule.steps=6", *test_resume.SMALL[1:3], "validation.every=3", "system.precision=float64",
            "model.num_layers=2", "system.warmup_steps=1", *wrappers)
    found = {}
    for world in (1, 2):
        command = [sys.executable, "train_gpt.py", "short/2", "--scale", "micro", "--out",
                   str(tmp_path / str(world)), *[part for x in sets for part in ("--set", x)]]
        done = process_group.run(command, world, cwd=Path(__file__).parent.parent,
                                 env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-2000:]
        summary = json.loads(next((tmp_path / str(world)).glob("*/summary.json")).read_text())
        found[world] = [loss for _, loss in summary["curve"]]
    assert len(found[1]) == 3
    assert all(abs(a - b) < 1e-12 for a, b in zip(found[1], found[2])), found


# ----- workers that train apart -----------------------------------------------------------------------------

def two_layers(*sets):
    return deltas.resolve("short/2", scale="micro", sets=[
        "model.num_layers=2", "system.precision=float64", "schedule.steps=6", *sets]).settings


def start_of(s):
    model = GPT(s)
    model.initialise(0)
    return model, Optimizer(model, s)


@pytest.mark.feature("optim.outer")
def test_workers_are_trainings_of_their_own_that_meet_every_period():
    """Against eight models with an optimizer each, which see one row of tokens in every step."""
    s, alone = two_layers(APART), two_layers()
    model, optimizer = start_of(s)
    world = SimpleNamespace(ranks=range(8), total=lambda x: x)
    workers, plans = Workers(model, optimizer, world), schedule.plan(s)
    run = SimpleNamespace(
        s=s, model=model, compiled=model, optimizer=optimizer, hooks=[*hooks_of(model), workers], world=world,
        workers=workers, ranks_per_microbatch=ranks_per_microbatch(s, 8, False),
        corpus=SimpleNamespace(bos=BOS), guards=None)
    others = [start_of(alone) for _ in range(8)]
    slow = {name: p.detach().clone() for name, p in model.named_parameters()}
    b, steps = {name: torch.zeros_like(x) for name, x in slow.items()}, []
    for i in range(6):
        x = tokens(8, plans[i].shape.seq_len + 1, seed=i)
        documents = [(1, x.size(1), 0)] * 8
        train_step(run, plans[i], x[:, None, :-1], x[:, None, 1:], documents)
        for rank, (its, own) in enumerate(others):
            step(own, its, alone, x[rank:rank + 1], i)
        weights = {name: [its.get_parameter(name).detach() for its, _ in others] for name in slow}
        mean = {name: torch.stack(found).mean(0) for name, found in weights.items()}
        steps.append(max((found[0] - found[1]).abs().max() for found in weights.values()))
        if i == 3:
            for name in slow:
                delta = slow[name] - mean[name]
                b[name] = 0.5 * b[name] + delta
                slow[name] = slow[name] - 0.7 * (delta + 0.5 * b[name])
                for its, _ in others:
                    its.get_parameter(name).data.copy_(slow[name])
            mean = slow
        with reading(run.hooks, i + 1):
            for name, p in model.named_parameters():
                assert torch.allclose(p, mean[name], rtol=0, atol=1e-11), (i, name)
        assert bool(schedule.readouts(s, i + 1)) == (i != 3)
    assert min(steps) > 1e-3  # they do part


@pytest.mark.feature("optim.outer")
def test_killed_workers_go_on_with_the_same_bits(tmp_path, monkeypatch):
    more = [part for x in ("model.num_layers=2", APART) for part in ("--set", x)]
    options, resolved = test_resume.options_of("short/2", tmp_path / "whole", *more)
    assert test_resume.train(options, resolved) == 0
    whole = next((tmp_path / "whole").glob("*/run.jsonl")).parent
    options, resolved = test_resume.options_of("short/2", tmp_path / "killed", *more)
    folder = test_resume.killed_at(7, monkeypatch, options, resolved)  # between two outer steps
    assert test_resume.go_on(folder) == 0
    (ours, losses, _), (theirs, expected, _) = test_resume.outcome(folder), test_resume.outcome(whole)
    assert losses == expected and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    log, unread = run_laws.read_log(whole, "run")
    assert unread == [] and lawful(log)
    text = (whole / "log.txt").read_text()
    assert "in 2 outer steps, in place of" in text and "in 8 steps: 75.0 % saved" in text


def test_workers_do_not_communicate_in_their_steps_and_memory_counts_them():
    s = two_layers(APART)
    optimizer = Optimizer(without_values(s), s, communication(s, 1, 8))
    assert {bank.comm.name for bank in optimizer.banks} == {"local"}
    one, eight = memory.estimate(two_layers(), 8, 1), memory.estimate(s, 8, 1)
    assert eight.state >= 9 * one.state + 8 * one.parameters
    assert memory.estimate(s, 1, 1, 8).state < eight.state
    assert ranks_per_microbatch(s, 8, cuda=False) == 1
    told, = exchanged(s)
    assert told.startswith("8 workers train apart") and told.endswith("in 6 steps: 83.3 % saved")


@pytest.mark.parametrize("ref, sets, message", [
    ("short/2", ["optim.outer={workers=4}"], "must be 1, or 8, one for each logical rank"),
    ("short/11", ["optim.outer={workers=8}", "optim.tail_ema={start=4}"], "without optim.tail_ema: switch"),
    ("short/57", ["optim.outer={workers=8}"], "without model.head.untied.tied_until: switch it off"),
    ("short/52", ["optim.outer={workers=8}"], "optim.embed rests in some: set optim.embed.every=1"),
    ("short/2", ["optim.outer={workers=8}", "system.ranks_per_microbatch=2"], "at 0 or 1")])
def test_what_workers_cannot_have_is_refused(ref, sets, message):
    with pytest.raises(UserError, match=message):
        deltas.resolve(ref, scale="micro", sets=sets)


# ----- the plan ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ref", ["short/11", "short/57"])
def test_the_plan_tells_what_moves_and_reads_the_weights(ref):
    s = deltas.resolve(ref, scale="micro", with_=["optim.ema_nesterov", "optim.tail_ema"], sets=[
        "schedule.steps=12", "validation.every=4", "optim.ema_nesterov.start=3",
        "optim.tail_ema.start=8", "optim.outer={period=5, first_step=true}",
        "optim.rre={start=4, every=4}"]).settings
    assert [type(hook).__name__ for hook in hooks_of(without_values(s))][:4] == [
        "Lookahead", "Outer", "Extrapolation", "Tail"]
    lines = [line.strip() for line in wrapper_remarks(s)]
    assert lines[0] == "look-ahead (optim.ema_nesterov) in the steps 3..11"
    assert lines[1] == "3 outer steps (optim.outer), after every 5 updates, first after 1"
    assert lines[2] == "2 extrapolations (optim.rre) after the updates 8, 12"
    assert lines[3] == "val_loss is read at the weights of optim.rre at step 8, 12"
    assert lines[4].startswith("val_loss is read at the weights of optim.tail_ema at step 8, 12; raw_val_los")
