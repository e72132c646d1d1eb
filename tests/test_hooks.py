"""State next to parameters: hooks act at their points of a step, and no state is missing from the lists of
tensors."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

import schedule
from data.batch import to_rows
from data.corpus import sample_corpus
from data.stream import Stream, stream_arguments, validation_rows
from model import GPT
from optim import Optimizer
from settings import deltas
from system.hooks import Stateful, all_tensors, hooks_of
from system.warmup import state_hash
from train_gpt import train_step, validation_loss

SHORT = ("schedule.steps=4",)


class WeightAverage(Stateful):
    """Test-only: the mean of the parameters after each update; validations see it in place of the
    parameters."""

    def __init__(self, model):
        self.model, self.count = model, torch.zeros(())
        self.mean = {name: torch.zeros_like(p) for name, p in model.named_parameters()}

    @torch.no_grad()
    def after_update(self, plan):
        self.count += 1
        for name, p in self.model.named_parameters():
            self.mean[name].lerp_(p, 1 / self.count.item())

    @contextlib.contextmanager
    def for_validation(self, windows):
        kept = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.write(self.mean)
        yield
        self.write(kept)

    @torch.no_grad()
    def write(self, values):
        for name, p in self.model.named_parameters():
            p.copy_(values[name])

    def reset(self):
        for tensor in self.tensors().values():
            tensor.zero_()

    def tensors(self):
        return {"count": self.count, **self.mean}


def small_run(ref, hooks=()):
    s = deltas.resolve(ref, scale="micro", sets=SHORT).settings
    model, corpus = GPT(s), sample_corpus()
    model.initialise(0)
    world = SimpleNamespace(
        total=lambda x: x, gather=lambda x: x, ranks=range(8), device=torch.device("cpu"), cuda=False
    )
    optimizer = Optimizer(model, s)
    return SimpleNamespace(
        s=s, world=world, plans=schedule.plan(s), model=model, compiled=model, corpus=corpus,
        optimizer=optimizer, hooks=[*hooks_of(model), *(make(model) for make in hooks)],
        workers=None, guards=None, ranks_per_microbatch=8, between_chunks=lambda: None,
        rows=validation_rows(corpus, s.validation.tokens, s.validation.seq_len, range(8))
    )


def train(run, steps):
    stream = Stream(run.corpus, ranks=range(8), **stream_arguments(run.s))
    for plan in run.plans[:steps]:
        train_step(run, plan, *to_rows(stream.next(), plan.shape.seq_len, run.world.device, run.corpus.bos))


def test_a_hook_averages_weights_and_validates_with_the_average():
    run, plain = small_run("short/11", hooks=[WeightAverage]), small_run("short/11")
    means = {}
    for steps in range(1, 4):  # the same training without the hook, from the start to each of its steps
        plain.model.initialise(0)
        plain.optimizer.reset()
        train(plain, steps)
        for name, p in plain.model.named_parameters():
            means[name] = means.get(name, 0) + p.detach().double() / 3
    train(run, 3)
    trained = [p.detach().clone() for p in run.model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(trained, plain.model.parameters(), strict=True))
    found, without = validation_loss(run, 3), validation_loss(plain, 3)
    assert all(torch.equal(a, b) for a, b in zip(trained, run.model.parameters(), strict=True))
    with torch.no_grad():
        for name, p in plain.model.named_parameters():
            p.copy_(means[name])
    assert found == pytest.approx(validation_loss(plain, 3), abs=1e-5) and abs(found - without) > 1e-4


def test_the_proof_of_the_reset_covers_the_state_of_hooks():
    run = small_run("short/11", hooks=[WeightAverage])
    before = state_hash(run.model, run.optimizer, run.hooks)
    train(run, 1)
    run.model.initialise(0)
    run.optimizer.reset()
    assert state_hash(run.model, run.optimizer, run.hooks) != before
    for hook in run.hooks:
        hook.reset()
    assert state_hash(run.model, run.optimizer, run.hooks) == before


@pytest.mark.feature("model.attn.rope.yarn")
def test_the_tables_of_yarn_follow_steps_and_validations_and_are_part_of_the_state():
    """Training continues with the same losses where the listed tensors are copied into a fresh run; a forward
    with tables of another window is refused."""
    run, fresh = small_run("short/33"), small_run("short/33")
    last = len(run.plans)
    before = state_hash(run.model, run.optimizer, run.hooks)
    validation_loss(run, last)
    moved = state_hash(run.model, run.optimizer, run.hooks)
    assert moved != before
    state = {name: t.clone() for name, t in all_tensors(run.model, run.optimizer, run.hooks).items()}
    with torch.no_grad():
        for name, t in all_tensors(fresh.model, fresh.optimizer, fresh.hooks).items():
            t.copy_(state[name])
    assert state_hash(fresh.model, fresh.optimizer, fresh.hooks) == moved
    assert validation_loss(fresh, last) == validation_loss(run, last)
    assert fresh.model.rotary_tables.scales == run.model.rotary_tables.scales
    tokens = torch.zeros((1, 64), dtype=torch.long)
    with pytest.raises(ValueError, match="update_yarn"):
        run.model.context(tokens, run.corpus.bos, run.plans[0].shape.windows)
    train(run, 1)
    run.model.context(tokens, run.corpus.bos, run.plans[0].shape.windows)
    run.model.initialise(0)
    run.optimizer.reset()
    assert state_hash(run.model, run.optimizer, run.hooks) == before


def reachable(root, path="", seen=None):
    """(path, tensor) of every tensor that an object of the project or of torch.nn holds, in attributes and
    containers."""
    seen = set() if seen is None else seen
    if id(root) in seen:
        return
    seen.add(id(root))
    if isinstance(root, torch.Tensor):
        yield path, root
    elif isinstance(root, (list, tuple, set)):
        for i, x in enumerate(root):
            yield from reachable(x, f"{path}[{i}]", seen)
    elif isinstance(root, dict):
        for key, x in root.items():
            yield from reachable(x, f"{path}[{key}]", seen)
    elif type(root).__module__.split(".")[0] not in ("builtins", "settings", "schedule") and hasattr(
        root, "__dict__"
    ):
        for name, x in vars(root).items():
            yield from reachable(x, f"{path}.{name}", seen)


def forgotten(run):
    """Paths of tensors that stay in model, optimizer or hooks after a step and are in no list of tensors."""
    listed = {
        t.untyped_storage().data_ptr() for t in all_tensors(run.model, run.optimizer, run.hooks).values()
    }
    listed |= {t.untyped_storage().data_ptr() for bank in run.optimizer.banks for t in [bank.param]}
    return sorted(path for path, t in reachable([run.model, run.optimizer, run.hooks])
                  if t.untyped_storage().data_ptr() not in listed)


class Forgetful(Stateful):
    """Test-only: keeps a tensor that it does not list."""

    def __init__(self, model):
        self.kept = None

    def before_forwards(self, plan):
        self.kept = torch.ones(3)


@pytest.mark.parametrize("ref", ["short/11", "short/33", "variants/4", "variants/5"])
def test_no_state_is_missing_from_the_lists_of_tensors(ref):
    run = small_run(ref)
    train(run, 2)
    assert forgotten(run) == []


def test_a_tensor_that_is_not_listed_is_found():
    run = small_run("short/11", hooks=[Forgetful])
    train(run, 1)
    assert len(forgotten(run)) == 1 and forgotten(run)[0].endswith(".kept")
