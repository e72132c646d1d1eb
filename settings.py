"""The vocabulary of a record: nested frozen dataclasses whose defaults are record 1.

Three axes. `model`, `optim` (optim_settings.py), `schedule`, `data` and `validation` say what is computed
(axis ml). `numerics` says in which precision; it changes losses, so it belongs to a record's identity.
`system` (system_settings.py) says how a run is executed; it may change the order of sums, but nothing else
in the mathematics.

Each field is declared once, with `declare.opt(...)`: its meaning, unit, range, what `--without` does to it,
what it needs and what a scale makes of it. A dataclass whose fields must agree with each other or with
another part has a method `check(self, s)` that yields one message per contradiction. These texts are printed
by `python -m records features`; no list of settings stands anywhere else. Nothing here imports torch, so that
bad settings are refused in a tenth of a second.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from common.errors import UserError
from declare import PRECISION, PRODUCTS, REFUSE, bound_faults, opt, unmet_needs, walk
from model_settings import Model, padded_vocab
from optim_settings import Optim
from system_settings import System

LOGICAL_RANKS = 8  # the token buffers of a step, whatever the number of processes
# Raised by hand when a fix changes the results of existing settings. 2: Newton-Schulz rounds (c A) B, record
# 6's averaged momentum and p - lr u are rounded as in the originals.
NUMERICS_VERSION = 2


# ----- schedule ---------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class MatrixLR:
    """Learning rate of the parameters of role `matrix`, in place of the run's (optimizer track, result 5).

    Constant after the warm-up, then the cooldown to the floor, over schedule.horizon like the run's.
    """
    warmup_steps: int = opt(0, "learning-rate warm-up, linear", unit="step", off=0, shrink="steps", least=0)
    warmup_from_zero: bool = opt(False, "learning rate 0 in the first step, and the full one after the "
                                        "warm-up's last (off: both a step earlier)", off=False,
                                 needs="schedule.matrix.warmup_steps")
    cooldown_frac: float = opt(1.0, "cooldown as a fraction of the steps", off=0.0,
                               idle="schedule.matrix.cooldown_steps", least=0, most=1)
    cooldown_steps: int | float = opt(0, "cooldown in steps, in place of cooldown_frac", unit="step", off=0,
                                      shrink="steps", least=0)
    cooldown_power: float = opt(1.0, "power of the cooldown", off=1.0, above=0)
    floor: float = opt(0.0, "learning-rate factor at the end of the cooldown", off=0.0, least=0, most=1)
    horizon: int | None = opt(None, "steps over which it is laid out, in place of schedule.horizon (result "
                                    "27)", unit="step", shrink="steps", least=1)

    def check(self, s: "Settings") -> Iterator[str]:
        if self.horizon is not None and self.horizon < s.schedule.steps:
            yield (f"schedule.matrix.horizon = {self.horizon} is shorter than the run: set it to "
                   f"schedule.steps = {s.schedule.steps} at least")


@dataclass(frozen=True)
class LateHorizon:
    """Another horizon of the learning rate from a step on (@jn2clark, claims from 2625 steps of the optimizer
    track: 2840 in place of 2900)."""
    start: int = opt(1400, "first step with it", unit="step", off=REFUSE, shrink="steps", least=1)
    steps: int = opt(2840, "steps over which the learning rate is laid out from then on", unit="step",
                     off=REFUSE, shrink="steps", least=1)

    def check(self, s: "Settings") -> Iterator[str]:
        if self.steps < s.schedule.steps:
            yield (f"schedule.late_horizon.steps = {self.steps} is shorter than the run: set it to "
                   f"schedule.steps = {s.schedule.steps} at least")


@dataclass(frozen=True)
class Schedule:
    """The schedules over the steps of a run (axis ml).

    The scheduled steps are those before the extension. Fractions of a run are fractions of them.
    """
    steps: int = opt(19560, "optimizer steps, those of the extension included", unit="step", off=REFUSE,
                     shrink="steps", least=1, most=1_000_000)
    extension_steps: int = opt(0, "extension (record 35): the last steps, after the end of all schedules; at "
                                  "most an eighth of the steps, so that a short trial has its schedules too",
                               unit="step", off=0, shrink="steps", least=0)
    extension_at: float = opt(1.0, "point at which the schedules stand during the extension, as a fraction "
                                   "of the scheduled steps (records 35 to 45 stop just before the end)",
                              off=1.0, needs="schedule.extension_steps", above=0, most=1)
    lr_spans_extension: bool = opt(False, "learning rate that falls during the extension too: its "
                                          "fractions are of all steps (record 41)", off=False,
                                   needs="schedule.extension_steps")
    lr: Literal["cosine", "trapezoid"] = opt(
        "cosine", "shape of the learning rate after its warm-up. cosine: a half cosine to zero. trapezoid: "
                  "constant, then linear over the cooldown")
    warmup_steps: int = opt(700, "learning-rate warm-up, linear", unit="step", off=0, shrink="steps", least=0)
    cooldown_frac: float = opt(0.0, "cooldown as a fraction of the steps, in place of cooldown_steps",
                               off=0.0, needs="schedule.lr=trapezoid", least=0, most=1)
    lr_floor: float = opt(0.0, "learning-rate factor at the end of the cooldown", off=0.0,
                          needs="schedule.lr=trapezoid", least=0, most=1)
    lr_peaks: tuple[tuple[float, float], ...] = opt(
        (), "learning-rate jumps (record 46), for batches that grow: pairs of a fraction of the scheduled "
        "steps and a factor. Beyond that fraction, the cooldown starts from this factor in place of 1",
        off=(), needs="schedule.lr=trapezoid", least=0
    )
    cooldown_steps: int | float = opt(0, "cooldown, the linear decay at the end", unit="step", off=0,
                                      needs="schedule.lr=trapezoid", shrink="steps", least=0)
    cooldown_power: float = opt(1.0, "power of the cooldown: the linear fall is raised to it (PowerCool of "
                                     "the optimizer track: 1.2)", off=1.0, needs="schedule.lr=trapezoid",
                                above=0)
    horizon: int | None = opt(
        None, "steps over which the learning rate is laid out, which may be more than the run has: the run "
        "then stops before the end of its cooldown (off: schedule.steps)", unit="step",
        needs="schedule.lr=trapezoid", shrink="steps", least=1
    )
    late_horizon: LateHorizon | None = opt(None, "late horizon: another one from a step on",
                                           needs="schedule.horizon")
    matrix: MatrixLR | None = opt(None, "own learning-rate schedule of the block matrices",
                                  needs="schedule.lr=trapezoid")
    stages: tuple[float, ...] = opt(
        (), "stages of the run: fractions of the scheduled steps, which add up to 1. A setting that has one "
        "value per stage goes through its values in this order and keeps the last one in the extension",
        off=(), above=0
    )
    stage_peaks: tuple[float, ...] = opt(
        (), "learning-rate factor of each stage (record 65), from which the cooldown starts, in place of "
            "lr_peaks",
        off=(), needs="schedule.lr=trapezoid", above=0
    )
    whole_steps: bool = opt(
        False, "whole steps (record 65): a stage ends, the cooldown begins and head and "
        "embedding part at a whole step, and what changes within a stage goes by its "
        "own steps (off: by fractions of the run)", off=False, needs="schedule.stages"
    )

    @property
    def extension(self) -> int:
        """Steps of the extension."""
        return min(self.extension_steps, self.steps // 8)

    def check(self, s: "Settings") -> Iterator[str]:
        if self.stages and abs(sum(self.stages) - 1) > 1e-6:
            yield f"schedule.stages = {list(self.stages)}: must add up to 1, the whole run"
        if self.cooldown_frac and self.cooldown_steps:
            yield ("schedule.cooldown_frac and schedule.cooldown_steps exclude each other: set one of them "
                   "to 0")
        if self.stage_peaks and len(self.stage_peaks) != len(self.stages):
            yield (f"schedule.stage_peaks has {len(self.stage_peaks)} factors and schedule.stages has "
                   f"{len(self.stages)}: give one factor per stage")
        if self.stage_peaks and self.lr_peaks:
            yield "schedule.stage_peaks and schedule.lr_peaks exclude each other: leave one empty"
        if self.horizon is not None and self.horizon < self.steps:
            yield (f"schedule.horizon = {self.horizon} is shorter than the run: set it to schedule.steps = "
                   f"{self.steps} at least")
        if self.horizon is not None and (self.extension_steps or self.stages):
            yield ("schedule.horizon ends a run before its schedules do: leave schedule.extension_steps and "
                   "schedule.stages off")
        ends = [end for end, _ in self.lr_peaks]
        if ends != sorted(set(ends)) or ends and ends[-1] >= 1:
            yield (f"schedule.lr_peaks = {[list(pair) for pair in self.lr_peaks]}: must list growing "
                   "fractions below 1, each with a factor")


# ----- data, validation -------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Data:
    """The stream of training tokens (axis ml)."""
    loader: Literal["shuffled", "per_rank", "synced", "bos_aligned", "packed"] = opt(
        "shuffled", "order of the tokens. shuffled: llm.c's shuffled slots. per_rank: in order, a position "
                    "per logical rank (the positions drift apart at shard ends). synced: in order, one "
                    "position for all ranks. bos_aligned: each rank starts at a document start. packed: "
                    "whole documents, truncated to max_doc_len")
    switch_at_equal: bool = opt(False, "earlier shard switch: a shard ends one token earlier (records "
                                       "15-17)", off=False, needs="data.loader=per_rank")
    max_doc_len: int | tuple[int, ...] | None = opt(
        None,
        "maximum document length: longer documents are truncated; one number, or one per stage (record 72)",
        unit="token", shrink="length", needs="data.loader=packed", least=1
    )
    tokens_per_rank: int | tuple[int, ...] = opt(
        65536, "tokens of one logical rank per step, or one number per stage; a step has eight logical ranks",
        unit="token", off=REFUSE, shrink="batch", least=1, most=2 ** 24)
    seq_len: int = opt(1024, "context length in training: the tokens of a rank are cut into rows of this "
                             "length", unit="token", off=REFUSE, shrink="length", least=1)
    first_batch_twice: bool = opt(False, "repeated first batch: steps 0 and 1 use the same batch (the "
                                         "original reset its loader)", off=False,
                                  needs="data.loader=per_rank")
    wrap: bool = opt(True, "restart at the first shard after the last one (off: running out of shards is an "
                           "error)", off=False, shrink="reread")

    def check(self, s: "Settings") -> Iterator[str]:
        sizes, stages, documents = per_stage(self.tokens_per_rank), s.schedule.stages, by_document(s)
        if isinstance(self.tokens_per_rank, tuple) and not fits_stages(len(sizes), s):
            yield (f"data.tokens_per_rank has {len(sizes)} values and schedule.stages has {len(stages)}: "
                   "give one value per stage (and one for the extension), or one number for all")
        if isinstance(self.max_doc_len, tuple) and not fits_stages(len(self.max_doc_len), s):
            yield (
                f"data.max_doc_len has {len(self.max_doc_len)} values and schedule.stages has {len(stages)}: "
                "give one value per stage, or one number for all"
            )
        if len(set(sizes)) > 1 and self.loader == "shuffled":
            yield ("data.loader=shuffled needs steps of one size: choose another loader, or one "
                   "data.tokens_per_rank for all stages")
        for size in sizes if not (documents and stages) else ():
            if size % self.seq_len:
                yield (f"data.tokens_per_rank = {size} is not a multiple of data.seq_len = {self.seq_len}: "
                       "change one of them")
        if documents and self.seq_len != max(sizes):
            yield (f"data.loader={self.loader} needs one row per logical rank: set data.seq_len = "
                   f"data.tokens_per_rank = {max(sizes)}")
        if self.loader == "packed" and self.max_doc_len is None:
            yield ("data.loader=packed needs data.max_doc_len: set it to the longest piece of a document, "
                   "like 2048")


@dataclass(frozen=True)
class LateValidations:
    """More frequent validations towards the end of a run (optimizer track), which show where it crosses."""
    frac: float = opt(0.1, "last fraction of the steps", off=REFUSE, above=0, most=1)
    every: int = opt(25, "steps between validations there; the number of a step is a multiple of it",
                     unit="step", off=REFUSE, shrink="late", least=1)


@dataclass(frozen=True)
class Validation:
    """The measurement of the validation loss (axis ml)."""
    tokens: int = opt(10_485_760, "validation targets: the first ones of the validation shard", unit="token",
                      off=REFUSE, shrink="validation", least=1, most=10 ** 9)
    seq_len: int = opt(1024, "context length in validation", unit="token", off=REFUSE, shrink="length",
                       least=1)
    every: int = opt(250, "steps between validations; there is always one after the last step", unit="step",
                     off=REFUSE, shrink="eighth", least=1)
    late: LateValidations | None = opt(None, "more frequent validations towards the end")
    canonical_mask: bool = opt(
        False, "canonical masking (record 91): in the final validation, tokens that the "
        "tokenizer never writes after the previous one get the logit -60", off=False
    )
    target: float | None = opt(3.28, "validation loss to reach, in nats per token", off=None, shrink="target")

    def check(self, s: "Settings") -> Iterator[str]:
        if self.tokens % (LOGICAL_RANKS * self.seq_len):
            yield (f"validation.tokens = {self.tokens} is not a multiple of 8 x validation.seq_len = "
                   f"{LOGICAL_RANKS * self.seq_len}: change one of them")


# ----- numerics ---------------------------------------------------------------------------------------------

Dtype = Literal["bfloat16", "float32", "float64"]


def precision(default: str, doc: str) -> Any:
    """Declare a dtype of the precision plan, which system.precision replaces."""
    return opt(default, doc, exact=PRECISION)


@dataclass(frozen=True)
class FP8Head:
    """FP8 head (record 19): the head's matrix products in training use 8-bit floats.

    Each operand is multiplied by its factor and cast. The forward pass uses e4m3 (largest value 448),
    gradients use e5m2 (57344); larger values are clamped. Validation does not use FP8. `grad` refers to the
    gradient of a rank's mean or sum of losses, as in the originals; the trainer undoes its own loss averaging
    before the cast.
    """
    x: float = opt(2.0, "factor of the activations", shrink="rsqrt_width", above=0)
    w: float = opt(32.0, "factor of the weight", above=0)
    grad: float = opt(8192.0, "factor of the gradient of a token's own loss with respect to its logits "
                              "(softmax - target)", above=0)

    def check(self, s: "Settings") -> Iterator[str]:
        sizes = {"classes (model.pad_vocab_to)": padded_vocab(s), "model.model_dim": s.model.model_dim,
                 "data.tokens_per_rank": math.gcd(*per_stage(s.data.tokens_per_rank))}
        if s.model.head.bias:
            yield "numerics.fp8_head has no bias: set model.head.bias=false"
        for name, size in sizes.items():
            if size % 16:
                yield (f"numerics.fp8_head needs multiples of 16 and {name} are {size}: change it or "
                       "add --without numerics.fp8_head")


@dataclass(frozen=True)
class FP8CProj:
    """FP8 for the second product of the MLPs (c_proj) too, with delayed scales (record 89).

    A delayed scale is computed from an earlier maximum, so that an operand is read only once. Activations:
    one scale per layer and logical rank, from its previous forward pass (1 in the first). Weight: from the
    previous step.
    """
    activation: float = opt(1.8, "margin of the activation scale: the scale is margin x (maximum in the "
                                 "previous forward pass) / 448", above=0)
    weight: float = opt(1.12, "margin of the weight scale: the scale is margin x (largest entry in the "
                              "previous step) / 448", above=0)
    fixed: float | None = opt(None, "fixed scale of the activations in place of the delayed one (record 90)",
                              above=0)
    exact_steps: int = opt(
        16, "first steps with an exact weight scale: before the first step and after each of this many "
            "steps, the scale is (current largest entry) / 448",
        unit="step", off=REFUSE, shrink="steps", least=0
    )


@dataclass(frozen=True)
class FP8Backward:
    """FP8 for the products of the MLPs' backward pass too (records 90 and 92): gradients in e5m2.

    Every operand is then cast once, with a scale that is known before. relu(pre) is the root of relu^2 as the
    cast left it. Scales of gradients refer to the gradient of a rank's sum of losses, as in the originals;
    the trainer undoes its own loss averaging. With a margin a scale is delayed: margin x (maximum of its
    logical rank in the previous pass) / (largest value of the format).
    """
    input: float = opt(8 / 448, "scale of the MLP's input; with input_margin that of the first step", above=0)
    input_margin: float | None = opt(1.25, "margin of the input's delayed scale (off: it stays)", above=0)
    grad: float = opt(1 / 448, "scale of the incoming gradient", above=0)
    hidden: float = opt(1 / 448, "scale of the gradient before relu^2; with hidden_margin that of the first "
                                 "step", above=0)
    hidden_margin: float | None = opt(None, "margin of that gradient's delayed scale (off: it stays)",
                                      above=0)
    c_fc_delayed: bool = opt(False, "the scale of c_fc is delayed as that of c_proj is (off: it is that of "
                                    "the current weight)", off=False)


@dataclass(frozen=True)
class FP8QKV:
    """FP8 for the projections q, k and v in both passes of training (record 90), as one product.

    The weight's scale is its largest entry / 448; the gradient, in e5m2, is that of a rank's sum of losses.
    """
    x: float = opt(8 / 448, "scale of attention's input", above=0)
    grad: float = opt(1 / 448, "scale of the gradient of the projections", above=0)

    def check(self, s: "Settings") -> Iterator[str]:
        if s.model.bias:
            yield "numerics.fp8_qkv has no bias vectors: set model.bias=false"
        if s.model.attn.latent:
            yield "numerics.fp8_qkv is for whole heads: add --without model.attn.latent"
        if s.model.head.loss_reduction == "mean":
            yield "numerics.fp8_qkv needs model.head.loss_reduction=sum or step_sum"
        if s.model.model_dim % 16:
            yield (f"numerics.fp8_qkv needs multiples of 16 and model.model_dim is {s.model.model_dim}: "
                   "change it or add --without numerics.fp8_qkv")


@dataclass(frozen=True)
class FP8MLP:
    """FP8 MLPs (record 84): the first product (c_fc) uses e4m3 in the forward pass of training.

    Each operand is divided by its scale and cast. A scale is the largest entry / 448: of the weight, in the
    dtype `matmul`, and of the activations of one logical rank, so that the rounding of a token depends on all
    tokens of its rank. The backward pass uses the operands before the cast. Validation does not use FP8.
    """
    c_proj: FP8CProj | None = opt(None, "FP8 for the second product too, with delayed scales")
    backward: FP8Backward | None = opt(None, "FP8 for the products of the backward pass too",
                                       needs="numerics.fp8_mlp.c_proj")

    def check(self, s: "Settings") -> Iterator[str]:
        if s.model.bias:
            yield "numerics.fp8_mlp has no bias vectors: set model.bias=false"
        if s.model.mlp.moe:
            yield ("numerics.fp8_mlp is for dense MLPs: add --without model.mlp.moe; experts have "
                   "numerics.fp8_experts")
        if s.model.model_dim % 16:
            yield (f"numerics.fp8_mlp needs multiples of 16 and model.model_dim is {s.model.model_dim}: "
                   "change it or add --without numerics.fp8_mlp")


@dataclass(frozen=True)
class Numerics:
    """The precision plan: dtypes of stored tensors and of computations (axis numerics)."""
    matmul: Dtype = precision("bfloat16", "linear layers and attention: dtype of their operands and results")
    eval_matmul: Dtype = precision("bfloat16", "linear layers and attention in validation")
    products: Literal["matmul", "bfloat16"] = opt(
        "matmul", "operands of the products of attention's projections, MLPs, experts and head. matmul: as "
                  "they are. bfloat16: rounded before the product, in training and validation; its result "
                  "returns to `matmul`, so that everything between products stays there. Gates and routers "
                  "are not rounded", exact=PRODUCTS)
    residual: Dtype = precision("bfloat16", "dtype of the residual stream")
    matrix: Dtype = precision("float32", "stored weights of linear layers and their optimizer state")
    head: Dtype = precision("float32", "stored weight of an untied head")
    gate: Dtype = precision("float32", "stored weights of gates")
    table: Dtype = precision("float32", "stored embedding tables and their optimizer state")
    scalar: Dtype = precision("float32", "stored gains, biases, learned scalars and their optimizer state")
    router: Dtype = precision("float32", "stored weights and arithmetic of the routers, where close scores "
                                         "decide which experts are chosen")
    fp8_experts: bool = opt(False, "simulated FP8 of the experts: their operands are rounded to e4m3 in "
                                   "training, with a scale per row. The products stay in `matmul`, and the "
                                   "backward pass uses the rounded operands", off=False,
                            needs="model.mlp.moe", exact=False)
    init_grid: Dtype = precision("float32", "grid of the initial weights: linear weights are rounded to it "
                                            "once")
    norm: Dtype = precision("float32", "statistics of the norms")
    norm_eps: float = opt(1e-5, "constant added to the mean square (rmsnorm) or to the variance (layernorm)",
                          least=0)
    qk_norm_eps: float | None = opt(None, "the same constant for QK norm alone (off: norm_eps)",
                                    needs="model.attn.qk_norm", least=0)
    rope: Dtype = precision("float32", "stored cos and sin tables of the rotary embedding")
    rope_frequency: Dtype = precision("float32", "frequencies from which the rotary tables are made")
    rope_math: Dtype = precision("float32", "arithmetic of the rotation: the widest of this, the tables and "
                                            "q, k")
    softcap: Dtype = precision("float32", "arithmetic of the logit soft cap: this or a wider dtype")
    fp8_head: FP8Head | None = opt(None, "FP8 head in training", exact=None)
    fp8_mlp: FP8MLP | None = opt(None, "FP8 MLPs in the forward pass of training",
                                 needs="model.mlp.activation=relu_sq", exact=None)
    fp8_qkv: FP8QKV | None = opt(None, "FP8 projections q, k and v in training", exact=None)
    loss: Dtype = precision("float32", "arithmetic of the cross entropy, and dtype of the logits it gets")
    eval_loss: Dtype = precision("float32", "the same in validation")
    newton_schulz: Dtype = precision("bfloat16", "dtype of the Newton-Schulz iteration")
    newton_schulz_norm: Dtype = precision(
        "float32", "Frobenius norm before the iteration, and the tensor whose norm it is")
    newton_schulz_form: Literal["expanded", "factored", "symmetric"] = opt(
        "expanded", "form of the Newton-Schulz polynomial. expanded: aX + b(AX) + (cA)(AX). factored: aX + "
                    "(bA + (cA)A)X. symmetric: bA + cAA is rounded once, and so is aX plus its product with "
                    "X (record 27). They differ by rounding")
    muon_update: Dtype = precision("float32", "dtype of the scaled Muon update, before it is subtracted")
    muon_decay: Dtype = precision("float32", "dtype to which Muon's update is rounded when its cautious "
                                             "decay has been added")
    adam: Dtype = precision("float32", "arithmetic of AdamW")
    adam_state: Literal["parameter", "bfloat16", "float32"] = opt(
        "parameter", "stored moments of AdamW. parameter: the dtype of the parameter", exact="parameter")
    matrix_mantissa: bool = opt(
        False, "kept mantissa: Muon updates bfloat16 matrices exactly as float32 ones, whose lower 16 bits "
               "are optimizer state; the weight in use is the truncated one (record 57)", off=False,
        needs="numerics.matrix=bfloat16 and optim.muon", exact=False)

    def check(self, s: "Settings") -> Iterator[str]:
        if self.products == self.matmul == self.eval_matmul:
            yield (f"numerics.products = {self.products} has no effect: matmul and eval_matmul are "
                   f"{self.matmul} too; set numerics.products=matmul, or system.precision=bf16_matmul")


# ----- all --------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Settings:
    """A complete description of what a run computes and how."""
    model: Model = opt(Model, "the model, a transformer")
    optim: Optim = opt(Optim, "the optimizer")
    schedule: Schedule = opt(Schedule, "the schedules over the steps of a run")
    data: Data = opt(Data, "the stream of training tokens")
    validation: Validation = opt(Validation, "the measurement of the validation loss")
    numerics: Numerics = opt(Numerics, "the precision plan")
    system: System = opt(System, "the execution of a run")


# ----- derived numbers --------------------------------------------------------------------------------------

def per_stage(value: object) -> tuple:
    """The values of a setting that may have one per stage; length 1 if one value holds for all stages."""
    return value if isinstance(value, tuple) else (value,)


def fits_stages(count: int, s: Settings) -> bool:
    """Whether a list has a value per stage, and perhaps one more for the extension."""
    return count == len(s.schedule.stages) or (
        s.schedule.extension_steps > 0 and count == len(s.schedule.stages) + 1
    )


def longest_document(s: Settings) -> int | None:
    """The longest document of any stage, None without a limit."""
    return None if s.data.max_doc_len is None else max(per_stage(s.data.max_doc_len))


def by_document(s: Settings) -> bool:
    """Whether the loader goes by documents. A logical rank then has one row, whatever its tokens."""
    return s.data.loader in ("bos_aligned", "packed")


def row_limit(s: Settings) -> int:
    """The longest row that the tokens of a logical rank allow in every stage."""
    sizes = per_stage(s.data.tokens_per_rank)
    return max(sizes) if by_document(s) else min(sizes)


def tokens_per_step(s: Settings) -> int | float:
    """Tokens of one step over all logical ranks, the mean over the steps. Single steps: schedule.plan."""
    sizes = per_stage(s.data.tokens_per_rank)
    if len(sizes) == 1:
        return LOGICAL_RANKS * sizes[0]
    scheduled = sum(size * share for size, share in zip(sizes, s.schedule.stages))
    extension = s.schedule.extension / s.schedule.steps
    return LOGICAL_RANKS * ((1 - extension) * scheduled + extension * sizes[-1])


# ----- check ------------------------------------------------------------------------------------------------

def check(s: Settings) -> Settings:
    """The same settings, or a UserError for the first contradiction, which names the paths and the remedy."""
    for message in faults(s):
        raise UserError(message)
    return s


def faults(s: Settings) -> Iterator[str]:
    """Messages on numbers out of bounds, then on parts that contradict each other, then on unmet needs.

    A check may rely on what was checked before it, so only the first message is certain to be right.
    """
    for path, f, value in walk(s):
        yield from bound_faults(path, f.metadata["bounds"], value)
    for _, _, node in walk(s):
        if hasattr(node, "check"):
            yield from node.check(s)
    for path, needs, default in unmet_needs(s):
        remedy = f"leave {path} at its default" if default is not None else f"switch it off: --without {path}"
        yield f"{path} needs {needs}: set it too, or {remedy}"


def check_processes(s: Settings, processes: int) -> None:
    """UserError if the experts cannot be shared out among so many processes.

    Every process calls this before init_process_group, so that the error is printed once.
    """
    moe = s.model.mlp.moe
    if s.system.expert_parallel and moe.num_experts % processes:
        raise UserError(f"system.expert_parallel: {processes} processes do not divide {moe.num_experts} "
                        "experts: change one of them")
