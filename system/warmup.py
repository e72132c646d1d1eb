"""Untimed warm-up steps and validations, which compile everything, and the proof that they leave no trace.

The trainer passes in its step and its validation, so that this module does not import the trainer.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

import runlog
import schedule
from data.batch import to_rows
from data.stream import Stream, stream_arguments
from model import GPT
from optim import Bank, Optimizer
from settings.data import LOGICAL_RANKS, per_stage
from system import compiler
from system.hooks import Stateful, all_tensors
from system.run import Run
from system.world import World
from updates.rows import Rows, total

HASHED = 2 ** 28  # bytes of a tensor that are on the host at a time
PIECE = 2 ** 22  # elements that are taken from all processes at a time: 32 MiB for each in float64


def state_hash(model: GPT, optimizer: Optimizer, hooks: Iterable[Stateful] = ()) -> str:
    """sha256 of everything that training changes: tensors of model, optimizer, hooks; random generator."""
    digest = hashlib.sha256()
    for t in [*all_tensors(model, optimizer, hooks).values(), torch.get_rng_state()]:
        for part in t.detach().contiguous().view(-1).view(torch.uint8).split(HASHED):
            digest.update(part.cpu().numpy())
    return digest.hexdigest()


def gradient_checksums(
    optimizer: Optimizer, world: World, gradients: dict[Bank, torch.Tensor] | None = None
) -> dict[str, list[float]]:
    """{parameter: [norm, sum_i g_i cos(i)]} of the gradient summed over all processes. Collective.

    gradients: this process's summand of each bank's gradient; None: those that the banks hold.

    Two numbers per tensor compare the logs of two programs, on any number of processes, because equal seeds
    give equal weights and warm-up tokens; a systems record must keep them. Unlike the norm, the second number
    depends on order and signs. They are taken in the last untimed step, because in the first one a zero head
    makes all other gradients zero. The processes' parts are added in rank order in float64, independent of
    system.comm.
    """
    out = {}
    for bank in optimizer.banks:
        # sum of all forwards, as p.grad is not in bfloat16
        held = bank.local_gradient() if gradients is None else gradients[bank]
        if isinstance(held, Rows):
            out[bank.members[0][0]] = rounded(checksums_of_rows(held, bank.comm.splits_members, world))
            continue
        share, start = held.detach().view(-1), 0
        for name, p in bank.members:
            part = share[start : start + p.numel()]
            out[name] = rounded(checksums_of(part, bank.comm.name == "own", world))
            start += p.numel()
    return dict(sorted(out.items()))


def rounded(checksums: list[float]) -> list[float]:
    """To eight digits, as the log has them."""
    return [float(f"{x:.8g}") for x in checksums]


def checksums_of(share: torch.Tensor, own: bool, world: World) -> list[float]:
    """[norm, sum_i g_i cos(i)] of a gradient g of all processes.

    Each process holds a summand of g or, with `own` (expert parallelism), a slice of it.
    """
    squares = turned = 0.0
    for start in range(0, len(share), PIECE):
        parts = [part.double() for part in world.parts(share[start:start + PIECE])]
        for rank, g in enumerate(parts if own else [sum(parts)]):
            at = start + rank * len(share)
            squares += g.square().sum().item()
            turned += (g * torch.arange(at, at + len(g), device=g.device).cos()).sum().item()
    return [math.sqrt(squares), turned]


def checksums_of_rows(share: Rows, own: bool, world: World) -> list[float]:
    """The same of a gradient of which each process holds a summand of some rows (N, D) or, with `own`, the
    rows of its share of the table."""
    if own:
        first = world.rank * share.table
        parts = world.parts(sums_of_rows(Rows(share.ids, share.values.double(), share.table), first))
        squares, turned = sum(parts).tolist()
    else:
        parts = zip(world.parts(share.ids), world.parts(share.values))
        g = total([Rows(ids, values.double(), share.table) for ids, values in parts])
        squares, turned = sums_of_rows(g).tolist()
    return [math.sqrt(squares), turned]


def sums_of_rows(g: Rows, first: int = 0) -> torch.Tensor:
    """[sum_i g_i^2, sum_i g_i cos(i)], (2,), of a gradient in float64. first: its row 0's number in the
    table."""
    width, found = g.values.size(1), g.values.new_zeros(2)
    for piece in g.pieces(max(1, PIECE // width)):
        at = (first + piece.ids[:, None]) * width + torch.arange(width, device=piece.ids.device)
        found += torch.stack([piece.values.square().sum(), (piece.values * at.cos()).sum()])
    return found


class Probe:
    """The gradient checksums of a step; with workers that train apart, of the mean of their gradients."""

    def __init__(self, run: Run) -> None:
        self.run, self.found, self.mean = run, {}, {}

    def look(self) -> None:
        """Before the gradients are reduced; once for each worker."""
        if self.run.workers is None:
            self.found = gradient_checksums(self.run.optimizer, self.run.world)
            return
        for bank in self.run.optimizer.banks:
            share = bank.local_gradient() / LOGICAL_RANKS
            self.mean[bank] = self.mean[bank] + share if bank in self.mean else share

    def checksums(self) -> dict[str, list[float]]:
        """Collective."""
        if self.run.workers is None:
            return self.found
        return gradient_checksums(self.run.optimizer, self.run.world, self.mean)


def warmup_steps(run: Run) -> list[int]:
    """Indices of the warm-up's steps: three, and if the model is compiled the first step of each Shape."""
    asked = run.s.system.warmup_steps
    if asked >= 0:
        return [min(i, len(run.plans) - 1) for i in range(asked)]
    steps = [min(i, len(run.plans) - 1) for i in range(3)]
    if run.compiled is not run.model:
        steps += [step for step in schedule.shapes(run.plans).values() if step not in steps]
    return steps


