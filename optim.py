"""Update rules (pure functions) and the engine that reduces, updates and gathers.

Rules: (parameter, gradient, state, hyper) -> (parameter, state), batched over equal shapes. Engine: parameters of one
rule, role, dtype and shape lie in one contiguous bank, with parameters and gradients as views; a bank is updated by
everyone, in shards, or by record 6's plan. Padding for the number of processes exists only inside a bank.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from kernels.newton_schulz import newton_schulz
from model import dtype
from settings import LOGICAL_RANKS, UserError

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
        self.partial = []  # gradients of finished forwards: float32 sum, or the levels of the fixed tree
        self.state = {}
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
        self.adamw = torch.compile(adamw, dynamic=False) if compiled else adamw
        self.direction = torch.compile(muon_direction, dynamic=False) if compiled else muon_direction
        self.compiled = compiled
        self.cut = Cut(joint=s.optim.muon is not None and not s.optim.muon.split_qkv)
        self.banks = self.make_banks(model)
        self.launching = False
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

    @torch.no_grad()
    def reset(self):
        """Forget everything but the parameters: state, gradients, counters."""
        self.steps_taken = 0
        for bank in self.banks:
            mine = self.mine(bank, bank.param)
            names = ("momentum_buffer",) if bank.rule == "muon" else ("exp_avg", "exp_avg_sq")
            state_dtype = bank.param.dtype
            if bank.rule == "adamw" and self.s.numerics.adam_state != "parameter":
                state_dtype = dtype(self.s.numerics.adam_state)
            bank.state = {name: torch.zeros_like(mine, dtype=state_dtype) for name in names}
            bank.grad.zero_()
            bank.partial, bank.work, bank.reduced, bank.pending = [], [], None, len(bank.members)

    def mine(self, bank, x):
        """The part of a bank-shaped tensor that this process updates (a view)."""
        if self.is_shared(bank.rule, bank.own):
            return x.chunk(self.world)[self.rank]
        if self.comm == "allreduce_updates" and bank.rule == "muon":
            return x[self.rank::self.world]
        return x

    # ----- gradients

    def expect(self, last):
        """Announce a backward pass; after the `last` one of a step the reductions start as gradients get ready."""
        self.launching = last
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
        if self.launching and not self.ordered:
            return
        for bank in self.banks:
            if self.ordered:
                bank.partial = bank.partial or [Tree()]
                bank.partial[0].push(bank.grad.clone())
                bank.grad.zero_()
            elif bank.grad.dtype == torch.bfloat16:
                fresh = bank.grad.float()
                bank.partial = [bank.partial[0] + fresh] if bank.partial else [fresh]
                bank.grad.zero_()

    @torch.no_grad()
    def local(self, bank):
        """This process's gradient sum of a bank (float32 if bf16 gradients had to be added up)."""
        if self.ordered:
            return bank.partial[0].total()
        return bank.partial[0] + bank.grad if bank.partial else bank.grad

    @torch.no_grad()
    def launch(self, bank):
        """Start the reduction over processes; finish() waits for it."""
        grad = self.local(bank)
        if self.comm == "sharded":
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
        partial = torch.tensor([bank.own or (self.comm == "sharded" and not self.ordered) for bank in self.banks])
        total = squares[partial].sum()
        if partial.any():
            dist.all_reduce(total)
        total = total + squares[~partial].sum()
        return (self.s.optim.grad_clip / total.sqrt()).clamp(max=1.0)

    # ----- updates

    @torch.no_grad()
    def step(self, plan):
        """Reduce, update, gather; then clear the gradients. `plan`: schedule.StepPlan."""
        self.steps_taken += 1
        if self.world > 1 and not self.ordered:
            for bank in self.banks:
                if not bank.work and not bank.own:  # bucketed, or a parameter had no gradient this time, so that the hook never fired
                    self.launch(bank)
        grads = [self.finish(bank) for bank in self.banks]
        factor = self.clip_factor(grads)
        gathers = []
        for bank, (grad, _) in zip(self.banks, grads):
            if factor is not None:
                grad = grad * factor.to(grad.dtype)
            self.update(bank, grad, plan)
            if self.is_shared(bank.rule, bank.own):
                gathers.append(all_gather(bank.param, self.mine(bank, bank.param).clone(), async_op=True))
        for work in gathers:
            work.wait()
        for bank in self.banks:
            bank.grad.zero_()
            bank.partial, bank.work, bank.reduced = [], [], None

    def number(self, value):
        """A per-step number for a rule; compiled rules get a tensor, so that a new value does not recompile them."""
        return torch.tensor(value, dtype=torch.float64) if self.compiled else value  # 0-d: it promotes nothing

    def update(self, bank, grad, plan):
        o, n = self.s.optim, self.s.numerics
        if bank.rule == "adamw":
            a, group = o.adam, getattr(o, bank.role)
            t = self.steps_taken
            p = self.mine(bank, bank.param)
            new = self.adamw(p, grad, bank.state["exp_avg"], bank.state["exp_avg_sq"],
                             lr=self.number(group.lr * plan.lr_factor), decay=getattr(group, "weight_decay", 0.0),
                             beta1=a.beta1, beta2=a.beta2, eps=a.eps,
                             eps_after_correction=a.eps_after_correction, correction1=self.number(1 - a.beta1 ** t),
                             correction2=self.number(1 - a.beta2 ** t), math_dtype=dtype(n.adam))
            for old, value in zip((p, bank.state["exp_avg"], bank.state["exp_avg_sq"]), new):
                old.copy_(value)
            return
        ns = (o.muon.ns_steps, n, self.ordered, self.s.system.kernels.muon == "triton")
        update, buffer = self.direction(grad.to(bank.param.dtype), bank.state["momentum_buffer"],
                                        momentum=self.number(plan.momentum), averaged=o.muon.averaged,
                                        cut=self.cut_of(bank), factor_shape=self.factor_shape(bank),
                                        scale=o.muon.scale, ns=ns)
        bank.state["momentum_buffer"].copy_(buffer)
        update = update.to(dtype(n.muon_update))
        if bank.loads is not None and not o.muon.move_idle:
            update = update * self.mine(bank, bank.busy()).to(update.dtype)
        lr = o.muon.lr * plan.lr_factor
        if self.comm == "allreduce_updates":  # record 6: zeros elsewhere, one sum brings everyone all updates
            whole = torch.zeros_like(bank.param, dtype=update.dtype)
            self.mine(bank, whole).copy_(update)
            dist.all_reduce(whole)
            bank.param.sub_(lr * whole.to(bank.param.dtype))
        else:
            p = self.mine(bank, bank.param)
            p.sub_(lr * update.to(p.dtype))

    def factor_shape(self, bank):
        """(rows, cols) that enter Muon's shape factor, where they are not those of the stored matrix (record 27)."""
        if bank.label in ("mlp_up", "expert_up") and self.s.optim.muon.up_shape == "in_out":
            return bank.unit[::-1]
        return None

    def cut_of(self, bank):
        return self.cut if len(bank.unit) == 3 else Cut(joint=False)

    def state_bytes(self):
        return sum(x.numel() * x.element_size() for bank in self.banks for x in bank.state.values())


def local_ranks(rank, world):
    """The logical ranks that a process serves. Error if the number of processes does not divide eight."""
    if LOGICAL_RANKS % world:
        raise UserError(f"{world} processes do not divide the {LOGICAL_RANKS} logical ranks: use 1, 2, 4 or 8")
    each = LOGICAL_RANKS // world
    return range(rank * each, (rank + 1) * each)
