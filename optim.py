"""Update rules (pure functions) and the engine that reduces, updates and gathers.

Rules: (parameter, gradient, state, hyper) -> (parameter, state), batched over equal shapes; with an underscore in place, which
a compiler makes one pass of, or a CUDA graph. Engine: parameters of one rule, role, dtype and shape lie in one contiguous
bank, with parameters and gradients as views; a bank is updated by everyone, in shards, or by record 6's plan. Padding for the
number of processes exists only inside a bank. All that a step reads or writes stays where it is in memory.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from kernels.newton_schulz import newton_schulz
from model import dtype
from settings import LOGICAL_RANKS
from common.errors import UserError

# torch 2.13 renamed the single-tensor collectives; 2.11 knows only the old names
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


# ----- rules ------------------------------------------------------------------------------------------------------

def adamw(p, g, m, v, *, lr, decay, beta1, beta2, eps, eps_after_correction, correction1, correction2, math_dtype):
    """AdamW (arXiv 1711.05101), elementwise. eps is added to the root of the corrected second moment, or of the raw one.

    correction1, correction2: 1 - beta^t. Computed in math_dtype; returns (p, m, v), to be stored in their own dtype.
    """
    p, g, m, v = (x.to(math_dtype) for x in (p, g, m, v))
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    p = p - (lr * decay) * p
    if eps_after_correction:
        return p - (lr / correction1) * m / ((v / correction2).sqrt() + eps), m, v
    return p - (lr * correction2 ** 0.5 / correction1) * m / (v.sqrt() + eps), m, v


def adamw_(p, g, m, v, **hyper):
    """adamw in place: compiled, each of the four is read once and three are written once."""
    for old, new in zip((p, m, v), adamw(p, g, m, v, **hyper)):
        old.copy_(new)


def muon_direction(g, momentum_buffer, *, momentum, averaged, cut, factor_shape, scale, ns):
    """Muon's update before the learning rate: Nesterov momentum, orthogonalised per matrix, times the shape factor.

    g: (N, ...) units. cut: units -> list of (N', rows, cols) batches and back (see Cut). factor_shape: (rows, cols) that
    `scale` sees for each piece; None: the piece's own. Returns (update, buffer).
    Versions: v0 (record 3) scale none; v1 (record 4) sqrt_max; v2 (8-14) sqrt_ratio; v3 (15 on) averaged.
    """
    if averaged:
        momentum_buffer = momentum * momentum_buffer + (1 - momentum) * g
        ahead = momentum * momentum_buffer + (1 - momentum) * g
    else:
        momentum_buffer = momentum * momentum_buffer + g
        ahead = g + momentum * momentum_buffer
    pieces = []
    for x in cut.split(ahead):
        rows, cols = factor_shape or x.shape[-2:]
        pieces.append(SHAPE_FACTORS[scale](rows, cols) * orthogonalise(x, ns))
    return cut.join(pieces), momentum_buffer


def muon_direction_(g, momentum_buffer, busy, *, update_dtype, **how):
    """muon_direction with the buffer in place. busy: None, or (N, 1, 1): 0 for units that shall stay where they are. Returns the
    update."""
    update, buffer = muon_direction(g.to(momentum_buffer.dtype), momentum_buffer, **how)
    momentum_buffer.copy_(buffer)
    update = update.to(update_dtype)
    return update if busy is None else update * busy.to(update.dtype)


def muon_(p, g, momentum_buffer, busy, *, lr, **how):
    """Muon in place: p <- p - lr times the update."""
    p.sub_(lr * muon_direction_(g, momentum_buffer, busy, **how).to(p.dtype))


def orthogonalise(x, ns):
    """Newton-Schulz of (N, rows, cols) matrices. ns: (steps, numerics, whether one matrix at a time, whether by Triton)."""
    steps, n, one_by_one, fused = ns
    kwargs = dict(steps=steps, dtype=dtype(n.newton_schulz), norm_dtype=dtype(n.newton_schulz_norm),
                  form=n.newton_schulz_form, fused=fused)
    if one_by_one:  # a batched product may round differently for another batch size
        x = torch.stack([newton_schulz(matrix, **kwargs) for matrix in x]) if len(x) else x.to(kwargs["dtype"])
    else:
        x = newton_schulz(x, **kwargs)
    return x.to(torch.promote_types(x.dtype, dtype(n.muon_update)))


SHAPE_FACTORS = {"none": lambda rows, cols: 1.0,
          "sqrt_max": lambda rows, cols: math.sqrt(max(rows, cols)),
          "sqrt_ratio": lambda rows, cols: math.sqrt(max(1, rows / cols))}


@dataclass(frozen=True)
class Cut:
    """How units of a bank are cut into the matrices that Muon orthogonalises. Storage never enters the mathematics.

    whole: a unit (rows, cols) is the matrix. joint: a unit (4, D, D) gives (3D, D) = q, k, v together, and (D, D) = o.
    """
    joint: bool

    def split(self, x):
        return [x[:, :3].flatten(1, 2), x[:, 3]] if self.joint else [x]

    def join(self, pieces):
        if not self.joint:
            return pieces[0]
        qkv, o = pieces
        return torch.cat([qkv.unflatten(1, (3, -1)), o[:, None]], dim=1)


BUCKET_BYTES = 64 * 2 ** 20  # record 22's flat buffers; here slices of the banks, so nothing is copied


# ----- banks ------------------------------------------------------------------------------------------------------

class Bank:
    """Parameters of one rule, role, dtype and unit shape in one contiguous tensor (N, *unit).

    unit: () for elementwise rules; (rows, cols) or (4, D, D) for Muon. N is padded to a multiple of the number of
    shards with zeros, which every rule leaves at zero. loads: of stacks of experts, the rows that each unit got in the step, one
    tensor per member; own: this process alone holds them (expert parallelism).
    """

    def __init__(self, rule, role, members, unit, shards, loads=None, own=False):
        self.rule, self.role, self.members, self.unit, self.loads, self.own = rule, role, members, unit, loads, own
        size = math.prod(unit)
        self.units = sum(p.numel() for _, p in members) // size
        padded = math.ceil(self.units / shards) * shards
        first = members[0][1]
        self.param = torch.zeros((padded, *unit), dtype=first.dtype, device=first.device)
        self.grad = torch.zeros_like(self.param)
        start = 0
        for _, p in members:
            stop = start + p.numel()
            self.param.view(-1)[start:stop].copy_(p.detach().reshape(-1))
            p.data = self.param.view(-1)[start:stop].view(p.shape)
            p.grad = self.grad.view(-1)[start:stop].view(p.shape)
            start = stop
        self.sum, self.summed = None, False  # of finished forwards: bfloat16 gradients in float32, and whether there are some
        self.tree = Tree()  # of finished forwards, with system.reduction=ordered
        self.state, self.replay = {}, None
        self.label = members[0][1].label
        self.pending = len(members)
        self.work, self.reduced = [], None

    def busy(self):
        """(N, 1, 1, ...) 1 for the units that got rows in the step, 0 for the others and the padding."""
        load = torch.cat(self.loads)
        padded = load.new_zeros(len(self.param))
        padded[:len(load)] = load > 0
        return padded.view(-1, *[1] * len(self.unit))

    def name(self):
        return f"{self.role} {self.rule} {self.units} x {tuple(self.unit)} {self.param.dtype}".replace("torch.", "")


class Tree:
    """Sums equal leaves in one fixed binary tree, however many are pushed at a time (a binary counter)."""

    def __init__(self):
        self.levels = []

    def push(self, x):
        for i, level in enumerate(self.levels):
            if level is None:
                self.levels[i] = x
                return
            x, self.levels[i] = level + x, None
        self.levels.append(x)

    def total(self):
        return self.levels[-1]  # complete: a power of two of leaves was pushed


class Replay:
    """An update as a CUDA graph: run once as it is, which compiles, then captured, and from there on replayed.

    Every call must mean the same tensors at the same places. In the warm-up, so that the clock sees replays only.
    """

    def __init__(self, pool):
        self.pool, self.calls, self.again = pool, 0, None

    def __call__(self, update):
        self.calls += 1
        if self.calls == 1:
            update()
            return
        if self.again is None:
            self.again = capture(update, self.pool)
        self.again()


def capture(update, pool):
    """The kernels of an update as a CUDA graph; returns what runs them. pool: memory that graphs share which run one by one."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # NCCL's and the loader's threads go on
        update()
    return graph.replay


# ----- engine -----------------------------------------------------------------------------------------------------

class Engine:
    """Owns the banks, the gradients' way through the processes, and the updates.

        engine = Engine(model, s, rank, world)
        for forward in ...: engine.expect(last); loss.backward(); engine.collect()
        engine.step(step_plan)

    Losses are scaled so that gradients add up to the mean over the eight logical ranks.
    """

    def __init__(self, model, s, rank=0, world=1, compiled=False):
        self.s, self.rank, self.world = s, rank, world
        comm = s.system.comm if s.system.comm != "auto" else "sharded"
        self.comm = comm if world > 1 else "replicated"
        self.ordered = s.system.reduction == "ordered"
        rules = (adamw_, muon_, muon_direction_)
        self.adamw, self.muon, self.direction = (torch.compile(f, dynamic=False) for f in rules) if compiled else rules
        self.compiled, self.numbers = compiled, {}
        self.cut = Cut(joint=s.optim.muon is not None and not s.optim.muon.split_qkv)
        self.banks = self.make_banks(model)
        self.last = self.launching = False
        self.launched = []  # banks in the order in which their reductions were started, the same on every process
        pool = torch.cuda.graph_pool_handle() if s.system.cuda_graphs and torch.cuda.is_available() else None
        for bank in self.banks:
            self.make_state(bank)
            bank.replay = Replay(pool) if s.system.cuda_graphs else None
        self.reset()
        for bank in self.banks:
            for _, p in bank.members:
                p.register_post_accumulate_grad_hook(lambda _, bank=bank: self.ready(bank))

    def make_banks(self, model):
        groups, loads = {}, model.expert_loads()
        for name, p in model.named_parameters():
            rule, unit = "adamw", ()
            if p.role == "matrix" and self.s.optim.muon:
                rule = "muon"
                unit = p.shape if self.cut.joint and p.label == "qkvo" else p.shape[-2:]
            groups.setdefault((rule, p.role, p.label, p.dtype, tuple(unit)), []).append((name, p))
        banks = []
        for (rule, role, _, _, unit), members in groups.items():
            load = [loads[name] for name, _ in members if name in loads]
            own = bool(load) and self.s.system.expert_parallel and self.world > 1
            banks.append(Bank(rule, role, members, unit, self.world if self.is_shared(rule, own) else 1, load or None, own))
        return banks

    def is_shared(self, rule, own):
        """Does each process update a shard of such a bank, which is then gathered? Muon is shared in all plans but record
        6's: orthogonalising every matrix on every process would cost more than the communication. What a process has alone
        (own) it updates alone."""
        shares = self.comm == "sharded" or (rule == "muon" and self.comm in ("replicated", "bucketed"))
        return self.world > 1 and shares and not own

    def make_state(self, bank):
        mine = self.mine(bank, bank.param.detach())
        names = ("momentum_buffer",) if bank.rule == "muon" else ("exp_avg", "exp_avg_sq")
        state_dtype = bank.param.dtype
        if bank.rule == "adamw" and self.s.numerics.adam_state != "parameter":
            state_dtype = dtype(self.s.numerics.adam_state)
        bank.state = {name: torch.zeros_like(mine, dtype=state_dtype) for name in names}

    @torch.no_grad()
    def reset(self):
        """Forget everything but the parameters: state, gradients, counters."""
        self.steps_taken, self.launched = 0, []
        for bank in self.banks:
            for tensor in bank.state.values():
                tensor.zero_()
            bank.pending = len(bank.members)
            self.clear(bank)

    def clear(self, bank):
        """Forget the gradients."""
        bank.grad.zero_()
        bank.summed, bank.tree, bank.work = False, Tree(), []

    def mine(self, bank, x):
        """The part of a bank-shaped tensor that this process updates (a view)."""
        if self.is_shared(bank.rule, bank.own):
            return x.chunk(self.world)[self.rank]
        if self.comm == "allreduce_updates" and bank.rule == "muon":
            return x[self.rank::self.world]
        return x

    # ----- gradients

    def expect(self, last, launch=True):
        """Announce a backward pass. After the `last` one of a step the reductions start as gradients get ready, if they shall."""
        self.last, self.launching = last, last and launch
        for bank in self.banks:
            bank.pending = len(bank.members)

    def ready(self, bank):
        bank.pending -= 1
        eager = self.world > 1 and not self.ordered and self.comm != "bucketed" and not bank.own
        if self.launching and bank.pending == 0 and eager:
            self.launch(bank)

    @torch.no_grad()
    def collect(self):
        """After a backward pass that is not the last: put its gradients aside (bf16 ones are summed in float32)."""
        if self.last and not self.ordered:
            return
        for bank in self.banks:
            if self.ordered:
                bank.tree.push(bank.grad.clone())
                bank.grad.zero_()
            elif bank.grad.dtype == torch.bfloat16:
                self.put_aside(bank)

    def put_aside(self, bank):
        if bank.sum is None:
            bank.sum = torch.empty_like(bank.grad, dtype=torch.float32)
        bank.sum = bank.sum.add_(bank.grad) if bank.summed else bank.sum.copy_(bank.grad)
        bank.summed = True
        bank.grad.zero_()

    @torch.no_grad()
    def local(self, bank):
        """This process's gradient sum of a bank (float32 if bf16 gradients had to be added up)."""
        if self.ordered:
            return bank.tree.total()
        if bank.summed:
            self.put_aside(bank)
        return bank.sum if bank.summed else bank.grad

    @torch.no_grad()
    def launch(self, bank):
        """Start the reduction over processes; finish() waits for it."""
        self.launched.append(bank)
        grad = self.local(bank)
        if self.comm == "sharded":
            if bank.reduced is None:
                bank.reduced = grad.new_empty((len(grad) // self.world, *grad.shape[1:]))
            bank.work = [reduce_scatter(bank.reduced, grad, op=dist.ReduceOp.SUM, async_op=True)]
            return
        bank.reduced = grad
        size = BUCKET_BYTES // grad.element_size() if self.comm == "bucketed" else grad.numel()
        bank.work = [dist.all_reduce(part, op=dist.ReduceOp.SUM, async_op=True)
                     for part in grad.view(-1).split(max(1, size)) if part.numel()]

    @torch.no_grad()
    def finish(self, bank):
        """(my part of the mean gradient, sum of squares of the whole gradient or of my part)."""
        if self.ordered:
            tree, grad = Tree(), self.local(bank)
            parts = [torch.empty_like(grad) for _ in range(self.world)]
            if self.world > 1:
                dist.all_gather(parts, grad.contiguous())
            for part in parts if self.world > 1 else [grad]:
                tree.push(part)
            return self.mine(bank, tree.total()), tree.total()[:bank.units]
        if self.world == 1 or bank.own:
            grad = self.local(bank)
            return grad, grad
        for work in bank.work:
            work.wait()
        grad = bank.reduced if self.comm == "sharded" else self.mine(bank, bank.reduced)
        return grad, bank.reduced

    @torch.no_grad()
    def clip_factor(self, grads):
        """Factor that brings the global gradient norm down to grad_clip (1.0 if it is below)."""
        if self.s.optim.grad_clip is None:
            return None
        squares = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) ** 2 for _, g in grads])
        partial = [bank.own or (self.comm == "sharded" and not self.ordered) for bank in self.banks]
        total, whole = (sum((x for x, p in zip(squares, partial) if p == kind), squares.new_zeros(())) for kind in (True, False))
        if any(partial):
            dist.all_reduce(total)
        total = total + whole
        return (self.s.optim.grad_clip / total.sqrt()).clamp(max=1.0)

    # ----- updates

    @torch.no_grad()
    def step(self, plan):
        """Reduce, update, gather; then clear the gradients. `plan`: schedule.StepPlan."""
        self.steps_taken += 1
        if self.world > 1 and not self.ordered:
            for bank in self.banks:
                if not bank.work and not bank.own:  # bucketed, or a parameter had no gradient this time and the hook never fired
                    self.launch(bank)
        grads, factor = {}, None
        if self.s.optim.grad_clip is not None:  # the norm of all must be known first
            grads = {bank: self.finish(bank) for bank in self.banks}
            factor = self.clip_factor(list(grads.values()))
        gathers = []
        # what was launched first arrives first, and is updated while the others are still under way; what is sent round goes
        # behind them, beside the later updates
        for bank in [*(b for b in self.banks if b not in self.launched), *self.launched]:
            grad, _ = grads[bank] if bank in grads else self.finish(bank)
            if factor is not None:
                grad.mul_(factor.to(grad.dtype))
            self.update(bank, grad, plan)
            if self.is_shared(bank.rule, bank.own):
                mine = self.mine(bank, bank.param)  # NCCL gathers in place
                gathers.append(all_gather(bank.param, mine if mine.is_cuda else mine.clone(), async_op=True))
        for work in gathers:
            work.wait()
        self.launched = []
        for bank in self.banks:
            self.clear(bank)

    def number(self, bank, name, value):
        """A per-step number for a rule. Compiled rules get a 0-d tensor, so that a new value does not recompile them (0-d: it
        promotes nothing); graphs one on the device that stays where it is."""
        if bank.replay is None:
            return torch.tensor(value, dtype=torch.float64) if self.compiled else value
        key = (bank.rule, bank.role, name)
        if key not in self.numbers:
            self.numbers[key] = torch.zeros((), dtype=torch.float64, device=bank.param.device)
        return self.numbers[key].fill_(value)

    def update(self, bank, grad, plan):
        p = self.mine(bank, bank.param)
        update = self.adamw_update(bank, p, grad, plan) if bank.rule == "adamw" else self.muon_update(bank, p, grad, plan)
        bank.replay(update) if bank.replay is not None else update()

    def adamw_update(self, bank, p, grad, plan):
        """The update of an AdamW bank, as a function without arguments."""
        a, group, t = self.s.optim.adam, getattr(self.s.optim, bank.role), self.steps_taken
        hyper = dict(lr=self.number(bank, "lr", group.lr * plan.lr_factor), decay=getattr(group, "weight_decay", 0.0),
                     beta1=a.beta1, beta2=a.beta2, eps=a.eps, eps_after_correction=a.eps_after_correction,
                     correction1=self.number(bank, "correction1", 1 - a.beta1 ** t),
                     correction2=self.number(bank, "correction2", 1 - a.beta2 ** t), math_dtype=dtype(self.s.numerics.adam))
        return lambda: self.adamw(p, grad, *bank.state.values(), **hyper)

    def muon_update(self, bank, p, grad, plan):
        o, n = self.s.optim.muon, self.s.numerics
        hyper = dict(momentum=self.number(bank, "momentum", plan.momentum), averaged=o.averaged, cut=self.cut_of(bank),
                     factor_shape=self.factor_shape(bank), scale=o.scale, update_dtype=dtype(n.muon_update),
                     ns=(o.ns_steps, n, self.ordered, self.s.system.kernels.muon == "triton"))
        lr, buffer = self.number(bank, "lr", o.lr * plan.lr_factor), bank.state["momentum_buffer"]

        def busy():
            return self.mine(bank, bank.busy()) if bank.loads is not None and not o.move_idle else None

        def spread():  # record 6: zeros elsewhere, one sum brings everyone all updates
            update = self.direction(grad, buffer, busy(), **hyper)
            whole = torch.zeros_like(bank.param, dtype=update.dtype)
            self.mine(bank, whole).copy_(update)
            dist.all_reduce(whole)
            bank.param.sub_(lr * whole.to(bank.param.dtype))

        return spread if self.comm == "allreduce_updates" else lambda: self.muon(p, grad, buffer, busy(), lr=lr, **hyper)

    def factor_shape(self, bank):
        """(rows, cols) that enter Muon's shape factor, where they are not those of the stored matrix (record 27)."""
        if bank.label in ("mlp_up", "expert_up") and self.s.optim.muon.up_shape == "in_out":
            return bank.unit[::-1]
        return None

    def cut_of(self, bank):
        return self.cut if len(bank.unit) == 3 else Cut(joint=False)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors that steps change, apart from the parameters: gradients, state, and the count of steps."""
        out = {"steps_taken": torch.tensor(self.steps_taken)}
        for i, bank in enumerate(self.banks):
            out |= {f"{i}.{name}": tensor for name, tensor in {"grad": bank.grad, **bank.state}.items()}
        return out

    def state_bytes(self):
        return sum(x.numel() * x.element_size() for bank in self.banks for x in bank.state.values())


def local_ranks(rank, world):
    """The logical ranks that a process serves. Error if the number of processes does not divide eight."""
    if LOGICAL_RANKS % world:
        raise UserError(f"{world} processes do not divide the {LOGICAL_RANKS} logical ranks: use 1, 2, 4 or 8")
    each = LOGICAL_RANKS // world
    return range(rank * each, (rank + 1) * each)
