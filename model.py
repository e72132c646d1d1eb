"""GPT: embedding, blocks on the residual stream, head and losses. Their parts are in layers/.

The constructors choose parts from the settings once; forward reads like the equations. A feature that is off
is None or a plain constant, and costs nothing. Shapes: R rows (sequences), T tokens, D model_dim, H heads, K
head_dim, F hidden width, V padded vocabulary, L layers, E experts. Every rule that looks back acts along T;
nothing joins across R.

No dtype is written here: all come from the precision plan (settings.numerics).
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from common.errors import UserError
from kernels import attention
from kernels.shared_table import gathered
from layers.attention import Attention, AttnCoefs, AttnMeta, Cache, Context, SALambdas, cached_tokens
from layers.bigram import Bigram
from layers.head import Head
from layers.latent import LatentAttention
from layers.mlp import MLP
from layers.moe import MoE, Router
from layers.mtp import MTPModule, within_documents
from layers.primitives import Norm, dtype, normal, parameter, uniform
from layers.residual import Residual, Stream
from layers.rotary import Rotary, RotaryTables
from layers.signed_gains import fill_gains
from layers.smear import OutputSmear, Smear
from layers.specs import LayerSpec, layer_specs
from layers.values import ValueEmbed, ValueResidual
from schedule import Windows, layer_spans, shape
from settings import Settings, renames
from settings.data import longest_document
from settings.model import padded_vocab, table_rows
from updates.views import mark_depth


# ----- embedding --------------------------------------------------------------------------------------------

class Embedding(nn.Module):
    """Token ids (R, T) -> stream (R, T, D).

    When tied, the table is also the head's weight and is updated with the settings of optim.lm_head.
    """

    def __init__(self, s: Settings) -> None:
        super().__init__()
        m, n = s.model, s.numerics
        tied = m.head.untied is None
        if tied and m.init.head_std is not None:
            init = normal(m.init.head_std)
        elif m.init.scheme == "gpt2":
            init = normal(0.02)
        else:  # records 2-7: a tied table has the head's default linear initialisation
            init = uniform(1 / math.sqrt(m.model_dim)) if tied else normal(1.0)
        rows = padded_vocab(s) if tied else table_rows(s)
        self.weight = parameter(
            (rows, m.model_dim), n.table, role="lm_head" if tied else "embed", label="embed", init=init
        )
        self.positions = None
        if m.embed.learned_positions:
            self.positions = parameter(
                (s.data.seq_len, m.model_dim), n.table, role="embed", label="positions", init=normal(0.02)
            )
        self.second = None
        if m.embed.second:
            self.second = parameter(
                (table_rows(s), m.model_dim), n.table, role="embed", label="embed2",
                init=normal(0.02 if m.init.scheme == "gpt2" else 1.0)
            )
        self.smear = Smear(s) if m.embed.smear else None
        self.norm = Norm(s) if m.embed.norm else None
        self.residual_dtype = dtype(n.residual)

    def forward(
        self, tokens: torch.Tensor, start: int = 0, table: torch.Tensor | None = None,
        cache: Cache | None = None
    ) -> torch.Tensor:
        """The embedded tokens (R, T, D).

        Args:
            tokens: (R, T) int64.
            start: position of the first token, for learned positions.
            table: used instead of self.weight while the embedding is tied to a head that is untied later.
            cache: Cache of a generation, for the smear, or None.
        """
        x = F.embedding(tokens, self.weight if table is None else table).to(self.residual_dtype)
        if self.smear is not None:
            x = self.smear(x, cache)
        if self.positions is not None:
            x = x + self.positions[start:start + tokens.size(1)].to(self.residual_dtype)
        return x if self.norm is None else self.norm(x)

    def second_rows(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """Rows (R, T, D) of the second table for tokens (R, T), normed like the first one's; or None."""
        if self.second is None:
            return None
        x = F.embedding(tokens, self.second).to(self.residual_dtype)
        return x if self.norm is None else self.norm(x)


