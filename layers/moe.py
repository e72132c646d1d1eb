"""Mixture of experts: the router, the experts, and expert parallelism."""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from common.errors import UserError
from kernels import experts
from layers.mlp import MLP
from layers.primitives import dtype, linear_init, normal, parameter, products_dtype
from settings import Settings, check_processes
from settings.data import LOGICAL_RANKS
from updates import views
from updates.views import Views


class Router(nn.Module):
    """Chooses the experts of each token and their gates (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

    Scores s = sigmoid or softmax of W x, in the dtype numerics.router. The top_k experts with the largest
    s + bias are chosen, within the best groups of experts if there are groups. The gates are the s of the
    chosen experts, so the bias (settings.model.Balance), in at least float32, never gets a gradient.

    `stats` sums the statistics of a step, for load balancing and the log, from its first forward to
    `end_step` (called by system.hooks.RouterBalance). `max_vio_sum` adds up the steps' MaxVio and
    `validation_counts` the tokens per expert of a validation, both for the log alone.
    """

    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.moe = moe = s.model.mlp.moe
        self.dtype = dtype(s.numerics.router)
        self.weight = parameter(
            (moe.num_experts, s.model.model_dim), s.numerics.router, role="router", label="router",
            init=normal(moe.router_init / math.sqrt(s.model.model_dim))
        )
        # part of a checkpoint; in 16 bits, steps of 0.01 or less would be lost
        self.register_buffer(
            "bias", torch.zeros(moe.num_experts, dtype=torch.promote_types(self.dtype, torch.float32))
        )
        # this process's sums of the current step; float64 holds them exactly, whatever the order
        self.register_buffer(
            "stats", torch.zeros(2 * moe.num_experts + 1, dtype=torch.float64), persistent=False
        )
        # of the last whole step
        self.register_buffer("tokens_per_expert", torch.zeros(moe.num_experts), persistent=False)
        # [sum over steps of MaxVio, number of these steps] since the log last read it; on the device, so that
        # no step waits for it
        self.register_buffer("max_vio_sum", torch.zeros(2, dtype=torch.float64), persistent=False)
        # this process's tokens per expert in a validation
        self.register_buffer(
            "validation_counts", torch.zeros(moe.num_experts, dtype=torch.float64), persistent=False
        )
        # mean entropy of the scores in the last whole step, relative to that of equal scores
        self.register_buffer("entropy", torch.zeros((), dtype=torch.float64), persistent=False)

    def forward(
        self, x: torch.Tensor, tokens_per_rank: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """x (R, T, D) -> experts (N, k) int64, gates (N, k), aux_loss (N,) or None; N = R T.

        tokens_per_rank: tokens of a logical rank in this step; None: all of x is one rank.
        """
        moe = self.moe
        logits = F.linear(x.flatten(0, 1).to(self.dtype), self.weight)
        scores = torch.sigmoid(logits) if moe.score_func == "sigmoid" else logits.softmax(-1)
        with torch.no_grad():
            quantile = moe.balance is not None and moe.balance.rule == "quantile"
            choice = (logits if quantile else scores) + self.bias
            chosen = best(self.in_best_groups(choice), moe.top_k)
            if self.training:
                self.count(logits, scores, choice, quantile, tokens_per_rank)
        gates = scores.gather(1, chosen)
        if moe.route_norm:
            gates = shares(gates)
        return (
            chosen, gates * moe.route_scale,
            self.aux_loss(logits, scores, x.size(1)) if self.training else None
        )

    def in_best_groups(self, choice: torch.Tensor) -> torch.Tensor:
        """choice (N, E) with -inf outside each token's best groups (node-limited routing, DeepSeek-V3)."""
        moe = self.moe
        if moe.num_expert_groups == 1:
            return choice
        grouped = choice.unflatten(1, (moe.num_expert_groups, -1))
        kept = best(grouped.topk(2).values.sum(-1), moe.num_limited_groups)
        out = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(1, kept, False)
        return grouped.masked_fill(out[..., None], -math.inf).flatten(1)

    def count(
        self, logits: torch.Tensor, scores: torch.Tensor, choice: torch.Tensor, quantile: bool,
        tokens_per_rank: int | None
    ) -> None:
        """Add to `stats` the entropy of the scores and each logical rank's thresholds of quantile balancing.

        MoE.forward adds the tokens per expert.
        """
        n = self.moe.num_experts
        p = shares(scores)
        self.stats[2 * n] -= (p * p.clamp(min=1e-20).log()).sum(dtype=torch.float64)
        # margin of each logit over the token's best choice that is not taken; the threshold is the share-th
        # largest margin of an expert
        if quantile:
            over = logits - choice.topk(self.moe.top_k + 1).values[:, -1:]
            tokens = min(len(over), tokens_per_rank or len(over))
            share = max(1, tokens * self.moe.top_k // n)
            self.stats[n : 2 * n] += (
                over.unflatten(0, (-1, tokens)).kthvalue(tokens - share + 1, dim=1).values.double().sum(0)
            )

    def aux_loss(self, logits: torch.Tensor, scores: torch.Tensor, length: int) -> torch.Tensor | None:
        """Auxiliary loss of each token (N,), or None: the balance loss within its row, and the z-loss.

        length: tokens of a row.
        """
        moe, out = self.moe, None
        if moe.seq_aux_loss:
            p = shares(scores).unflatten(0, (-1, length)).mean(1)
            with torch.no_grad():
                chosen = best(scores, moe.top_k).view(-1, length * moe.top_k)
                counted = torch.promote_types(p.dtype, torch.float32)  # bfloat16 cannot count beyond 256
                f = torch.zeros_like(p, dtype=counted).scatter_add_(
                    1, chosen, torch.ones_like(chosen, dtype=counted)
                )
                f *= moe.num_experts / (moe.top_k * length)
            out = (moe.seq_aux_loss * (f * p).sum(-1)).repeat_interleave(length)
        if moe.z_loss:
            z = moe.z_loss * logits.logsumexp(-1).square()
            out = z if out is None else out + z
        return out

    @torch.no_grad()
    def end_step(self, stats: torch.Tensor, tokens: int, update_bias: bool = True) -> None:
        """End a step: store its tokens per expert, MaxVio and entropy, and update the bias.

        Args:
            stats: those of all processes, summed.
            tokens: tokens of the step over all logical ranks.
            update_bias: False leaves the bias as it is.
        """
        n, balance = self.moe.num_experts, self.moe.balance
        tokens_per_expert, bound, entropy = stats.split([n, n, 1])
        self.tokens_per_expert.copy_(tokens_per_expert)
        self.max_vio_sum[0] += max_vio(tokens_per_expert)
        self.max_vio_sum[1] += 1
        self.entropy.copy_(entropy[0] / (tokens * math.log(n)))
        if balance is None or not update_bias:
            return
        if balance.rule == "quantile":
            self.bias.copy_(-bound / LOGICAL_RANKS)
            return
        mean = tokens_per_expert.mean()
        lack = mean - tokens_per_expert
        # why softmax scores need another rate: settings.model.Balance
        rate = balance.rate * (4 / n if self.moe.score_func == "softmax" else 1)
        self.bias += (rate * (lack.sign() if balance.rule == "sign" else lack / mean)).to(self.bias.dtype)

    def reset(self) -> None:
        for buffer in self.buffers():
            buffer.zero_()


def max_vio(load: torch.Tensor) -> torch.Tensor:
    """MaxVio (Wang et al., arXiv 2408.15664): largest load / mean load - 1, of the last dimension.

    0: equal loads; experts / top_k - 1: every token has the same experts.
    """
    return load.amax(-1) / load.mean(-1) - 1


def shares(x: torch.Tensor) -> torch.Tensor:
    """x (N, n) divided by the sum of each row.

    A row whose scores have all underflowed stays zero (sigmoid(-104) is 0 in float32).
    """
    return x / (x.sum(-1, keepdim=True) + 1e-20)


def best(x: torch.Tensor, k: int) -> torch.Tensor:
    """Indices (N, k) of the k largest entries in each row of x (N, n), in no particular order."""
    return x.topk(k, sorted=False).indices


class MoE(nn.Module):
    """Mixture of experts (settings.model.MoE).

    y = shared(x) + sum over the chosen experts of gate * W_proj phi(W_fc x). With system.expert_parallel each
    process holds a share of the experts, and processes exchange rows by all-to-all.
    """

    def __init__(self, s: Settings) -> None:
        super().__init__()
        moe, d, n = s.model.mlp.moe, s.model.model_dim, s.numerics
        self.router, self.num_experts = Router(s), moe.num_experts
        parallel = s.system.expert_parallel and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if parallel else (0, 1)
        check_processes(s, self.world)
        mine = moe.num_experts // self.world

        def stack(label, rows, cols, projection, of=Views()):
            return parameter((mine, rows, cols), n.matrix, role="matrix", label=label, views=of, init=None,
                             parts=[linear_init(s, cols, projection)] * mine, first_part=self.rank * mine)

        self.c_fc = stack("expert_c_fc", moe.hidden, d, False, views.c_fc(s))
        self.c_proj = stack("expert_c_proj", d, moe.hidden, True, views.c_proj(s))
        self.shared = MLP(s, moe.shared) if moe.shared else None
        self.activation = MLP.ACTIVATIONS[s.model.mlp.activation]
        self.backend, self.fp8, self.products = s.system.experts, n.fp8_experts, products_dtype(s)

    def forward(
        self, x: torch.Tensor, aux_losses: list, compiled: bool, tokens_per_rank: int | None = None
    ) -> torch.Tensor:
        """x (R, T, D) -> (R, T, D).

        Args:
            aux_losses: list to which this layer's aux_loss (R T,), if it has one, is appended.
            compiled: whether this runs inside torch.compile.
            tokens_per_rank: tokens of a logical rank in this step; None: all of x is one rank.
        """
        chosen, gates, aux_loss = self.router(x, tokens_per_rank)
        if aux_loss is not None:
            aux_losses.append(aux_loss)
        backend = self.select_backend(x.device, self.products or x.dtype, compiled)
        p = experts.plan(chosen, self.num_experts, backend if self.world == 1 else "grouped")
        counts = self.router.stats[:self.num_experts] if self.training else self.router.validation_counts
        counts += p.counts
        rows = experts.gather(x.flatten(0, 1), p)
        rows = self.feed(rows, p) if self.world == 1 else self.expert_all_to_all(rows, p.counts, backend)
        y = experts.combine(rows, gates.to(rows.dtype), p).view(x.shape)
        return y if self.shared is None else self.shared(x, tokens_per_rank) + y

    def select_backend(self, device: torch.device, matmul_dtype: torch.dtype, compiled: bool) -> str:
        """Name of the kernels.experts backend for this device and dtype."""
        try:
            return experts.choose(
                self.backend, device, matmul_dtype, (self.c_fc.size(1), self.c_fc.size(2)), compiled
            )
        except ValueError as error:
            raise UserError(f"system.experts={self.backend}: {error}") from None

    def feed(self, rows: torch.Tensor, p: experts.Plan) -> torch.Tensor:
        """Apply its expert to each row; rows (P, D) are sorted by expert."""
        eight = experts.fake_fp8 if self.fp8 and self.training else lambda t: t
        d = self.products or rows.dtype
        c_fc, c_proj = self.c_fc.to(d), self.c_proj.to(d)
        hidden = self.activation(experts.grouped_linear(eight(rows.to(d)), eight(c_fc), p).to(rows.dtype))
        return experts.grouped_linear(eight(hidden.to(d)), eight(c_proj), p).to(rows.dtype)

    def expert_all_to_all(self, rows: torch.Tensor, counts: torch.Tensor, backend: str) -> torch.Tensor:
        """`feed` with expert parallelism: send rows to the processes of their experts and get them back.

        Waits for the GPU once, because the host must know the number of rows to exchange.
        """
        coming = experts.exchange_counts(counts, self.world)
        sent, received = torch.stack([counts.view(self.world, -1).sum(1), coming.sum(1)]).tolist()
        mine = experts.exchange(rows, received, sent)
        owner = torch.arange(len(self.c_fc), device=rows.device).repeat(self.world)
        owner = owner.repeat_interleave(coming.flatten(), output_size=len(mine))
        p = experts.plan(owner[:, None], len(self.c_fc), backend)
        done = self.feed(experts.gather(mine, p), p)
        back = experts.combine(done, done.new_ones(len(mine), 1), p)
        return experts.exchange(back, sent, received)
