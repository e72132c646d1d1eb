"""The experiments of `records audit` on the model, train_step and validate of an audited checkout (see audit_probe.py).

A training of a few steps runs with a recorder in the model's place. So the experiments call the model exactly as the
trainer calls it, with whatever arguments, and know only: train_gpt.main, train_step and validate; and that the model maps
(tokens, targets, ...), both (R, T), to per-token losses (R, T).
"""

import hashlib
import json
import random
import sys
from collections import Counter, deque
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch

TOLERANCE = 1e-4  # of a sum of probabilities, from float32 losses


class Unknown(Exception):
    """The checkout does something that this auditor does not know how to test."""


# ----- the trainer under observation --------------------------------------------------------------------------------

@dataclass
class Call:
    """One call of the model by the trainer. args, kwargs: what it passed besides tokens and targets."""
    model: torch.nn.Module
    tokens: torch.Tensor
    targets: torch.Tensor
    args: tuple
    kwargs: dict
    losses: torch.Tensor
    recorded_gradients: bool


class Recorder(torch.nn.Module):
    """Stands in for the model and keeps every Call. answer: function targets -> losses, instead of the model's."""

    def __init__(self, model, answer=None):
        super().__init__()
        self.model, self.answer, self.calls = model, answer, []

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, tokens, targets=None, *args, **kwargs):
        if targets is None:
            raise Unknown("the trainer calls the model without targets: this audit knows per-token losses only")
        losses = self.answer(targets) if self.answer else self.model(tokens, targets, *args, **kwargs)
        if losses.shape != targets.shape:
            raise Unknown(f"the model returns losses {tuple(losses.shape)} for targets {tuple(targets.shape)}")
        self.calls.append(Call(self.model, tokens.clone(), targets.clone(), args, kwargs, losses.detach().clone(),
                               losses.requires_grad))
        return losses


@dataclass
class Arguments:
    """Arguments of a call of train_step or validate, in which one can be found by its kind and replaced."""
    args: tuple
    kwargs: dict

    def find(self, kind):
        found = [a for a in (*self.args, *self.kwargs.values()) if kind(a)]
        if len(found) != 1:
            raise Unknown(f"the trainer passes {len(found)} arguments for which {kind.__name__} holds; this audit knows one")
        return found[0]

    def replaced(self, kind, new):
        old = self.find(kind)
        return Arguments(tuple(new if a is old else a for a in self.args),
                         {k: new if v is old else v for k, v in self.kwargs.items()})


def is_model(x):
    return isinstance(x, torch.nn.Module)


def is_rows(x):
    """Validation rows: ids (ranks, rows, T + 1)."""
    return isinstance(x, np.ndarray) and x.ndim == 3


@dataclass
class Validated:
    """One call of validate: its arguments, the calls of the model, what it returned and what it changed."""
    given: Arguments
    calls: list
    value: float
    changed: list
    watched: int
    backwards: int


class Observed:
    """A training in this process. answer: losses for validations in place of the model's. watch: look for their traces."""

    def __init__(self, argv, answer=None, watch=False):
        import deltas
        import train_gpt
        self.validate, self.train_step, self.answer, self.watch = train_gpt.validate, train_gpt.train_step, answer, watch
        self.step, self.step_calls, self.validations, self.backwards = None, [], [], 0
        with mock.patch.object(train_gpt, "validate", self.on_validate), \
                mock.patch.object(train_gpt, "train_step", self.on_step), \
                mock.patch.object(torch.autograd, "backward", self.counting(torch.autograd.backward)), \
                mock.patch.object(torch.autograd, "grad", self.counting(torch.autograd.grad)):
            try:
                train_gpt.main(*deltas.command_line(argv))
            except SystemExit as end:
                if end.code not in (None, 0, 3):  # 3: a target was missed
                    raise
        self.logged = logged(argv)
        if not self.validations or not self.step_calls:
            raise Unknown("the training went without train_gpt.validate or train_gpt.train_step")

    def counting(self, call):
        def counted(*args, **kwargs):
            self.backwards += 1
            return call(*args, **kwargs)
        return counted

    def on_step(self, *args, **kwargs):
        self.step = Arguments(args, kwargs)
        spy = Recorder(self.step.find(is_model))
        given = self.step.replaced(is_model, spy)
        out = self.train_step(*given.args, **given.kwargs)
        self.step_calls = spy.calls
        return out

    def on_validate(self, *args, **kwargs):
        given = Arguments(args, kwargs)
        held = [given.find(is_model), *([a for a in self.step.args if not isinstance(a, torch.Tensor)] if self.step else [])]
        before, backwards = fingerprint(held) if self.watch else {}, self.backwards
        value, calls = self.validated(given)
        after = fingerprint(held) if self.watch else {}
        changed = sorted(k for k in {**before, **after} if before.get(k) != after.get(k))
        if self.validations:
            self.validations[-1].calls.clear()  # only the last one is looked at in detail
        self.validations.append(Validated(given, calls, value, changed, len(before), self.backwards - backwards))
        return value

    def validated(self, given):
        """(value, calls of the model) of a validation."""
        spy = Recorder(given.find(is_model), self.answer)
        given = given.replaced(is_model, spy)
        return self.validate(*given.args, **given.kwargs), spy.calls

    def losses_of_rows(self, rows):
        """Per-token losses (n, T) that validate adds up for rows (ranks, n / ranks, T + 1)."""
        _, calls = self.validated(self.last.given.replaced(is_rows, rows))
        seen = torch.cat([c.tokens for c in calls])
        if not np.array_equal(seen.numpy(), rows.reshape(-1, rows.shape[-1])[:, :-1]):
            raise Unknown("validate does not pass its rows on as they are")
        return torch.cat([c.losses for c in calls])

    @property
    def last(self):
        return self.validations[-1]


