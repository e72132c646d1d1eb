"""The vocabulary of a record: nested frozen dataclasses whose defaults are record 1, the scales, and check().

Three axes. `model`, `optim`, `schedule`, `data` and `validation` say what is computed (axis ml); `numerics` says in
which precision (it changes losses, so it belongs to a record's identity); `system` says how it is executed and must
not change the mathematics beyond the order of sums.

Each field is declared once, with `opt(...)`: its meaning in one line, its unit, what `--without` does to it and how it
shrinks with the scale. `python -m records features` prints exactly these lines; there is no second list.
Nothing here imports torch, so that bad settings are refused in a tenth of a second.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

from common.errors import UserError

LOGICAL_RANKS = 8  # the token buffers of a step, whatever the number of processes
NUMERICS_VERSION = 1  # raised by hand when a fix changes the results of existing settings


REFUSE = "refuse"  # --without has no sensible meaning: name --set and --revert instead
BEFORE = "before"  # --without restores the value before the record that last set the field


def opt(default, doc, *, unit="", off=BEFORE, needs="", idle="", shrink=""):
    """Declare one setting.

    doc: one line of meaning, with paper or person where an idea is used. unit: of a number (`step`, `token`, ...).
    off: what `--without` gives: a value, BEFORE or REFUSE (an optional sub-configuration always goes to None).
    needs: path (or path=value) without which the field means nothing and must keep its default. idle: one with which the
    field has no effect, whatever its value. shrink: how a scale changes it (see SCALES).
    """
    metadata = {"doc": doc, "unit": unit, "off": off, "needs": needs, "idle": idle, "shrink": shrink}
    if dataclasses.is_dataclass(default) and isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


# ----- model ------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Embed:
    padded: bool = opt(True, "embedding tables have the padded rows too (off: vocab_size rows)", off=REFUSE)
    learned_positions: bool = opt(True, "learned position table added to the token table (GPT-2)", off=False)
    norm: bool = opt(False, "RMS norm right after the embedding", off=False)


@dataclass(frozen=True)
class Yarn:
    """YaRN (Peng et al., arXiv 2309.00071) at every change of the long window from a to b blocks (record 31).

    A pair that turns r times within the old window keeps its frequency f if r >= beta, gets f a/b if r <= alpha, and a
    linear mix between; the attention scale is multiplied by 1 + gain ln(b/a).
    """
    alpha: float = opt(1.0, "turns at or below which a frequency shrinks by a/b", shrink="turns")
    beta: float = opt(32.0, "turns at or above which a frequency stays", shrink="turns")
    gain: float = opt(0.2, "growth of the attention scale per e-fold of the window", off=0.0)


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al., arXiv 2104.09864), half-split pairs (j, j + head_dim/2)."""
    base: float = opt(10000.0, "frequencies base^(-2j/head_dim)")
    half: bool = opt(False, "half of the pairs turn, with frequencies base^(-j/(head_dim/4 - 1)); the others stand still "
                            "(@YouJiacheng)", off=False)
    yarn: Yarn | None = opt(None, "frequencies and attention scale follow the long window as it grows",
                            needs="model.attn.window.growth=stages")


@dataclass(frozen=True)
class QKNorm:
    """RMS norm of queries and keys per head, no gain (Henry et al., arXiv 2010.04245)."""
    order: Literal["after_rope", "before_rope"] = opt(
        "after_rope", "side of the rotation; equal in exact arithmetic, they differ by rounding")


@dataclass(frozen=True)
class ValueResidual:
    """Values mixed with the values of the first block (Zhou et al., arXiv 2410.17897): v <- (1-lam) v + lam v1."""
    init: float = opt(0.5, "lam at initialisation; the constant when `learned` is off")
    learned: bool = opt(True, "lam is a learned scalar per block (off: the constant `init`)", off=False)


@dataclass(frozen=True)
class ValueEmbed:
    """Values mixed with rows of token tables (record 14, @KoszarskyB): value of the token itself, by layer."""
    tables: tuple[int, ...] = opt((0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11), "table of each layer; -1: none", off=REFUSE)
    mix: Literal["lerp", "pair"] = opt("lerp", "v <- (1-b) v + b ve, or v <- a v + b ve (layers without a table: a v)")
    init: float = opt(0.5, "a and b at initialisation; the constants when `learned` is off")
    learned: bool = opt(True, "a and b are learned scalars per layer (off: the constant `init`)", off=False)


@dataclass(frozen=True)
class Window:
    """Sliding window: how far back in its document a query sees, by a schedule. Sizes in tokens; `block` makes blocks.

    rule `tokens`: q - k < w. `blocks`: q//block - k//block < w/block (FlexAttention's tiles, record 16). `tokens_blocks`:
    both (record 15). `tokens_back`: q - k <= w, FlashAttention's left window (record 29).
    """
    rule: Literal["tokens", "tokens_blocks", "blocks", "tokens_back"] = opt("tokens", "what the window is counted in")
    block: int = opt(128, "tokens of a block", unit="token", off=REFUSE, shrink="length")
    growth: Literal["constant", "floor", "ceil", "stages"] = opt(
        "constant", "w over the run: `start`; start + (end-start) x in whole grains, rounded down or up (at least one), x the "
                    "fraction of steps done; or `stages` in equal shares of the steps")
    start: int = opt(1024, "window at the first step", unit="token", idle="model.attn.window.growth=stages", shrink="length0")
    end: int = opt(1024, "value that the window grows towards", unit="token", idle="model.attn.window.growth=stages|constant",
                   shrink="length0")
    grain: int = opt(64, "the window grows by whole multiples of this", unit="token",
                     idle="model.attn.window.growth=stages|constant", shrink="length")
    stages: tuple[int, ...] = opt((), "windows one after the other, each longer than the one before", unit="block",
                                  needs="model.attn.window.growth=stages")
    long_layers: tuple[int, ...] | None = opt(None, "layers that see the whole window; the others see half of its blocks, "
                                                    "at least one (off: all see all; Gemma 2, record 20)")
    final: int | None = opt(None, "long window in the final validation (record 31)", unit="block",
                            needs="model.attn.window.growth=stages")
    final_last_layer: int | None = opt(None, "window of the last layer in the final validation (record 33)", unit="block",
                                       needs="model.attn.window.final")


