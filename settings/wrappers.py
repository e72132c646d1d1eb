"""The axis ml of the settings, what stands around the optimizer: look-ahead, outer steps, readouts.

They work on the weights between two updates, whatever rule made the updates, and go on any record by one flag
(`--with optim.ema_nesterov`). system/wrappers.py holds their arithmetic. In `check(self, s)`, s is the whole
Settings.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from settings.declare import REFUSE, opt, order_faults, with_default

WORKERS = (1, 8)  # all ranks together, or a worker for each logical rank


def whole_weights(s: Any, path: str) -> Iterator[str]:
    """A wrapper keeps copies of all weights, and a checkpoint those of one process."""
    for setting, what in (("expert_parallel", "all experts"), ("table_parallel", "the whole table")):
        if getattr(s.system, setting):
            yield (f"{path} keeps copies of the weights of {what}, and system.{setting} gives each process "
                   f"some of them: set system.{setting}=false")


@dataclass(frozen=True)
class EMANesterov:
    """EMA-Nesterov (track 3, results 39 to 46): gradients are taken ahead, along the mean of past steps.

    Before the forwards of a step theta <- theta + beta rho m, where rho is the learning-rate factor of the
    group embed in the step before; after the update m <- decay m + (1 - decay) (theta - theta_before), where
    theta_before are the weights after the update before. The look-ahead is not undone.
    """
    beta: float = opt(0.3, "factor of the look-ahead (result 39: 0.6)", above=0)
    decay: float = opt(0.99, "decay of the mean of the steps", least=0, below=1)
    start: int = opt(300, "first step with a look-ahead", unit="step", shrink="steps", least=0)
    stop: int = opt(1950, "first step without one again", unit="step", shrink="steps", least=1)

    def check(self, s: Any) -> Iterator[str]:
        yield from whole_weights(s, "optim.ema_nesterov")
        yield from order_faults("optim.ema_nesterov", self, "start", "stop")


@dataclass(frozen=True)
class OuterStep:
    """An outer optimizer around the inner one: a Nesterov step on the sum of several updates.

    MuLoCo (Therien et al., arXiv 2505.23725; result 13 of track 3: period 30, lr 0.7,
    momentum 0.5) and Snoo (Kallusky et al., arXiv 2510.15830; medium records 12 and 14 to 16: period 28, lr
    0.68, momentum 0.37, first_step) are one rule: delta = slow - theta, b <- momentum b + delta, slow <- slow
    - lr (delta + momentum b), theta <- slow.
    """
    period: int = opt(30, "updates from one outer step to the next", unit="step", off=REFUSE, least=1)
    lr: float = opt(0.7, "learning rate of the outer step; 1 without momentum changes nothing", above=0)
    momentum: float = opt(0.5, "decay of the outer momentum b", least=0, below=1)
    first_step: bool = opt(
        False, "outer step after the first update, too: after the updates 1, period + 1, ... (Snoo; off: "
        "after the updates period, 2 period, ...)", off=False
    )
    workers: int = opt(
        1, "workers that train apart, each with weights and optimizer state of its own. 8: one for each "
        "logical rank; they exchange nothing but their weights, whose mean is the theta of an outer step "
        "(MuLoCo, DiLoCo). 1: all ranks together", off=1, least=1, most=8
    )
    dtype: Literal["parameter", "float32"] = opt(
        "parameter", "dtype of the slow weights and of b. parameter: that of each parameter. float32: at "
        "least float32, so that a bfloat16 parameter has float32 slow weights"
    )

    def check(self, s: Any) -> Iterator[str]:
        yield from whole_weights(s, "optim.outer")
        if self.workers not in WORKERS:
            yield (f"optim.outer.workers = {self.workers}: must be {WORKERS[0]}, or {WORKERS[1]}, one for "
                   "each logical rank")
        elif self.workers > 1:
            yield from self.check_workers(s)

    def check_workers(self, s: Any) -> Iterator[str]:
        """What is joined over logical ranks, or kept between steps elsewhere, is not a worker's own."""
        untied = s.model.head.untied
        apart = {
            "model.mlp.moe": s.model.mlp.moe, "model.head.candidates": s.model.head.candidates,
            "model.head.untied.tied_until": untied and untied.tied_until is not None,
            "numerics.fp8_head": s.numerics.fp8_head, "numerics.fp8_mlp": s.numerics.fp8_mlp,
            "optim.tail": s.optim.tail, "optim.ema_nesterov": s.optim.ema_nesterov, "optim.rre": s.optim.rre,
            "optim.tail_ema": s.optim.tail_ema, "optim.tail_velocity": s.optim.tail_velocity,
            "optim.broad_delta": s.optim.broad_delta, "optim.trail_delta": s.optim.trail_delta,
            "optim.phase_readout": s.optim.phase_readout,
            "optim.reference_readout": s.optim.reference_readout,
            "optim.anchor": s.optim.anchor, "optim.lm_head.kfac": s.optim.lm_head.kfac
        }
        for path in (path for path, on in apart.items() if on):
            yield f"optim.outer.workers = {self.workers} train apart, without {path}: switch it off"
        groups = s.optim.groups().items()
        for name in (name for name, one in groups if one.every > 1 or one.slower or one.freeze_steps):
            yield (f"optim.outer.workers = {self.workers} update all weights in every step, and optim.{name} "
                   f"rests in some: set optim.{name}.every=1 and optim.{name}.freeze_steps=0")
        if s.system.ranks_per_microbatch not in (0, 1):
            yield (f"optim.outer.workers = {self.workers} have one logical rank in a forward: leave "
                   "system.ranks_per_microbatch at 0 or 1")