def logged(argv):
    """val_loss of every validation in the log of the run with this command line."""
    path, = Path(argv[argv.index("--out") + 1]).glob("*/run.jsonl")
    events = [json.loads(line) for line in path.read_text().splitlines()]
    return [e["val_loss"] for e in events if e["kind"] == "validation"]


# ----- all that a validation could leave behind ---------------------------------------------------------------------

def fingerprint(roots):
    """{path: hash} of all state in reach of the roots and of the checkout's modules, and of the random generators.

    Tensors with their gradients, arrays, numbers and strings, in attributes, containers and closures. Of objects only
    those of the checkout's and torch.nn's classes are entered.
    """
    checkout = Path(sys.modules["train_gpt"].__file__).parent
    ours = {n for n, m in sys.modules.items() if getattr(m, "__file__", None) and checkout in Path(m.__file__).parents}
    found, seen = {}, set()

    def note(path, data):
        found[path] = hashlib.sha256(data).digest()

    def walk(path, x):
        if isinstance(x, torch.Tensor):
            note(path, bytes(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()))
            if x.is_leaf and x.grad is not None:
                walk(path + ".grad", x.grad)
        elif isinstance(x, (np.ndarray, np.generic)):
            note(path, x.tobytes())
        elif x is None or isinstance(x, (bool, int, float, complex, str, bytes)):
            note(path, repr(x).encode())
        elif id(x) not in seen:
            seen.add(id(x))
            for name, value in inside(x):
                walk(f"{path}.{name}", value)

    def inside(x):
        if isinstance(x, dict):
            return list(x.items())
        if isinstance(x, (list, tuple, deque, set, frozenset)):
            return list(enumerate(x))
        if getattr(x, "__closure__", None):
            return [(f"<{i}>", held) for i, cell in enumerate(x.__closure__) for held in contents(cell)]
        entered = type(x).__module__ in ours or type(x).__module__.startswith("torch.nn")
        return list(vars(x).items()) if entered and hasattr(x, "__dict__") else []

    for root in roots:
        walk(type(root).__name__, root)
    for name in sorted(ours):
        for key, value in list(vars(sys.modules[name]).items()):
            if not key.startswith("__") and not isinstance(value, type):
                walk(f"{name}.{key}", value)
    note("torch's random state", bytes(torch.get_rng_state().numpy()))
    note("random's state", repr(random.getstate()).encode())
    note("numpy's random state", repr(np.random.get_state()).encode())
    return found


def contents(cell):
    """What a closure's cell holds: a list of one, or of none before it is filled."""
    try:
        return [cell.cell_contents]
    except ValueError:
        return []


def no_trace(observed, spec):
    wrong, timed = [], observed.validations[-len(observed.logged):]
    for i, v in enumerate(timed):
        if v.changed:
            wrong.append(f"validation {i} changed {len(v.changed)} of {v.watched} values: {', '.join(v.changed[:3])}")
        if v.backwards:
            wrong.append(f"validation {i} made {v.backwards} backward passes")
    if any(c.recorded_gradients for c in observed.last.calls):
        wrong.append("validation records gradients")
    again, _ = observed.validated(observed.last.given)
    if again != observed.last.value:
        wrong.append(f"validating once more gives {again!r}, not {observed.last.value!r}")
    return not wrong, "; ".join(wrong) or (
        f"{len(timed)} validations left all {timed[-1].watched} tensors and values in reach as they were, without a "
        "backward pass; one more gave the same bits")


# ----- validation targets -------------------------------------------------------------------------------------------

def random_losses():
    """An answer whose losses are random multiples of 2^-10 below 16: sums are exact in float64, so a mean is checkable."""
    generator = torch.Generator().manual_seed(3)
    return lambda targets: torch.randint(16 * 1024, targets.shape, generator=generator).double() / 1024