@dataclass(frozen=True)
class HeadGate:
    """Each head's output times sigmoid(W n), n the first channels of the block's normed input (record 28, @classiclarryd)."""
    channels: int = opt(12, "input channels", unit="channel", off=REFUSE)


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): keys and values of all heads from one narrow
    latent per token, which is all that generation has to keep, and a rotary part of the keys that the heads share."""
    kv: int = opt(256, "width of the latent of keys and values, RMS normed", unit="channel", off=REFUSE, shrink="width")
    query: int | None = opt(None, "width of a latent of the queries, RMS normed (off: straight from the stream)", unit="channel",
                            shrink="width")
    still: int = opt(96, "part of a head's query and key without rotation", unit="channel", off=REFUSE, shrink="width")
    turning: int = opt(32, "part of a head's query and key with rotary positions", unit="channel", off=REFUSE, shrink="width")
    value: int = opt(128, "width of a head's value", unit="channel", off=REFUSE, shrink="width")


@dataclass(frozen=True)
class Attention:
    num_heads: int = opt(12, "attention heads; head_dim = model_dim / num_heads, unless latent says otherwise", unit="head")
    rope: Rope | None = opt(None, "rotary position embedding of queries and keys")
    qk_norm: QKNorm | None = opt(None, "RMS norm of queries and keys per head")
    depth_scale: bool = opt(False, "attention branch times 1/sqrt(2 num_layers) before it is added", off=False)
    value_residual: ValueResidual | None = opt(None, "values mixed with those of the first block")
    value_embed: ValueEmbed | None = opt(None, "values mixed with rows of token tables")
    documents: bool = opt(False, "a query sees only keys of its own document, which begins with its end-of-text token",
                          off=False)
    window: Window | None = opt(None, "a query sees only the last keys")
    scale: float | None = opt(None, "softmax scale of the logits q.k (off: 1/sqrt of a query's width)", shrink="rsqrt_width")
    gate: HeadGate | None = opt(None, "gate on each head's output")
    latent: Latent | None = opt(None, "multi-head latent attention: keys and values from a narrow latent")
    drop_layers: tuple[int, ...] = opt((), "layers without attention", off=())


@dataclass(frozen=True)
class Balance:
    """Load balancing without auxiliary loss: a bias per expert enters the choice of experts, not their gates, and is moved
    once per step by the loads c of the whole batch (Wang et al., arXiv 2408.15664; DeepSeek-V3, arXiv 2412.19437)."""
    rule: Literal["sign", "proportional", "quantile"] = opt(
        "proportional", "b += rate sign(mean c - c); b += rate (mean c - c)/mean c; or from this batch the bias on the "
                        "logits at which each expert would have had its share (J. Su, as in Marin)")
    rate: float = opt(1e-2, "step of the bias on sigmoid scores; softmax scores, whose mean is 1/experts, get rate x "
                            "4/experts: at equal logits a score rises by 1/4 or about 1/experts of its logit, so that "
                            "both steps move the choice alike", idle="model.mlp.moe.balance.rule=quantile")
    freeze_frac: float = opt(0.0, "the bias stands still over this last fraction of the steps (DeepSeek-V3: 0.5 of "
                                  "14.8 T tokens, 0.034)", off=0.0)


@dataclass(frozen=True)
class MoE:
    """Mixture of experts (DeepSeekMoE: Dai et al., arXiv 2401.06066; DeepSeek-V3, arXiv 2412.19437, section 2.1.2): every token
    goes through the shared MLP and its top_k of many routed ones, none is dropped: y = shared(x) + sum_e g_e expert_e(x)."""
    experts: int = opt(8, "routed experts", unit="expert", off=REFUSE)
    top_k: int = opt(1, "routed experts of a token", unit="expert", off=REFUSE)
    hidden: int = opt(1536, "hidden width of a routed expert", unit="channel", off=REFUSE, shrink="width")
    shared: int = opt(1536, "hidden width of the shared expert, 0: none", unit="channel", off=REFUSE, shrink="width")
    score: Literal["sigmoid", "softmax"] = opt("sigmoid", "of the router's logits, one by one or over the experts")
    normalise: bool = opt(False, "gates of a token divided by their sum; not with top_k 1, where the router would get no "
                                 "gradient", off=False)
    gate_scale: float = opt(1.0, "gates times this")
    groups: int = opt(1, "experts in so many groups, of which a token may use the best few (by the sum of their two best)",
                      off=1)
    groups_kept: int = opt(1, "groups that a token may use", off=REFUSE)
    balance: Balance | None = opt(None, "bias on the choice, moved towards equal loads")
    sequence_loss: float = opt(0.0, "factor of the balance loss within each row (DeepSeek-V3, eq. 17)", off=0.0)
    z_loss: float = opt(0.0, "factor of the squared logsumexp of the router's logits (ST-MoE, arXiv 2202.08906)", off=0.0)
    dense_layers: tuple[int, ...] = opt((0,), "layers that keep the dense MLP", off=())


@dataclass(frozen=True)
class MLP:
    activation: Literal["gelu_tanh", "gelu", "relu_sq"] = opt(
        "gelu_tanh", "hidden activation; relu_sq = relu(x)^2 (So et al., Primer, arXiv 2109.08668)")
    expansion: int = opt(4, "hidden width / model_dim", off=REFUSE)
    drop_layers: tuple[int, ...] = opt((), "layers without MLP", off=())
    moe: MoE | None = opt(None, "mixture of experts instead of the MLP")


@dataclass(frozen=True)
class X0Mix:
    """Embedding re-injected at every block entry: x <- a x + b x0, learned (a, b) per block."""
    x: float = opt(1.0, "a at initialisation; the constant when `learned` is off")
    x0: float = opt(0.0, "b at initialisation; the constant when `learned` is off")
    learned: bool = opt(True, "a and b are learned scalars per block (off: the constants)", off=False)


@dataclass(frozen=True)
class UnetSkips:
    """U-net skips: outputs of the first half of the blocks, last in first out, added before the second half."""
    init: float = opt(1.0, "skip weight at initialisation; the constant when `learned` is off",
                      idle="model.residual.unet_skips.sigmoid")
    sigmoid: float | None = opt(None, "weight = sigmoid(s) instead, s this number at initialisation (record 32)")
    learned: bool = opt(True, "one learned weight per skip (off: the constant `init`)", off=False)


@dataclass(frozen=True)
class Residual:
    x0_mix: X0Mix | None = opt(None, "learned mix of the stream and the embedding at every block entry")
    unet_skips: UnetSkips | None = opt(None, "U-net skips from the first to the second half of the blocks")


@dataclass(frozen=True)
class Untied:
    init: Literal["linear", "zero"] = opt("linear", "initial head weight: as any linear layer, or zero")


@dataclass(frozen=True)
class Softcap:
    """Logits bounded smoothly (Gemma 2, arXiv 2408.00118): cap tanh(z / cap), or cap sigmoid(z / scale).

    cap sigmoid(z / scale) is (cap/2) tanh(z / (2 scale)) and a constant, which the softmax does not see.
    """
    form: Literal["tanh", "sigmoid"] = opt("tanh", "the bounding function", off=REFUSE)
    cap: float = opt(30.0, "bound of the logits", off=REFUSE)
    scale: float = opt(7.5, "divisor inside the sigmoid", needs="model.head.softcap.form=sigmoid")


@dataclass(frozen=True)
class Head:
    untied: Untied | None = opt(None, "own weight for the output head instead of the token table")
    softcap: Softcap | None = opt(None, "soft cap on the logits")
    logit_scale: Literal["one", "rsqrt_dim"] = opt("one", "logits times 1 or 1/sqrt(model_dim) before the soft cap")
    train_loss: Literal["mean", "sum"] = opt("mean", "over the tokens of a logical rank; a sum makes Adam's eps relatively "
                                                     "smaller and is else absorbed by Adam and Muon")


@dataclass(frozen=True)
class Init:
    scheme: Literal["gpt2", "uniform"] = opt(
        "gpt2", "gpt2: N(0, 0.02), projections N(0, 0.02/sqrt(2 num_layers)); uniform: U(+-bound/sqrt(fan_in)), tables N(0,1)")
    bound: float = opt(1.0, "half-width of the uniform scheme times sqrt(fan_in); its standard deviation is bound/sqrt(3 fan_in)")
    zero_proj: bool = opt(False, "attention-out and MLP-out weights start at zero (as in muP)", off=False)


@dataclass(frozen=True)
class Model:
    num_layers: int = opt(12, "blocks of attention and MLP", unit="layer", off=REFUSE)
    model_dim: int = opt(768, "width of the residual stream", unit="channel", off=REFUSE, shrink="width")
    vocab_size: int = opt(50257, "token ids of the tokenizer", unit="token id", off=REFUSE, shrink="vocab")
    pad_vocab_to: int = opt(1, "vocabulary padded to a multiple of this; the padding takes part in the softmax", off=1)
    norm: Literal["layernorm", "rmsnorm"] = opt(
        "layernorm", "layernorm: gain and bias; rmsnorm: neither (Zhang & Sennrich, arXiv 1910.07467)")
    bias: bool = opt(True, "bias vectors in the linear layers", off=False)
    embed: Embed = opt(Embed, "from token ids to the stream")
    attn: Attention = opt(Attention, "self-attention")
    mlp: MLP = opt(MLP, "feed-forward layers")
    residual: Residual = opt(Residual, "wiring of the residual stream")
    head: Head = opt(Head, "from the stream to logits")
    init: Init = opt(Init, "initial weights")


# ----- optimizer --------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Adam:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101), shared by all its groups."""
    beta1: float = opt(0.9, "decay of the first moment")
    beta2: float = opt(0.95, "decay of the second moment")
    eps: float = opt(1e-8, "added to the root of the second moment")
    eps_after_correction: bool = opt(True, "eps is added to the bias-corrected root, as in torch (off: to the raw root, record "
                                           "24, which makes it relatively larger at first)", off=BEFORE)


