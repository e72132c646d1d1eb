"""In which precision a run computes: `numerics.*`."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from settings.data import per_stage
from settings.declare import PRECISION, PRODUCTS, REFUSE, opt
from settings.model import padded_vocab

# Raised by hand when a fix changes the results of existing settings. 2: Newton-Schulz rounds (c A) B, record
# 6's averaged momentum and p - lr u are rounded as in the originals.
NUMERICS_VERSION = 2

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
    logits: Literal["matmul", "e4m3"] = opt(
        "matmul", "dtype of the product, the logits before the soft cap. matmul: numerics.matmul, which "
                  "their gradient has too before its cast. e4m3: rounded once from the product's sum, at "
                  "most 448; their gradient goes from float32 to e5m2 (record 92)")

    def check(self, s: Any) -> Iterator[str]:
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
    one scale per layer and logical rank, from its previous forward pass. Weight: from the previous step.
    """
    activation: float = opt(1.8, "margin of the activation scale: the scale is margin x (maximum in the "
                                 "previous forward pass) / 448", above=0)
    weight: float | None = opt(1.12, "margin of the weight scale: the scale is margin x (largest entry in "
                                     "the previous step) / 448 (off: that of the current weight)", above=0)
    first: float = opt(1.0, "scale of the activations in the first pass", above=0)
    exact_steps: int = opt(
        16, "first steps with an exact weight scale: before the first step and after each of this many "
            "steps, the scale is (current largest entry) / 448",
        unit="step", off=REFUSE, shrink="steps", least=0
    )


@dataclass(frozen=True)
class FP8Backward:
    """FP8 for the products of the MLPs' backward pass too (records 90 and 92).

    Every operand is then cast once, with a scale that is known before. relu(pre) is the root of relu^2 as the
    cast left it. Scales of gradients refer to the gradient of a rank's sum of losses, as in the originals;
    the trainer undoes its own loss averaging. With a margin a scale is delayed: margin x (maximum of its
    logical rank in the previous pass) / (largest value of the format).
    """
    input: float = opt(8 / 448, "scale of the MLP's input; with input_margin that of the first step", above=0)
    input_margin: float | None = opt(1.25, "margin of the input's delayed scale (off: it stays)", above=0)
    format: Literal["e5m2", "e4m3"] = opt("e5m2", "8-bit format of the gradients")
    grad: float | None = opt(1 / 448, "scale of the incoming gradient (off: its largest entry of a logical "
                                      "rank / largest value of the format)", above=0)
    hidden: float = opt(1 / 448, "scale of the gradient before relu^2; with hidden_margin that of the first "
                                 "step", above=0)
    hidden_margin: float | None = opt(None, "margin of that gradient's delayed scale (off: it stays)",
                                      above=0)
    c_fc_delayed: bool = opt(False, "the scale of c_fc is delayed as that of c_proj is (off: it is that of "
                                    "the current weight)", off=False,
                             needs="numerics.fp8_mlp.c_proj.weight")


@dataclass(frozen=True)
class FP8QKV:
    """FP8 for the projections q, k and v in both passes of training (record 90), as one product.

    The weight's scale is its largest entry / 448; the gradient, in e4m3, is that of a rank's sum of losses.
    """
    x: float = opt(8 / 448, "scale of attention's input", above=0)
    grad: float = opt(1 / 448, "scale of the gradient of the projections", above=0)

    def check(self, s: Any) -> Iterator[str]:
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

    def check(self, s: Any) -> Iterator[str]:
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
    softcap_sigmoid: Literal["unrounded", "bfloat16", "float16"] = opt(
        "unrounded", "rounding of the soft cap's sigmoid in training: loss and gradient see the rounded one, "
                     "whose derivative is taken to be s (1 - s). bfloat16: the kernel of record 79. float16: "
                     "that of record 92. (Both take the GPU's approximate tanh, which is not done here)",
        needs="model.head.softcap.form=sigmoid", exact="unrounded")
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

    def check(self, s: Any) -> Iterator[str]:
        if self.products == self.matmul == self.eval_matmul:
            yield (f"numerics.products = {self.products} has no effect: matmul and eval_matmul are "
                   f"{self.matmul} too; set numerics.products=matmul, or system.precision=bf16_matmul")
