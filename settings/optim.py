"""The axis ml of the settings, its section `optim`: update rules, parameter groups and their constants.

A parameter belongs to the group of its role (embed, lm_head, matrix, scalar, router) unless its label has a
section that is on. In `check(self, s)`, s is the whole Settings.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from settings.declare import BEFORE, REFUSE, fields_of, opt, with_default
from settings.muon import Muon
from settings.wrappers import (
    RRE, Anchor, BroadDelta, EMANesterov, OuterStep, PhaseReadout, ReferenceReadout, TailEMA, TailVelocity,
    TrailDelta
)


@dataclass(frozen=True)
class AdamCautiousDecay:
    """Cautious weight decay of AdamW (Chen et al., arXiv 2510.12402; record 50).

    Only the entries that the update moves towards zero decay, by lr^2 weight_decay decay_mul p. It replaces
    the decoupled decay.
    """
    weight_decay: float = opt(0.005, "weight decay, which the square of the learning rate multiplies",
                              above=0)
    strict: bool = opt(False, "entries whose update is zero do not decay (record 53: update * p > 0; off: "
                              "update * p >= 0)", off=False)


@dataclass(frozen=True)
class Adam:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101): the constants that all AdamW groups share."""
    beta1: float = opt(0.9, "decay of the first moment", least=0, below=1)
    beta2: float = opt(0.95, "decay of the second moment", least=0, below=1)
    eps: float = opt(1e-8, "constant added to the square root of the second moment", least=0)
    eps_after_correction: bool = opt(True, "eps is added after bias correction, as in torch (off: before "
                                           "it, as in record 24, so that eps is relatively larger in the "
                                           "first steps)", off=BEFORE)
    cautious_decay: AdamCautiousDecay | None = opt(None, "cautious weight decay of the AdamW groups")


@dataclass(frozen=True)
class Scalars:
    """The AdamW group of gains, biases and learned scalars."""
    lr: float = opt(6e-4, "peak learning rate, which the schedule multiplies", least=0)
    weight_decay: float = opt(0.0, "decoupled weight decay: p <- p - lr weight_decay p", off=0.0, least=0)
    every: int = opt(1, "steps from one update to the next; the gradients of the steps between are summed",
                     unit="step", off=1, least=1)
    beta1: float | None = opt(None, "decay of the first moment, in place of optim.adam.beta1", least=0,
                              below=1)
    beta2: float | None = opt(None, "decay of the second moment, in place of optim.adam.beta2", least=0,
                              below=1)
    bias_correction: bool = opt(True, "bias correction of both moments (off: the first updates are those of "
                                      "moments that start at 0; track 3, result 44)", off=BEFORE)
    decay_mul: float = opt(1.0, "factor of the cautious weight decay", off=1.0,
                           needs="optim.adam.cautious_decay", least=0)
    freeze_steps: int = opt(
        0, "frozen steps after a change of the window or of the batch, the step of the change included: the "
           "group is not updated, and the gradients of these steps are dropped (record 52)", unit="step",
        off=0, shrink="steps", least=0
    )


@dataclass(frozen=True)
class Group(Scalars):
    """One AdamW parameter group of embeddings or matrices."""
    weight_decay: float = with_default(Scalars, "weight_decay", 0.1)


@dataclass(frozen=True)
class EmbedGroup(Group):
    """The AdamW group of the token table and of other tables without a section of their own."""
    master: int | None = opt(
        None, "float32 master of bfloat16 tables, and moments in float32, from this step on (@jn2clark, "
              "claims from 2580 steps of the optimizer track: 1000)", unit="step",
        needs="numerics.table=bfloat16",
        exact=None, shrink="steps", least=0
    )

    def check(self, s: Any) -> Iterator[str]:
        if self.master is not None and s.numerics.adam == "bfloat16":
            yield ("optim.embed.master is in float32, and AdamW's arithmetic in bfloat16: set "
                   "numerics.adam=float32")
        if self.master is not None and s.model.head.untied and s.model.head.untied.tied_until is not None:
            yield ("optim.embed.master is of the token table alone, which takes over the head's state at "
                   "model.head.untied.tied_until: switch one off")