@dataclass(frozen=True)
class Group:
    """One AdamW group: the parameters with this role."""
    lr: float = opt(6e-4, "learning rate at factor 1")
    weight_decay: float = opt(0.1, "decoupled decay: p <- p - lr weight_decay p", off=0.0)


@dataclass(frozen=True)
class Scalars:
    lr: float = opt(6e-4, "learning rate; gains, biases and learned scalars never decay")


@dataclass(frozen=True)
class MomentumWarmup:
    start: float = opt(0.85, "momentum at step 0; rises linearly to optim.muon.momentum")
    steps: int = opt(500, "length of the rise", unit="step", shrink="steps")


@dataclass(frozen=True)
class Muon:
    """Muon (Jordan et al., kellerjordan.github.io/posts/muon): orthogonalised Nesterov momentum for the block matrices."""
    lr: float = opt(0.018, "learning rate at factor 1")
    momentum: float = opt(0.95, "decay of the momentum buffer; the update looks one step ahead (Nesterov)")
    averaged: bool = opt(False, "M <- mu M + (1-mu) g, update (1-mu) g + mu M (off: M <- mu M + g, g + mu M); they differ "
                                "while mu changes", off=False)
    momentum_warmup: MomentumWarmup | None = opt(None, "momentum rises over the first steps")
    scale: Literal["none", "sqrt_max", "sqrt_ratio"] = opt(
        "none", "update times 1, sqrt(max(rows, cols)) or sqrt(max(1, rows/cols)), of the matrix that is orthogonalised")
    up_shape: Literal["out_in", "in_out"] = opt(
        "out_in", "rows and cols of the MLP's up matrix in `scale`: 4d x d, or d x 4d as record 27 stores it")
    split_qkv: bool = opt(False, "orthogonalise q, k, v apart (off: as one 3d x d matrix)", off=False)
    ns_steps: int = opt(5, "Newton-Schulz iterations", off=REFUSE)
    move_idle: bool = opt(False, "an expert that got no token in a step moves by its momentum, which orthogonalised is a full "
                                 "step (off: it stays)", off=False, needs="model.mlp.moe")


@dataclass(frozen=True)
class Optim:
    adam: Adam = opt(Adam, "constants of AdamW")
    embed: Group = opt(Group, "token table (when it is not the head), position table, value tables")
    lm_head: Group = opt(Group, "output head; the shared table when tied")
    matrix: Group = opt(Group, "block matrices, unless optim.muon takes them")
    scalar: Scalars = opt(Scalars, "gains, biases and learned scalars")
    router: Group = opt(Group, "routers of the experts, by AdamW even beside Muon", needs="model.mlp.moe")
    muon: Muon | None = opt(None, "block matrices by Muon instead of AdamW")
    grad_clip: float | None = opt(1.0, "gradient scaled to at most this global norm", off=None)


@dataclass(frozen=True)
class Schedule:
    steps: int = opt(19560, "optimizer steps", unit="step", off=REFUSE, shrink="steps")
    lr: Literal["cosine", "trapezoid"] = opt(
        "cosine", "after the warm-up: cosine to zero, or constant and then linear to zero over cooldown_steps")
    warmup_steps: int = opt(700, "linear rise of the learning rate", unit="step", off=0, shrink="steps")
    cooldown_frac: float = opt(0.0, "linear fall over this last fraction of the steps, instead of cooldown_steps",
                               off=0.0, needs="schedule.lr=trapezoid")
    lr_floor: float = opt(0.0, "learning rate at the end of the fall", off=0.0, needs="schedule.lr=trapezoid")
    cooldown_steps: int = opt(0, "linear fall at the end (trapezoid)", unit="step", off=0,
                              needs="schedule.lr=trapezoid", shrink="steps")
    stages: tuple[float, ...] = opt((), "fractions of the steps, which add up to 1: a setting that has one value per stage goes "
                                        "through its values in this order", off=())


# ----- data, validation -------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Data:
    loader: Literal["shuffled", "per_rank", "synced", "bos_aligned", "packed"] = opt(
        "shuffled", "llm.c's shuffled slots; in order with a position per logical rank (which drift at shard ends), or one for "
                    "all; each rank from a document start; whole documents packed, cut at max_document")
    switch_at_equal: bool = opt(False, "a shard ends one token earlier (records 15-17)", off=False,
                                needs="data.loader=per_rank")
    max_document: int | None = opt(None, "longer documents lose their rest", unit="token", shrink="length",
                                   needs="data.loader=packed")
    tokens_per_rank: int | tuple[int, ...] = opt(
        65536, "tokens of one logical rank in one step, or one number per stage; eight of them make a step", unit="token",
                               off=REFUSE, shrink="batch")
    seq_len: int = opt(1024, "tokens attention sees: a rank's tokens are cut in rows of this length", unit="token",
                       off=REFUSE, shrink="length")
    first_batch_twice: bool = opt(False, "the first batch is used for steps 0 and 1 (the original reset its loader)",
                                  off=False, needs="data.loader=per_rank")
    wrap: bool = opt(True, "begin again after the last shard (off: running out of shards is an error)", off=False)