def validation_targets(observed, spec):
    """At the audited scale with the model's losses; and with as many targets as full scale has, and random losses."""
    full = Observed(spec["counted_argv"], random_losses())
    wrong = [*counted(observed, spec["validation_tokens"], spec["val_shard"]),
             *counted(full, spec["full_validation_tokens"], spec["val_shard"])]
    return not wrong, "; ".join(wrong) or (
        f"the shard's first {spec['validation_tokens']:,} targets, and {spec['full_validation_tokens']:,} as at full scale, "
        "each once; the logged loss is the plain mean of their losses")


def counted(observed, tokens, shard):
    """Words for what is wrong with the targets and the mean of the last validation of a training."""
    calls, value, wrong = observed.last.calls, observed.last.value, []
    if observed.logged[-1] != value:
        wrong.append(f"the log says {observed.logged[-1]!r} where validate returned {value!r}")
    losses = torch.cat([c.losses.flatten() for c in calls])
    mean = float(losses.double().mean())
    if not abs(value - mean) <= 1e-9 * abs(mean):
        wrong.append(f"{value!r} is not the plain mean {mean!r} of the losses")
    if len(losses) != tokens:
        return [*wrong, f"{len(losses):,} targets instead of {tokens:,}"]
    rows = torch.cat([torch.cat([c.tokens, c.targets], 1).int() for c in calls]).numpy()
    width = rows.shape[1] // 2
    ids = np.fromfile(shard, "<u2", tokens + 1, offset=1024).astype(np.int32)
    want = np.concatenate([ids[:-1].reshape(-1, width), ids[1:].reshape(-1, width)], 1)
    lacking = sum((Counter(map(bytes, want)) - Counter(map(bytes, rows))).values())
    if lacking:
        wrong.append(f"{lacking} of {len(want)} rows with the shard's first {tokens:,} targets are missing or repeated")
    return wrong


# ----- causality ----------------------------------------------------------------------------------------------------

def shake(model):
    """Random non-zero values on every parameter, so that no zero-initialised weight hides a path."""
    generator = torch.Generator().manual_seed(20240520)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                noise = torch.randn(p.shape, generator=generator, dtype=torch.float32)
                p.add_((noise * (p.shape[-1] ** -0.5 if p.dim() > 1 else 0.1)).to(p))


def losses_of(call, tokens, targets, training):
    """Losses (n, T) of n rows, in calls of exactly the trainer's shape, each from the same buffers."""
    rows, out = len(call.tokens), []
    buffers = [(b, b.clone()) for b in call.model.buffers()]
    call.model.train(training)
    for first in range(0, len(tokens), rows):
        x, y = tokens[first:first + rows], targets[first:first + rows]
        used = len(x)
        if used < rows:
            x, y = (torch.cat([a, a[:1].expand(rows - used, -1)]) for a in (x, y))
        with torch.set_grad_enabled(training):
            out.append(call.model(x, y, *call.args, **call.kwargs).detach()[:used].clone())
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
    call.model.train()
    out = torch.cat(out)
    if not out.isfinite().all():
        raise Unknown("losses of a model with random weights are not finite")
    return out


def chosen_positions(length):
    """All positions of a short row; of a long one both ends, the powers of two and a sample."""
    if length <= 128:
        return torch.arange(length)
    near = {t for k in range(20) for t in (2 ** k - 1, 2 ** k) if t < length}
    return torch.tensor(sorted({length - 2, length - 1} | near | set(random.Random(0).sample(range(length), 32))))


def other_ids(ids, vocab_size, seed):
    """Random ids, each different from the one in its place."""
    generator = torch.Generator().manual_seed(seed)
    return (ids + torch.randint(1, vocab_size, ids.shape, generator=generator)) % vocab_size


def moved(base, new, first_allowed, changed, label):
    """Words for losses (n, T) that moved before position first_allowed[i] of row i, or if none did from changed[i] on."""
    wrong, t, different = [], torch.arange(base.shape[1]), base != new
    early, late = different & (t < first_allowed[:, None]), different & (t >= changed[:, None])
    if early.any():
        row = int(early.any(1).nonzero()[0])
        wrong.append(f"{label}: {int(early.any(1).sum())} of {len(base)} changed tokens moved an earlier loss, by up to "
                     f"{float(((base - new).abs() * early).max()):.3g}; e.g. token {int(changed[row])} moved loss "
                     f"{int(early[row].nonzero()[0])}")
    if not late.any(1).all():
        wrong.append(f"{label}: {int((~late.any(1)).sum())} of {len(base)} changed tokens moved no loss")
    return wrong