@dataclass(frozen=True)
class HeadEigenbasis:
    """Adam on the head in the eigenbasis of its gradients' covariance over the model dimension (@jn2clark,
    claims of 2560 and 2540 steps of the optimizer track)."""
    start: int = opt(1000, "first step in the eigenbasis; before, it is AdamW", unit="step", shrink="steps",
                     least=0)
    beta: float = opt(0.95, "decay of the covariance", least=0, below=1)
    every: int = opt(8, "steps from one computation of the basis to the next", unit="step", off=REFUSE,
                     least=1)


@dataclass(frozen=True)
class HeadKfac:
    """Output K-FAC (@jn2clark, claims from 2625 to 2580 steps of the optimizer track): the head's gradient is
    preconditioned by a power of the covariance of the head's inputs.

    The step count of each part is that of the claim of 2600 steps.
    """
    start: int = opt(1400, "first step whose inputs enter the covariances", unit="step", shrink="steps",
                     least=0)
    apply: int = opt(1500, "first step with a preconditioned gradient", unit="step", shrink="steps", least=0)
    full: int = opt(1750, "step at which strength and damping are at their ends", unit="step",
                    shrink="steps", least=1)
    stop: int = opt(2640, "first step without it again", unit="step", shrink="steps", least=1)
    strength_start: float = opt(0.25, "share of the preconditioned gradient at `apply`", least=0, most=1)
    strength: float = opt(0.75, "share of the preconditioned gradient from `full` on", above=0, most=1)
    damping_start: float = opt(0.15, "damping at `apply`, in units of the mean eigenvalue", above=0)
    damping: float = opt(0.05, "damping from `full` on", above=0)
    power: float = opt(0.5, "power of the covariance whose inverse multiplies the gradient", above=0)
    fast_beta: float = opt(0.8, "decay of the fast covariance", least=0, below=1)
    slow_beta: float = opt(0.98, "decay of the slow covariance", least=0, below=1)
    share: float = opt(8 / 9, "share of the fast covariance in their mixture", least=0, most=1)
    every: int = opt(8, "steps from one computation of the power to the next", unit="step", off=REFUSE,
                     least=1)
    sample: int = opt(16, "every how many tokens an input enters the covariances", unit="token", off=REFUSE,
                      least=1)

    def check(self, s: Any) -> Iterator[str]:
        if not self.start <= self.apply < self.stop:
            yield (f"optim.lm_head.kfac starts at {self.start}, is applied from {self.apply} and stops at "
                   f"{self.stop}: give growing steps")


@dataclass(frozen=True)
class HeadGroup(Group):
    """The AdamW group of the output head."""
    eigenbasis: HeadEigenbasis | None = opt(None, "Adam in the eigenbasis of the head's gradients")
    kfac: HeadKfac | None = opt(None, "output K-FAC: a preconditioner by the head's inputs")

    def check(self, s: Any) -> Iterator[str]:
        own = [name for name in ("eigenbasis", "kfac") if getattr(self, name)]
        if len(own) > 1:
            yield "optim.lm_head.eigenbasis and optim.lm_head.kfac are two rules of the head: keep one"
        for name in own:
            path = f"optim.lm_head.{name}"
            if not s.model.head.untied or s.model.head.untied.tied_until is not None:
                yield (f"{path} is a rule of the head alone, and the token table is tied to it: set "
                       "model.head.untied, without tied_until")
            if self.every > 1:
                yield f"{path} counts every step: set optim.lm_head.every=1"
            if s.optim.adam.cautious_decay and name == "eigenbasis":
                yield (f"{path} has no cautious decay, whose signs are those of single weights: set "
                       "optim.adam.cautious_decay=false")
        if self.kfac and s.model.head.mtp:
            yield "optim.lm_head.kfac has the inputs of one next token: set model.head.mtp=false"