@dataclass(frozen=True)
class Validation:
    tokens: int = opt(10_485_760, "targets: the first ones of the validation shard", unit="token", off=REFUSE,
                      shrink="validation")
    seq_len: int = opt(1024, "context in validation", unit="token", off=REFUSE, shrink="length")
    every: int = opt(250, "validate every so many steps and after the last (below full: eight times)", unit="step", off=REFUSE)
    target: float | None = opt(3.28, "validation loss to reach, nats per token", off=None, shrink="target")


# ----- numerics ---------------------------------------------------------------------------------------------------

Dtype = Literal["bfloat16", "float32", "float64"]


@dataclass(frozen=True)
class FP8Head:
    """The head's matrix product in 8-bit floats while training (record 19): operands times these factors, then cast.

    Forward e4m3 (largest 448), gradients e5m2 (largest 57344); values beyond are clamped. Validation is not in FP8. The
    originals give `grad` for the gradient of a rank's mean or sum; what the trainer divides by is undone before the cast.
    """
    x: float = opt(2.0, "factor of the activations", shrink="rsqrt_width")
    w: float = opt(32.0, "factor of the weight")
    grad: float = opt(8192.0, "factor of the gradient of a token's own loss by its logits (softmax - target)")


@dataclass(frozen=True)
class FP8Down:
    """The MLPs' second product in e4m3 too, with delayed scales (record 89): made from maxima of before, so that an operand
    is read once. Activations: by layer and logical rank, from its last forward; 1 in the first. Weight: from last step."""
    activation: float = opt(1.8, "scale of the hidden activations times 448, over their largest one in the last forward")
    weight: float = opt(1.12, "scale of the weight times 448, over its largest entry of the step before")
    exact_steps: int = opt(16, "before the first step and after so many, the weight's scale is its largest entry now / 448",
                           unit="step", off=REFUSE, shrink="steps")


@dataclass(frozen=True)
class FP8MLP:
    """The MLPs' first product in e4m3 in the forward pass of training (record 84): operands over their scale, then cast.

    A scale is the largest entry / 448: of the weight, in `matmul`, and of the activations of a logical rank, so that a
    token's rounding depends on all tokens of its rank. The backward pass has the operands as they were. Validation is not
    in FP8.
    """
    down: FP8Down | None = opt(None, "the second product too")


@dataclass(frozen=True)
class Numerics:
    matmul: Dtype = opt("bfloat16", "operands and result of linear layers and attention")
    eval_matmul: Dtype = opt("bfloat16", "the same in validation")
    residual: Dtype = opt("bfloat16", "residual stream")
    matrix: Dtype = opt("float32", "stored weights of linear layers and their optimizer state")
    head: Dtype = opt("float32", "stored weight of an untied head")
    gate: Dtype = opt("float32", "stored weights of gates")
    table: Dtype = opt("float32", "stored embedding tables and their optimizer state")
    scalar: Dtype = opt("float32", "stored gains, biases, learned scalars and their optimizer state")
    router: Dtype = opt("float32", "stored weights and arithmetic of the routers, where close scores decide who is chosen")
    fp8_experts: bool = opt(False, "operands of the experts rounded to e4m3 while training, a scale per row (simulated: products "
                                   "stay in `matmul`); the backward pass uses the rounded ones", off=False, needs="model.mlp.moe")
    init_grid: Dtype = opt("float32", "linear weights are rounded to this grid once, at initialisation")
    norm: Dtype = opt("float32", "statistics of the norms")
    norm_eps: float = opt(1e-5, "added to the mean square (rmsnorm) or the variance (layernorm)")
    rope: Dtype = opt("float32", "stored cos and sin tables")
    rope_frequency: Dtype = opt("float32", "the frequencies that the tables are made from")
    rope_math: Dtype = opt("float32", "arithmetic of the rotation, at least (the wider of this, the tables and q, k)")
    softcap: Dtype = opt("float32", "arithmetic of the soft cap, at least")
    fp8_head: FP8Head | None = opt(None, "head in FP8 while training", needs="model.head.untied")
    fp8_mlp: FP8MLP | None = opt(None, "MLPs in FP8 in the forward pass of training", needs="model.mlp.activation=relu_sq")
    loss: Dtype = opt("float32", "cross entropy")
    newton_schulz: Dtype = opt("bfloat16", "Newton-Schulz iteration")
    newton_schulz_norm: Dtype = opt("float32", "Frobenius norm before the iteration, and the tensor it is taken from")
    newton_schulz_form: Literal["expanded", "factored"] = opt(
        "expanded", "aX + b(AX) + cA(AX), or aX + (bA + cAA)X: the same polynomial, other roundings")
    muon_update: Dtype = opt("float32", "the scaled Muon update before it is subtracted")
    adam: Dtype = opt("float32", "arithmetic of AdamW")
    adam_state: Literal["parameter", "bfloat16"] = opt("parameter", "stored moments of AdamW: dtype of the parameter, or this")


# ----- system -----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Kernels:
    """Which implementation of an operation runs; all compute the same up to rounding. auto: torch's own way, until a table of
    bench/results shows another one to be faster on the card."""
    loss: Literal["auto", "whole", "chunks", "triton"] = opt(
        "auto", "head and cross entropy: all logits at once; chunks of tokens, whose logits the backward pass makes again, so "
                "that they never exist in full; the same with fused Triton kernels. auto: whole, or on CUDA in chunks if they "
                "do not fit otherwise (system/memory.py)")
    muon: Literal["auto", "torch", "triton"] = opt(
        "auto", "Newton-Schulz: whole products, or half of each symmetric one and its mirror image (record 27). auto: torch",
        needs="optim.muon")
    mlp: Literal["auto", "torch", "triton"] = opt(
        "auto", "dense MLPs: step by step, or with relu^2 at the end of the first product (record 59). auto: torch",
        needs="model.mlp.activation=relu_sq")
    qk: Literal["auto", "torch", "triton"] = opt(
        "auto", "norm and rotation of queries and keys: step by step, or in one launch in float32 (as record "
                "90). auto: torch", needs="model.attn.rope")
    transpose: Literal["auto", "torch", "triton"] = opt(
        "auto", "transposed copies that the FP8 head's products need on CUDA: torch's, or in tiles (records 74 and 76). "
                "auto: torch", needs="numerics.fp8_head")


