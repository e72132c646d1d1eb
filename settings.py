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

LOGICAL_RANKS = 8  # the token buffers of a step, whatever the number of processes
NUMERICS_VERSION = 1  # raised by hand when a fix changes the results of existing settings


class UserError(Exception):
    """A mistake a user can mend: printed as one line (culprit and remedy), exit code 2, never a traceback."""


REFUSE = "refuse"  # --without has no sensible meaning: name --set and --revert instead
BEFORE = "before"  # --without restores the value before the record that last set the field


def opt(default, doc, *, unit="", off=BEFORE, needs="", shrink=""):
    """Declare one setting.

    doc: one line of meaning, with paper or person where an idea is used. unit: of a number (`step`, `token`, ...).
    off: what `--without` gives: a value, BEFORE or REFUSE (an optional sub-configuration always goes to None).
    needs: path (or path=value) without which the field means nothing. shrink: how a scale changes it (see SCALES).
    """
    metadata = {"doc": doc, "unit": unit, "off": off, "needs": needs, "shrink": shrink}
    if dataclasses.is_dataclass(default) and isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


# ----- model ------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Embed:
    learned_positions: bool = opt(True, "learned position table added to the token table (GPT-2)", off=False)
    norm: bool = opt(False, "RMS norm right after the embedding", off=False)


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al., arXiv 2104.09864), half-split pairs (j, j + head_dim/2)."""
    base: float = opt(10000.0, "frequencies base^(-2j/head_dim)")


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
class Attention:
    num_heads: int = opt(12, "attention heads; head_dim = model_dim / num_heads", unit="head")
    rope: Rope | None = opt(None, "rotary position embedding of queries and keys")
    qk_norm: QKNorm | None = opt(None, "RMS norm of queries and keys per head")
    depth_scale: bool = opt(False, "attention branch times 1/sqrt(2 num_layers) before it is added", off=False)
    value_residual: ValueResidual | None = opt(None, "values mixed with those of the first block")


@dataclass(frozen=True)
class MLP:
    activation: Literal["gelu_tanh", "gelu", "relu_sq"] = opt(
        "gelu_tanh", "hidden activation; relu_sq = relu(x)^2 (So et al., Primer, arXiv 2109.08668)")
    expansion: int = opt(4, "hidden width / model_dim", off=REFUSE)


@dataclass(frozen=True)
class X0Mix:
    """Embedding re-injected at every block entry: x <- a x + b x0, learned (a, b) per block."""
    x: float = opt(1.0, "a at initialisation; the constant when `learned` is off")
    x0: float = opt(0.0, "b at initialisation; the constant when `learned` is off")
    learned: bool = opt(True, "a and b are learned scalars per block (off: the constants)", off=False)


@dataclass(frozen=True)
class UnetSkips:
    """U-net skips: outputs of the first half of the blocks, last in first out, added before the second half."""
    init: float = opt(1.0, "skip weight at initialisation; the constant when `learned` is off")
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
    """Logits bounded smoothly: cap * tanh(z / cap) (Gemma 2, arXiv 2408.00118)."""
    cap: float = opt(30.0, "bound of the logits")


@dataclass(frozen=True)
class Head:
    untied: Untied | None = opt(None, "own weight for the output head instead of the token table")
    softcap: Softcap | None = opt(None, "tanh soft cap on the logits")


@dataclass(frozen=True)
class Init:
    scheme: Literal["gpt2", "uniform"] = opt(
        "gpt2", "gpt2: N(0, 0.02), projections N(0, 0.02/sqrt(2 num_layers)); uniform: U(+-1/sqrt(fan_in)), tables N(0,1)")
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
    eps: float = opt(1e-8, "added to the root of the bias-corrected second moment")


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
    momentum: float = opt(0.95, "M <- momentum M + g; the update uses g + momentum M")
    momentum_warmup: MomentumWarmup | None = opt(None, "momentum rises over the first steps")
    scale: Literal["none", "sqrt_max", "sqrt_ratio"] = opt(
        "none", "update times 1, sqrt(max(rows, cols)) or sqrt(max(1, rows/cols)), of the matrix that is orthogonalised")
    split_qkv: bool = opt(False, "orthogonalise q, k, v apart (off: as one 3d x d matrix)", off=False)
    ns_steps: int = opt(5, "Newton-Schulz iterations", off=REFUSE)


@dataclass(frozen=True)
class Optim:
    adam: Adam = opt(Adam, "constants of AdamW")
    embed: Group = opt(Group, "token table (and position table) when it is not the head")
    lm_head: Group = opt(Group, "output head; the shared table when tied")
    matrix: Group = opt(Group, "block matrices, unless optim.muon takes them")
    scalar: Scalars = opt(Scalars, "gains, biases and learned scalars")
    muon: Muon | None = opt(None, "block matrices by Muon instead of AdamW")
    grad_clip: float | None = opt(1.0, "gradient scaled to at most this global norm", off=None)


@dataclass(frozen=True)
class Schedule:
    steps: int = opt(19560, "optimizer steps", unit="step", off=REFUSE, shrink="steps")
    lr: Literal["cosine", "trapezoid"] = opt(
        "cosine", "after the warm-up: cosine to zero, or constant and then linear to zero over cooldown_steps")
    warmup_steps: int = opt(700, "linear rise of the learning rate", unit="step", off=0, shrink="steps")
    cooldown_steps: int = opt(0, "linear fall at the end (trapezoid)", unit="step", off=0,
                              needs="schedule.lr=trapezoid", shrink="steps")


# ----- data, validation -------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Data:
    loader: Literal["shuffled", "per_rank"] = opt(
        "shuffled", "llm.c's shuffled slots, or in order with a position per logical rank (which drift at shard ends)")
    tokens_per_rank: int = opt(65536, "tokens of one logical rank in one step; eight of them make a step", unit="token",
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
    every: int = opt(250, "validate every so many steps and after the last", unit="step", off=REFUSE, shrink="steps")
    target: float | None = opt(3.28, "validation loss to reach, nats per token", off=None, shrink="target")


# ----- numerics ---------------------------------------------------------------------------------------------------

Dtype = Literal["bfloat16", "float32", "float64"]


@dataclass(frozen=True)
class Numerics:
    matmul: Dtype = opt("bfloat16", "operands and result of linear layers and attention")
    eval_matmul: Dtype = opt("bfloat16", "the same in validation")
    residual: Dtype = opt("bfloat16", "residual stream")
    matrix: Dtype = opt("float32", "stored weights of linear layers and their optimizer state")
    table: Dtype = opt("float32", "stored embedding tables and their optimizer state")
    scalar: Dtype = opt("float32", "stored gains, biases, learned scalars and their optimizer state")
    init_grid: Dtype = opt("float32", "linear weights are rounded to this grid once, at initialisation")
    norm: Dtype = opt("float32", "statistics of the norms")
    norm_eps: float = opt(1e-5, "added to the mean square (rmsnorm) or the variance (layernorm)")
    rope: Dtype = opt("float32", "stored cos and sin tables")
    loss: Dtype = opt("float32", "cross entropy")
    newton_schulz: Dtype = opt("bfloat16", "Newton-Schulz iteration")
    newton_schulz_norm: Dtype = opt("float32", "Frobenius norm before the iteration, and the tensor it is taken from")
    newton_schulz_form: Literal["expanded", "factored"] = opt(
        "expanded", "aX + b(AX) + cA(AX), or aX + (bA + cAA)X: the same polynomial, other roundings")
    muon_update: Dtype = opt("float32", "the scaled Muon update before it is subtracted")
    adam: Dtype = opt("float32", "arithmetic of AdamW (its state has the dtype of the parameter)")


# ----- system -----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class System:
    device: Literal["auto", "cpu", "cuda"] = opt("auto", "where to run; auto: CUDA when there is one")
    precision: Literal["record", "float32", "float64"] = opt(
        "record", "record: as `numerics` says; else every dtype of `numerics` is lifted to this one (and hashed so)")
    compile: Literal["auto", "on", "off"] = opt("auto", "torch.compile of the model; auto: on CUDA")
    comm: Literal["auto", "replicated", "sharded", "allreduce_updates"] = opt(
        "auto", "who updates what: everyone everything; a shard each (ZeRO); Muon round-robin + all-reduce of updates "
                "(record 6). auto: sharded when there are several processes")
    reduction: Literal["ordinary", "ordered"] = opt(
        "ordinary", "ordered: the eight logical gradients are summed in one fixed binary tree (same bits on 1, 2, 4, 8)")
    ranks_per_forward: int = opt(0, "logical ranks in one forward pass; 0: all of the process's on CPU, 1 on CUDA")
    warmup_steps: int = opt(-1, "untimed steps before the reset; -1: 3")
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


def padded_vocab(s):
    """Rows of the token table and classes of the softmax."""
    return math.ceil(s.model.vocab_size / s.model.pad_vocab_to) * s.model.pad_vocab_to


def tokens_per_step(s):
    return LOGICAL_RANKS * s.data.tokens_per_rank


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
    steps / record's steps (at least 1 where it was at least 1); learning rates and head counts stay.
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
                changes[f.name] = rules[f.metadata["shrink"]](value)
        return dataclasses.replace(node, **changes)

    s = shrink(s)
    data = dataclasses.replace(s.data, wrap=True)  # a small corpus is read again, and the log says how often
    validation = dataclasses.replace(s.validation, every=max(1, round(steps / 8)))  # enough points for a curve
    system = dataclasses.replace(s.system, precision=scale.precision)
    return dataclasses.replace(s, data=data, validation=validation, system=system)


def lifted(s):
    """system.precision other than `record` rewrites every dtype of the plan, so that the hash tells the truth."""
    if s.system.precision == "record":
        return s
    to = s.system.precision
    changes = {f.name: to for f in dataclasses.fields(s.numerics) if f.type is Dtype}
    return dataclasses.replace(s, numerics=dataclasses.replace(s.numerics, **changes))


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
                        ("data.tokens_per_rank", d.tokens_per_rank), ("data.seq_len", d.seq_len),
                        ("validation.tokens", v.tokens), ("validation.seq_len", v.seq_len),
                        ("validation.every", v.every), ("model.mlp.expansion", m.mlp.expansion)]:
        require(value >= 1, f"{path} = {value}: must be at least 1")
    require(s.model.vocab_size <= 65536, f"model.vocab_size = {m.vocab_size}: shards hold 16-bit token ids (<= 65536)")
    require(m.model_dim % m.attn.num_heads == 0,
            f"model.model_dim = {m.model_dim} is not divisible by model.attn.num_heads = {m.attn.num_heads}")
    require(m.attn.rope is None or head_dim(s) % 2 == 0,
            f"model.attn.rope needs an even head_dim, got {head_dim(s)}: change model.attn.num_heads")
    require(d.tokens_per_rank % d.seq_len == 0,
            f"data.tokens_per_rank = {d.tokens_per_rank} is not a multiple of data.seq_len = {d.seq_len}")
    require(v.tokens % (LOGICAL_RANKS * v.seq_len) == 0,
            f"validation.tokens = {v.tokens} is not a multiple of 8 x validation.seq_len = {LOGICAL_RANKS * v.seq_len}")
    require(not m.embed.learned_positions or v.seq_len <= d.seq_len,
            f"validation.seq_len = {v.seq_len} is longer than the learned positions (data.seq_len = {d.seq_len}): "
            "set model.embed.learned_positions=false or shorten it")
    require(m.residual.unet_skips is None or m.num_layers % 2 == 0,
            f"model.residual.unet_skips needs an even model.num_layers, got {m.num_layers}")
    require(s.schedule.warmup_steps >= 0 and s.schedule.cooldown_steps >= 0,
            "schedule.warmup_steps and schedule.cooldown_steps must not be negative")
    require(s.optim.grad_clip is None or s.optim.grad_clip > 0, f"optim.grad_clip = {s.optim.grad_clip}: must be > 0")
    require(s.system.ranks_per_forward in (0, 1, 2, 4, 8),
            f"system.ranks_per_forward = {s.system.ranks_per_forward}: must be 0 (automatic), 1, 2, 4 or 8")
    require(s.system.reduction == "ordinary" or s.system.ranks_per_forward in (0, 1),
            "system.reduction=ordered sums logical ranks one by one: leave system.ranks_per_forward at 0 or 1")
    require(s.system.reduction == "ordinary" or s.system.comm != "allreduce_updates",
            "system.reduction=ordered does not go with system.comm=allreduce_updates: choose replicated or sharded")
    for path, needs in needs_of(s):
        if needs and not holds(s, needs) and lookup(s, path) != default_of(path):
            raise UserError(f"{path} needs {needs}: set it too, or leave {path} at its default")
    return s


def default_of(path):
    node = Settings()
    for name in path.split(".")[:-1]:
        node = getattr(node, name)
        if node is None:
            return None
    return getattr(node, path.split(".")[-1])


def lookup(s, path):
    """Value at a dotted path; None when a feature on the way is off."""
    node = s
    for name in path.split("."):
        if node is None:
            return None
        node = getattr(node, name)
    return node


def holds(s, needs):
    """Does a `needs` condition (path, or path=value) hold in these settings?"""
    path, _, value = needs.partition("=")
    found = lookup(s, path)
    return str(found) == value if value else bool(found)


def needs_of(s):
    """(path, needs) of every field that is present in these settings."""
    def walk(node, prefix):
        for f in dataclasses.fields(node):
            path, value = prefix + f.name, getattr(node, f.name)
            yield path, f.metadata["needs"]
            if dataclasses.is_dataclass(value):
                yield from walk(value, path + ".")
    return list(walk(s, ""))