def warmup_validations(run: Run) -> list[int]:
    """Steps of one validation for each graph that validations need; not compiled, of the first and the last.

    The graph depends on the windows and on whether the head is tied.
    """
    n = len(run.plans)
    first = {}
    for step in (i for i in range(n + 1) if schedule.validates(run.s, i)):
        first.setdefault((schedule.validation_windows(run.s, step), schedule.tied(run.s, step)), step)
    steps = list(first.values())
    return steps if run.compiled is not run.model else sorted({steps[0], n})


def warmup_batches(run: Run, seed: int, sizes: list[int]) -> Iterator[np.ndarray]:
    """Batches (ranks, size + 1) for the warm-up: real ones from a stream of their own, or random tokens."""
    s, world = run.s, run.world
    if s.system.warmup_tokens == "real":
        about = stream_arguments(s)
        if len(set(sizes)) > 1:
            about["tokens_per_rank"] = sizes
        stream = Stream(run.corpus, ranks=world.ranks, **about)
        for _ in sizes:
            yield stream.next()
        return
    generator = torch.Generator().manual_seed(seed + 1)
    # random targets are more distinct than those of text, and all must be candidates of a sampled softmax
    candidates = [plan.shape.candidates for plan in run.plans if plan.shape.candidates]
    classes = min([run.corpus.vocab_size, *(max(1, n // 2) for n in candidates)])
    for size in sizes:
        shape = (LOGICAL_RANKS, size + 1)  # of all ranks: the same tokens on any number of processes
        batch = torch.randint(classes, shape, generator=generator, dtype=torch.int32).numpy()
        batch = batch[list(world.ranks)]
        if s.data.max_doc_len:  # limit random documents too
            batch[:, ::min(per_stage(s.data.max_doc_len))] = run.corpus.bos
        yield batch


def warm_up(run: Run, seed: int, train_step: Callable, validation_loss: Callable, process_start: float,
            imported: float) -> None:
    """Untimed steps and validation chunks, which compile everything; then a reset, proven by hashes.

    Logs the loss and gradient checksums of the last untimed step (event `probe`), and the reset with the
    times of the start (event `reset`).

    Args:
        train_step, validation_loss: those of the trainer.
        process_start, imported: perf_counter() when the process began and when its imports were done.
    """
    world, began = run.world, time.perf_counter()
    before, generator = state_hash(run.model, run.optimizer, run.hooks), torch.get_rng_state()
    steps = warmup_steps(run)
    batches = warmup_batches(run, seed, [run.plans[step].shape.tokens_per_rank for step in steps])
    for n, (step, batch) in enumerate(zip(steps, batches)):
        probe, last = Probe(run), n == len(steps) - 1
        inputs, targets, documents = to_rows(
            batch, run.plans[step].shape.seq_len, world.device, run.corpus.bos, run.s.model.attn.segment
        )
        look = probe.look if last else None
        loss = train_step(run, run.plans[step], inputs, targets, documents, before_reduction=look)
        if last:
            loss = round(float(world.mean(loss)), 8)
            run.log.event(
                "probe", step=n, tokens=run.s.system.warmup_tokens, loss=loss, gradients=probe.checksums()
            )
    for step in warmup_validations(run) if steps else ():
        validation_loss(run, step, limit=1)
    run.model.initialise(seed)
    run.optimizer.reset()
    for hook in run.hooks:
        hook.reset()
    torch.set_rng_state(generator)
    after = state_hash(run.model, run.optimizer, run.hooks)
    if before != after:
        raise RuntimeError(f"the reset after warm-up is incomplete: state {before[:16]} became {after[:16]}")
    run.graphs, cost = compiler.graph_count(), compiler.account()
    if run.cache_file is not None:
        world.say(*run.cache_file.save(world.gather_objects, world.main))
    event = run.log.event(
        "reset", warmup_steps=len(steps), state_before=before, state_after=after, graphs=run.graphs,
        imports_ms=round(1000 * (imported - process_start), 3),
        start_ms=round(1000 * (began - process_start), 3),
        warmup_ms=round(1000 * (time.perf_counter() - began), 3), **({"compile": cost} if cost else {})
    )
    world.say(*runlog.render(event))