@dataclass(frozen=True)
class System:
    device: Literal["auto", "cpu", "cuda"] = opt("auto", "where to run; auto: CUDA when there is one")
    precision: Literal["record", "float32", "float64"] = opt(
        "record", "record: as `numerics` says; otherwise all of `numerics` that --set does not name is lifted to this dtype, "
                  "without FP8 (and hashed so)")
    compile: Literal["auto", "on", "off"] = opt("auto", "torch.compile of the model; auto: on CUDA")
    attention: Literal["auto", "dense", "documents", "banded", "flex", "varlen", "flash3", "flash4"] = opt(
        "auto", "attention backend (kernels/attention.py); all see the same keys. auto: the fastest for device and window")
    experts: Literal["auto", "grouped", "padded"] = opt(
        "auto", "how the rows of all experts are multiplied: torch's grouped_mm, or in blocks padded to one size "
                "(kernels/experts.py)", needs="model.mlp.moe")
    expert_parallel: bool = opt(False, "each process keeps its share of every layer's experts and the rows travel "
                                       "(all-to-all); off: all processes keep all experts", off=False, needs="model.mlp.moe")
    kernels: Kernels = opt(Kernels, "implementations of operations")
    cuda_graphs: bool = opt(False, "each update of the optimizer as a CUDA graph, captured in the warm-up", off=False)
    comm: Literal["auto", "replicated", "bucketed", "sharded", "allreduce_updates"] = opt(
        "auto", "gradients all-reduced during the backward pass (record 23) or after it in buckets (22), everyone updates all but "
                "Muon's matrices, which are shared out; a shard each of all, ZeRO (24); Muon's updates all-reduced (6). auto: sharded")
    reduction: Literal["ordinary", "ordered"] = opt(
        "ordinary", "ordered: the eight logical gradients are summed in one fixed binary tree (same bits on 1, 2, 4, 8)")
    ranks_per_forward: int = opt(0, "logical ranks in one forward pass; 0: all of the process's on CPU, on CUDA as many as "
                                   "make 65,536 tokens, or fewer if system/memory.py finds that they do not fit")
    recompute: Literal["auto", "on", "off"] = opt("auto", "blocks keep nothing for the backward pass, which goes through them "
                                                          "again; auto: if it does not fit otherwise (system/memory.py), on CUDA")
    warmup_steps: int = opt(-1, "untimed steps before the reset; -1: 3, compiled also one of each window")
    warmup_tokens: Literal["random", "real"] = opt("random", "what the untimed steps read")


@dataclass(frozen=True)
class Settings:
    model: Model = opt(Model, "axis ml: the model")
    optim: Optim = opt(Optim, "axis ml: the optimizer")
    schedule: Schedule = opt(Schedule, "axis ml: what changes over the steps")
    data: Data = opt(Data, "axis ml: the token stream")
    validation: Validation = opt(Validation, "axis ml: how the loss is measured")
    numerics: Numerics = opt(Numerics, "axis numerics: the precision plan")
    system: System = opt(System, "axis system: how it is executed")


# ----- derived numbers ----------------------------------------------------------------------------------------------

def head_dim(s):
    return s.model.model_dim // s.model.attn.num_heads


def query_dim(s):
    """Width of a head's query and key."""
    latent = s.model.attn.latent
    return latent.still + latent.turning if latent else head_dim(s)


def value_dim(s):
    """Width of a head's value."""
    return s.model.attn.latent.value if s.model.attn.latent else head_dim(s)


def rotary_dim(s):
    """The part of a head's query and key that rotary positions turn."""
    return s.model.attn.latent.turning if s.model.attn.latent else head_dim(s)


def padded_vocab(s):
    """Rows of the token table and classes of the softmax."""
    return math.ceil(s.model.vocab_size / s.model.pad_vocab_to) * s.model.pad_vocab_to


def table_rows(s):
    """Rows of the embedding tables."""
    return padded_vocab(s) if s.model.embed.padded else s.model.vocab_size