def causal_call(call, vocab_size, training, label):
    """Change inputs, then a row, then (in eval) targets, in calls of the model. Returns (tokens changed, wrong in words)."""
    where = chosen_positions(call.tokens.shape[1])
    n = len(where)
    at, x, y = torch.arange(n), call.tokens[:1].repeat(n, 1), call.targets[:1].repeat(n, 1)
    base = losses_of(call, x, y, training)
    changed = x.clone()
    changed[at, where] = other_ids(x[at, where], vocab_size, 1)
    wrong = moved(base, losses_of(call, changed, y, training), where, where, label)
    if len(call.tokens) > 1:
        other = call.tokens.clone()
        other[1] = other_ids(other[1], vocab_size, 2)
        different = losses_of(call, other, call.targets, training) != losses_of(call, call.tokens, call.targets, training)
        if different.any(1).nonzero().flatten().tolist() != [1]:
            wrong.append(f"{label}: changing row 1 moved rows {different.any(1).nonzero().flatten().tolist()}")
    if not training:  # in training a loss may look at several targets (multi-token prediction)
        others = y.clone()
        others[at, where] = other_ids(y[at, where], vocab_size, 3)
        different = losses_of(call, x, others, training) != base
        different[at, where] = False
        if different.any():
            wrong.append(f"{label}: {int(different.any(1).sum())} of {n} changed targets moved another position's loss")
    return n, wrong


def causal_rows(observed, vocab_size):
    """The same through validate: change id t of a row; losses before t - 1, whose target it is, keep every bit."""
    rows = observed.last.given.find(is_rows)
    where = chosen_positions(rows.shape[-1])[:-1]  # the last id is a target only
    n = len(where)
    base = np.repeat(rows[:1, :1], len(rows), 0).repeat(-(-n // len(rows)), 1)
    changed = base.copy().reshape(-1, rows.shape[-1])
    changed[np.arange(n), where] = other_ids(torch.from_numpy(changed[np.arange(n), where]), vocab_size, 4).numpy()
    old, new = (observed.losses_of_rows(x.reshape(base.shape))[:n] for x in (base, changed))
    return n, moved(old, new, where - 1, where, "validate")


def causality(observed, spec):
    done, wrong = causal_rows(observed, spec["vocab_size"])
    lengths = set()
    for name, call in (("validation", observed.last.calls[0]), ("training", observed.step_calls[0])):
        lengths.add(call.tokens.shape[1])
        for training in (False, True):
            label = f"{'training' if training else 'eval'} mode, call of {name}, context {call.tokens.shape[1]}"
            n, found = causal_call(call, spec["vocab_size"], training, label)
            done, wrong = done + n, wrong + found
    return not wrong, "; ".join(wrong) or (
        f"{done} tokens changed one by one, through validate and in calls of both modes, context "
        f"{' and '.join(map(str, sorted(lengths)))}: no earlier loss moved by a bit, nor one of another row or target")


# ----- normalisation ------------------------------------------------------------------------------------------------

def normalisation(observed, spec):
    """All targets for one context, at each position; and through validate at one, where it is also the next input."""
    call, classes = observed.last.calls[0], spec["padded_vocab"]
    length = min(64, call.tokens.shape[1])
    short = Call(call.model, call.tokens[:, :length], call.targets[:, :length], call.args, call.kwargs, None, False)
    every = torch.arange(classes)[:, None].expand(-1, length)
    sums = (-losses_of(short, short.tokens[:1].expand(classes, -1), every, False).double()).exp().sum(0)
    rows = observed.last.given.find(is_rows)
    ranks, row = len(rows), rows[0, 0, :17]
    padded, middle = -(-classes // ranks) * ranks, len(row) // 2
    rows = np.repeat(row[None], padded, 0)
    rows[:, middle] = np.arange(padded) % classes
    through = observed.losses_of_rows(rows.reshape(ranks, -1, len(row)))[:classes, middle - 1]
    total, error = float((-through.double()).exp().sum()), float((sums - 1).abs().max())
    return max(error, abs(total - 1)) <= TOLERANCE, (
        f"probabilities of {classes} targets sum to {float(sums.min()):.6f} .. {float(sums.max()):.6f} at {length} "
        f"positions, through validate to {total:.6f}")


# ----- the job ------------------------------------------------------------------------------------------------------

def checks(spec):
    """{"checks": {name: (passed, detail)}} from one training. A check that cannot be carried out has failed."""
    observed, results = Observed(spec["argv"], watch="no_trace" in spec["checks"]), {}
    for check in (validation_targets, no_trace, causality, normalisation):
        if check.__name__ in spec["checks"]:
            if check in (causality, normalisation):
                shake(observed.last.given.find(is_model))
            try:
                results[check.__name__] = check(observed, spec)
            except Exception as error:
                results[check.__name__] = False, f"could not be carried out: {type(error).__name__}: {error}"
    return {"checks": results}
