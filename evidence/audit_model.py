"""The experiments of `records audit` on the model, train_step and validate of an audited
checkout (see audit_probe.py).

A training of a few steps runs with a tap on the model. Experiments then go through the trainer's own validate
and train_step with other tokens, so that all they do around the model (documents, windows) is audited with
it. Known by name are only: model.GPT, which maps (tokens, targets, ...), both (R, T), to per-token losses (R,
T); train_gpt.main; train_gpt.validate, with rows (ranks, n, T + 1) among its arguments; train_gpt.train_step,
with inputs and targets (ranks, n, T) as its only tensors.
"""

import contextlib
import json
import math
import os
import random
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import CellType
from unittest import mock

import numpy as np
import torch

# of a sum of probabilities, and of a loss where another document structure changes shapes: float32
TOLERANCE = 1e-4
LARGEST_SCALE = 2 ** 12  # of the weights next to the classes, where no soft cap ends the search before
TIED = 3  # classes at one position that may share the largest loss to the last bit
CLOCK_SHARE = 0.98  # of the true time that the claimed time must reach; the rest is for reading clocks
# What a validation may leave: a router's tokens per expert, for the log. That training does not read them is
# shown by the training that validates at every step. The watch for stalled processes notes when what began.
TALLY = ".router._buffers.validation_counts"
WATCH = ("Run.watchdog.doing", "Run.watchdog.since", "Run.watchdog.posts.")
now, own_cpu, all_cpu = time.perf_counter, time.thread_time, time.process_time  # before the checkout can
as_numpy, threads = torch.Tensor.numpy, torch.get_num_threads  # change them
# CPU time of a program in a pause of the clock, next to the validation: share of a step, and seconds.
PAUSE_SHARE, PAUSE_S = 0.5, 0.1
LOGGED_NATS = 1e-4  # of a training loss, which is logged with six decimals; a float32 mean
PROBED = 33  # ids of a row, where every class is the next input once


def reseed() -> None:
    """Random states from the system, so that code that sets no seed does not repeat itself."""
    torch.seed()
    np.random.seed(random.SystemRandom().randrange(2 ** 32))


class Unknown(Exception):
    """The checkout does something that this auditor does not know how to test."""


# ----- the trainer under observation ------------------------------------------------------------------------

@dataclass
class Call:
    """One call of the model with targets, and what it gave."""
    model: torch.nn.Module
    tokens: torch.Tensor
    targets: torch.Tensor
    losses: torch.Tensor
    recorded_gradients: bool


class Enough(BaseException):
    """Ends a train_step after its forward, or a training when its clock starts."""