def validation_rows_at_once(rows, seq_len, cuda):
    """Rows of one forward pass in validation, where a logical rank has `rows`: 32,768 tokens on CUDA and 4,096 elsewhere, or
    one row that has more."""
    return min(rows, max(1, (32768 if cuda else 4096) // seq_len))


def ranks_per_forward(s, ranks, cuda):
    """How many of a process's `ranks` logical ranks go through the model at once: speed and memory, not mathematics."""
    if s.system.reduction == "ordered":
        return 1
    if s.system.ranks_per_forward:
        return min(s.system.ranks_per_forward, ranks)
    most = max(1, min(ranks, 65536 // max(per_stage(s.data.tokens_per_rank)))) if cuda else ranks
    return 1 << (most.bit_length() - 1)  # forwards of equal size, whose losses have equal shares


def recomputable(s):
    """Does a block's forward pass leave no trace, so that it can be done again?"""
    return s.model.mlp.moe is None and lookup(s, "numerics.fp8_mlp.down") is None


def per_stage(value):
    """The values of a setting that may have one per stage, as a tuple: of length 1 where one value holds for all stages."""
    return value if isinstance(value, tuple) else (value,)


def by_document(s):
    """Does the loader go by documents? Then a logical rank has one row, whatever its tokens (data.stream.BY_DOCUMENT)."""
    return s.data.loader in ("bos_aligned", "packed")


def tokens_per_step(s):
    """Tokens of a step, the mean over the stages. Numbers of single steps come from schedule.plan."""
    sizes = per_stage(s.data.tokens_per_rank)
    if len(sizes) == 1:
        return LOGICAL_RANKS * sizes[0]
    return LOGICAL_RANKS * sum(size * share for size, share in zip(sizes, s.schedule.stages))


# ----- scales -------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Scale:
    """Divisors of a record's sizes and the budget in training tokens (None: the record's own steps)."""
    width: int
    length: int
    batch: int
    budget_tokens: int | None
    validation_tokens: int | None
    vocab_size: int | None
    precision: str


# Chosen on models shaped like records 1, 5, 11, 33, 57 and 89; README "Scales" says why. The vocabulary of the
# embedded corpus is 256 bytes + 1000 merges + end of text, the small image of GPT-2's 256 + 50,000 + 1. The CPU scales
# lift the precision plan to float32, which is faster than bfloat16 at these widths (bench/throughput.py).
SCALES = {
    "full": Scale(1, 1, 1, None, None, None, "record"),
    "small": Scale(1, 1, 8, 40_000_000, 2_097_152, None, "record"),
    "tiny": Scale(8, 16, 128, 720_896, 65_536, 1257, "float32"),
    "micro": Scale(16, 16, 512, 73_728, 8_192, 1257, "float32"),
}


def scaled(s, name):
    """The settings at a scale: one pure function, no record names.

    Widths, lengths and batch shrink by the scale's divisors; every setting counted in steps is multiplied by
    steps / record's steps (at least 1 where it was at least 1); learning rates, head counts and windows in blocks stay.
    A row is never longer than a rank's share of the batch or of the validation tokens.
    """
    scale = SCALES[name]
    if name == "full":
        return s
    steps = max(1, round(scale.budget_tokens * scale.batch / tokens_per_step(s)))
    ratio = steps / s.schedule.steps
    rules = {
        "width": lambda v: v // scale.width,
        "length": lambda v: max(1, v // scale.length),
        "batch": lambda v: v // scale.batch,
        "vocab": lambda v: scale.vocab_size or v,
        "validation": lambda v: scale.validation_tokens,
        "length0": lambda v: v // scale.length,
        "rsqrt_width": lambda v: v * math.sqrt(scale.width),  # terms in 1/sqrt(width)
        "turns": lambda v: v / scale.length,  # of a rotary pair within a window
        "steps": lambda v: max(1, round(v * ratio)) if v else 0,
        "target": lambda v: None,  # a target belongs to a scale and a corpus; presets set their own
    }

    def shrink(node):
        changes = {}
        for f in dataclasses.fields(node):
            value = getattr(node, f.name)
            if dataclasses.is_dataclass(value):
                changes[f.name] = shrink(value)
            elif f.metadata["shrink"] and value is not None:
                changes[f.name] = elementwise(rules[f.metadata["shrink"]], value)
        return dataclasses.replace(node, **changes)

    s = shrink(s)
    if s.model.head.logit_scale == "rsqrt_dim":  # the step of such a head is a term in 1/sqrt(width) too
        lr = s.optim.lm_head.lr / math.sqrt(scale.width)
        s = dataclasses.replace(s, optim=dataclasses.replace(s.optim, lm_head=dataclasses.replace(s.optim.lm_head, lr=lr)))
    data = dataclasses.replace(s.data, wrap=True,  # a small corpus is read again, and the log says how often
                               seq_len=min(s.data.seq_len, row_limit(s)))
    validation = dataclasses.replace(s.validation, every=max(1, round(steps / 8)),  # enough points for a curve
                                     seq_len=min(s.validation.seq_len, s.validation.tokens // LOGICAL_RANKS))
    system = dataclasses.replace(s.system, precision=scale.precision)
    return dataclasses.replace(s, data=data, validation=validation, system=system)


def row_limit(s):
    """The longest row that the tokens of a logical rank allow in every stage."""
    sizes = per_stage(s.data.tokens_per_rank)
    return max(sizes) if by_document(s) else min(sizes)


def elementwise(rule, value):
    """rule(value), or where a setting has one value per stage, the rule applied to each."""
    return tuple(elementwise(rule, v) for v in value) if isinstance(value, tuple) else rule(value)


# ----- check --------------------------------------------------------------------------------------------------------

def check(s):
    """Refuse settings that contradict each other; every message names the paths and what to do."""
    def require(condition, message):
        if not condition:
            raise UserError(message)

    m, d, v = s.model, s.data, s.validation
    for path, value in [("model.num_layers", m.num_layers), ("model.model_dim", m.model_dim),
                        ("model.attn.num_heads", m.attn.num_heads), ("model.vocab_size", m.vocab_size),
                        ("model.pad_vocab_to", m.pad_vocab_to), ("schedule.steps", s.schedule.steps),
                        ("data.tokens_per_rank", min(per_stage(d.tokens_per_rank))), ("data.seq_len", d.seq_len),
                        ("validation.tokens", v.tokens), ("validation.seq_len", v.seq_len),
                        ("validation.every", v.every), ("model.mlp.expansion", m.mlp.expansion)]:
        require(value >= 1, f"{path} = {value}: must be at least 1")
    for path, most in MOST.items():
        value = lookup(s, path)
        value = max(value) if isinstance(value, tuple) else value
        require(value is None or value <= most, f"{path} = {value}: must be at most {most}")
    require(s.model.vocab_size <= 65536, f"model.vocab_size = {m.vocab_size}: shards hold 16-bit token ids (<= 65536)")
    require(m.model_dim % m.attn.num_heads == 0,
            f"model.model_dim = {m.model_dim} is not divisible by model.attn.num_heads = {m.attn.num_heads}")
    require(m.attn.rope is None or rotary_dim(s) % 2 == 0,
            f"model.attn.rope turns pairs and gets {rotary_dim(s)} channels of a head: change "
            + ("model.attn.latent.turning" if m.attn.latent else "model.attn.num_heads"))
    check_stages(s, require)
    for size in per_stage(d.tokens_per_rank) if not (by_document(s) and s.schedule.stages) else ():
        require(size % d.seq_len == 0, f"data.tokens_per_rank = {size} is not a multiple of data.seq_len = {d.seq_len}")
    require(v.tokens % (LOGICAL_RANKS * v.seq_len) == 0,
            f"validation.tokens = {v.tokens} is not a multiple of 8 x validation.seq_len = {LOGICAL_RANKS * v.seq_len}")
    require(not m.embed.learned_positions or v.seq_len <= d.seq_len,
            f"validation.seq_len = {v.seq_len} is longer than the learned positions (data.seq_len = {d.seq_len}): "
            "set model.embed.learned_positions=false or shorten it")
    check_bounds(s, require)
    check_layers(s, require)
    check_window(s, require)
    check_latent(s, require)
    check_moe(s, require)
    require(m.residual.unet_skips is None or m.num_layers % 2 == 0,
            f"model.residual.unet_skips needs an even model.num_layers, got {m.num_layers}")
    require(not (s.schedule.cooldown_frac and s.schedule.cooldown_steps),
            "schedule.cooldown_frac and schedule.cooldown_steps exclude each other: set one of them to 0")
    require(0 <= s.schedule.cooldown_frac <= 1 and 0 <= s.schedule.lr_floor <= 1,
            "schedule.cooldown_frac and schedule.lr_floor must lie between 0 and 1")
    longest = max(per_stage(d.tokens_per_rank))
    require(not by_document(s) or d.seq_len == longest,
            f"data.loader={d.loader} needs one row per logical rank: set data.seq_len = data.tokens_per_rank = {longest}")
    require(d.loader != "packed" or d.max_document is not None,
            "data.loader=packed needs data.max_document: set it to the longest piece of a document, like 2048")
    require(d.max_document is None or d.max_document >= 1, f"data.max_document = {d.max_document}: must be at least 1")
    require(s.schedule.warmup_steps >= 0 and s.schedule.cooldown_steps >= 0,
            "schedule.warmup_steps and schedule.cooldown_steps must not be negative")
    require(s.optim.grad_clip is None or s.optim.grad_clip > 0, f"optim.grad_clip = {s.optim.grad_clip}: must be > 0")
    require(s.system.ranks_per_forward in (0, 1, 2, 4, 8),
            f"system.ranks_per_forward = {s.system.ranks_per_forward}: must be 0 (automatic), 1, 2, 4 or 8")
    require(s.system.reduction == "ordinary" or s.system.ranks_per_forward in (0, 1),
            "system.reduction=ordered sums logical ranks one by one: leave system.ranks_per_forward at 0 or 1")
    require(s.system.reduction == "ordinary" or s.system.comm != "allreduce_updates",
            "system.reduction=ordered does not go with system.comm=allreduce_updates: choose replicated or sharded")
    require(s.system.recompute != "on" or not m.mlp.moe,
            "system.recompute=on would count the loads of the experts twice: leave it off with model.mlp.moe")
    require(s.system.recompute != "on" or recomputable(s),
            "system.recompute=on would move delayed scales twice: leave it off with numerics.fp8_mlp.down")
    require(not s.system.cuda_graphs or s.system.comm != "allreduce_updates",
            "system.cuda_graphs does not capture communication: choose another system.comm than allreduce_updates")
    require(not s.system.cuda_graphs or s.system.warmup_steps not in (0, 1),
            f"system.cuda_graphs are captured in the second untimed step: system.warmup_steps = {s.system.warmup_steps} is too few")
    require(s.system.kernels.muon != "triton" or s.numerics.newton_schulz_form == "factored",
            "system.kernels.muon=triton computes the factored form: set numerics.newton_schulz_form=factored, or leave it")
    require(s.system.kernels.mlp != "triton" or not m.bias, "system.kernels.mlp=triton has no bias: set model.bias=false")
    require(s.system.kernels.qk != "triton" or m.attn.latent is None,
            "system.kernels.qk=triton turns whole heads, model.attn.latent a part of them: leave it at auto")
    check_fp8_mlp(s, require)
    for path, needs, default in unmet_needs(s):
        leave = f"leave {path} at its default" if default is not None else f"switch it off: --without {path}"
        raise UserError(f"{path} needs {needs}: set it too, or {leave}")
    return s


# What is counted out one by one before a run, or laid out in memory: more of it ends a program instead of a run.
MOST = {"schedule.steps": 1_000_000, "model.num_layers": 1000, "model.model_dim": 2 ** 17, "model.pad_vocab_to": 65536,
        "model.mlp.expansion": 1024, "model.mlp.moe.experts": 65536, "data.tokens_per_rank": 2 ** 24,
        "validation.tokens": 10 ** 9}
# (path, least value, whether that value itself is allowed); settings that are off are not looked at
BOUNDS = [
    ("model.attn.rope.base", 0, False), ("model.attn.rope.yarn.alpha", 0, True), ("model.attn.scale", 0, False),
    ("model.head.softcap.cap", 0, False), ("model.head.softcap.scale", 0, False), ("model.init.bound", 0, True),
    ("optim.adam.eps", 0, True), ("optim.embed.lr", 0, True), ("optim.lm_head.lr", 0, True), ("optim.matrix.lr", 0, True),
    ("optim.scalar.lr", 0, True), ("optim.router.lr", 0, True), ("model.mlp.moe.gate_scale", 0, False),
    ("model.mlp.moe.balance.rate", 0, False), ("model.mlp.moe.sequence_loss", 0, True), ("model.mlp.moe.z_loss", 0, True),
    ("optim.muon.lr", 0, True), ("optim.muon.ns_steps", 1, True),
    ("optim.muon.momentum_warmup.steps", 1, True), ("numerics.norm_eps", 0, True), ("numerics.fp8_head.x", 0, False),
    ("numerics.fp8_head.w", 0, False), ("numerics.fp8_head.grad", 0, False), ("numerics.fp8_mlp.down.activation", 0, False),
    ("numerics.fp8_mlp.down.weight", 0, False), ("numerics.fp8_mlp.down.exact_steps", 0, True),
    ("system.warmup_steps", -1, True)]


def check_stages(s, require):
    """One value per stage goes with as many stages, and they make up the whole run."""
    stages, sizes = s.schedule.stages, per_stage(s.data.tokens_per_rank)
    require(all(share > 0 for share in stages) and (not stages or abs(sum(stages) - 1) < 1e-6),
            f"schedule.stages = {list(stages)}: must be fractions of the steps that are greater than 0 and add up to 1")
    require(not isinstance(s.data.tokens_per_rank, tuple) or len(sizes) == len(stages),
            f"data.tokens_per_rank has {len(sizes)} values and schedule.stages has {len(stages)}: give one value per stage, or one "
            "number for all")
    require(len(set(sizes)) == 1 or s.data.loader != "shuffled",
            "data.loader=shuffled needs steps of one size: choose another loader, or one data.tokens_per_rank for all stages")


def check_bounds(s, require):
    for path, least, allowed in BOUNDS:
        value = lookup(s, path)
        require(value is None or value > least or (allowed and value == least),
                f"{path} = {value}: must be {'at least' if allowed else 'greater than'} {least}")
    for path in ("optim.adam.beta1", "optim.adam.beta2", "optim.muon.momentum", "optim.muon.momentum_warmup.start"):
        value = lookup(s, path)
        require(value is None or 0 <= value < 1, f"{path} = {value}: must lie in 0 <= x < 1")
    yarn = lookup(s, "model.attn.rope.yarn")
    require(yarn is None or yarn.beta > yarn.alpha, "model.attn.rope.yarn.beta must be greater than model.attn.rope.yarn.alpha")
    sizes = {"classes (model.pad_vocab_to)": padded_vocab(s), "model.model_dim": s.model.model_dim,
             "data.tokens_per_rank": math.gcd(*per_stage(s.data.tokens_per_rank))}
    for name, size in sizes.items():
        require(s.numerics.fp8_head is None or size % 16 == 0, f"numerics.fp8_head needs multiples of 16 and {name} are {size}: "
                                                               "change it or add --without numerics.fp8_head")


def check_fp8_mlp(s, require):
    m = s.model
    if s.numerics.fp8_mlp is None:
        return
    require(not m.bias, "numerics.fp8_mlp has no bias vectors: set model.bias=false")
    require(m.mlp.moe is None, "numerics.fp8_mlp is for dense MLPs: add --without model.mlp.moe; experts have "
                               "numerics.fp8_experts")
    require(m.model_dim % 16 == 0, f"numerics.fp8_mlp needs multiples of 16 and model.model_dim is {m.model_dim}: change it "
                                   "or add --without numerics.fp8_mlp")


def check_layers(s, require):
    """Settings that name layers must name existing ones."""
    m, layers = s.model, s.model.num_layers
    a = m.attn
    named = {"model.attn.drop_layers": a.drop_layers, "model.mlp.drop_layers": m.mlp.drop_layers}
    if m.mlp.moe:
        named["model.mlp.moe.dense_layers"] = m.mlp.moe.dense_layers
    if a.window and a.window.long_layers:
        named["model.attn.window.long_layers"] = a.window.long_layers
    for path, indices in named.items():
        for i in indices:
            require(0 <= i < layers, f"{path} names layer {i}: the model has layers 0 to {layers - 1}")
        require(len(set(indices)) == len(indices), f"{path} = {list(indices)} names a layer twice")
    require(len(a.drop_layers) < layers, "model.attn.drop_layers leaves no attention: leave one layer")
    require(not (a.value_residual and a.value_embed),
            "model.attn.value_residual and model.attn.value_embed exclude each other: switch one off")
    require(a.value_residual is None or 0 not in a.drop_layers,
            "model.attn.value_residual takes the values of block 0: keep attention there")
    if a.value_embed:
        tables = a.value_embed.tables
        require(len(tables) == layers, f"model.attn.value_embed.tables has {len(tables)} entries for {layers} layers: give one "
                                       "per layer, -1 for none")
        used = sorted({t for t in tables if t >= 0})
        require(min(tables) >= -1 and used == list(range(len(used))),
                f"model.attn.value_embed.tables = {list(tables)}: number the tables 0, 1, ... without gaps")
    require(a.gate is None or 1 <= a.gate.channels <= m.model_dim,
            f"model.attn.gate.channels = {a.gate.channels if a.gate else 0}: must lie between 1 and model.model_dim")


def check_latent(s, require):
    m, latent = s.model, s.model.attn.latent
    if latent is None:
        return
    for name in ("kv", "query", "still", "turning", "value"):
        value = getattr(latent, name)
        require(value is None or value >= 1, f"model.attn.latent.{name} = {value}: must be at least 1")
    require(not m.bias, "model.attn.latent has no bias vectors: set model.bias=false")
    require(m.attn.rope is not None, "model.attn.latent gives positions to its turning part: it needs model.attn.rope")
    require(not m.attn.rope.half, "model.attn.latent says itself which channels turn: add --without model.attn.rope.half")
    require(m.attn.value_embed is None or m.attn.num_heads * latent.value == m.model_dim,
            f"model.attn.value_embed has {m.model_dim} channels, the values of model.attn.latent have {m.attn.num_heads} x "
            f"{latent.value}: change model.attn.latent.value")


def check_moe(s, require):
    m, moe, path = s.model, s.model.mlp.moe, "model.mlp.moe"
    if moe is None:
        return
    require(not m.bias, f"{path} has no bias vectors: set model.bias=false")
    require(moe.experts >= 2 and 1 <= moe.top_k < moe.experts,
            f"{path}.top_k = {moe.top_k} of {path}.experts = {moe.experts}: at least one must be chosen and one left")
    require(moe.hidden >= 1 and moe.shared >= 0,
            f"{path}.hidden = {moe.hidden} and {path}.shared = {moe.shared}: must be at least 1 and 0")
    require(not (moe.normalise and moe.top_k == 1),
            f"{path}.normalise with top_k = 1 makes every gate the same number, and the router gets no gradient: switch it off")
    require(moe.groups >= 1 and moe.experts % moe.groups == 0,
            f"{path}.groups = {moe.groups} does not divide {moe.experts} experts")
    each = moe.experts // moe.groups
    require(1 <= moe.groups_kept <= moe.groups,
            f"{path}.groups_kept = {moe.groups_kept}: must lie between 1 and groups = {moe.groups}")
    require(moe.top_k <= moe.groups_kept * each,
            f"{path}.groups_kept = {moe.groups_kept} groups of {each} hold fewer than top_k = {moe.top_k} experts")
    require(moe.groups == 1 or each >= 2, f"{path}.groups = {moe.groups}: a group needs two experts")
    require(moe.balance is None or moe.balance.rule != "quantile" or moe.groups_kept == moe.groups,
            f"{path}.balance.rule=quantile counts on every expert being open to every token, and {path}.groups_kept = "
            f"{moe.groups_kept} of {moe.groups} groups: choose rule proportional or sign, or set groups=1")
    require(moe.balance is None or moe.balance.rate <= 1,
            f"{path}.balance.rate = {moe.balance.rate if moe.balance else 0}: must be at most 1, the largest score")
    require(moe.balance is None or 0 <= moe.balance.freeze_frac < 1,
            f"{path}.balance.freeze_frac = {moe.balance.freeze_frac if moe.balance else 0}: must lie in 0 <= x < 1")
    require(set(range(m.num_layers)) - set(moe.dense_layers) - set(m.mlp.drop_layers),
            f"{path}.dense_layers leaves no layer with experts: leave one")
    require(not s.system.expert_parallel or s.system.reduction == "ordinary",
            "system.reduction=ordered sums the gradients of whole layers: leave system.expert_parallel off")
    require(not s.system.expert_parallel or s.system.comm != "allreduce_updates",
            "system.expert_parallel keeps updates where they are: choose another system.comm")


def check_processes(s, processes):
    """UserError if so many processes cannot share out the experts; asked before they meet, so that one line is said."""
    moe = s.model.mlp.moe
    if s.system.expert_parallel and moe.experts % processes:
        raise UserError(f"system.expert_parallel: {processes} processes do not divide {moe.experts} experts: change "
                        "one of them")


def check_window(s, require):
    w, path = s.model.attn.window, "model.attn.window"
    require(not s.model.attn.rope or not s.model.attn.rope.half or head_dim(s) % 4 == 0,
            f"model.attn.rope.half needs a head_dim that is a multiple of 4, got {head_dim(s)}")
    if w is None:
        return
    require(w.block >= 1 and w.grain >= 1, f"{path}.block and {path}.grain must be at least 1 token")
    if w.growth == "stages":
        require(w.stages and min(w.stages) >= 1 and list(w.stages) == sorted(set(w.stages)),
                f"{path}.stages = {list(w.stages)}: must list growing windows of at least one block, like [3, 7, 11]")
    else:
        require(w.growth != "constant" or w.start >= 1, f"{path}.start = {w.start}: must be at least 1 token")
        require(0 <= w.start <= w.end or w.growth == "constant", f"{path}.start = {w.start} is beyond {path}.end = {w.end}")
        require(w.rule != "blocks" or (w.grain if w.growth != "constant" else w.start) % w.block == 0,
                f"{path}.rule=blocks needs {path}.{'grain' if w.growth != 'constant' else 'start'} in whole blocks of "
                f"{w.block} tokens")
    require(w.final is None or not w.stages or w.final >= w.stages[-1],
            f"{path}.final = {w.final}: must be at least the last stage, {w.stages[-1] if w.stages else 0} blocks")
    last = s.model.num_layers - 1
    require(w.final_last_layer is None or w.final_last_layer >= 1,
            f"{path}.final_last_layer = {w.final_last_layer}: must be at least one block")
    require(w.final_last_layer is None or ((w.long_layers is None or last in w.long_layers)
                                           and last not in s.model.attn.drop_layers),
            f"{path}.final_last_layer needs attention with the long window in layer {last}: add it to {path}.long_layers")


def lookup(s, path):
    """Value at a dotted path; None when a feature on the way is off."""
    node = s
    for name in path.split("."):
        if node is None:
            return None
        node = getattr(node, name)
    return node


def holds(s, needs):
    """Does a condition (path, or path=value or path=value|value) hold in these settings?"""
    path, _, values = needs.partition("=")
    found = lookup(s, path)
    return str(found) in values.split("|") if values else bool(found)


def unmet_needs(s):
    """(path, needs, default) of every field that is away from its default although what it needs is not there."""
    def walk(node, prefix):
        for f in dataclasses.fields(node):
            path, value, needs = prefix + f.name, getattr(node, f.name), f.metadata["needs"]
            default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
            if needs and value != default and not holds(s, needs):
                yield path, needs, default
            if dataclasses.is_dataclass(value):
                yield from walk(value, path + ".")
    return list(walk(s, ""))
