"""Guards of a run under way: loss and gradients are finite, and all processes hold the same parameters.

    guards = Guards(world, optimizer)
    optimizer.step(plan, guards.watch)      # the optimizer shows its gradients
    guards.after_step(step, loss)           # nothing waits for the device
    guards.check()                          # Tripped, with the step and the tensor
    guards.gradient_norms()                 # of the steps since the last validation

A step adds one norm per parameter, in one fused call per dtype, and on a GPU a copy of these numbers to the
host, which is looked at when it has arrived: some steps late, at the latest at the next validation. Without a
GPU it is looked at in the same step. Several processes must stop at the same step: at a validation, or, where
checkpoints are on, two steps after process 0 has found something (checkpoint.Ahead).

A norm is not finite where a gradient is not, or is larger than 1.8e19, whose square float32 cannot hold.
"""

import collections
import contextlib
import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import torch

import schedule
from optim import Bank, Optimizer
from system.movement import Movement
from system.spikes import Spike, Spikes
from system.world import World

LOSS = "training loss"
NAMED = 3  # tensors that a message names; the rest is counted
DIGESTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


class Tripped(Exception):
    """A guard stops the run. Carries the fields of the log's event `guard`."""

    def __init__(self, fields: dict) -> None:
        super().__init__(fields["message"])
        self.fields = fields


@dataclasses.dataclass(frozen=True)
class Finding:
    """What is not finite: the first step with it (from 0), and the loss or gradients by name."""
    step: int
    names: tuple[str, ...]

    def fields(self) -> dict:
        """The fields of the event `guard`."""
        loss = LOSS in self.names
        names = [LOSS] if loss else list(self.names)  # a loss that is not finite spoils all gradients
        more = f" and of {len(names) - NAMED} more" if len(names) > NAMED else ""
        what = f"the {LOSS}" if loss else f"the gradient of {', '.join(names[:NAMED])}{more}"
        return {"what": "finite", "step": self.step, "tensors": names,
                "message": f"step {self.step}: {what} is not finite"}


# ----- finite numbers ---------------------------------------------------------------------------------------