@dataclass(frozen=True)
class RRE:
    """Reduced-rank extrapolation (Eddy 1979; track 3, result 34) of the block matrices near the end.

    Of the weights after the last `points` updates, d_a are the differences, oldest first. With the weights c
    of sum 1 that make sum c_a d_a shortest, theta <- theta - damping sum_a (sum of c_b, b >= a) d_a, and at
    most cap ||theta|| far. Training goes on from there.
    """
    start: int = opt(2820, "number of the first update after which weights are kept", unit="step",
                     off=REFUSE, shrink="steps", least=1)
    points: int = opt(4, "weights that an extrapolation needs, those that it moves included", off=REFUSE,
                      least=3, most=16)
    every: int = opt(5, "an extrapolation follows each update whose number is a multiple of this",
                     unit="step", off=REFUSE, least=1)
    damping: float = opt(0.875, "share of the extrapolation that is taken", above=0)
    cap: float = opt(0.001, "greatest length of an extrapolation, as a share of the norm of the matrices "
                            "together", above=0)

    def check(self, s: Any) -> Iterator[str]:
        yield from whole_weights(s, "optim.rre")


@dataclass(frozen=True)
class TrailDelta:
    """TrailDelta (track 3, result 43): pulses back along the way that the weights have come.

    After the updates start + every, start + 2 every, ... up to `stop`: d <- theta - theta_last + momentum d,
    then theta <- theta + push d and theta_last <- theta. theta_last are the weights after update `start` at
    first, and d is 0. Training goes on from there.
    """
    start: int = opt(2650, "number of the update whose weights are the first theta_last", unit="step",
                     off=REFUSE, shrink="steps", least=1)
    every: int = opt(100, "updates from one pulse to the next", unit="step", off=REFUSE, shrink="steps",
                     least=1)
    stop: int = opt(2850, "number of the last update that a pulse may follow", unit="step", off=REFUSE,
                    shrink="steps", least=1)
    first: float = opt(-0.04, "push of the first pulse")
    push: float = opt(-0.12, "push of the others")
    momentum: float = opt(1.0, "share of the last d that joins the next", off=0.0, least=0)
    scope: Literal["all", "other_matrices"] = opt(
        "all", "what is moved. all: all parameters but the token embedding. other_matrices: the block "
        "matrices but v and o"
    )

    path = "optim.trail_delta"

    def check(self, s: Any) -> Iterator[str]:
        yield from whole_weights(s, self.path)
        yield from order_faults(self.path, self, "start", "stop")


@dataclass(frozen=True)
class BroadDelta(TrailDelta):
    """BroadDelta (track 3, result 43): the pulse of TrailDelta once, over a longer way and with less push."""
    start: int = with_default(TrailDelta, "start", 2000)
    every: int = with_default(TrailDelta, "every", 400)
    stop: int = with_default(TrailDelta, "stop", 2400)
    first: float = with_default(TrailDelta, "first", -0.005)
    push: float = with_default(TrailDelta, "push", -0.005)
    momentum: float = with_default(TrailDelta, "momentum", 0.0)
    scope: Literal["all", "other_matrices"] = with_default(TrailDelta, "scope", "other_matrices")

    path = "optim.broad_delta"


@dataclass(frozen=True)
class PhaseReadout:
    """Phase readout (track 3, result 43): after the last update the block matrices but v and o turn a little.

    With theta_0 and theta_1 the weights after the updates `first` and `second`: v = theta - theta_1, a = v -
    (theta_1 - theta_0), b the part of a that is orthogonal to v, theta <- theta + push |v| b / |b|.
    """
    first: int = opt(2650, "number of the update whose weights are theta_0", unit="step", off=REFUSE,
                     shrink="steps", least=1)
    second: int = opt(2750, "number of the update whose weights are theta_1", unit="step", off=REFUSE,
                      shrink="steps", least=2)
    push: float = opt(0.01, "length of the move, as a share of |v|")

    def check(self, s: Any) -> Iterator[str]:
        yield from whole_weights(s, "optim.phase_readout")
        if self.first >= self.second:
            yield (f"optim.phase_readout.first = {self.first} must come before optim.phase_readout.second = "
                   f"{self.second}: set a smaller one")