@dataclass(frozen=True)
class Slower:
    """A slower cadence from a step on (record 92): each update then stands for several.

    Both decays beta are raised to the power of every / the group's `every`, and the weight decay is
    multiplied by it.
    """

    start: int = opt(
        336, "first step of the slower cadence", unit="step", off=REFUSE, shrink="steps", least=1
    )
    every: int = opt(4, "steps from one update to the next", unit="step", off=REFUSE, least=2)


@dataclass(frozen=True)
class Label:
    """Settings of one kind of parameters; a setting that is off is that of the group the kind belongs to."""
    lr: float | None = opt(None, "peak learning rate, which the schedule multiplies", least=0)
    weight_decay: float | None = opt(None, "decoupled weight decay", least=0)
    beta1: float | None = opt(None, "decay of AdamW's first moment", least=0, below=1)
    beta2: float | None = opt(None, "decay of AdamW's second moment", least=0, below=1)
    eps: float | None = opt(None, "added to the root of AdamW's second moment", least=0)
    bias_correction: bool | None = opt(None, "bias correction of AdamW's moments")
    every: int | None = opt(
        None, "steps from one update to the next; the gradients of the steps between are summed", unit="step",
        least=1
    )
    decay_mul: float | None = opt(None, "factor of AdamW's cautious weight decay",
                                  needs="optim.adam.cautious_decay", least=0)
    freeze_steps: int | None = opt(
        None, "frozen steps after a change of the window or of the batch, without an update and without "
              "their gradients", unit="step", shrink="steps", least=0
    )


@dataclass(frozen=True)
class TableLabel(Label):
    """Settings of a table of embeddings; a setting that is off is that of the group embed."""

    slower: Slower | None = opt(None, "slower cadence from a step on")
    row_moment: bool = opt(
        False, "row-wise Adam (record 92): one second moment for each row, of its mean square, and no "
        "first moment; rows without gradient stay", off=False
    )
    c_optim: float = opt(
        0.0, "C-Optim (Liang et al., arXiv 2411.16085): share s of the cautious update, (1-s) u + s u keep / "
        "max(mean(keep), 0.001) with keep = 1[u g > 0], before the cautious decay. The mean is over all "
        "entries of a table. (Log of record 87: 0.5, with the mean of a rank's eighth of the tables of a "
        "kind, stored as one)", off=0.0, least=0, most=1
    )

    def check(self, s: Any) -> Iterator[str]:
        if self.c_optim and self.row_moment:
            name = next(name for name in LABELS["embed"] if getattr(s.optim, name) is self)
            yield (f"optim.{name}.c_optim compares the gradient with a first moment, which "
                   f"optim.{name}.row_moment does without: switch one off")


@dataclass(frozen=True)
class MatrixLabel(Label):
    """Settings of one kind of matrices; a setting that is off is that of optim.muon, or of optim.matrix."""

    lr_mul: float | None = opt(
        None, "factor of Muon's update, cautious decay included; the decay's other factor is the learning "
              "rate without it (records 42 and 48)", needs="optim.muon", above=0
    )
    adamw: bool = opt(
        False, "AdamW, with the group optim.matrix, updates these matrices although optim.muon is on",
        off=False, needs="optim.muon",
        # Muon has no use for AdamW's constants, and its learning rate is another
        along=("lr", "weight_decay", "beta1", "beta2", "eps", "bias_correction", "every", "decay_mul",
               "freeze_steps")
    )


@dataclass(frozen=True)
class Hyper:
    """The resolved settings of a group of parameters (Optim.group). name: of its section in Optim."""
    name: str
    rule: str
    lr: float
    weight_decay: float
    beta1: float
    beta2: float
    eps: float
    every: int
    decay_mul: float = 1.0
    freeze_steps: int = 0
    lr_mul: float = 1.0
    bias_correction: bool = True
    slower: Slower | None = None
    c_optim: float = 0.0

    def cadence(self, step: int) -> int:
        """Steps from one update to the next, at a step."""
        return self.slower.every if self.slower and step >= self.slower.start else self.every

    def stretch(self, step: int) -> float:
        """How many updates of the usual cadence an update at this step stands for."""
        return self.cadence(step) / self.every