class Guards:
    """Watches the steps of one process, and agrees with the others when all of them meet.

    spikes: the detector of slow spikes, which is then shown the mean loss of all processes. known: gradient
    norms (steps,) float64 of the steps since the last validation, in a run that was resumed.
    """

    def __init__(
        self, world: World, optimizer: Optimizer, spikes: Spikes | None = None,
        known: torch.Tensor | None = None
    ) -> None:
        self.world, self.optimizer, self.spikes = world, optimizer, spikes
        self.known = self.on_device(known)
        self.finding: Finding | Spike | None = None
        self.movement = Movement(optimizer) if spikes is not None else None
        self.update: list[torch.Tensor] = []  # its size in the step under way, 0-d, for the detector
        self.norms: list[torch.Tensor] = []  # of the step under way, (parameters,) float32 per dtype
        self.names: list[str] = []
        self.shared = 0  # so many of the names, the first ones, are shards: other processes hold the rest
        # (norms, shared) of each step since the last validation, on the device; None: its update was skipped
        self.measured: list[tuple[torch.Tensor, int] | None] = []
        self.cuts: dict[Bank, tuple[list[str], list[int]]] = {}
        self.excused = False
        self.looked_at = -1  # the last step whose numbers were looked at
        self.under_way = collections.deque()  # (step, names, values on the host, CUDA event or None)

    def watch(self, gradients: dict[Bank, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Take the norms of a step's gradients, before anything changes them.

        gradients: (this process's shard, gradient for the norm) of each bank, as Optimizer.reduced.
        """
        pieces = collections.defaultdict(list)
        for bank, (_, seen) in gradients.items():
            names, sizes = self.cut(bank, seen)
            parts = seen.reshape(-1).split(sizes)[:len(names)]
            for name, part in zip(names, parts):
                pieces[not bank.comm.partial, part.dtype].append((name, part))
        in_order = [pieces[key] for key in sorted(pieces, key=lambda key: key[0])]
        self.norms = [torch.stack(torch._foreach_norm([part for _, part in some])).float()
                      for some in in_order]
        self.names = [name for some in in_order for name, _ in some]
        self.shared = sum(len(some) for (whole, _), some in pieces.items() if not whole)

    def cut(self, bank: Bank, seen: torch.Tensor) -> tuple[list[str], list[int]]:
        """(names of the parameters in a bank's gradient, or in this process's shard of it; their sizes).

        The sizes add up to the gradient: the last ones, without a name, are padding.
        """
        if bank.by_rows:  # as many rows as were looked up
            return [bank.members[0][0]], [seen.numel()]
        if bank not in self.cuts:
            sharded = bank.comm.partial and not bank.comm.splits_members
            start = self.world.rank * seen.numel() if sharded else 0
            stop, at, found = start + seen.numel(), 0, []
            for name, p in bank.members:
                size = min(at + p.numel(), stop) - max(at, start)
                found += [(name, size)] if size > 0 else []
                at += p.numel()
            names, sizes = [name for name, _ in found], [size for _, size in found]
            self.cuts[bank] = names, [*sizes, seen.numel() - sum(sizes)]
        return self.cuts[bank]

    def excuse(self) -> None:
        """The step under way makes no update: what is not finite in it does no harm."""
        self.excused = True

    @contextlib.contextmanager
    def updating(self) -> Iterator[None]:
        """A context around an update, whose size the detector of spikes is shown."""
        if self.movement is None:
            yield
            return
        self.movement.begin()
        yield
        self.update = [self.movement.end().reshape(1)]

    def after_step(self, step: int, loss: torch.Tensor) -> None:
        """Send loss and norms of this step to the host. loss: 0-d, of this process."""
        if self.excused:
            self.excused = False
            self.measured.append(None)
            return
        if self.spikes is not None:
            loss = self.world.mean(loss)
        values = torch.cat([loss.reshape(1).float(), *self.norms, *self.update])
        self.measured.append((values[1:1 + len(self.names)], self.shared))
        arrived = None
        if values.is_cuda:
            values = torch.empty(values.shape, pin_memory=True).copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self.under_way.append((step, (LOSS, *self.names), values, arrived))
        self.look()

    def last_step(self) -> int:
        """The last step whose numbers have arrived, -1 before the first; for any thread."""
        done = [step for step, _, _, arrived in [*self.under_way] if arrived is None or arrived.query()]
        return max([self.looked_at, *done])

    def look(self, wait: bool = False) -> None:
        """Look at what has arrived. wait: at everything, until it has."""
        while self.under_way and self.finding is None:
            step, names, values, arrived = self.under_way[0]
            if arrived is not None and not arrived.query():
                if not wait:
                    return
                arrived.synchronize()
            self.under_way.popleft()
            self.looked_at = step
            finite = np.isfinite(values.numpy()[:len(names)])
            if not finite.all():
                self.finding = Finding(step, tuple(name for name, good in zip(names, finite) if not good))
            elif self.spikes is not None:
                self.finding = self.spikes.see(step, float(values[0]), float(values[-1]))

    def check(self) -> None:
        """Between two steps: Tripped if this process is alone and has found something."""
        self.look()
        if self.finding is not None and self.world.size == 1:
            raise Tripped(self.finding.fields())

    def on_device(self, known: torch.Tensor | None) -> torch.Tensor | None:
        """Gradient norms of a checkpoint where those of the run are, so that no later copy waits."""
        return None if known is None else known.to(self.optimizer.banks[0].param.device)

    def begin_again(self, known: torch.Tensor | None) -> None:
        """Forget the steps that the run has gone back over. known: as for the constructor."""
        self.finding, self.known = None, self.on_device(known)
        self.under_way.clear()
        self.measured.clear()

    # ----- several processes

    @torch.no_grad()
    def norms_so_far(self) -> torch.Tensor:
        """(steps,) float64: norm of all gradients in each step since the last validation. Collective.

        NaN where the update was skipped. On the device; nothing waits for it.
        """
        device = self.optimizer.banks[0].param.device
        squares = torch.full((len(self.measured), 2), math.nan, dtype=torch.float64, device=device)
        for i, kept in enumerate(self.measured):
            if kept is not None:
                norms, shared = kept
                each = norms.double().square()
                squares[i, 0], squares[i, 1] = each[:shared].sum(), each[shared:].sum()
        total = self.world.total(squares[:, 0].clone()) if self.measured else squares[:, 0]
        found = (total + squares[:, 1]).sqrt()
        return found if self.known is None else torch.cat([self.known, found])

    def gradient_norms(self) -> list[float]:
        """Return and forget norms_so_far, on every process. Collective.

        [] with workers that train apart (optim.outer.workers), which have no gradient in common.
        """
        found = [] if schedule.apart(self.optimizer.s) else self.norms_so_far().tolist()
        self.known = None
        self.measured.clear()
        return [float(f"{x:.6g}") for x in found]

    def agree(self) -> None:
        """Tripped, on all processes, if one has found something or holds other parameters. Collective."""
        self.look(wait=True)
        self.agree_on_findings()
        if self.world.size > 1:
            digests = self.digests()
            if (fields := differing(self.optimizer.banks, digests.cpu().numpy())) is not None:
                raise Tripped(fields)

    def agree_on_findings(self) -> None:
        """Tripped, on all processes, if one has found something. Collective."""
        self.look(wait=True)
        found = [x for x in self.world.gather_objects(self.finding) if x is not None]
        if not found:
            return
        first = min(x.step for x in found)
        found = [x for x in found if x.step == first]
        if names := dict.fromkeys(name for x in found if isinstance(x, Finding) for name in x.names):
            raise Tripped(Finding(first, tuple(names)).fields())
        raise Tripped(found[0].fields())

    @torch.no_grad()
    def digests(self) -> torch.Tensor:
        """(processes, banks) int64: sums of the parameters' bits, the same for equal parameters. Collective.

        Experts that are spread over the processes, and workers that train apart (optim.outer.workers), differ
        by design; they count as 0.
        """
        apart = schedule.apart(self.optimizer.s)
        sums = [bits(bank.param[:0] if apart or bank.comm.splits_members else bank.param)
                for bank in self.optimizer.banks]
        return torch.stack(self.world.parts(torch.stack(sums)))


def bits(x: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor's elements, whose bits are read as integers, 0-d int64: exact in any order."""
    return x.detach().view(DIGESTS[x.element_size()]).sum(dtype=torch.int64)


def differing(banks: list[Bank], digests: np.ndarray) -> dict | None:
    """The fields of an event `guard` if processes hold other parameters than process 0, or None.

    digests: (processes, banks), as Guards.digests.
    """
    other = digests != digests[0]
    if not other.any():
        return None
    ranks = np.flatnonzero(other.any(1)).tolist()
    names = [name for bank, bad in zip(banks, other.any(0)) if bad for name, _ in bank.members]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return {"what": "digest", "tensors": names, "message": (
        f"process{'es' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} and process 0 hold different "
        f"parameters: {', '.join(names[:NAMED])}{more} (or others of the same bank)"
    )}


def not_finite(tensors: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors with a number that is not finite; a sum tells, as it is not finite then either."""
    return [name for name, x in tensors.items()
            if x.is_floating_point() and x.numel() and not math.isfinite(x.sum(dtype=torch.float64))
            and not x.isfinite().all()]