class Tap:
    """Sits on GPT.forward for the life of this process and keeps its calls.

    answer: function targets -> losses, in place of the model's. targets: (n, T), handed to the model row by
    row instead of the trainer's. stop: raise Enough after a call. aim: compare losses with its logits.
    gaps: what that found, [(largest loss, difference)].
    """

    def __init__(self) -> None:
        from model import GPT
        self.forward, self.calls, self.answer, self.targets, self.stop = GPT.forward, [], None, None, False
        self.aim, self.gaps = False, []
        self.given_threads = self.most_threads = threads()
        GPT.forward = lambda model, *args, **kwargs: self.call(model, *args, **kwargs)

    def call(self, model: torch.nn.Module, tokens: torch.Tensor, targets: torch.Tensor | None = None, *args,
             **kwargs) -> torch.Tensor:
        if targets is None:
            raise Unknown("the trainer calls the model without targets: this audit knows per-token losses "
                          "only")
        self.most_threads = max(self.most_threads, threads())
        if self.targets is not None:
            targets, self.targets = self.targets[:len(targets)], self.targets[len(targets):]
        if self.answer:
            losses = self.answer(targets)
        else:
            losses = self.forward(model, tokens, targets, *args, **kwargs)
        if losses.shape != targets.shape:
            raise Unknown(f"the model returns losses {tuple(losses.shape)} for targets "
                          f"{tuple(targets.shape)}")
        if self.aim:
            self.gaps.append(self.gap(model, tokens, *args, **kwargs))
        self.calls.append(Call(
            model, tokens.clone(), targets.clone(), losses.detach().clone(), losses.requires_grad))
        if self.stop:
            raise Enough
        return losses

    def gap(self, model: torch.nn.Module, tokens: torch.Tensor, *args, **kwargs) -> tuple[float, float]:
        """(largest loss, largest |loss - (logsumexp - logit)|) of the likeliest, of random and of the least
        likely classes of each position."""
        logits = self.forward(model, tokens, None, *args, **kwargs).double()
        if logits.shape[:2] != tokens.shape:
            raise Unknown(f"without targets the model returns {tuple(logits.shape)}, not logits")
        order, worst, largest = logits.argsort(-1), 0.0, 0.0
        for rank in (0, 1, logits.shape[-1] // 2, -1):
            targets = order[..., rank]
            losses = self.forward(model, tokens, targets, *args, **kwargs).double()
            true = torch.logsumexp(logits, -1) - logits.gather(-1, targets[..., None])[..., 0]
            gap = ((losses - true).abs() / true.abs().clamp(min=1)).nan_to_num(torch.inf)  # max() skips NaN
            worst, largest = max(worst, float(gap.max())), max(largest, float(losses.max()))
        return largest, worst

    def taken(self) -> list[Call]:
        """The calls since the last time."""
        calls, self.calls = self.calls, []
        return calls


@dataclass
class Arguments:
    """Arguments of a call of train_step or validate."""
    args: tuple
    kwargs: dict

    def values(self) -> tuple:
        return (*self.args, *self.kwargs.values())

    def find(self, kind: Callable[[object], bool], count: int) -> list:
        found = [a for a in self.values() if kind(a)]
        if len(found) != count:
            raise Unknown(f"the trainer passes {len(found)} arguments with {kind.__name__}; this audit knows "
                          f"{count}")
        return found

    def replaced(self, old: list, new: list) -> "Arguments":
        """With each of the values `old` replaced by the one of `new`."""
        def swap(a):
            return next((y for x, y in zip(old, new) if a is x), a)
        return Arguments(tuple(map(swap, self.args)), {k: swap(v) for k, v in self.kwargs.items()})


def is_rows(x: object) -> bool:
    """Validation rows: ids (ranks, n, T + 1)."""
    return isinstance(x, np.ndarray) and x.ndim == 3


def is_batch(x: object) -> bool:
    """Inputs or targets of a step: ids (ranks, n, T)."""
    return isinstance(x, torch.Tensor) and x.ndim == 3


@dataclass
class Validated:
    """One validation: its arguments, the calls of the model, what it returned and what it changed."""
    given: Arguments
    calls: list[Call]
    value: float
    changed: list[str]
    watched: int
    backwards: int


class Observed:
    """A training in this process. answer: losses for validations in place of the model's. watch:
    look for their traces, and for changes outside the steps. until_start: end it when the clock starts."""

    def __init__(self, tap: Tap, argv: list[str], answer: Callable | None = None, watch: bool = False,
                 until_start: bool = False) -> None:
        import train_gpt
        try:
            from system.command_line import command_line
        except ImportError:  # a commit from before that was a file of its own
            from settings.deltas import command_line
        self.tap, self.answer, self.watch, self.until_start = tap, answer, watch, until_start
        self.validate, self.train_step = train_gpt.validate, train_gpt.train_step
        self.step, self.validations, self.backwards, self.tables = None, [], 0, None
        self.clock, self.steps = ClockWatch(self), StepWatch(self)
        with mock.patch.object(train_gpt, "validate", self.on_validate), \
                mock.patch.object(train_gpt, "train_step", self.on_step), \
                mock.patch.object(torch.autograd, "backward", self.counting(torch.autograd.backward)), \
                mock.patch.object(torch.autograd, "grad", self.counting(torch.autograd.grad)), \
                self.clock.tapped():
            try:
                train_gpt.main(*command_line(argv))
            except SystemExit as end:
                if end.code not in (None, 0, 3):  # 3: a target was missed
                    raise
            except Enough:
                return
        self.log = log_of(argv)
        self.logged = [math.nan if e["val_loss"] is None else e["val_loss"] for e in self.log]
        if not self.validations or self.step is None:
            raise Unknown("the training went without train_gpt.validate or train_gpt.train_step")

    def counting(self, call: Callable) -> Callable:
        def counted(*args, **kwargs):
            self.backwards += 1
            return call(*args, **kwargs)
        return counted

    def on_step(self, *args, **kwargs) -> torch.Tensor:
        self.step = Arguments(args, kwargs)
        self.tap.taken()
        backwards = self.backwards
        self.steps.begins()
        out = self.train_step(*args, **kwargs)
        self.tap.most_threads = max(self.tap.most_threads, threads())
        self.steps.ends(self.tap.taken(), self.backwards - backwards)
        return out

    def on_validate(self, *args, **kwargs) -> float:
        # only the last one is looked at, so that the others may say anything
        if self.answer and self.step is None:
            return 1.0
        self.clock.pause(False)
        self.steps.compare("the validation")
        self.tables = self.rotary_tables()
        before, backwards = self.state(), self.backwards
        self.put_back()
        self.tap.taken()
        self.tap.answer = self.answer
        value = self.validate(*args, **kwargs)
        calls, self.tap.answer = self.tap.taken(), None
        backwards, after = self.backwards - backwards, self.state()
        self.put_back()
        changed = sorted(k for k in {**before, **after} if before.get(k) != after.get(k))
        if self.validations:
            self.validations[-1].calls.clear()  # of the last one only they are looked at
        self.validations.append(
            Validated(Arguments(args, kwargs), calls, value, changed, len(before), backwards))
        self.clock.pause(True)
        return value

    def state(self) -> dict[str, bytes]:
        """Fingerprint of all that a step is given, as its forward finds it."""
        if not self.watch or self.step is None:
            return {}
        self.step_losses(*self.step.find(is_batch, 2))
        return fingerprint([a for a in self.step.values() if not isinstance(a, torch.Tensor)])

    def rotary_tables(self) -> tuple | None:
        """The rotary tables as they are: (their holder, copies of its tensors, its softmax scales), or None.

        They follow the windows of the last step or validation, so that a step that is replayed moves them.
        """
        run = next((a for a in self.step.values() if hasattr(a, "model")), None) if self.step else None
        tables = getattr(run and run.model, "rotary_tables", None)
        return tables and (tables, {k: x.clone() for k, x in tables.tensors().items()}, tables.scales)

    def put_back(self) -> None:
        """Restore the rotary tables that the last validation found."""
        if self.tables:
            tables, kept, tables.scales = self.tables
            for name, x in tables.tensors().items():
                x.copy_(kept[name])

    def validated(self, given: Arguments) -> float:
        """What the trainer's validate returns for Arguments, with tables and weights of the last validation.

        The trainer reads averaged or extrapolated weights within a context, and has its own ones afterwards.
        """
        self.put_back()
        with self.reading():
            return self.validate(*given.args, **given.kwargs)

    def reading(self) -> contextlib.AbstractContextManager:
        """The trainer's context of the weights that its last validation read; none in older commits."""
        run = next((a for a in self.step.values() if hasattr(a, "hooks") and hasattr(a, "plans")), None)
        context = getattr(sys.modules["train_gpt"], "reading", None)
        if run is None or context is None:
            return contextlib.nullcontext()
        return context(run.hooks, len(run.plans))

    def row_losses(self, rows: np.ndarray, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Per-token losses (ranks n, T) that validate adds up for rows (ranks, n, T + 1); targets: Tap's."""
        self.tap.targets = targets
        given = self.last.given.replaced(self.last.given.find(is_rows, 1), [rows])
        self.validated(given)
        return self.losses_in_order(rows.reshape(-1, rows.shape[-1])[:, :-1])

    def step_losses(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Per-token losses (ranks n, T) that a training step forms for inputs and targets (ranks, n, T)."""
        given = self.step.replaced(self.step.find(is_batch, 2), [inputs, targets])
        self.tap.stop = True
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self.train_step(*given.args, **given.kwargs)
        except Enough:
            pass
        self.tap.stop = False
        return self.losses_in_order(inputs.flatten(0, 1).numpy())

    def losses_in_order(self, tokens: np.ndarray) -> torch.Tensor:
        calls, self.tap.targets = self.tap.taken(), None
        if not np.array_equal(torch.cat([c.tokens for c in calls]).numpy(), tokens):
            raise Unknown("the trainer does not pass its rows on as they are, all in one forward in training")
        return torch.cat([c.losses for c in calls])

    @property
    def last(self) -> Validated:
        return self.validations[-1]


def log_of(argv: list[str]) -> list[dict]:
    """The validations in the log of the run with this command line."""
    path, = Path(argv[argv.index("--out") + 1]).glob("[!.]*/run.jsonl")
    events = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [e for e in events if e["kind"] == "validation"]


# ----- the clock and the steps ------------------------------------------------------------------------------

class ClockWatch:
    """Sits on Clock.start and Clock.stop: the true time between them, and the state at both."""

    def __init__(self, observed: Observed) -> None:
        self.observed, self.started, self.true_s, self.first = observed, None, 0.0, None
        self.pauses, self.others, self.since, self.stopped, self.children = [], [], None, None, []

    def pause(self, begins: bool) -> None:
        """The trainer is at work while its clock stands, and neither its validation nor this audit."""
        if self.since is not None:
            self.pauses[-1] += own_cpu() - self.since
        self.since = own_cpu() if begins and self.started is None and self.pauses else None

    def tapped(self) -> contextlib.AbstractContextManager:
        """A context in which the trainer's clock is watched."""
        from system.run import Clock
        start, stop, watch = Clock.start, Clock.stop, self

        def on_start(clock):
            watch.pause(False)
            if watch.stopped is not None:
                watch.others.append(all_cpu() - own_cpu() - watch.stopped)
            watch.observed.steps.compare("the start of the clock")
            if watch.first is None:
                watch.first = watch.observed.steps.hashed(whole=True)
                if watch.observed.until_start:
                    raise Enough
            out = start(clock)
            watch.started = now()
            return out

        def on_stop(clock):
            if watch.started is not None:
                watch.true_s, watch.started = watch.true_s + now() - watch.started, None
            out = stop(clock)
            watch.observed.steps.compare("the stop of the clock")
            watch.children += children()
            watch.pauses.append(0.0)
            watch.stopped = all_cpu() - own_cpu()
            watch.pause(True)
            return out

        return mock.patch.multiple(Clock, start=on_start, stop=on_stop)


def children() -> list[str]:
    """Names of the processes that this one has started and that still run (Linux; none elsewhere)."""
    with contextlib.suppress(OSError):
        texts = [os.fsdecode(x.read_bytes()).rpartition(")") for x in Path("/proc").glob("[0-9]*/stat")]
        return [name.partition("(")[2] for name, _, rest in texts
                if rest.split()[1] == str(os.getpid()) and rest.split()[0] not in "ZX"]
    return []


class StepWatch:
    """Parameters and optimizer state may change within a timed train_step only, by backward passes through
    GPT.forward; and what a step reads is noted."""

    def __init__(self, observed: Observed) -> None:
        self.observed, self.wrong, self.known, self.since = observed, [], None, ""
        self.count, self.targets, self.seen, self.losses, self.read = 0, 0, set(), [], sha256()
        self.began = self.true_s = 0.0

    def timed(self) -> bool:
        return self.observed.clock.started is not None

    def hashed(self, whole: bool = False) -> str | None:
        """One hash of all parameters and optimizer tensors; None before a step has shown where they are.

        whole: of everything that model, optimizer and hooks hold.
        """
        o = self.observed
        if not o.watch or o.step is None:
            return None
        run = next((a for a in o.step.values() if hasattr(a, "optimizer") and hasattr(a, "model")), None)
        if run is None:
            raise Unknown("train_step gets no object with a model and an optimizer")
        moving = {"model": dict(run.model.named_parameters()), "optimizer": run.optimizer}
        if whole:
            moving = {"model": run.model, "optimizer": run.optimizer, "hooks": getattr(run, "hooks", None)}
        found = fingerprint([moving], outside=False)
        return sha256(b"".join(k.encode() + v for k, v in sorted(found.items()))).hexdigest()

    def compare(self, where: str) -> None:
        """Note it if the state is not what it was at the last event."""
        if self.observed.clock.first is None and where != "the start of the clock":
            return
        state = self.hashed()
        if self.known is not None and state != self.known:
            self.wrong.append(f"parameters or optimizer changed between {self.since} and {where}, not in a "
                              "training step")
        self.known, self.since = state, where

    def begins(self) -> None:
        if self.timed():
            self.count += 1
            self.compare(f"the beginning of step {self.count}")
        self.began = now()

    def ends(self, calls: list[Call], backwards: int) -> None:
        if self.observed.clock.first is not None:
            self.true_s += now() - self.began
        if not self.timed():
            return
        self.known, self.since = self.hashed(), f"the end of step {self.count}"
        forwards = sum(c.recorded_gradients for c in calls)
        if backwards > forwards:
            self.wrong.append(f"step {self.count} makes {backwards} backward passes and {forwards} forward "
                              "passes through GPT.forward: it trains past it")
        inputs, targets = self.observed.step.find(is_batch, 2)
        self.targets += targets.numel()
        self.seen |= {*inputs.unique().tolist(), *targets.unique().tolist()}
        self.losses.append(float(np.mean([as_numpy(c.losses.double()).mean() for c in calls] or [0.0])))
        rows = torch.cat([inputs.flatten(1), targets.flatten(1)[:, -1:]], 1).int()
        self.read.update(as_numpy(rows.contiguous()).tobytes())


def state(observed: Observed, spec: dict) -> tuple[bool, str]:
    """Law: what is trained changes in the timed steps and nowhere else."""
    watch = observed.steps
    if watch.known is None:
        return False, "the trainer's clock or its steps were not found: no state could be compared"
    wrong = list(dict.fromkeys(watch.wrong))
    return not wrong, "; ".join(wrong[:3]) or (
        f"parameters and optimizer have the same hash from the end of each of {watch.count} steps to the "
        "beginning of the next, over every stop and start of the clock; each backward pass follows a forward "
        "pass that was seen")


def inputs(observed: Observed, spec: dict) -> tuple[bool, str]:
    """Law: the steps read training shards only, as many tokens as the log says."""
    watch, told = observed.steps, observed.log[-1]["tokens"]
    foreign = sorted(watch.seen & set(spec["markers"]))
    if foreign:
        return False, f"training steps read {len(foreign)} ids that only the validation shard has"
    if told != watch.targets:
        return False, f"the log says {told:,} tokens, the steps got {watch.targets:,}"
    return True, (f"{watch.count} steps got {told:,} tokens, as the log says, none of them of the validation "
                  "shard")


def true_time(observed: Observed, spec: dict) -> tuple[bool, str]:
    """Law: the claimed training time is the time that passed between start and stop of the clock, and no less
    than the steps took."""
    true_s, told_s = observed.clock.true_s, observed.log[-1]["train_time_ms"] / 1000
    if told_s < CLOCK_SHARE * true_s:
        return False, f"the log says {told_s:.3f} s of training, between start and stop passed {true_s:.3f} s"
    if told_s < CLOCK_SHARE * observed.steps.true_s:
        return False, f"the log says {told_s:.3f} s of training, the steps took {observed.steps.true_s:.3f} s"
    if wrong := in_pauses(observed):
        return False, wrong
    return True, f"{told_s:.3f} s of training claimed, {true_s:.3f} s passed between start and stop"


def in_pauses(observed: Observed) -> str:
    """What works while the clock stands, next to the validation, or on too many threads, in words; or ''."""
    clock, tap, step_s = observed.clock, observed.tap, observed.steps.true_s / max(observed.steps.count, 1)
    own, others = (max(x, default=0.0) for x in (clock.pauses, clock.others))
    most = PAUSE_SHARE * step_s + PAUSE_S
    found = [
        (own > most, f"{own:.2f} s of work while the clock stood, next to validating, a step {step_s:.2f}"),
        (others > most, f"other threads worked for {others:.3f} s while the clock stood"),
        (clock.children, f"a process that it started ({clock.children[:1]}) ran on while the clock stood"),
        (tap.most_threads > tap.given_threads,
         f"torch computes with {tap.most_threads} threads, where it was given {tap.given_threads}")]
    return next((text for wrong, text in found if wrong), "")


# ----- all that a validation could leave behind -------------------------------------------------------------

def fingerprint(roots: list, outside: bool = True) -> dict[str, bytes]:
    """{path: hash} of all state in reach of the roots and (with `outside`) of the checkout's modules,
    and of the random generators.

    Tensors with their gradients, arrays, numbers and strings, in attributes, containers and closures. Of
    objects only those of the checkout's and torch.nn's classes are entered.
    """
    checkout = Path(sys.modules["train_gpt"].__file__).parent
    ours = {
        n for n, m in sys.modules.items()
        if getattr(m, "__file__", None) and checkout in Path(m.__file__).parents
    }
    found, seen = {}, set()

    def note(path, data):
        found[path] = sha256(data).digest()

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
    if not outside:
        return found
    for name in sorted(ours):
        for key, value in list(vars(sys.modules[name]).items()):
            if not key.startswith("__") and not isinstance(value, type):
                walk(f"{name}.{key}", value)
    note("torch's random state", bytes(torch.get_rng_state().numpy()))
    note("random's state", repr(random.getstate()).encode())
    note("numpy's random state", repr(np.random.get_state()).encode())
    return found


def contents(cell: CellType) -> list:
    """What a closure's cell holds: a list of one, or of none before it is filled."""
    try:
        return [cell.cell_contents]
    except ValueError:
        return []


def no_trace(observed: Observed, spec: dict) -> tuple[bool, str]:
    """Law: validate() changes no tensor in reach, makes no backward pass and gives the same bits again."""
    wrong, timed = [], observed.validations[-len(observed.logged):]
    for i, v in enumerate(timed):
        changed = [name for name in v.changed if not name.endswith(TALLY) and not name.startswith(WATCH)]
        if changed:
            wrong.append(
                f"validation {i} changed {len(changed)} of {v.watched} values: {', '.join(changed[:3])}"
            )
        if v.backwards:
            wrong.append(f"validation {i} made {v.backwards} backward passes")
    if any(c.recorded_gradients for c in observed.last.calls):
        wrong.append("validation records gradients")
    again = observed.validated(observed.last.given)
    observed.tap.taken()
    if again != observed.last.value:
        wrong.append(f"validating once more gives {again!r}, not {observed.last.value!r}")
    return not wrong, "; ".join(wrong) or (
        f"{len(timed)} validations left all {timed[-1].watched} tensors and values in reach as they were, "
        "without a backward pass; one more gave the same bits")


# ----- validation targets -----------------------------------------------------------------------------------

def random_losses() -> Callable[[torch.Tensor], torch.Tensor]:
    """An answer whose losses are random multiples of 2^-10 below 16: sums are exact in float64,
    so a mean is checkable."""
    generator = torch.Generator().manual_seed(3)
    return lambda targets: torch.randint(16 * 1024, targets.shape, generator=generator).double() / 1024


def validation_targets(observed: Observed, spec: dict) -> tuple[bool, str]:
    """At the audited scale with the model's losses; and with as many targets as full scale has,
    and random losses."""
    full = Observed(observed.tap, spec["counted_argv"], random_losses())
    told, mine = [x for event in observed.log for x in event["train_loss"]], observed.steps.losses
    same = len(told) == len(mine) and all(abs(a - b) < LOGGED_NATS for a, b in zip(told, mine))
    wrong = [*([f"the log's training losses {told} are not those of the steps"] * (not same)),
             *counted(observed, spec["validation_tokens"], spec["val_shard"]),
             *counted(full, spec["full_validation_tokens"], spec["val_shard"])]
    return not wrong, "; ".join(wrong) or (
        f"the shard's first {spec['validation_tokens']:,} targets, and {spec['full_validation_tokens']:,} as "
        "at full scale, each once; the logged loss is the plain mean of their losses")


def counted(observed: Observed, tokens: int, shard: str) -> list[str]:
    """Words for what is wrong with the targets and the mean of the last validation of a training."""
    calls, value, wrong = observed.last.calls, observed.last.value, []
    if observed.logged[-1] != value:
        wrong.append(f"the log says {observed.logged[-1]!r} where validate returned {value!r}")
    losses = torch.cat([c.losses.flatten() for c in calls])
    mean = float(np.add.reduce(as_numpy(losses.double()).reshape(-1)) / losses.numel())
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
        wrong.append(
            f"{lacking} of {len(want)} rows with the shard's first {tokens:,} targets are missing or repeated"
            + read_instead(rows, shard)
        )
    return wrong


def read_instead(rows: np.ndarray, shard: str) -> str:
    """The end of a message: whether rows (n, 2 T: inputs, targets) are of a training shard next to it."""
    width = rows.shape[1] // 2
    runs = np.concatenate([rows[:, :width], rows[:, -1:]], 1).astype("<u2")
    for path in sorted(Path(shard).parent.glob("*_train_*.bin")):
        held = path.read_bytes()[1024:]
        found = sum(run.tobytes() in held for run in runs[:64])
        if found:
            return (f": the validation reads training tokens ({found} of its first {len(runs[:64])} rows lie "
                    f"in {path.name})")
    return ""


# ----- causality --------------------------------------------------------------------------------------------

def shake(model: torch.nn.Module) -> None:
    """Random non-zero values on every parameter, so that no zero-initialised weight hides a path."""
    generator = torch.Generator().manual_seed(20240520)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                noise = torch.randn(p.shape, generator=generator, dtype=torch.float32)
                p.add_((noise * (p.shape[-1] ** -0.5 if p.dim() > 1 else 0.1)).to(p))


def chosen_positions(length: int) -> torch.Tensor:
    """All positions of a short row; of a long one both ends, some at powers of two, where blocks begin,
    and a sample."""
    if length <= 128:
        return torch.arange(length)
    near = {t for k in (0, 3, 6, 9, 12, 15) for t in (2 ** k - 1, 2 ** k) if t < length}
    return torch.tensor(
        sorted({length - 2, length - 1} | near | set(random.Random(0).sample(range(length), 6))))


def copies(row: np.ndarray | torch.Tensor, n: int, ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """(ranks, ceil(n / ranks), T): a row repeated, and the same for changing."""
    same = np.repeat(np.asarray(row)[None], -(-n // ranks) * ranks, 0)
    return same, same.copy()


def other_ids(ids: np.ndarray, bos: int, seed: int) -> np.ndarray:
    """Random ids below bos (the highest), each different from the one in its place."""
    generator = np.random.default_rng(seed)
    return (ids + generator.integers(1, bos, ids.shape)) % bos


def moved(base: torch.Tensor, new: torch.Tensor, changed: torch.Tensor, label: str,
          tolerance: float = 0.0) -> list[str]:
    """Words for losses (n, T) that moved before position changed[i] of row i, or did not from there on."""
    wrong, t, distance = [], torch.arange(base.shape[1]), (base.double() - new.double()).abs()
    if not distance.isfinite().all():
        return [f"{label}: losses of a model with random weights are not finite"]
    early, late = (distance > tolerance) & (t < changed[:, None]), (distance > 0) & (t >= changed[:, None])
    if early.any():
        row = int(early.any(1).nonzero()[0])
        wrong.append(f"{label}: {int(early.any(1).sum())} of {len(base)} changed tokens moved an earlier "
                     f"loss, by up to {float((distance * early).max()):.3g}; e.g. token {int(changed[row])} "
                     f"moved loss {int(early[row].nonzero()[0])}")
    if not late.any(1).all():
        wrong.append(f"{label}: {int((~late.any(1)).sum())} of {len(base)} changed tokens moved no loss")
    return wrong


def rows_that_moved(before: torch.Tensor, after: torch.Tensor) -> list[int]:
    """Indices of the rows (R, ...) that differ between two tensors."""
    return (before != after).any(1).nonzero().flatten().tolist()


def causal_validation(observed: Observed, row: np.ndarray, bos: int) -> tuple[int, list[str]]:
    """Change ids of copies of a row (T + 1) one by one, then a whole row, then targets.
    Returns (tokens changed, wrong).

    The targets stay while ids change, so that losses before t must keep every bit; where a document begins or
    ends elsewhere (id t becomes or was bos) attention may work in other shapes, and they must stay within
    rounding.
    """
    ranks, length = len(observed.last.given.find(is_rows, 1)[0]), len(row) - 1
    where, label, wrong = chosen_positions(length), f"validation, context {length}", []
    n, at = len(where), np.arange(len(where))
    same, ordinary = copies(row, n, ranks)
    begins = same.copy()
    ordinary[at, where] = np.where(row[where] == bos, bos, other_ids(row[where], bos, 1))
    begins[at, where] = np.where(row[where] == bos, 0, bos)
    shape = (ranks, -1, length + 1)
    targets, kept = torch.from_numpy(same[:, 1:].astype(np.int64)), torch.from_numpy(row[where] != bos)
    base, new, other = (observed.row_losses(x.reshape(shape), targets)[:n] for x in (same, ordinary, begins))
    wrong += moved(base[kept], new[kept], where[kept], label)
    wrong += moved(base, other, where, label + ", begin of a document", TOLERANCE)
    rows = np.resize(observed.last.given.find(is_rows, 1)[0][..., :length + 1], (2 * ranks, length + 1))
    before, other = observed.row_losses(rows.reshape(shape)), rows.copy()
    other[1] = np.where(rows[1] == bos, bos, other_ids(rows[1], bos, 2))
    if (which := rows_that_moved(before, observed.row_losses(other.reshape(shape)))) != [1]:
        wrong.append(f"{label}: changing row 1 moved rows {which}")
    targets[at, where] = torch.from_numpy(other_ids(row[1:][where], bos, 3).astype(np.int64))
    different = observed.row_losses(same.reshape(shape), targets)[:n] != base
    different[at, where] = False
    if different.any():
        wrong.append(
            f"{label}: {int(different.any(1).sum())} of {n} changed targets moved another position's loss"
        )
    return 3 * n, wrong


def causal_step(observed: Observed, bos: int) -> tuple[int, list[str]]:
    """The same for train_step: an input, with the targets as they were; then a row. Documents stay, since a
    loader may promise their length; targets too, since a loss may look at several of them
    (multi-token prediction)."""
    inputs, targets = observed.step.find(is_batch, 2)
    ranks, _, length = inputs.shape
    row = inputs[0, 0].numpy()
    where = chosen_positions(length)
    where = where[torch.from_numpy(row[where] != bos)]
    n, label = len(where), f"training step, context {length}"
    same, changed = copies(row, n, ranks)
    changed[np.arange(n), where] = other_ids(row[where], bos, 4)
    shape = ranks, -1, length
    aims = torch.from_numpy(copies(targets[0, 0], n, ranks)[0]).view(shape)
    base, new = (observed.step_losses(torch.from_numpy(x).view(shape), aims)[:n] for x in (same, changed))
    wrong, other = moved(base, new, where, label), inputs.clone().flatten(0, 1)
    other[1] = torch.where(other[1] == bos, bos, torch.from_numpy(other_ids(other[1].numpy(), bos, 5)))
    before, after = (observed.step_losses(x.view(inputs.shape), targets) for x in (inputs, other))
    if (which := rows_that_moved(before, after)) != [1]:
        wrong.append(f"{label}: changing row 1 moved rows {which}")
    return n, wrong


def causality(observed: Observed, spec: dict) -> tuple[bool, str]:
    """Law: changing a token moves no loss before it, and none of another row or target."""
    bos = spec["bos"]
    ids = np.fromfile(spec["val_shard"], "<u2", spec["validation_tokens"], offset=1024).astype(np.int32)
    done, wrong = causal_step(observed, bos)
    lengths = sorted({observed.step.find(is_batch, 2)[0].shape[-1], spec["validation_seq_len"]})
    for length in lengths:
        n, found = causal_validation(observed, ids[:length + 1], bos)
        done, wrong = done + n, wrong + found
    return not wrong, "; ".join(wrong) or (
        f"{done} tokens and targets changed one by one, in validate with context "
        f"{' and '.join(map(str, lengths))} and in a training step: no earlier loss moved by a bit, nor one "
        "of another row or target")


# ----- normalisation ----------------------------------------------------------------------------------------

def normalisation(observed: Observed, spec: dict) -> tuple[bool, str]:
    """Every class as the target, in validate: at each position of one row, whose tokens stay; and at one
    position where it is the next input too, as in text (but not the classes of padding:
    a token table may lack them). Then again with ever larger weights, up to the cap of the logits."""
    classes, rows = spec["padded_vocab"], observed.last.given.find(is_rows, 1)[0]
    row = rows[0, 0, :65]
    every = np.arange(classes)
    same, changed = copies(row, classes, len(rows))
    shape, length, middle = (len(rows), -1, len(row)), len(row) - 1, len(row) // 8
    targets = torch.from_numpy(np.resize(every, len(same)))[:, None].repeat(1, length)
    sums = (-observed.row_losses(same.reshape(shape), targets)[:classes].double()).exp().sum(0)
    changed = changed[:, :2 * middle + 1]
    changed[:spec["vocab_size"], middle] = every[:spec["vocab_size"]]
    targets = torch.from_numpy(changed[:, 1:].astype(np.int64))
    targets[:, middle - 1] = torch.from_numpy(np.resize(every, len(same)))
    through = observed.row_losses(changed.reshape(len(rows), -1, 2 * middle + 1), targets)[:, middle - 1]
    total, error = float((-through[:classes].double()).exp().sum()), float((sums - 1).abs().max())
    found = (f"probabilities of {classes} targets sum to {float(sums.min()):.6f} .. {float(sums.max()):.6f} "
             f"at {length} positions, and to {total:.6f} where the target is the next input")
    if not (error <= TOLERANCE and abs(total - 1) <= TOLERANCE):  # NaN, too
        return False, found
    for further in (every_next, every_context, whole_range):
        passed, detail = further(observed, spec, row)
        found = f"{found}; {detail}" if passed else detail
        if not passed:
            break
    return passed, found


def every_next(observed: Observed, spec: dict, row: np.ndarray) -> tuple[bool, str]:
    """(passed, detail): no class's loss tells whether it is the next input, early and late in a row."""
    draw, bos, length = np.random.default_rng(spec["draw"]), spec["bos"], min(PROBED, len(row))
    ranks = len(observed.last.given.find(is_rows, 1)[0])
    # without `bos`: a document that begins elsewhere changes shapes, which is causality's business
    every = np.resize(np.arange(bos), 2 * -(-bos // ranks) * ranks)
    rows = draw.integers(0, bos, (len(every), length))
    at = draw.integers(0, length // 2, len(rows)) + length // 2 * (np.arange(len(rows)) >= bos)
    rows[:, 0] = bos
    targets, seen = torch.from_numpy(rows[:, 1:].astype(np.int64)), rows.copy()
    targets[np.arange(len(rows)), at] = torch.from_numpy(every)
    seen[np.arange(len(rows)), at + 1] = every
    rows[np.arange(len(rows)), at + 1] = other_ids(every, bos, 6)
    rows, seen = (x.reshape(ranks, -1, length).astype(np.int32) for x in (rows, seen))
    without, within = observed.row_losses(rows, targets), observed.row_losses(seen, targets)
    differ = (without != within).numpy()[np.arange(len(every)), at]
    found = sorted({*every[differ].tolist()})
    return not found, (f"the loss of {len(found)} of {bos} classes tells whether they are the next "
                       f"input {found[:1]}")


def every_context(observed: Observed, spec: dict, row: np.ndarray) -> tuple[bool, str]:
    """(passed, detail): after each id the losses are those of the model's own logits."""
    ranks, length = len(observed.last.given.find(is_rows, 1)[0]), len(row) - 1
    order = np.random.default_rng(spec["draw"]).permutation(spec["vocab_size"])
    rows = np.zeros((-(-len(order) // (length * ranks)) * ranks, length + 1), int)
    rows[:, :-1] = np.resize(order, (len(rows), length))  # every id is an input, and some are twice
    observed.tap.aim = True
    observed.row_losses(rows.reshape(ranks, -1, length + 1).astype(np.int32))
    observed.tap.aim = False
    gap = max(gap for _, gap in observed.tap.gaps)
    return gap <= TOLERANCE, f"after all {len(order)} ids losses are within {gap:.1e} of those of the logits"


def whole_range(observed: Observed, spec: dict, row: np.ndarray) -> tuple[bool, str]:
    """(passed, detail): losses over the whole range of the logits' cap, which the weights next to the classes
    are scaled through: as many different losses as classes, a sum of one, and the losses of the logits."""
    classes, ranks = spec["padded_vocab"], len(observed.last.given.find(is_rows, 1)[0])
    model, short, scale, largest = observed.last.calls[0].model, row[:9], 1, 0.0
    tables = [p for p in model.parameters() if {classes, spec["vocab_size"]} & set(p.shape)]
    same, _ = copies(short, classes, ranks)
    targets = torch.from_numpy(np.resize(np.arange(classes), len(same)))[:, None].repeat(1, len(short) - 1)
    while scale <= LARGEST_SCALE:
        losses = observed.row_losses(same.reshape(ranks, -1, len(short)), targets)[:classes].double()
        ordered = losses.sort(0).values
        finite = bool(losses.isfinite().all())
        if not finite and scale == 1:
            return False, f"a loss of one of {classes} targets is not finite"
        if not finite or (ordered[1] - ordered[0]).min() < 1e-5 and scale > 1:
            break  # the likeliest classes are at the cap themselves
        largest, error = max(largest, float(losses.max())), float(((-losses).exp().sum(0) - 1).abs().max())
        if error > 10 * TOLERANCE:
            return False, (f"probabilities of {classes} targets sum to one only within {error:.1e}, where "
                           f"losses reach {float(losses.max()):.1f}")
        if (tied := int((losses == ordered[-1]).sum(0).max())) > TIED:
            return False, (f"{tied} of {classes} classes share the loss {float(losses.max()):.4f}: it is "
                           "clamped")
        observed.tap.aim = True
        observed.row_losses(copies(short, ranks, ranks)[0].reshape(ranks, -1, len(short)))
        observed.tap.aim = False
        if max(gap for _, gap in observed.tap.gaps) > TOLERANCE:
            loss, gap = max(observed.tap.gaps, key=lambda found: found[1])
            return False, (f"losses differ from those of the model's own logits by up to {gap:.1e} "
                           f"(relative), where they reach {loss:.1f}")
        scale *= 2
        with torch.no_grad():
            for p in tables:
                p.mul_(2)
    return True, (f"the same up to losses of {largest:.1f} (weights next to the classes times 1 to "
                  f"{scale // 2}), without a clamp, as the model's logits have them")


def fixed_losses(observed: Observed, spec: dict) -> list[float]:
    """Losses of the first rows of the audit's own validation shard, whichever shard this training had."""
    ranks, _, width = observed.last.given.find(is_rows, 1)[0].shape
    ids = np.fromfile(spec["val_shard"], "<u2", 4 * ranks * width, offset=1024).astype(np.int32)
    return as_numpy(observed.row_losses(ids.reshape(ranks, 4, width)).double()).reshape(-1).tolist()


# ----- the job ----------------------------------------------------------------------------------------------

def checks(spec: dict) -> dict:
    """{"checks": {name: (passed, detail)}, "first": hash of the state at the first start of the clock} from
    one training. A check that cannot be carried out has failed."""
    if spec["until_start"]:
        return {"first": Observed(Tap(), spec["argv"], watch=True, until_start=True).clock.first}
    observed, results = Observed(Tap(), spec["argv"], watch=spec["watch"]), {}
    fixed = fixed_losses(observed, spec) if spec["watch"] else None
    model = observed.last.calls[0].model
    # the last one trains again, from step 0: what began late in the first training would be over
    for check in (state, inputs, true_time, no_trace, causality, normalisation, validation_targets):
        if check.__name__ in spec["checks"]:
            if check in (causality, normalisation):
                shake(model)
            try:
                results[check.__name__] = check(observed, spec)
            except Exception as error:
                results[check.__name__] = False, f"could not be carried out: {type(error).__name__}: {error}"
    return {"checks": results, "first": observed.clock.first, "fixed": fixed, "logged": observed.logged,
            "read": observed.steps.read.hexdigest()}
