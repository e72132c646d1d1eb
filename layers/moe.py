"""Mixture of experts: the router, the experts, and their way to other processes."""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from common.errors import UserError
from kernels import experts
from layers.mlp import MLP
from layers.primitives import dtype, linear_init, normal, parameter
from schedule import shape
from settings import check_processes
from updates import views
from updates.views import Views


class Router(nn.Module):
    """Which experts a token goes to, and with what gates; DeepSeek-V3, arXiv 2412.19437, section 2.1.2.

    Scores s = sigmoid or softmax of W x. The top_k largest of s + bias are chosen (bias: see
    settings.Balance), within the best groups if there are some; the gates are the chosen s, so that the bias
    never gets a gradient. All in numerics.router, the bias in float32 at least. What the whole batch of a
    step did is added up in `tally`, for balancing and the log, from the first forward of a step to `settle`
    (system.hooks.RouterBalance).
    """

    def __init__(self, s):
        super().__init__()
        self.moe = moe = s.model.mlp.moe
        self.dtype = dtype(s.numerics.router)
        self.tokens_per_rank = shape(s, 0).tokens_per_rank
        self.weight = parameter(
            (moe.experts, s.model.model_dim), s.numerics.router, role="router", label="router",
            init=normal(moe.router_init / math.sqrt(s.model.model_dim))
        )
        # belongs to a checkpoint; steps of 0.01 or less would be lost in 16 bits
        self.register_buffer(
            "bias", torch.zeros(moe.experts, dtype=torch.promote_types(self.dtype, torch.float32))
        )
        # of the current step, on this process; float64 holds the sums exactly, in whatever order they are
        # added
        self.register_buffer("tally", torch.zeros(2 * moe.experts + 1, dtype=torch.float64), persistent=False)
        # rows of each expert in the last whole step
        self.register_buffer("load", torch.zeros(moe.experts), persistent=False)
        # of its tokens' scores in the last whole step, mean, relative to equal ones
        self.register_buffer("entropy", torch.zeros((), dtype=torch.float64), persistent=False)

    def forward(self, x):
        """x (R, T, D). Returns experts (N, k) int64, gates (N, k) and aux_loss (N,) or None of the N = R T
        tokens."""
        moe = self.moe
        logits = F.linear(x.flatten(0, 1).to(self.dtype), self.weight)
        scores = torch.sigmoid(logits) if moe.score == "sigmoid" else logits.softmax(-1)
        with torch.no_grad():
            quantile = moe.balance is not None and moe.balance.rule == "quantile"
            choice = (logits if quantile else scores) + self.bias
            chosen = best(self.in_best_groups(choice), moe.top_k)
            if self.training:
                self.count(logits, scores, choice, quantile)
        gates = scores.gather(1, chosen)
        if moe.normalise:
            gates = shares(gates)
        return (
            chosen, gates * moe.gate_scale,
            self.aux_loss(logits, scores, x.size(1)) if self.training else None
        )

    def in_best_groups(self, choice):
        """choice (N, E) with -inf outside each token's best groups (node-limited routing, DeepSeek-V3)."""
        moe = self.moe
        if moe.groups == 1:
            return choice
        grouped = choice.unflatten(1, (moe.groups, -1))
        kept = best(grouped.topk(2).values.sum(-1), moe.groups_kept)
        out = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(1, kept, False)
        return grouped.masked_fill(out[..., None], -math.inf).flatten(1)

    def count(self, logits, scores, choice, quantile):
        """Add to the tally what the scores say: their entropy, and by logical rank the bound of the quantile
        rule. The rows of each expert come from who sorts them (MoE)."""
        n = self.moe.experts
        p = shares(scores)
        self.tally[2 * n] -= (p * p.clamp(min=1e-20).log()).sum(dtype=torch.float64)
        # by how much each token's logit beats the best one not chosen: the share-th largest becomes 0
        if quantile:
            over = logits - choice.topk(self.moe.top_k + 1).values[:, -1:]
            tokens = min(len(over), self.tokens_per_rank)
            share = max(1, tokens * self.moe.top_k // n)
            self.tally[n : 2 * n] += (
                over.unflatten(0, (-1, tokens)).kthvalue(tokens - share + 1, dim=1).values.double().sum(0)
            )

    def aux_loss(self, logits, scores, length):
        """What the gradient of each token's loss gets on top, (N,), or None: balance in its row of `length`,
        and z-loss."""
        moe, out = self.moe, None
        if moe.sequence_loss:
            p = shares(scores).unflatten(0, (-1, length)).mean(1)
            with torch.no_grad():
                chosen = best(scores, moe.top_k).view(-1, length * moe.top_k)
                counted = torch.promote_types(p.dtype, torch.float32)  # bfloat16 cannot count beyond 256
                f = torch.zeros_like(p, dtype=counted).scatter_add_(
                    1, chosen, torch.ones_like(chosen, dtype=counted)
                )
                f *= moe.experts / (moe.top_k * length)
            out = (moe.sequence_loss * (f * p).sum(-1)).repeat_interleave(length)
        if moe.z_loss:
            z = moe.z_loss * logits.logsumexp(-1).square()
            out = z if out is None else out + z
        return out

    @torch.no_grad()
    def settle(self, tally, tokens, moves_bias=True):
        """Close a step of so many tokens: tally summed over all processes. Moves the bias, unless it is to
        stand still."""
        n, balance = self.moe.experts, self.moe.balance
        load, bound, entropy = tally.split([n, n, 1])
        self.load.copy_(load)
        self.entropy.copy_(entropy[0] / (tokens * math.log(n)))
        if balance is None or not moves_bias:
            return
        if balance.rule == "quantile":
            self.bias.copy_(-bound / (tokens // self.tokens_per_rank))
            return
        lack = load.mean() - load
        rate = balance.rate * (4 / n if self.moe.score == "softmax" else 1)  # settings.Balance says why
        self.bias += (rate * (lack.sign() if balance.rule == "sign" else lack / load.mean())).to(
            self.bias.dtype
        )

    def reset(self):
        for buffer in self.buffers():
            buffer.zero_()


def shares(x):
    """x (N, n) divided by the sum of each row; zeros where all have underflowed (sigmoid(-104) is 0 in
    float32)."""
    return x / (x.sum(-1, keepdim=True) + 1e-20)


def best(x, k):
    """Indices (N, k) of the k largest of each row of x (N, n)."""
    return x.topk(k, sorted=False).indices


class MoE(nn.Module):
    """Mixture of experts: shared(x) + sum over the chosen experts of gate * W_down phi(W_up x)
    (settings.MoE).

    With system.expert_parallel a process holds its share of the experts, and rows travel to their expert and
    back.
    """

    def __init__(self, s):
        super().__init__()
        moe, d, n = s.model.mlp.moe, s.model.model_dim, s.numerics
        self.router, self.experts = Router(s), moe.experts
        parallel = s.system.expert_parallel and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if parallel else (0, 1)
        check_processes(s, self.world)
        mine = moe.experts // self.world

        def stack(label, rows, cols, projection, of=Views()):
            return parameter((mine, rows, cols), n.matrix, role="matrix", label=label, views=of, init=None,
                             parts=[linear_init(s, cols, projection)] * mine, first_part=self.rank * mine)

        self.up = stack("expert_up", moe.hidden, d, False, views.mlp_up(s))
        self.down = stack("expert_down", d, moe.hidden, True, views.mlp_down(s))
        self.shared = MLP(s, moe.shared) if moe.shared else None
        self.activation = MLP.ACTIVATIONS[s.model.mlp.activation]
        self.backend, self.fp8 = s.system.experts, n.fp8_experts

    def forward(self, x, aux_losses, compiled):
        """x (R, T, D) -> (R, T, D). aux_losses: list that gets this layer's (R T,) aux_loss, if it has
        one."""
        chosen, gates, aux_loss = self.router(x)
        if aux_loss is not None:
            aux_losses.append(aux_loss)
        backend = self.select_backend(x.device, x.dtype, compiled)
        p = experts.plan(chosen, self.experts, backend if self.world == 1 else "grouped")
        if self.training:
            self.router.tally[:self.experts] += p.counts
        rows = experts.gather(x.flatten(0, 1), p)
        rows = self.feed(rows, p) if self.world == 1 else self.expert_all_to_all(rows, p.counts, backend)
        y = experts.combine(rows, gates.to(rows.dtype), p).view(x.shape)
        return y if self.shared is None else self.shared(x) + y

    def select_backend(self, device, matmul_dtype, compiled):
        """Name of the backend of kernels.experts that runs there."""
        try:
            return experts.choose(
                self.backend, device, matmul_dtype, (self.up.size(1), self.up.size(2)), compiled
            )
        except ValueError as error:
            raise UserError(f"system.experts={self.backend}: {error}") from None

    def feed(self, rows, p):
        """Rows sorted by expert (P, D) through their experts."""
        eight = experts.fake_fp8 if self.fp8 and self.training else lambda t: t
        up, down = self.up.to(rows.dtype), self.down.to(rows.dtype)
        hidden = self.activation(experts.grouped_linear(eight(rows), eight(up), p))
        return experts.grouped_linear(eight(hidden), eight(down), p)

    def expert_all_to_all(self, rows, counts, backend):
        """The same by the processes that hold the experts. One wait for the host: it must know how many rows
        travel."""
        coming = experts.exchange_counts(counts, self.world)
        sent, received = torch.stack([counts.view(self.world, -1).sum(1), coming.sum(1)]).tolist()
        mine = experts.exchange(rows, received, sent)
        owner = torch.arange(len(self.up), device=rows.device).repeat(self.world)
        owner = owner.repeat_interleave(coming.flatten(), output_size=len(mine))
        p = experts.plan(owner[:, None], len(self.up), backend)
        done = self.feed(experts.gather(mine, p), p)
        back = experts.combine(done, done.new_ones(len(mine), 1), p)
        return experts.exchange(back, sent, received)
