"""The optimizer of a run: banks of parameters, each with an update rule and a way to communicate.

Update rules are in updates/, communication between processes is in system/comm.py. Parameters of one rule,
group, dtype and unit shape lie in one contiguous bank; parameters and gradients are views of it. Padding for
the number of processes exists only inside a bank. All tensors of a step keep their addresses, so that CUDA
graphs can replay it.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from common.errors import UserError
from schedule import StepPlan
from settings import Settings
from settings.data import LOGICAL_RANKS, per_stage
from settings.optim import Hyper
from updates import noise
from updates.adam import AdamW, RowAdam
from updates.head import EigenAdam, HeadRule, KfacAdam
from updates.master import MasterAdamW
from updates.muon import Muon
from updates.rows import Rows, total

# name -> function (settings, group) -> rule
RULES = {"adamw": AdamW.of, "row_adam": RowAdam.of, "master_adamw": MasterAdamW.of,
         "eigen_adam": EigenAdam.of, "kfac_adam": KfacAdam.of, "muon": Muon.of}
Rule = AdamW | HeadRule | Muon
Gradient = torch.Tensor | Rows
Member = tuple[str, torch.nn.Parameter]


# ----- communication of one process -------------------------------------------------------------------------

class Local:
    """The communication of a bank on one process; the classes of system/comm.py have the same methods.

    shards: the bank's N is padded to a multiple of this.
    reduces: whether the gradient is reduced over processes.
    eager: the reduction starts as soon as the gradient is ready.
    late: the reduction starts after the banks that are not late have been updated.
    partial: `wait` returns only a part of the gradient.
    sends_updates: processes exchange updates instead of parameters.
    splits_members: each process holds a slice of every parameter of the bank (expert parallelism).
    """
    name = "local"
    shards = world = 1
    reduces = eager = late = partial = sends_updates = splits_members = False

    def __init__(self):
        self.work = []

    def shard(self, x: torch.Tensor) -> torch.Tensor:
        """The part of a bank-shaped tensor that this process updates, as a view."""
        return x

    def reduce(self, grad: Gradient) -> None:
        """Start the reduction of a gradient over the processes."""

    def wait(self, grad: Gradient | None) -> tuple[Gradient, Gradient]:
        """Wait for the reduction. Returns two gradients summed over processes.

        The first is that of this process's shard, the second the one whose squares enter the global norm.
        """
        return grad, grad

    def gather(self, param: torch.Tensor) -> "torch.distributed.Work | None":
        """Start the all-gather of the updated shards. Returns its work handle, or None."""

    def whole(self, x: torch.Tensor, units: int) -> torch.Tensor:
        """The whole tensor (units, ...), from this process's shard x; may be x itself. May be collective."""
        return x


class Alone:
    """The communication plan of a run on one process: none.

    gathers_last: the last all-gather of an elementwise rule starts after all updates.
    """
    name = "replicated"
    gathers_last = False

    def of(self, shared: bool, experts: bool, small: bool = False) -> Local:
        return Local()

    def of_rows(self, by_rows: bool) -> Local:
        return Local()

    def total(self, x: torch.Tensor) -> torch.Tensor:
        return x


# ----- banks ------------------------------------------------------------------------------------------------

class Tree:
    """Sums equal leaves in one fixed binary tree, however many are pushed at a time (a binary counter)."""

    def __init__(self):
        self.levels = []

    def push(self, x: Gradient) -> None:
        for i, level in enumerate(self.levels):
            if level is None:
                self.levels[i] = x
                return
            x, self.levels[i] = level + x, None
        self.levels.append(x)

    def total(self) -> Gradient:
        return self.levels[-1]  # complete: a power of two of leaves was pushed


def together(parts: list[Rows], ordered: bool) -> Rows:
    """The sum of rows, in the order of the parts or in one tree."""
    if not ordered:
        return total(parts)
    tree = Tree()
    for part in parts:
        tree.push(part)
    return tree.total()


class RowSum:
    """The rows of backward passes until they are summed: in a tree if ordered, otherwise in a list.

    most: slots from which the list is summed, because the sum is smaller.
    """

    def __init__(self, ordered: bool, most: int) -> None:
        self.tree, self.parts, self.most = Tree() if ordered else None, [], most

    def push(self, rows: Rows) -> None:
        if self.tree is not None:
            self.tree.push(rows)
            return
        self.parts.append(rows)
        if sum(len(part.ids) for part in self.parts) > self.most:
            self.parts = [total(self.parts)]

    def total(self) -> Rows | None:
        """The sum, or None of nothing."""
        if self.tree is not None:
            return self.tree.total() if self.tree.levels else None
        return total(self.parts) if self.parts else None