@dataclass(frozen=True)
class TailEMA:
    """Tail-EMA (track 3, results 45 and 46): what is read out is a blend with an average of the last steps.

    E are the weights after update number `start`; after each later update E <- E + (theta - E) / tau. Read
    out are (1 - share) theta + share E.
    """
    start: int = opt(2400, "number of the update whose weights begin the average", unit="step", off=REFUSE,
                     shrink="steps", least=1)
    tau: int = opt(150, "length of the average", unit="step", off=REFUSE, shrink="steps", least=1)
    share: float = opt(0.6, "share of the average in the blend", above=0, most=1)
    embed: bool = opt(False, "token embedding averaged, too (off: it is read out as it is)", off=False)
    at: Literal["validation", "end"] = opt(
        "validation", "when the weights are the blend. validation: in each validation from `start` on, and "
        "in the saved checkpoint; training goes on from theta (result 46). end: after the last update "
        "(result 45)"
    )

    def check(self, s: Any) -> Iterator[str]:
        yield from whole_weights(s, "optim.tail_ema")


@dataclass(frozen=True)
class TailVelocity:
    """Tail velocity (track 3, result 38): what is read out lies back along the mean of the last steps.

    Of the block matrices, v <- decay v + (1 - decay) (theta - theta_before) after each update beyond number
    `start`. Read out are theta + push min(1, cap |theta| / |v|) v, with the norms of each matrix.
    """
    start: int = opt(2500, "number of the update whose weights begin the first step of the mean", unit="step",
                     off=REFUSE, shrink="steps", least=1)
    decay: float = opt(0.9, "decay of the mean of the steps", least=0, below=1)
    push: float = opt(-6.0, "factor of the mean; a negative one goes back")
    cap: float = opt(0.01, "greatest length of the mean, as a share of the norm of its matrix", above=0)
    at: Literal["validation", "end"] = opt(
        "validation", "when the weights are those. validation: in each validation beyond `start`, and in the "
        "saved checkpoint. end: after the last update"
    )

    def check(self, s: Any) -> Iterator[str]:
        yield from whole_weights(s, "optim.tail_velocity")


@dataclass(frozen=True)
class ReferenceReadout:
    """Reference readout (track 3, results 38 and 42): what is read out lies away from earlier weights.

    Read out are theta + push (theta - reference), where reference are all weights after update number
    `reference`. A negative push goes back towards them.
    """
    reference: int = opt(2375, "number of the update whose weights are the reference", unit="step",
                         off=REFUSE, shrink="steps", least=1)
    push: float = opt(-0.075, "factor of the distance from the reference", least=-1)
    start: int = opt(2850, "first step whose validation reads out so, not before there is a reference",
                     unit="step", off=REFUSE, shrink="steps", least=1)
    at: Literal["validation", "end"] = opt(
        "validation", "when the weights are those. validation: in each validation from `start` on, and in "
        "the saved checkpoint (results 38 and 42). end: after the last update (result 43)"
    )
    embed: bool = opt(True, "token embedding read out so, too (off: it is read as it is, as in result 43)",
                      off=False)

    def check(self, s: Any) -> Iterator[str]:
        yield from whole_weights(s, "optim.reference_readout")


@dataclass(frozen=True)
class Anchor:
    """Anchor extrapolation (@jn2clark, claims from 2580 steps of the optimizer track): gradients are taken
    away from an average of the last weights, and what is read out lies towards it.

    E are the weights after update number `start`; after each later update E <- E + (theta - E) / tau. The
    forwards of a step see theta + g (theta - E), where g rises from 0 at `ramp_start` to `gain` at
    `ramp_end`; the update is made at theta. Read out are (1 - share) theta + share E, with a share for each
    kind of parameters.
    """
    start: int = opt(2040, "number of the update whose weights begin the average", unit="step", off=REFUSE,
                     shrink="steps", least=1)
    tau: int = opt(100, "length of the average", unit="step", off=REFUSE, shrink="steps", least=1)
    gain: float = opt(0.45, "largest g; 0: gradients are taken at theta", off=0.0, least=0)
    ramp_start: int = opt(2100, "step at which g begins to rise", unit="step", shrink="steps", least=0)
    ramp_end: int = opt(2200, "step at which g is `gain`", unit="step", shrink="steps", least=1)
    first: float = opt(0.8, "share of E in the matrices of the first block", off=0.0, least=0, most=1)
    blocks: float = opt(0.55, "share of E in the matrices of the other blocks", off=0.0, least=0, most=1)
    head: float = opt(0.5, "share of E in the head's weight", off=0.0, least=0, most=1)
    vectors: float = opt(1.0, "share of E in gains, biases and other vectors", off=0.0, least=0, most=1)
    tables: float = opt(0.0, "share of E in embedding tables", off=0.0, least=0, most=1)

    def check(self, s: Any) -> Iterator[str]:
        yield from whole_weights(s, "optim.anchor")
        yield from order_faults("optim.anchor", self, "ramp_start", "ramp_end")