class Block(nn.Module):
    """Attention and MLP, each with its norm; either may be dropped in a layer (records 17 and 30)."""

    def __init__(self, s: Settings, spec: LayerSpec, rotary: Rotary | None) -> None:
        super().__init__()
        self.attn = self.mlp = None
        if spec.attn is not None:
            self.rotary = rotary  # one module for all layers of the same width
            self.attn_norm = nn.Identity() if s.model.attn.raw_input else Norm(s)
            self.attn = LatentAttention(s, spec.attn) if s.model.attn.latent else Attention(s, spec.attn)
        if spec.mlp is not None or spec.moe:
            self.mlp_norm = Norm(s)
            self.mlp = MoE(s) if spec.moe else MLP(s, spec.mlp, spec.c_fc_factor)
        self.parallel = MLP(s, spec.mlp) if spec.parallel_mlp else None  # of the same input (record 92)


# ----- GPT --------------------------------------------------------------------------------------------------

class GPT(nn.Module):
    """The whole model: embedding, L blocks on the residual stream, head.

    The constructor leaves the weights empty; `initialise(seed)` fills them. Each tensor draws from a
    generator keyed by (seed, name), so switching a feature changes no other weight ("paired by seed").
    """

    def __init__(self, s: Settings, specs: tuple[LayerSpec, ...] | None = None) -> None:
        """specs: the specification of each layer; None: derived from the settings."""
        super().__init__()
        self.settings = s
        self.first_tokens_per_rank = shape(s, 0).tokens_per_rank
        self.specs = layer_specs(s) if specs is None else specs
        self.embed = Embedding(s)
        self.bigram = Bigram(s) if s.model.embed.bigram else None
        widths = dict.fromkeys(
            spec.attn.rotary for spec in self.specs if spec.attn is not None and spec.attn.rotary
        )
        rotaries = {width: Rotary(s, width) for width in widths}
        self.rotaries = nn.ModuleList(rotaries.values())
        self.blocks = nn.ModuleList(
            Block(s, spec, rotaries.get(spec.attn and spec.attn.rotary)) for spec in self.specs
        )
        mark_depth(s, self.blocks)
        self.residual = Residual(s, self.specs)
        self.values = None
        if s.model.attn.value_residual:
            self.values = ValueResidual(s)
        elif s.model.attn.value_embed:
            self.values = ValueEmbed(s, self.specs)
        self.sa_lambdas = SALambdas(s, self.specs) if s.model.attn.sa_lambdas else None
        self.norm = Norm(s)
        self.smear = OutputSmear(s) if s.model.head.smear else None
        self.lm_head = Head(s)
        self.mtp = None
        if s.model.head.mtp and s.model.head.mtp.module:
            self.mtp_layer = max(i for i, spec in enumerate(self.specs) if spec.attn is not None)
            attn = dataclasses.replace(self.specs[self.mtp_layer].attn, value_table=None, value_gate=None)
            spec = LayerSpec(attn, s.model.mlp.expansion * s.model.model_dim, False)
            self.mtp = MTPModule(s, Block(s, spec, rotaries.get(attn.rotary)))
        self.train_dtype, self.eval_dtype = dtype(s.numerics.matmul), dtype(s.numerics.eval_matmul)
        self.init_grid = dtype(s.numerics.init_grid)
        self.sees_all = not s.model.attn.document_mask and s.model.attn.window is None
        self.rotary_tables = RotaryTables(s, self.specs, rotaries.values())
        self.compiled = False
        self.recompute = s.system.activation_checkpoint == "on"
        self.passed = set()  # faster attention backends that cannot run here, each with the reason
        self.tied = self.tied_at_first()  # the embedding is the head's weight until the trainer unties them

    def forward(
        self, tokens: torch.Tensor, targets: torch.Tensor | None = None, context: Context | None = None,
        cache: Cache | None = None, target_weights: torch.Tensor | Sequence[float] | None = None,
        prefix: torch.Tensor | None = None, prefix_weight: torch.Tensor | float | None = None,
        candidates: torch.Tensor | None = None, corrections: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Losses of each token (R, T); without targets, logits (R, T, V).

        Args:
            tokens: (R, T) int64.
            targets: (R, T) int64, or None.
            context: attention metadata and tokens per logical rank, from GPT.context. None is allowed only
                without document mask and window (records 1-11), and then means the first stage.
            cache: `new_cache()` for generation, extended here, or None.
            target_weights, prefix, prefix_weight, candidates, corrections: as in Head.losses. With an MTP
                module the second target weight applies to the module's loss.
        """
        if context is None and not self.sees_all:
            raise ValueError("this model has documents or a window: call it with context=model.context(...)")
        matmul_dtype = self.train_dtype if self.training else self.eval_dtype
        start = 0 if cache is None else max(cached_tokens(c) for c in cache)
        if start and tokens.size(1) != 1:
            raise ValueError("after a cache comes one token at a time")
        x0 = self.embed(tokens, start, self.lm_head.weight if self.tied else None, cache)  # (R, T, D)
        stream = self.residual.start(
            x0, self.bigrams(tokens, cache, context), self.embed.second_rows(tokens)
        )
        x = stream.begin()
        mix = self.values.begin(tokens, stream) if self.values is not None else None
        lambdas = self.sa_lambdas.begin() if self.sa_lambdas is not None else None
        aux_losses = []
        for i, layer in enumerate(self.layers()):
            stream.enter(i, x)
            x = stream.mix("skip", i, x)
            x = stream.mix("in", i, x).to(x0.dtype)
            x = layer(i, x, stream, mix, lambdas, context, cache, aux_losses)
            stream.keep(f"saved.{i}", x)
        stream.enter(len(self.blocks), x)
        h = stream.mix("out", len(self.blocks), x)
        x = stream.reuse(self.norm(h), self.norm)
        x = (x if self.smear is None else self.smear(x, cache)).to(matmul_dtype)
        size = self.tokens_per_rank(context)
        if targets is None:
            return self.lm_head(x, self.embed.weight, size)
        if context is not None and context.impossible is not None:
            return self.lm_head.masked_losses(x, self.embed.weight, targets, tokens, context.impossible)
        with_module = self.mtp is not None and target_weights is not None
        losses = self.lm_head.losses(
            x, self.embed.weight, targets, target_weights[:1] if with_module else target_weights,
            prefix=prefix, prefix_weight=prefix_weight, candidates=candidates, corrections=corrections,
            tokens_per_rank=size
        )
        if with_module and len(target_weights) > 1:
            losses = losses + target_weights[1] * self.module_losses(h, targets, context, matmul_dtype)
        # an aux loss adds its gradient and exactly zero to the value: the reported loss stays a cross entropy
        for aux in aux_losses:
            losses = losses + (aux - aux.detach()).view(targets.shape)
        return losses

    def bigrams(
        self, tokens: torch.Tensor, cache: Cache | None, context: Context | None
    ) -> torch.Tensor | None:
        """Rows (R, T, D) of the bigram table for tokens (R, T), or None without a table.

        cache: of a generation: holds the tokens before these, and is extended by them.
        """
        if self.bigram is None:
            return None
        past = None if cache is None else cache.tokens
        if cache is not None:
            cache.tokens = tokens if past is None else torch.cat([past, tokens], 1)
        return self.bigram(tokens, past, None if context is None else context.bigrams)

    def tokens_per_rank(self, context: Context | None) -> int | None:
        """Tokens of a logical rank in this training step.

        None in validation, where nothing is counted per rank and the graph must not depend on the step.
        """
        if not self.training:
            return None
        told = None if context is None else context.tokens_per_rank
        return self.first_tokens_per_rank if told is None else told

    def module_losses(
        self, h: torch.Tensor, targets: torch.Tensor, context: Context | None, matmul_dtype: torch.dtype
    ) -> torch.Tensor:
        """Cross entropies (R, T) of the MTP module, which predicts the token after the next one.

        Zero where that token belongs to another document. h: the stream (R, T, D) after the last block.
        """
        e = self.embed(targets, table=self.lm_head.weight if self.tied else None)
        meta = AttnMeta(None, self.rotary_tables.scales[self.mtp_layer])
        if context is not None:
            meta = context.layers[self.mtp_layer]
        size = self.tokens_per_rank(context)
        x = self.mtp(h, e, meta, matmul_dtype)
        losses = self.lm_head.losses(x, self.embed.weight, targets.roll(-1, 1), tokens_per_rank=size)
        keep = within_documents(None if context is None else context.documents, targets)
        return losses.masked_fill(~keep, 0.0)

    def layers(self) -> list[Callable]:
        """The function that runs each layer: `layer`, or `layer` under activation checkpointing."""
        plain = [self.layer] * len(self.blocks)
        if not (self.recompute and self.training):
            return plain
        again = functools.partial(checkpoint, self.layer, use_reentrant=False, preserve_rng_state=False)
        first = 1 if isinstance(self.values, ValueResidual) else 0  # layer 0 stores its values for the others
        return plain[:first] + [again] * (len(self.blocks) - first)

    def layer(
        self, i: int, x: torch.Tensor, stream: Stream, mix: Callable | None, lambdas: Callable | None,
        context: Context | None, cache: Cache | None, aux_losses: list[torch.Tensor]
    ) -> torch.Tensor:
        """Attention and MLP of layer i on the stream x (R, T, D).

        Re-run by activation checkpointing (system.activation_checkpoint), so it must be free of side effects;
        exceptions: `cache`, and without recomputation `aux_losses` and layer 0's values.
        """
        block, matmul_dtype = self.blocks[i], self.train_dtype if self.training else self.eval_dtype
        y = None
        if block.attn is not None:
            mix_values = None if mix is None else functools.partial(mix, i)
            meta = AttnMeta(None, self.rotary_tables.scales[i]) if context is None else context.layers[i]
            h = block.attn_norm(stream.attn_input(block.attn.spec.saved_input, x)).to(matmul_dtype)
            stream.keep(f"attn_in.{i}", h)
            y = block.attn(h, block.rotary, mix_values, meta, None if cache is None else cache[i],
                           self.attn_coefs(i, stream, lambdas))
        x = stream.mix("attn", i, x, y)
        stream.keep(f"attn.{i}", x)
        y = None
        if block.mlp is not None:
            h = block.mlp_norm(stream.mlp_input(x)).to(matmul_dtype)
            stream.keep(f"mlp_in.{i}", h)
            size = self.tokens_per_rank(context)
            if isinstance(block.mlp, MoE):
                y = block.mlp(h, aux_losses, self.compiled, size)
            else:
                y = block.mlp(h, size)
            if block.parallel is not None:
                y = y + block.parallel(h, size)
        x = stream.mix("mlp", i, x, y)
        return x

    def attn_coefs(self, i: int, stream: Stream, lambdas: Callable | None) -> AttnCoefs:
        """The coefficients of layer i's attention: factors of its projections, and what token gates give."""
        w1, w2 = stream.by_head("w1", i), stream.by_head("w2", i)
        return AttnCoefs(
            *((None, None) if lambdas is None else lambdas(i)), gate=stream.by_head("attn", i),
            xsa=stream.by_head("xsa", i), compose=None if w1 is None else (w1, w2)
        )

    def new_cache(self, absorbed: bool | None = None) -> Cache:
        """An empty Cache for generation.

        absorbed: cache latents instead of keys and values (LatentAttention); None: if the model supports it.
        ValueError if it does not: without latents, or with value_residual or value_embed.
        """
        able = self.settings.model.attn.latent is not None and self.values is None
        if absorbed and not able:
            raise ValueError(
                "a latent cache needs model.attn.latent, and neither value_residual nor value_embed with it"
            )
        return Cache([None] * (3 if able and absorbed is not False else 2) for _ in self.blocks)

    def context(
        self, tokens: torch.Tensor, bos: int, windows: Windows | None, cached: bool = False,
        max_docs: int | None = None, max_seqlen: int | None = None, tokens_per_rank: int | None = None,
        documents: torch.Tensor | None = None
    ) -> Context:
        """The attention metadata of one forward pass, computed outside the compiled forward.

        Layers with the same span share one view.

        Args:
            tokens: (R, T) int64.
            bos: the token that begins each document.
            windows: schedule.Windows of the step, or None; with YaRN the windows last given to update_yarn.
            cached: whether only the last token is new and the others are in a cache.
            max_docs, max_seqlen: upper bounds known on the host, so that nothing waits for the GPU.
            tokens_per_rank: tokens of a logical rank in this step; None: as in the first step.
            documents: (R, T) growing numbers of what attention keeps apart; None: the documents, if masked.
        """
        a, scales = self.settings.model.attn, self.rotary_tables.scales
        if not self.rotary_tables.stands_at(windows):
            raise ValueError("the rotary tables are of another window: call model.update_yarn(windows) first")
        if self.sees_all:
            layers = [spec.attn and AttnMeta(None, scale) for spec, scale in zip(self.specs, scales)]
            return self.with_bigrams(Context(layers, tokens_per_rank), tokens)
        if documents is None and a.document_mask:
            documents = segments(tokens == bos, a.segment if self.training else None)
        views, spans = {}, layer_spans(self.specs, windows)
        for paired, span in {(spec.attn.paired, span) for spec, span in zip(self.specs, spans) if spec.attn}:
            window = attention.CAUSAL if span is None else attention.Window(*span, a.window.block)
            line, mine, longest = tokens, documents, max_seqlen
            if paired:  # two positions a token
                line = tokens.repeat_interleave(2, 1)
                mine = None if documents is None else documents.repeat_interleave(2, 1)
                longest = None if max_seqlen is None else 2 * max_seqlen
            views[paired, span] = (
                (mine, window) if cached else self.view(line, mine, window, max_docs, longest, 1 + paired)
            )
        layers = [
            spec.attn
            and AttnMeta(views[spec.attn.paired, span], scale, self.composition(spec, documents, scale))
            for spec, span, scale in zip(self.specs, spans, scales)
        ]
        layers = self.traceable(layers) if self.compiled and not cached else layers
        documents = documents if self.mtp is not None else None
        return self.with_bigrams(Context(layers, tokens_per_rank, documents), tokens)

    def with_bigrams(self, context: Context, tokens: torch.Tensor) -> Context:
        """The context, for a compiled forward with the rows of a table that is looked up outside of it: one
        with sparse gradients in training, or one that is shared out over processes."""
        if self.compiled and self.bigram is not None and (
                self.bigram.world > 1 or self.training and self.bigram.table.takes_rows):
            context.bigrams = self.bigram.look_up(tokens)
        return context

    def composition(
        self, spec: LayerSpec, documents: torch.Tensor | None, scale: float | None
    ) -> tuple | None:
        """Documents (R, T) and softmax scale of a layer whose heads are composed, otherwise None."""
        if spec.attn.compose is None:
            return None
        return documents, 1 / math.sqrt(spec.attn.qk) if scale is None else scale

    def traceable(self, layers: list[AttnMeta | None]) -> list[AttnMeta | None]:
        """The metadata for a compiled forward.

        With FlashAttention, window and scale become inputs of the graph (attention.traceable).
        """
        kinds, out = [spec.attn and (spec.attn.qk, spec.attn.paired) for spec in self.specs], list(layers)
        for kind in {*kinds} - {None}:
            mine = [i for i, k in enumerate(kinds) if k == kind]
            scale = self.rotary_tables.scales[mine[0]]
            metas = attention.traceable([layers[i].view for i in mine], scale, kind[0])
            for i, meta in zip(mine, metas):
                out[i] = AttnMeta(*meta, layers[i].compose)
        return out

    def update_yarn(self, windows: Windows | None) -> None:
        """Recompute the rotary tables and softmax scales if the long window has changed (YaRN, record 31)."""
        self.rotary_tables.update(windows)

    def view(
        self, tokens: torch.Tensor, documents: torch.Tensor | None, window: attention.Window,
        max_docs: int | None, max_seqlen: int | None, positions: int = 1
    ) -> attention.View:
        """The attention.View of one window, for the backend that system.attention selects.

        positions: of each token: 2 with paired heads.
        """
        s, length = self.settings, tokens.size(1)
        matmul_dtype = self.train_dtype if self.training else self.eval_dtype
        if tokens.is_meta:  # shapes only, for which `attend` needs no more than the backend of a GPU
            flash = window.blocks is None and matmul_dtype.itemsize == 2
            auto = "varlen" if flash else "flex"
            return attention.View(auto if s.system.attention == "auto" else s.system.attention, None)
        try:
            backend = attention.choose(
                s.system.attention, tokens.device, documents=documents is not None, window=window,
                tokens=length, requires_grad=torch.is_grad_enabled(), dtype=matmul_dtype,
                compiled=self.compiled, passed=self.passed
            )
            if backend not in attention.FLASH:  # the block sizes of `banded` would depend on the text
                max_seqlen = None
            if max_seqlen is None and self.training and s.data.loader == "packed":
                max_seqlen = positions * longest_document(s)
            return attention.view(
                documents, window, backend, rows=len(tokens), tokens=length, device=tokens.device,
                dtype=matmul_dtype, max_seqlen=max_seqlen, max_docs=max_docs
            )
        except ValueError as error:
            raise UserError(f"system.attention={s.system.attention}: {error}") from None

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Fill every parameter and table.

        Values are drawn on the CPU in float32, so they are equal on all devices.
        """
        for name, p in self.named_parameters():
            drawn_as = name if p.drawn_as is None else f"{name.rpartition('.')[0]}.{p.drawn_as}"
            first_name = renames.first_parameter(drawn_as)
            p.drawn_by = [f"{seed}/{first_name}/{p.first_part + i}" for i in range(len(p.parts))]
            for i, init in enumerate(p.parts):
                target = p[i] if len(p.parts) > 1 else p
                generator = generator_of(p.drawn_by[i])
                # a table of constants may be larger than the host's memory
                size = [1] * target.dim() if getattr(init, "constant", False) else target.shape
                values = init(torch.empty(size, dtype=torch.float32), generator)
                if p.role in ("matrix", "lm_head") and p.dim() > 1:
                    values = values.to(self.init_grid)  # record 10 rounded the linear weights once
                target.copy_(values)
        if self.bigram is not None and self.bigram.signs is not None:
            self.bigram.draw_signs(generator_of(f"{seed}/bigram.signs"))
        if self.settings.model.init.signed_gains is not None:
            fill_gains(self.blocks, self.settings, lambda layer: generator_of(f"{seed}/gains.{layer}"))
        self.rotary_tables.reset()
        self.tied = self.tied_at_first()
        for router in self.routers():
            router.reset()
        for mlp in self.fp8_mlps():
            mlp.fp8.reset()

    def tied_at_first(self) -> bool:
        """Whether training begins with the head's weight as the embedding, although the head is untied."""
        untied = self.settings.model.head.untied
        return untied is not None and untied.tied_until is not None

    def fp8_mlps(self) -> list[MLP]:
        """The MLPs that use FP8 in training."""
        found = [mlp for block in self.blocks for mlp in (block.mlp, block.parallel) if isinstance(mlp, MLP)]
        return [mlp for mlp in found if mlp.fp8 is not None]

    def prepare_compile(self) -> None:
        """Call this before torch.compile: shapes in the graph must not depend on the data."""
        self.compiled = True
        # The number of exchanged rows depends on the data. A decorator would load the compiler in every run.
        for _, moe in self.mixtures():
            moe.expert_all_to_all = torch.compiler.disable(moe.expert_all_to_all)

    # ----- experts

    def mixtures(self) -> list[tuple[int, MoE]]:
        """[(layer number, MoE)] of the layers that have experts."""
        return [(i, block.mlp) for i, block in enumerate(self.blocks) if isinstance(block.mlp, MoE)]

    def routers(self) -> list[Router]:
        return [moe.router for _, moe in self.mixtures()]

    def tokens_per_expert(self) -> dict[str, torch.Tensor]:
        """{parameter name: (E,) tokens of each of its experts in the last whole step}.

        The tensors are views of the routers' buffers, so they follow later steps.
        """
        out = {}
        for i, moe in self.mixtures():
            mine = moe.router.tokens_per_expert.view(moe.world, -1)[moe.rank]
            out |= {f"blocks.{i}.mlp.c_fc": mine, f"blocks.{i}.mlp.c_proj": mine}
        return out

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """state_dict on the CPU with all experts and rows, on every process (collective where these are
        shared out).

        While embedding and head are tied, it holds the weight under both names.
        """
        state = {name: value.detach().cpu() for name, value in self.state_dict().items()}
        if self.tied:
            state["embed.weight"] = state["lm_head.weight"]
        for i, moe in self.mixtures():
            if moe.world == 1:
                continue
            for name, p in (("c_fc", moe.c_fc), ("c_proj", moe.c_proj)):
                state[f"blocks.{i}.mlp.{name}"] = gathered(p.detach(), moe.world)
        if self.bigram is not None and self.bigram.world > 1:
            state["bigram.table"] = gathered(self.bigram.table.detach(), self.bigram.world)
        return {name: value.clone() for name, value in state.items()}

    # ----- accounting

    def sizes(self) -> list[tuple[nn.Parameter, int, int]]:
        """[(parameter, elements over all processes, elements used for one token)]."""
        stacks = {id(p): moe for _, moe in self.mixtures() for p in (moe.c_fc, moe.c_proj)}
        out = []
        for p in self.parameters():
            moe = stacks.get(id(p))
            n = p.numel() * (self.bigram.world if p.label == "bigram" else 1)
            out.append((p, n, n) if moe is None else
                       (p, p[0].numel() * moe.num_experts, p[0].numel() * moe.router.moe.top_k))
        return out

    def num_parameters(self) -> int:
        return sum(whole for _, whole, _ in self.sizes())

    def num_active(self) -> int:
        """Active parameters per token: all but the experts that the token is not routed to."""
        return sum(active for _, _, active in self.sizes())

    def flops_per_token(self) -> int:
        """Training FLOPs per token of products with weights: 6 per active matrix parameter, head included.

        Embedding tables are only read. attention_flops_per_token counts attention's own products. An MTP
        module uses the head a second time.
        """
        found = [(p, active) for p, _, active in self.sizes() if p.dim() > 1]
        active = sum(n for p, n in found if p.role in ("matrix", "lm_head", "router"))
        return 6 * (active + sum(n for p, n in found if self.mtp is not None and p.role == "lm_head"))

    def attention_flops_per_token(self, windows: Windows | None = None) -> float:
        """Training FLOPs per token of attention's own products: 6 per channel of a visible key and value.

        Counted for rows of data.seq_len in these windows (schedule.Windows or None). Document masks hide
        more keys, but depend on the text and are ignored.
        """
        s, total = self.settings, 0.0
        layers = [*zip(self.specs, layer_spans(self.specs, windows))]
        if self.mtp is not None:
            layers.append(layers[self.mtp_layer])  # the module's attention is like that of this layer
        for spec, span in layers:
            if spec.attn is not None:
                window = (
                    attention.CAUSAL if span is None else attention.Window(*span, s.model.attn.window.block)
                )
                channels = spec.attn.heads * (spec.attn.qk + spec.attn.v)
                total += 6 * channels * attention.keys_seen(window, s.data.seq_len)
        return total


def generator_of(key: str) -> torch.Generator:
    """The generator of an initial value that goes by this key."""
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def segments(begins: torch.Tensor, longest: int | None) -> torch.Tensor:
    """Numbers (R, T) int32, growing, of what attention keeps apart: documents, cut at multiples of `longest`.

    begins: (R, T) bool, whether a document begins at a token. longest: tokens; None: documents are not cut.
    """
    if longest is not None:
        at = torch.arange(begins.size(1), device=begins.device)
        start = torch.where(begins, at, 0).cummax(1).values  # of the token's document
        begins = begins | ((at - start) % longest == 0)
    return begins.cumsum(1, dtype=torch.int32)


def without_values(s: Settings) -> GPT:
    """The model of these settings on the meta device, without storage, for counting."""
    with torch.device("meta"):
        return GPT(s)