LABELS = {  # role -> labels that may have settings of their own
    "embed": ("value_embed", "positions", "bigram", "embed2"),
    "scalar": ("norm", "bias", "o_bias", "resid_lambdas", "x0_lambdas", "skip_weights", "value_lambda",
               "sa_lambdas", "smear_lambda", "backout_lambda", "post_lambdas", "bigram_lambdas", "xsa",
               "mudd_bias", "token_gate_bias", "token_gate_scale"),
    "matrix": ("qkvo", "latent", "gate", "smear_gate", "ve_gate", "skip_gate", "c_fc", "c_proj",
               "expert_c_fc", "expert_c_proj", "mudd", "token_gate")}


ADAMS_ALONE = ("beta1", "beta2", "eps", "bias_correction", "decay_mul")  # fields that Muon does not read

# Labels of matrices whose inputs grow with the width, unlike those of gates.
BLOCK_MATRICES = ("qkvo", "latent", "c_fc", "c_proj", "expert_c_fc", "expert_c_proj")


@dataclass(frozen=True)
class TailAverage:
    """Averages of the weights over the last steps, which the weights take or are pulled to in the end (record
    92).

    system/tail_average.py says what is averaged how often. Norms stay as they were.
    """
    long: int = opt(298, "last steps over which head, embedding and, for a blend, all matrices are averaged",
                    unit="step", off=REFUSE, shrink="steps", least=2)
    short: int = opt(
        250, "last steps over which v, o, the MLPs and the value tables are averaged, which they become",
        unit="step", off=REFUSE, shrink="steps", least=1
    )
    short_rate: float = opt(4 / 53, "rate of a tick of those averages", above=0, most=1)
    head: float = opt(0.65, "share by which head and embedding move to their average", least=0, most=1)
    qk: float = opt(0.55, "share by which q and k move to theirs in the blend", least=0, most=1)
    matrices: float = opt(
        0.3493, "share by which v, o and the MLPs, averaged already, move to theirs in the blend", least=0,
        most=1
    )
    unread_mlp_square: float = opt(
        0.0, "squares of MLP weights that a record stores and never reads; their sum counts in the norm that "
        "the MLPs keep (record 92: the first matrix of layer 7)", off=0.0, shrink="width", least=0
    )