class Bank:
    """Parameters that are updated together, in one contiguous tensor (N, *unit), with state and update count.

    N is padded to a multiple of comm.shards with zeros, which every rule leaves at zero.

    members: [(name, parameter)], of one rule, group, dtype and unit shape.
    group: the section of settings.optim.Optim that they belong to.
    unit: () for elementwise rules, otherwise the shape that the rule updates as a whole.
    tokens_per_expert: for expert weights only, (E,) per member: tokens of each expert in the step.
    """

    has_rows = by_rows = False  # whether the gradient is Rows, and whether the rule gets it like this

    def __init__(
        self, rule: Rule, group: str, members: list[Member], unit: tuple[int, ...], comm: Local,
        ordered: bool, tokens_per_expert: Sequence[torch.Tensor] = ()
    ) -> None:
        self.rule, self.group, self.members, self.unit = rule, group, members, unit
        self.comm, self.ordered, self.tokens_per_expert = comm, ordered, tokens_per_expert
        first = members[0][1]
        self.role, self.label, self.views = first.role, first.label, first.views
        self.units = sum(p.numel() for _, p in members) // math.prod(unit)
        padded = math.ceil(self.units / comm.shards) * comm.shards
        if len(members) == 1 and padded == self.units and first.is_contiguous():
            # in place: a table may take most of the memory
            self.param = first.detach().view(padded, *unit)
        else:
            self.param = torch.zeros((padded, *unit), dtype=first.dtype, device=first.device)
        self.bind()
        units = len(comm.shard(self.param))
        self.state = {name: torch.zeros((units, *shape), dtype=dtype, device=first.device)
                      for name, (shape, dtype) in rule.state(unit, first.dtype, first.views).items()}
        self.fill_keys()
        self.sum = None  # float32 sum of bfloat16 gradients; holds one while `summed`
        self.numbers = {}  # 0-d tensors on the device, for an update that is replayed as a CUDA graph
        self.replay = None
        self.updates = 0
        self.pending = len(members)  # parameters whose gradient is not ready in this backward pass
        self.clear()

    @property
    def eager(self) -> bool:
        """Whether the update is neither compiled nor captured in a CUDA graph."""
        return self.rule.eager

    def bind(self) -> None:
        """Make the parameters and their gradients views of the bank."""
        self.grad = torch.zeros_like(self.param)
        start = 0
        for _, p in self.members:
            stop = start + p.numel()
            part = self.param.view(-1)[start:stop]
            if part.data_ptr() != p.data_ptr() or part.is_meta:
                part.copy_(p.detach().reshape(-1))
            p.data = part.view(p.shape)
            p.grad = self.grad.view(-1)[start:stop].view(p.shape)
            start = stop

    def clear(self) -> None:
        """Forget the gradients."""
        self.grad.zero_()
        self.forget()

    def forget(self) -> None:
        """Forget what was summed, and the reduction."""
        self.summed, self.tree, self.comm.work = False, Tree(), []

    def reset(self) -> None:
        """Forget everything but the parameters."""
        for tensor in self.state.values():
            tensor.zero_()
        self.fill_keys()
        self.updates, self.pending = 0, len(self.members)
        self.clear()

    def fill_keys(self) -> None:
        """Give every matrix its key, if the rule draws random numbers (updates/noise.py).

        A key depends on what the initial values of its part of the parameter were drawn by and on its place
        there, not on the number of processes.
        """
        if noise.KEY not in self.state:
            return
        state = self.state[noise.KEY]
        keys = state.new_zeros((len(self.param), *state.shape[1:]))
        for (name, part), (_, p) in zip(self.members_of(keys), self.members):
            drawn_by = getattr(p, "drawn_by", [name])
            own = [noise.keys_of(key, part.numel() // 2 // len(drawn_by)) for key in drawn_by]
            part.copy_(torch.cat(own).view(part.shape))
        state.copy_(self.comm.shard(keys))

    def place(self, label: str) -> tuple[int, int] | None:
        """(start, stop) of the first member with this label in the flattened bank, or None."""
        start = 0
        for _, p in self.members:
            if p.label == label:
                return start, start + p.numel()
            start += p.numel()

    def accumulate(self) -> None:
        """Add the gradient of a finished backward pass to the tree or the float32 sum, if the bank has one.

        Otherwise autograd adds the next gradient in place.
        """
        if self.ordered:
            self.tree.push(self.grad.clone())
            self.grad.zero_()
        elif self.grad.dtype == torch.bfloat16:
            if self.sum is None:
                self.sum = torch.empty_like(self.grad, dtype=torch.float32)
            self.sum = self.sum.add_(self.grad) if self.summed else self.sum.copy_(self.grad)
            self.summed = True
            self.grad.zero_()

    def local_gradient(self) -> torch.Tensor:
        """This process's gradient sum; float32 if bfloat16 gradients of several forwards were summed."""
        if self.ordered:
            return self.tree.total()
        if self.summed:
            self.accumulate()
        return self.sum if self.summed else self.grad

    def received(self, mine: torch.Tensor, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(gradient for the rule, gradient for the norm) from what comm.wait returns."""
        return mine, seen if self.comm.partial else seen[:self.units]

    def kept_gradient(self) -> torch.Tensor:
        """What the bank holds of its gradient, as a tensor."""
        return self.grad

    def grad_bytes(self) -> int:
        """Bytes of a gradient in the parameters' dtype, on one process."""
        return self.grad.nbytes

    def mask(self) -> torch.Tensor | None:
        """(N, 1, ...): 0 skips the update of a unit (an expert without tokens, padding). None: no mask."""
        if not self.tokens_per_expert or not self.rule.skips_idle:
            return None
        tokens = torch.cat(self.tokens_per_expert)
        padded = tokens.new_zeros(len(self.param))
        padded[:len(tokens)] = tokens > 0
        return self.comm.shard(padded.view(-1, *[1] * len(self.unit)))

    def members_of(self, x: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, that parameter's part) of a bank-shaped tensor."""
        start = 0
        for name, p in self.members:
            stop = start + p.numel() // math.prod(self.unit)
            yield name, x[start:stop]
            start = stop

    def local_parts(
        self, grad: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]:
        """[(parameter, gradient, state)] of each member: its numbers in this process's shard, flat, as views.

        For elementwise rules. grad: of the shard, as `update` gets it.
        """
        shard, found, start = self.comm.shard(self.param), [], 0
        before = (shard.data_ptr() - self.param.data_ptr()) // self.param.element_size()
        for _, p in self.members:
            first, last = (min(max(at - before, 0), shard.numel()) for at in (start, start + p.numel()))
            parts = [x.view(-1)[first:last] for x in (shard, grad, *self.state.values())]
            found.append((parts[0], parts[1], dict(zip(self.state, parts[2:]))))
            start += p.numel()
        return found

    def full_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) of the parameters, and of their state as `name/key`. Collective.

        Tensors are whole and without padding, so they are the same on any number of processes: parameters in
        their shape, state as (units, ...). They may be views of the bank.
        """
        split = self.comm.splits_members
        for name, p in self.members:
            yield name, self.comm.whole(p.detach(), 0) if split else p.detach()
        for key, x in self.state.items():
            x = x if split else self.comm.whole(x, len(self.param))
            for name, part in self.members_of(x):
                yield f"{name}/{key}", self.comm.whole(part, 0) if split else part

    def load(self, full: Mapping[str, torch.Tensor]) -> None:
        """Fill parameters and state from {name: tensor}, as full_tensors gives them.

        KeyError for a missing name, ValueError for a tensor of another size or dtype.
        """
        split = self.comm.splits_members

        def fill(part, name):
            given = full[name]
            given = given.chunk(self.comm.world)[self.comm.rank] if split else given
            if given.numel() != part.numel() or given.dtype != part.dtype:
                raise ValueError(
                    f"{name}: {given.numel()} numbers {given.dtype}, here {part.numel()} {part.dtype}"
                )
            part.copy_(given.reshape(part.shape))

        for name, p in self.members:
            fill(p, name)
        for key, x in self.state.items():
            whole = x if split else x.new_zeros((len(self.param), *x.shape[1:]))
            for name, part in self.members_of(whole):
                fill(part, f"{name}/{key}")
            if not split:
                x.copy_(self.comm.shard(whole))

    def update(
        self, grad: torch.Tensor, numbers: dict, update_: Callable, direction: Callable | None
    ) -> None:
        """Apply the rule in place. update_, direction: its functions, compiled or not."""
        mask = self.mask()
        extra = (self.views,) if mask is None else (self.views, mask)
        p = self.comm.shard(self.param)
        if self.comm.sends_updates:
            u = direction(p, grad, self.state, numbers, *extra)
            self.rule.apply_(self.param, self.comm.spread(u, self.param), numbers)
        else:
            update_(p, grad, self.state, numbers, *extra)

    def name(self) -> str:
        return f"{self.role} {self.rule.name} {self.units} x {tuple(self.unit)} {self.param.dtype}".replace(
            "torch.", ""
        )


class RowBank(Bank):
    """A table (N, D) whose gradient is the rows that were looked up (updates/rows.py), never a whole tensor.

    Autograd's sparse gradient of each backward pass becomes Rows, which are summed when they are needed. A
    rule that updates by rows gets them as they are. Any other gets a dense gradient of this process's shard.
    Of a table that is shared out over processes, the Rows of this process's share come from all of them, and
    are summed for each of them first: the bits of a whole table's.
    """
    has_rows = True

    def __init__(
        self, rule: Rule, group: str, members: list[Member], comm: Local, ordered: bool, rows_per_rank: int,
        steps: int
    ) -> None:
        """rows_per_rank: rows that a logical rank looks up in a step, at most. steps: from one update to the
        next, at most."""
        self.dense, self.rows_per_rank, self.steps = None, rows_per_rank, steps
        self.by_rows, self.sources = rule.by_rows, comm.world if comm.splits_members else 1
        super().__init__(rule, group, members, tuple(members[0][1].shape[-1:]), comm, ordered)

    @property
    def eager(self) -> bool:
        return self.by_rows or self.rule.eager  # the number of rows changes with the cadence

    def bind(self) -> None:
        (_, p), = self.members
        if self.param.data_ptr() != p.data_ptr() or p.is_meta:
            self.param[:len(p)].copy_(p.detach())
        p.data, p.grad, p.takes_rows = self.param[:len(p)], None, True

    def clear(self) -> None:
        p = self.members[0][1]
        p.grad, p.arrived = None, []
        # of bfloat16 rows, more than twice the table take more room than their float32 sum
        self.sums = [RowSum(self.ordered, 2 * self.units) for _ in range(self.sources)]
        self.forget()

    def accumulate(self) -> None:
        """Take the rows of a finished backward pass: from autograd, or from the processes that sent them."""
        p = self.members[0][1]
        if p.grad is not None:
            self.sums[0].push(Rows.looked_up(p.grad))
        for ids, values, counts in p.arrived:
            for sum_, *part in zip(self.sums, ids.split(counts), values.split(counts)):
                sum_.push(Rows(*part, self.units))
        p.grad, p.arrived = None, []

    def local_gradient(self) -> Rows:
        """This process's gradient sum, as Rows; of a shared table that of its rows."""
        self.accumulate()
        parts = [rows for rows in (each.total() for each in self.sums) if rows is not None]
        return together(parts, self.ordered) if parts else Rows.none(self.members[0][1])

    def received(self, mine: Rows, seen: Rows) -> tuple[Gradient, torch.Tensor]:
        if self.by_rows:
            return mine, mine.values
        shard = self.comm.shard(self.param)
        if self.dense is None or self.dense.dtype != mine.dtype:
            self.dense = torch.empty_like(shard, dtype=mine.dtype)
        return (mine.dense_(self.dense),) * 2

    def kept_gradient(self) -> torch.Tensor:
        parts = [part.values for each in self.sums for part in each.parts]
        return torch.cat(parts) if parts else self.param[:0]

    def row_bytes(self, rows: int, summed: bool = False) -> int:
        """Bytes of so many rows of a gradient. summed: of a sum of several, not by one forward pass."""
        dtype = torch.promote_types(self.param.dtype, torch.float32) if summed else self.param.dtype
        return rows * (self.param[0].numel() * dtype.itemsize + torch.int64.itemsize)

    def grad_bytes(self) -> int:
        rows = self.rows_per_rank * LOGICAL_RANKS // self.comm.world
        return self.row_bytes(min(rows, self.units))

    def update(self, grad: Gradient, numbers: dict, update_: Callable, direction: Callable | None) -> None:
        if self.by_rows:
            self.rule.update_touched_(self.param, grad, self.state, numbers)
        else:
            super().update(grad, numbers, update_, direction)


def as_rows(s: Settings, p: torch.nn.Parameter, rule: Rule) -> bool:
    """Whether the gradient of a parameter is kept as the rows that were looked up."""
    if not getattr(p, "row_lookups", 0):
        return False
    how = s.system.table_gradients
    return how == "rows" or s.system.table_parallel or (how == "auto" and rule.by_rows)


def row_bank(s: Settings, plan: Any, group: Hyper, rule: Rule, name: str, p: torch.nn.Parameter) -> RowBank:
    """The RowBank of a table p, the parameter `name`."""
    steps = max(group.every, group.cadence(s.schedule.steps - 1))
    rows = p.row_lookups * max(per_stage(s.data.tokens_per_rank))
    return RowBank(
        rule, group.name, [(name, p)], plan.of_rows(rule.by_rows), s.system.reduction == "ordered", rows,
        steps
    )


def banks_of(model: torch.nn.Module, s: Settings, plan: Any, rules: dict[str, Callable]) -> list[Bank]:
    """The banks of a model's parameters. plan: the communication plan; rules: as RULES."""
    found, loads, banks = {}, model.tokens_per_expert(), []
    for name, p in model.named_parameters():
        group = s.optim.group(p.role, p.label)
        rule = rules[group.rule](s, group)
        if as_rows(s, p, rule):
            banks.append(row_bank(s, plan, group, rule, name, p))
            continue
        unit = rule.unit(p.shape, p.views)
        # An elementwise rule has one bank for the whole group; matrices have one bank per label.
        small = not unit and p.numel() < s.system.small_allreduce
        key = (rule, group.name, p.label if unit else "", p.views if unit else None, p.dtype, unit, small)
        found.setdefault(key, []).append((name, p))
    for (rule, group, _, _, _, unit, small), members in found.items():
        tokens = [loads[name] for name, _ in members if name in loads]
        comm = plan.of(rule.shared, bool(tokens), *([small] if small else []))
        banks.append(Bank(rule, group, members, unit, comm, s.system.reduction == "ordered", tokens))
    return banks


# ----- CUDA graphs ------------------------------------------------------------------------------------------

class Replay:
    """An update as a CUDA graph: the first call runs (and compiles) it, the second captures, others replay.

    Every call must use the same tensors at the same addresses. Parameters, gradients, state and numbers do
    not depend on the step's Shape, so one graph serves all Shapes. The warm-up makes the first two calls, so
    that timed steps only replay.
    """

    def __init__(self, pool: tuple[int, int] | None) -> None:
        self.pool, self.calls, self.again = pool, 0, None

    def __call__(self, update: Callable[[], None]) -> None:
        self.calls += 1
        if self.calls == 1:
            update()
            return
        if self.again is None:
            self.again = capture(update, self.pool)
        self.again()


def capture(update: Callable[[], None], pool: tuple[int, int] | None) -> Callable[[], None]:
    """Capture the kernels of an update in a CUDA graph and return the function that replays them.

    pool: memory pool of all updates' graphs, which never run at the same time.
    UserError if CUDA cannot capture the update.
    """
    graph = torch.cuda.CUDAGraph()
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    untouched = generator.clone_state()
    try:
        # thread_local: calls in the threads of NCCL and of the loader do not invalidate the capture
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            update()
    except BaseException as error:
        # torch leaves the generator in capture mode, in which every later draw raises
        generator.graphsafe_set_state(untouched)
        if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, RuntimeError):
            raise
        why = (str(error).splitlines() or ["no reason given"])[0]
        raise UserError(
            f"system.cuda_graphs: an update cannot be captured ({why}): --set system.cuda_graphs=false"
        ) from error
    return graph.replay


# ----- optimizer --------------------------------------------------------------------------------------------

class Optimizer:
    """Accumulates, reduces and applies gradients.

        optimizer = Optimizer(model, s, communication(s, rank, world))
        for forward in ...: optimizer.expect(last); loss.backward(); optimizer.accumulate()
        optimizer.step(step_plan)

    Losses are scaled so that gradients add up to the mean over the eight logical ranks.
    plan: the communication plan; None: one process. compiled: whether rules run under torch.compile.
    """

    def __init__(
        self, model: torch.nn.Module, s: Settings, plan: Any = None, compiled: bool = False,
        rules: dict[str, Callable] = RULES
    ) -> None:
        self.s, self.plan, self.compiled = s, plan or Alone(), compiled
        self.banks = banks_of(model, s, self.plan, rules)
        self.last = self.launching = False
        self.due = None
        # banks in the order in which their reductions were started, the same on every process
        self.launched = []
        self.functions = {}  # compiled functions of rules
        self.judge = None  # system.rescue.Skip, called with the same before the update: whether it is made
        pool = torch.cuda.graph_pool_handle() if s.system.cuda_graphs and torch.cuda.is_available() else None
        for bank in self.banks:
            bank.replay = Replay(pool) if s.system.cuda_graphs and not bank.eager else None
            for _, p in bank.members:
                p.register_post_accumulate_grad_hook(lambda _, bank=bank: self.ready(bank))

    @torch.no_grad()
    def reset(self) -> None:
        """Forget everything but the parameters: state, gradients, counts."""
        self.launched = []
        for bank in self.banks:
            bank.reset()

    def tensors(self) -> dict[str, torch.Tensor]:
        """{name: tensor} of everything but the parameters that a step changes."""
        out = {}
        for i, bank in enumerate(self.banks):
            held = {"gradient": bank.kept_gradient(), **bank.state}
            out |= {f"{i} {bank.name()}/{name}": x for name, x in held.items()}
            out[f"{i} {bank.name()}/updates"] = torch.tensor(bank.updates)
        return out

    @torch.no_grad()
    def full_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) of all parameters and their state (Bank.full_tensors). Collective."""
        for bank in self.banks:
            yield from bank.full_tensors()

    def update_counts(self) -> dict[str, int]:
        """{parameter's name: updates so far}."""
        return {name: bank.updates for bank in self.banks for name, _ in bank.members}

    @torch.no_grad()
    def load(self, full: Mapping[str, torch.Tensor], updates: Mapping[str, int]) -> None:
        """Continue from the tensors of full_tensors and the counts of update_counts, with no gradient kept.

        The number of processes may be another one. Errors: those of Bank.load.
        """
        self.reset()
        for bank in self.banks:
            bank.load(full)
            bank.updates = updates[bank.members[0][0]]

    def keeps_gradients(self, plan: StepPlan) -> bool:
        """Whether gradients are kept after a step for a later one (groups with a cadence).

        plan: schedule.StepPlan of the step.
        """
        return any(not is_due(bank, plan.due) and bank.group not in plan.frozen for bank in self.banks)

    def state_bytes(self) -> int:
        return sum(x.nbytes for bank in self.banks for x in bank.state.values())

    # ----- gradients

    def expect(self, last: bool, launch: bool = True, due: frozenset[str] | None = None) -> None:
        """Announce a backward pass.

        Args:
            last: whether it is the last one of the step.
            launch: on the last one, launch each reduction when its gradient is ready (not in warm-up).
            due: StepPlan.due, the groups that the step updates; None: all.
        """
        self.last, self.launching, self.due = last, last and launch, due
        for bank in self.banks:
            bank.pending = len(bank.members)

    def ready(self, bank: Bank) -> None:
        """Called by autograd when the gradient of one of the bank's parameters is complete."""
        bank.pending -= 1
        if self.launching and bank.pending == 0 and bank.comm.eager and is_due(bank, self.due):
            self.launch(bank)

    @torch.no_grad()
    def accumulate(self) -> None:
        """After each backward pass: add bfloat16 gradients to their float32 sum, and push ordered ones."""
        for bank in self.banks:
            if bank.ordered or not self.last:
                bank.accumulate()

    @torch.no_grad()
    def launch(self, bank: Bank) -> None:
        """Start the reduction over processes."""
        self.launched.append(bank)
        bank.comm.reduce(bank.local_gradient())

    @torch.no_grad()
    def reduced(self, bank: Bank) -> tuple[Gradient, torch.Tensor]:
        """Wait for the reduction: (this process's shard of the mean gradient, gradient for the norm)."""
        local = None if bank.comm.reduces else bank.local_gradient()
        return bank.received(*bank.comm.wait(local))

    @torch.no_grad()
    def clip_factor(self, banks: Sequence[Bank], seen: Sequence[torch.Tensor]) -> torch.Tensor:
        """Factor (0-d, at most 1) that limits the global norm of the banks' gradients to grad_clip."""
        return (self.s.optim.grad_clip / self.global_norm(banks, seen)).clamp(max=1.0)

    @torch.no_grad()
    def global_norm(self, banks: Sequence[Bank], seen: Sequence[torch.Tensor]) -> torch.Tensor:
        """The norm of the banks' gradients together, 0-d float64. Collective where they are sharded.

        seen: the second result of `reduced` for each bank.
        """
        squares = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) ** 2 for g in seen])
        partial = [bank.comm.partial for bank in banks]
        parts, whole = (
            sum((x for x, p in zip(squares, partial) if p == kind), squares.new_zeros(()))
            for kind in (True, False)
        )
        total = (self.plan.total(parts) if any(partial) else parts) + whole
        return total.sqrt()

    # ----- updates

    @torch.no_grad()
    def step(self, plan: StepPlan, watch: Callable[[dict], Any] | None = None) -> None:
        """Reduce, update and gather the banks that are due, and clear their gradients.

        plan: schedule.StepPlan of the step.
        watch: function that is shown the gradients, {bank: as `reduced`}, before anything changes them.
        """
        due = [bank for bank in self.banks if is_due(bank, plan.due)]
        if not set(self.launched) <= set(due):
            raise ValueError(
                "a bank is being reduced that the step does not update: tell expect() the plan's `due` too"
            )
        gradients, factor, phases = {}, None, phases_of(due)
        clip = self.s.optim.grad_clip is not None
        if clip or self.judge is not None:  # clipping needs the norm of all gradients before any update
            self.launch_rest(due)
            gradients = {bank: self.reduced(bank) for bank in due}
        if self.judge is not None and not self.judge(gradients):
            self.launched = []
            self.forget_gradients(due, plan.frozen)
            return
        if clip:
            if watch is not None:
                watch(gradients)
            factor = self.clip_factor(due, [seen for _, seen in gradients.values()])
        held = [bank for bank in self.in_order(due) if not bank.unit][-1:] if self.plan.gathers_last else []
        gathers = []
        for phase in phases:
            self.launch_rest(phase)
            # Each all-gather starts right after its bank's update and overlaps later updates.
            for bank in self.in_order(phase):
                if bank not in gradients:
                    gradients[bank] = self.reduced(bank)
                grad, _ = gradients[bank]
                if factor is not None:
                    grad.mul_(factor.to(grad.dtype))
                self.update(bank, grad, plan)
                if bank not in held:
                    gathers.append(bank.comm.gather(bank.param))
        gathers += [bank.comm.gather(bank.param) for bank in held]
        for work in gathers:
            if work is not None:
                work.wait()
        if not clip and watch is not None:
            watch(gradients)
        self.launched = []
        self.forget_gradients(due, plan.frozen)

    def launch_rest(self, banks: Sequence[Bank]) -> None:
        """Start the reductions that have not started.

        Their banks are not eager, or a parameter got no gradient and its hook never fired.
        """
        for bank in banks:
            if bank.comm.reduces and not bank.comm.work:
                self.launch(bank)

    def in_order(self, banks: Sequence[Bank]) -> list[Bank]:
        """Banks in the order of their updates; reductions finish in the order in which they were launched."""
        return [*(b for b in banks if b not in self.launched), *(b for b in self.launched if b in banks)]

    def forget_gradients(self, updated: Sequence[Bank], frozen: frozenset[str]) -> None:
        """Clear the gradients of the banks that a step has updated, and drop those of frozen groups."""
        for bank in self.banks:
            if bank in updated or bank.group in frozen:
                bank.clear()
            elif not bank.ordered:  # the bank keeps its gradient; a bfloat16 one moves to the float32 sum
                bank.accumulate()

    def copied(self, source: str, target: str) -> tuple[Bank, Bank]:
        """The banks of two labels, of which the second takes over the first one's state in `copy_parameter`.

        UserError if it cannot.
        """
        old, new = (next(b for b in self.banks if b.place(label)) for label in (source, target))
        if others := sorted({p.label for _, p in new.members} - {target}):
            raise UserError(f"{target} takes over the optimizer state of {source}, and {others[0]} shares "
                            f"its group: add --with optim.{others[0]}")
        (start, stop), (first, end) = old.place(source), new.place(target)
        if old.unit or new.unit or stop - start != end - first:
            raise UserError(f"{target} cannot take over the state of {source}: give both AdamW, and tables "
                            "of one size")
        return old, new

    @torch.no_grad()
    def copy_parameter(self, source: str, target: str) -> None:
        """Copy values, state and update count of one parameter to another (record 53 splits a tied head).

        Collective where the state is sharded, because the two banks are sharded at different places.

        source, target: labels of one parameter each, with the same shape and elementwise rules. The target
            must be alone in its bank, because a bank has one update count.
        """
        old, new = self.copied(source, target)
        (start, stop), (first, end) = old.place(source), new.place(target)
        new.param.view(-1)[first:end] = old.param.view(-1)[start:stop]
        for name, x in new.state.items():
            whole = new.comm.whole(x, len(new.param)).clone()
            taken = old.comm.whole(old.state[name], len(old.param))
            whole.view(-1)[first:end] = taken.view(-1)[start:stop]
            x.copy_(new.comm.shard(whole))
        new.updates = old.updates

    def update(self, bank: Bank, grad: Gradient, plan: StepPlan) -> None:
        bank.updates += 1
        numbers = self.numbers(bank, bank.rule.numbers(plan.of_role(bank.role), bank.updates))
        if getattr(bank.rule, "c_optim", 0.0):
            self.update_cautiously(bank, grad, numbers)
            return
        functions = self.function(bank.rule, "update_"), self.function(bank.rule, "direction")
        if bank.replay is not None:
            bank.replay(lambda: bank.update(grad, numbers, *functions))
        else:
            bank.update(grad, numbers, *functions)

    def update_cautiously(self, bank: Bank, grad: torch.Tensor, numbers: dict) -> None:
        """The update of a bank with C-Optim, whose shares are of whole parameters, however they are sharded.

        Collective where the bank is sharded.
        """
        parts = bank.local_parts(grad)
        counts = torch.stack([bank.rule.agreeing(g, state, numbers) for _, g, state in parts])
        shared = bank.comm.world if bank.comm.splits_members else 1  # processes that each hold a part of it
        if bank.comm.shards > 1 or shared > 1:
            counts = self.plan.total(counts)
        for (p, g, state), count, (_, own) in zip(parts, counts, bank.members):
            share = count.double() / (shared * own.numel())
            bank.rule.update_(p, g, state, numbers | {"kept": share}, bank.views)

    def function(self, rule: Rule, name: str) -> Callable | None:
        """A function of a rule, compiled if the optimizer is; None if the rule does not have it."""
        function = getattr(rule, name, None)
        if function is None or not self.compiled or rule.eager:
            return function
        if (rule, name) not in self.functions:
            self.functions[rule, name] = torch.compile(function, dynamic=False)
        return self.functions[rule, name]

    def numbers(self, bank: Bank, values: dict[str, float]) -> dict:
        """Per-step numbers in the form that the rule needs.

        Compiled rules get 0-d tensors: a new value does not recompile, and 0-d tensors do not promote dtypes.
        CUDA graphs get tensors on the device whose addresses never change.
        """
        if bank.replay is None:
            return (
                {k: torch.tensor(x, dtype=torch.float64) for k, x in values.items()}
                if self.compiled and not bank.eager else values
            )
        for name, value in values.items():
            if name not in bank.numbers:
                bank.numbers[name] = torch.zeros((), dtype=torch.float64, device=bank.param.device)
            bank.numbers[name].fill_(value)
        return bank.numbers

    # ----- report

    def table(self) -> list[tuple[str, ...]]:
        """The parameter table of a run, one row of texts per label and shape.

        Columns: label, role, count x shape, rule, rate, decay, constants, communication, cadence.
        """
        rows = []
        for bank in self.banks:
            group = self.s.optim.group(bank.role, bank.label)
            constants = f"betas {group.beta1:g} {group.beta2:g} eps {group.eps:g}"
            if group.rule == "muon":
                constants = " > ".join(type(slot).__name__.lower() for slot in bank.rule.slots)
            elif group.rule == "row_adam":  # which has no first moment
                constants = f"beta2 {group.beta2:g} eps {group.eps:g}"
            every = "every step" if group.every == 1 else f"every {group.every} steps"
            if group.slower:
                every += f", from {group.slower.start} on every {group.slower.every}"
            for (label, shape), n in Counter((p.label, tuple(p.shape)) for _, p in bank.members).items():
                rows.append(
                    (
                        label, bank.role, f"{n} x {'x'.join(map(str, shape))}", bank.rule.name,
                        f"{group.lr:g}", f"{group.weight_decay:g}", constants, bank.comm.name, every
                    )
                )
        return rows


def phases_of(banks: Sequence[Bank]) -> list[Sequence[Bank]]:
    """Banks in phases: the reductions of a phase start after the updates of the previous phase."""
    late = [bank for bank in banks if bank.comm.late]
    return [[bank for bank in banks if not bank.comm.late], late] if late else [banks]


def is_due(bank: Bank, due: frozenset[str] | None) -> bool:
    """Whether a step updates this bank. due: StepPlan.due."""
    return due is None or bank.group in due