@dataclass(frozen=True)
class Optim:
    """The optimizer: AdamW in parameter groups, and optionally Muon for the block matrices (axis ml)."""
    adam: Adam = opt(Adam, "constants of AdamW")
    embed: EmbedGroup = opt(EmbedGroup, "AdamW group of the token table (unless it is also the head), the "
                                        "position table and the value tables")
    lm_head: HeadGroup = opt(HeadGroup, "AdamW group of the output head, or of the table that the token "
                                        "embedding and the head share")
    matrix: Group = opt(Group, "AdamW group of the block matrices, unless optim.muon updates them")
    scalar: Scalars = opt(Scalars, "AdamW group of gains, biases and learned scalars")
    router: Group = opt(Group, "AdamW group of the routers, also when Muon updates the block matrices",
                        needs="model.mlp.moe")
    value_embed: TableLabel | None = opt(None, "own settings of the tables of value embeddings",
                                   needs="model.attn.value_embed")
    positions: Label | None = opt(None, "own settings of the position table",
                                   needs="model.embed.learned_positions")
    bigram: TableLabel | None = opt(None, "own settings of the table of bigrams", needs="model.embed.bigram")
    embed2: TableLabel | None = opt(None, "own settings of the second token table",
                                    needs="model.embed.second")
    norm: Label | None = opt(None, "own settings of the gains and biases of the norms",
                                   needs="model.norm=layernorm or model.norm_gain")
    bias: Label | None = opt(None, "own settings of the biases of the linear layers",
                                   needs="model.bias")
    o_bias: Label | None = opt(None, "own settings of the biases of attention's output projections, which "
                                     "are then stored apart", needs="model.bias")
    resid_lambdas: Label | None = opt(None, "own settings of the factors of the stream, in the x0 mix or in "
                                            "sublayers",
                                      needs="model.residual.x0_mix.learned or "
                                            "model.residual.sublayers.learned")
    x0_lambdas: Label | None = opt(None, "own settings of the factors of the embedding in the x0 mix, and of "
                                         "the second embedding",
                                   needs="model.residual.x0_mix.learned or model.embed.second.learned")
    skip_weights: Label | None = opt(None, "own settings of the weights of the U-net skips",
                                   needs="model.residual.unet_skips.learned")
    value_lambda: Label | None = opt(None, "own settings of the lam of the value residual",
                                   needs="model.attn.value_residual.learned")
    sa_lambdas: Label | None = opt(None, "own settings of the factors of the values and their embeddings",
                                   needs="model.attn.value_embed.learned")
    smear_lambda: Label | None = opt(None, "own settings of the factors of the smears",
                                     needs="model.embed.smear.learned or model.head.smear.learned")
    backout_lambda: Label | None = opt(None, "own settings of the factors of backout and layer reuse",
                                       needs="model.residual.backout.learned or "
                                             "model.residual.layer_reuse.learned")
    post_lambdas: Label | None = opt(None, "own settings of the factors of the branches",
                                     needs="model.residual.sublayers.learned")
    bigram_lambdas: Label | None = opt(None, "own settings of the coefficients of the bigram",
                                       needs="model.embed.bigram.learned")
    xsa: Label | None = opt(None, "own settings of the strengths of XSA", needs="model.attn.xsa.learned")
    mudd_bias: Label | None = opt(None, "own settings of the biases of MUDD", needs="model.residual.mudd")
    token_gate_bias: Label | None = opt(None, "own settings of the biases of the token gates",
                                        needs="model.token_gates")
    token_gate_scale: Label | None = opt(None, "own settings of the scale of the token gates",
                                         needs="model.token_gates")
    qkvo: MatrixLabel | None = opt(None, "own settings of the projections of attention")
    latent: MatrixLabel | None = opt(None, "own settings of the matrices of latent attention",
                                   needs="model.attn.latent")
    gate: MatrixLabel | None = opt(None, "own settings of the gates of the heads",
                                   needs="model.attn.gate")
    smear_gate: MatrixLabel | None = opt(None, "own settings of the gate of the smear",
                                         needs="model.embed.smear")
    ve_gate: MatrixLabel | None = opt(None, "own settings of the gates of the value embeddings",
                                      needs="model.attn.value_embed.gate")
    skip_gate: MatrixLabel | None = opt(None, "own settings of the gates of the skips",
                                        needs="model.residual.unet_skips.gate")
    c_fc: MatrixLabel | None = opt(None, "own settings of the first matrix of the MLPs")
    c_proj: MatrixLabel | None = opt(None, "own settings of the second matrix of the MLPs")
    expert_c_fc: MatrixLabel | None = opt(None, "own settings of the first matrix of the experts",
                                   needs="model.mlp.moe")
    expert_c_proj: MatrixLabel | None = opt(None, "own settings of the second matrix of the experts",
                                   needs="model.mlp.moe")
    mudd: MatrixLabel | None = opt(None, "own settings of the matrices of MUDD", needs="model.residual.mudd")
    token_gate: MatrixLabel | None = opt(None, "own settings of the matrices of the token gates",
                                         needs="model.token_gates")
    muon: Muon | None = opt(None, "Muon, in place of AdamW, for the block matrices")
    tail: TailAverage | None = opt(
        None, "tail averaging: the weights in the end are averages over the last steps",
        needs="optim.muon.head_pairs"
    )
    ema_nesterov: EMANesterov | None = opt(
        None, "EMA-Nesterov (track 3, result 39): gradients are taken ahead along the mean of past steps"
    )
    outer: OuterStep | None = opt(
        None, "outer optimizer (MuLoCo, Snoo): a Nesterov step on the sum of several updates"
    )
    rre: RRE | None = opt(
        None, "reduced-rank extrapolation of the block matrices near the end (track 3, result 34)"
    )
    broad_delta: BroadDelta | None = opt(
        None, "BroadDelta: a small pulse back along a long way (track 3, result 43)"
    )
    trail_delta: TrailDelta | None = opt(
        None, "TrailDelta: pulses back along the way that the weights have come (track 3, result 43)"
    )
    tail_ema: TailEMA | None = opt(
        None, "Tail-EMA: what is read out is a blend with an average of the last steps (track 3, result 45)"
    )
    tail_velocity: TailVelocity | None = opt(
        None, "tail velocity: what is read out lies back along the mean of the last steps (track 3, result "
        "38)"
    )
    phase_readout: PhaseReadout | None = opt(
        None, "phase readout: the last weights turn across their last way (track 3, result 43)"
    )
    reference_readout: ReferenceReadout | None = opt(
        None, "reference readout: what is read out lies away from earlier weights (track 3, result 42)"
    )
    anchor: Anchor | None = opt(
        None, "anchor extrapolation: gradients are taken away from an average of the last weights, which is "
        "a part of what is read out"
    )
    grad_clip: float | None = opt(1.0, "gradient clipping: the global norm of the gradient is at most this",
                                  off=None, above=0)

    def group(self, role: str, label: str) -> Hyper:
        """The settings of the parameters with this role and label.

        They come from the label's section where it is on, otherwise from the role's.
        """
        of_role, own = getattr(self, role), getattr(self, label, None)
        own = own if isinstance(own, Label) else None
        muon = self.muon is not None and role == "matrix" and not getattr(own, "adamw", False)
        values = {"lr": self.muon.lr if muon else of_role.lr,
                  "weight_decay": self.muon.weight_decay if muon else of_role.weight_decay,
                  "beta1": self.adam.beta1, "beta2": self.adam.beta2, "eps": self.adam.eps,
                  "every": 1 if muon else of_role.every, "freeze_steps": 0 if muon else of_role.freeze_steps,
                  "decay_mul": 1.0 if muon else of_role.decay_mul, "lr_mul": 1.0,
                  "bias_correction": True if muon else of_role.bias_correction}
        for section in (None if muon else of_role, own):
            for name in values:
                if getattr(section, name, None) is not None:
                    values[name] = getattr(section, name)
        rule = "muon" if muon else "row_adam" if getattr(own, "row_moment", False) else (
            self.tables_rule(role, own)
        )
        return Hyper(
            name=label if own else role, rule=rule, slower=getattr(own, "slower", None),
            c_optim=getattr(own, "c_optim", 0.0), **values
        )

    def tables_rule(self, role: str, own: Label | None) -> str:
        """The rule of AdamW's parameters: a rule of the tables or of the head, if they have one."""
        if role == "embed" and own is None and self.embed.master is not None:
            return "master_adamw"
        if role == "lm_head" and (self.lm_head.eigenbasis or self.lm_head.kfac):
            return "eigen_adam" if self.lm_head.eigenbasis else "kfac_adam"
        return "adamw"

    def groups(self) -> dict[str, Hyper]:
        """All groups by name: of the roles, and of the labels whose section is on."""
        found = {role: self.group(role, role) for role in ("embed", "lm_head", "matrix", "scalar", "router")}
        for role, labels in LABELS.items():
            found |= {label: self.group(role, label) for label in labels if getattr(self, label) is not None}
        return found

    def cadences(self, step: int = 0) -> dict[str, int]:
        """{group: steps from one update to the next, at a step} of all groups, by name."""
        return {name: group.cadence(step) for name, group in self.groups().items()}

    def freezes(self) -> dict[str, int]:
        """{group: its `freeze_steps`} of the groups that have some."""
        return {name: group.freeze_steps for name, group in self.groups().items() if group.freeze_steps}

    def inert(self) -> Iterator[tuple[str, str]]:
        """(path, path of what makes it inert) of settings that no rule of their group reads."""
        if self.muon:
            adamw = [own for name in LABELS["matrix"] if (own := getattr(self, name)) and own.adamw]
            if not adamw:
                yield "optim.matrix", "optim.muon"
            for f in fields_of(Group):
                if all(getattr(own, f.name) is not None for own in adamw):
                    yield f"optim.matrix.{f.name}", "optim.muon"
        for name in LABELS["embed"]:
            if getattr(getattr(self, name), "row_moment", False):
                yield f"optim.{name}.beta1", f"optim.{name}.row_moment"

    def check(self, s: Any) -> Iterator[str]:
        if s.system.reduction == "ordered" and max(self.cadences().values()) > 1:
            yield "system.reduction=ordered sums the gradients of one step: leave every optim.*.every at 1"
        yield from self.check_decay(s)
        yield from self.check_muon(s)
        yield from self.check_freezes(s)

    def check_freezes(self, s: Any) -> Iterator[str]:
        """A freeze follows a change of the window or of the batch."""
        window, sizes = s.model.attn.window, s.data.tokens_per_rank
        changes = window is not None and window.changes or isinstance(sizes, tuple) and len(set(sizes)) > 1
        for name, steps in self.freezes().items() if not changes else ():
            yield (f"optim.{name}.freeze_steps = {steps} follows a change of the window or of the batch, and "
                   f"neither changes in this run: set optim.{name}.freeze_steps=0")

    def check_decay(self, s: Any) -> Iterator[str]:
        """Either the decoupled or the cautious decay."""
        for name, group in self.groups().items():
            if name == "router" and s.model.mlp.moe is None:
                continue
            if group.rule == "row_adam" and group.weight_decay:
                yield (f"optim.{name}.row_moment leaves rows without gradient as they are, and "
                       f"optim.{name}.weight_decay = {group.weight_decay} decays all of them: set "
                       f"optim.{name}.weight_decay=0")
            cautious = self.muon.cautious_decay if group.rule == "muon" else self.adam.cautious_decay
            if cautious and group.weight_decay:
                yield (f"optim.{name}.weight_decay = {group.weight_decay} is the decoupled decay, and "
                       f"optim.{'muon' if group.rule == 'muon' else 'adam'}.cautious_decay is on: set "
                       f"optim.{name}.weight_decay=0, or leave the cautious decay off")

    def check_muon(self, s: Any) -> Iterator[str]:
        """What is AdamW's has no effect on Muon's matrices, and the other way round."""
        for name in LABELS["matrix"] if self.muon else ():
            own = getattr(self, name)
            for field in ADAMS_ALONE if own and not own.adamw else ():
                if getattr(own, field) is not None:
                    yield (f"optim.{name}.{field} is AdamW's, and optim.muon has these matrices: "
                           f"set optim.{name}.adamw=true, or leave it out")
            if own and own.adamw and own.lr_mul is not None:
                yield f"optim.{name}.lr_mul is Muon's, and AdamW has these matrices: set optim.{name}.lr"
        for name in self.muon.moves_after() if self.muon and s.system.comm == "allreduce_updates" else ():
            yield (f"system.comm=allreduce_updates exchanges updates alone, and optim.muon.{name} moves the "
                   "parameters after them: choose another system.comm")
        normuon = self.muon and self.muon.normuon
        if (
            self.muon and self.muon.cautious_decay and self.muon.cautious_decay.gate == "slow"
            and not self.muon.slow
        ):
            yield "optim.muon.cautious_decay.gate=slow reads the slow buffer: set optim.muon.slow"
        if self.muon and self.muon.head_pairs:
            if s.model.attn.latent or s.model.attn.num_heads % 2:
                yield ("optim.muon.head_pairs pairs the heads of q and k: give an even model.attn.num_heads, "
                       "without model.attn.latent")
            if normuon and normuon.attn == "mixed":
                yield (
                    "optim.muon.normuon.attn=mixed takes q, k, v and o together: set "
                    "optim.muon.head_pairs=false"
                )
        if normuon and normuon.attn == "mixed" and not self.muon.split_qkv:
            yield "optim.muon.normuon.attn=mixed is for separate q, k and v: set optim.muon.split_qkv=true"
