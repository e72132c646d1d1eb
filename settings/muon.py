"""The section `optim.muon`: the chain of slots that updates the block matrices, one section per slot.

updates/chain.py puts the slots in order. A new slot is a section here, a class in updates/ and a line there.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from settings.declare import BEFORE, REFUSE, opt, order_faults


# ----- directions that stand in for momentum and orthogonalisation, and Muown

@dataclass(frozen=True)
class AdamDirection:
    """Adam's direction, bias-corrected, without its learning rate (track 3, result 4)."""
    beta1: float = opt(0.9, "decay of the first moment", least=0, below=1)
    beta2: float = opt(0.95, "decay of the second moment", least=0, below=1)
    eps: float = opt(1e-8, "constant added to the root of the second moment", least=0)


@dataclass(frozen=True)
class SoapH:
    """SOAP (Vyas et al., arXiv 2409.11321) as in result 27 of track 3: no bias correction, new bases in every
    step."""
    beta: float = opt(0.9, "decay of the second moment and of the statistics of rows and columns", least=0,
                      below=1)
    eps: float = opt(1e-8, "constant added to the root of the second moment", above=0)


@dataclass(frozen=True)
class KlSoap:
    """KL-SOAP (Lin et al., arXiv 2509.03378) as in result 19 of track 3.

    The statistics of each side are taken of the gradient whitened by the other side. The first update only
    starts the bases.
    """
    beta2: float = opt(0.9, "decay of the second moment", least=0, below=1)
    beta: float = opt(0.9, "decay of the statistics of rows and columns", least=0, below=1)
    eps: float = opt(1e-8, "constant added to the root of the second moment", above=0)
    start: float = opt(0.1, "eigenvalues of the statistics before the first update", above=0)
    largest: float = opt(4000.0, "largest inverse root of an eigenvalue", above=0)


@dataclass(frozen=True)
class Shampoo:
    """Shampoo (Gupta et al., arXiv 1802.09568; Shi et al., arXiv 2309.06497) with the norm of Adam's
    direction.

    L^(-1/4) M R^(-1/4), M the momentum (track 3, results 21 and 35).
    """
    beta1: float = opt(0.9, "decay of the momentum", least=0, below=1)
    beta2: float = opt(0.95, "decay of the statistics of rows and columns, and of Adam's second moment",
                       least=0, below=1)
    eps: float = opt(1e-12, "least eigenvalue of the statistics, added to all of them (without "
                            "`pseudo_inverse`)", least=0)
    graft_eps: float = opt(1e-10, "constant added to the root of Adam's second moment", above=0)
    every: int = opt(5, "updates from one computation of the roots to the next; Adam's direction before the "
                        "first one", unit="step", off=1, least=1)
    pseudo_inverse: bool = opt(
        False, "pseudo-inverse: eigenvalues at or below 0 are left out of the roots, in place of `eps` "
        "(track 3, result 35)", off=False
    )

    def check(self, s: Any) -> Iterator[str]:
        if not self.eps and not self.pseudo_inverse:
            yield ("optim.muon.shampoo.eps = 0 divides by the eigenvalue 0: set optim.muon.shampoo."
                   "pseudo_inverse=true, or give an eps")


@dataclass(frozen=True)
class Psgd:
    """PSGD with a Kronecker factored preconditioner (Li, arXiv 1512.04202 and 2402.04553; track 3, result
    33).

    Two triangular factors are fitted to the momentum and a random probe in every step.
    """
    beta1: float = opt(0.95, "decay of the momentum", least=0, below=1)
    rate: float = opt(1.0, "step size of the factors, relative to the norm of their gradient", above=0)


@dataclass(frozen=True)
class Muown:
    """Muown (track 3, results 23 and 31): Muon on the directions of the rows, Adam on their gains.

    A row is g v / |v|. Muon moves v, and Adam moves g with Muon's learning rate. |v|, against which a step
    is measured, goes from the norm of the row at the start to `norm`.
    """
    beta1: float = opt(0.9, "decay of the first moment of the gains", least=0, below=1)
    beta2: float = opt(0.95, "decay of the second moment of the gains", least=0, below=1)
    eps: float = opt(1e-8, "constant added to the root of the second moment of the gains", least=0)
    norm: float = opt(2.496, "norm of v at the end", above=0)
    o_mul: float = opt(1.0, "factor of `norm` for o", off=1.0, above=0)
    c_fc_mul: float = opt(1.0, "factor of `norm` for c_fc", off=1.0, above=0)
    c_proj_mul: float = opt(3.33333333333, "factor of `norm` for c_proj", off=1.0, above=0)
    norm_power: float = opt(1.2, "power of the share of `norm_steps` with which the norm grows", above=0)
    norm_steps: int = opt(3165, "updates over which the norm of v grows", unit="step", off=REFUSE,
                          shrink="steps", least=2)


# ----- Muon

@dataclass(frozen=True)
class MomentumWarmup:
    """Linear warm-up of Muon's momentum, up to optim.muon.momentum."""
    start: float = opt(0.85, "momentum at step 0", least=0, below=1)
    steps: int = opt(500, "length of the warm-up", unit="step", shrink="steps", least=1)
    reaches_end: bool = opt(True, "the momentum ends at optim.muon.momentum (off: it stays at the value of "
                                  "the warm-up's last step, as in records 39 and 40)", off=BEFORE)


@dataclass(frozen=True)
class MomentumCooldown:
    """Linear fall of Muon's momentum over the last steps of a run (record 39)."""
    end: float = opt(0.85, "momentum that the step after the last one would have", least=0, below=1)
    steps: int = opt(50, "length of the cooldown", unit="step", shrink="steps", least=1)
    until: int | None = opt(None, "step at which it ends, if the run stops before that (off: schedule.steps)",
                            unit="step", shrink="steps", least=1)


@dataclass(frozen=True)
class UpdateNoise:
    """Exploration noise of NorMuon (log of record 87, @cong_ml and the AI system Recursive).

    Each entry of the update gets rms sigma(t) n, n standard normal, rms the root mean square of its neuron's.

    sigma(t) = sigma min(1, t / ramp_steps) (1 - t / end) at step t < end, the whole part of `until` times the
    scheduled steps; 0 from there. Matrices without a second moment (`square` off) have the noise too.
    """
    sigma: float = opt(0.1, "standard deviation without ramp and fall, in units of the neuron's root mean "
                            "square", above=0)
    ramp_steps: int = opt(50, "steps of the linear ramp from 0", unit="step", off=0, shrink="steps", least=0)
    until: float = opt(0.25, "share of the scheduled steps at whose end the noise is gone", above=0, most=1)

    def end(self, s: Any) -> int:
        """The first step without noise. s: settings.Settings."""
        return max(1, math.floor(self.until * (s.schedule.steps - s.schedule.extension)))


@dataclass(frozen=True)
class NorMuon:
    """NorMuon (Li et al., arXiv 2510.05491; record 41): a second moment per neuron.

    The orthogonalised update is divided by the root of a running second moment per neuron, and rescaled to
    its Frobenius norm. The second moment of an MLP's matrices is per hidden unit; that of other matrices is
    set here.
    """
    beta2: float = opt(0.95, "decay of the second moment", least=0, below=1)
    attn: Literal["output", "input", "mixed"] = opt(
        "output", "what has a second moment of its own in q, k, v and o. output: each output channel (record "
                  "48). input: each input channel (record 42). mixed: each column of the four matrices "
                  "stored as one (d, 4d), with one norm for the four (record 41)")
    gates: Literal["output", "input"] = opt(
        "output", "what has a second moment of its own in gates. output: each output, like a head (record "
                  "48). input: each input channel (record 41)")
    o_input: bool = opt(
        False, "second moment of o per input channel (record 90, which stores o that way round)", off=False,
        needs="optim.muon.head_pairs"
    )
    floor: float = opt(1e-10, "least second moment before its root is taken (record 41: 1e-20)", least=0)
    square: bool = opt(True, "square matrices have it too (off: only the others, as in result 26 of track 3)",
                       off=True)
    noise: UpdateNoise | None = opt(None, "exploration noise: normal noise on the update in the first part "
                                          "of a run")


@dataclass(frozen=True)
class MuonCautiousDecay:
    """Cautious weight decay of Muon (Chen et al., arXiv 2510.12402; record 43).

    p <- p - lr mul (u + lr weight_decay p), with the second term only where u p >= 0; mul are the update's
    factors by shape and label.
    """
    weight_decay: float = opt(1.2, "weight decay, which the learning rate multiplies twice", above=0)
    gate: Literal["update", "slow"] = opt(
        "update", "what must have the sign of the weight for it to decay. update: the update. slow: the slow "
                  "momentum buffer (record 92)", needs="optim.muon.slow")


@dataclass(frozen=True)
class SlowMomentum:
    """A second, slower momentum buffer (the two rails of record 92; after the Bi-Maxwell momentum of track
    3).

    Both buffers are moving averages, V0 <- b V0 + (1-b) g and V1 <- beta V1 + (1-beta) g. From `start` on the
    momentum is (1-share) V0 + share V1, with b = fast_beta; before, it is V0 with Muon's momentum as b.
    """
    beta: float = opt(0.98, "decay of the slow buffer", least=0, below=1)
    fast_beta: float = opt(0.85, "decay of the fast buffer from `start` on", least=0, below=1)
    share: float = opt(0.5615, "share of the slow buffer from `start` on", above=0, most=1)
    start: int = opt(514, "first step with both buffers", unit="step", shrink="steps", least=0)


@dataclass(frozen=True)
class BiMaxwell:
    """Bi-Maxwell momentum (@jn2clark, claims of 2600 to 2540 steps of the optimizer track): a fast and a slow
    moving average of the gradient, which begin as copies of the momentum."""
    fast_beta: float = opt(0.85, "decay of the fast average", least=0, below=1)
    slow_beta: float = opt(0.98, "decay of the slow average", least=0, below=1)
    share: float = opt(0.5615, "share of the slow average in the momentum", above=0, most=1)
    start: int = opt(1000, "step after whose update the averages have decays of their own; until then both "
                           "are the momentum", unit="step", shrink="steps", least=0)


# ----- slots of the optimizer track (track 3), in the order of the chain

@dataclass(frozen=True)
class MuonSquared:
    """Muon^2 (track 3, result 7): the momentum is divided by the root of a second moment per entry."""
    beta2: float = opt(0.95, "decay of the second moment", least=0, below=1)
    eps: float = opt(1e-10, "added to the root", above=0)


@dataclass(frozen=True)
class SoapTrust:
    """Gate of SOAP on o (track 3, result 16): how far the whitened momentum replaces the momentum.

    Between two bounds, which are released from `release_start` to `release_end`.
    """
    agree: float = opt(0.2, "cosine of both from which the gate opens", least=0, below=1)
    least: float = opt(0.45, "least gate, which falls linearly to 0 over the release", least=0, most=1)
    most: float = opt(0.85, "largest gate until the end of the release", above=0, most=1)
    release_start: int = opt(1375, "first step of the release", unit="step", shrink="steps", least=0)
    release_end: int = opt(1625, "step after the release", unit="step", shrink="steps", least=1)
    until: int | None = opt(None, "first step without the gate, in which the whitened momentum replaces the "
                                  "momentum (claims of 2560 and 2540 steps: 1000; off: there is none)",
                            unit="step", shrink="steps", least=1)

    def check(self, s: Any) -> Iterator[str]:
        path = "optim.muon.soap.trust"
        yield from order_faults(path, self, "least", "most")
        yield from order_faults(path, self, "release_start", "release_end")


@dataclass(frozen=True)
class Soap:
    """SOAP-Muon (track 3, result 14; Vyas et al., arXiv 2409.11321): the momentum is whitened before Muon.

    In the eigenbases of the gradients' covariances, by a second moment of the rotated momentum.
    """
    beta: float = opt(0.9, "decay of the second moment", least=0, below=1)
    statistics_beta: float = opt(0.9, "decay of the covariances", least=0, below=1)
    every: int = opt(10, "updates from one refresh of the bases to the next", unit="step", least=1)
    matrices: tuple[str, ...] = opt(
        (), "names of the matrices that have it, of q, k, v, o, c_fc and c_proj (none: all)", off=()
    )
    eps: float = opt(1e-8, "least root of the second moment, or what is added to it", above=0)
    eps_form: Literal["least", "added"] = opt(
        "least", "how `eps` acts. least: as the least root. added: to the root (result 14)"
    )
    attn_floor: float = opt(
        0.0, "least denominator in q, k, v and o, in units of its root mean square (result 16: 0.2, result "
             "20: 0.55)", off=0.0, least=0
    )
    v_share: float = opt(
        1.0, "share of the whitened momentum in that of v, mixed before it is rescaled, so that the mixture "
             "depends on the scale of the loss (result 20: 0.95)", off=1.0, least=0, most=1
    )
    trust: SoapTrust | None = opt(None, "trust gate of o")

    def check(self, s: Any) -> Iterator[str]:
        muon, apart = s.optim.muon, self.tells_apart()
        if unknown := set(self.matrices) - {"q", "k", "v", "o", "c_fc", "c_proj"}:
            yield (f"optim.muon.soap.matrices has {', '.join(sorted(unknown))}, and the matrices are q, k, "
                   "v, o, c_fc and c_proj")
        if apart and not muon.split_qkv:
            yield ("optim.muon.soap treats q, k, v and o differently, and q, k and v are one matrix: set "
                   "optim.muon.split_qkv=true")
        if muon.head_pairs and {"q", "k"} & set(self.matrices):
            yield ("optim.muon.soap.matrices has q or k, and with optim.muon.head_pairs they are pairs of "
                   "heads: leave them out")
        for name, on in (("trust", self.trust is not None), ("v_share", self.v_share != 1)):
            matrix = {"trust": "o", "v_share": "v"}[name]
            if on and self.matrices and matrix not in self.matrices:
                yield f"optim.muon.soap.{name} acts on {matrix}, which optim.muon.soap.matrices does not have"

    def tells_apart(self) -> bool:
        """Whether q, k, v and o are not treated alike."""
        some = bool({"q", "k", "v", "o"} & set(self.matrices))
        return some or self.trust is not None or self.v_share != 1 or self.attn_floor > 0


@dataclass(frozen=True)
class PMuon:
    """PMuon (track 3, result 18): powers of the momentum's covariances on both sides of it."""
    beta: float = opt(0.95, "decay of the covariances", least=0, below=1)
    power: float = opt(0.3, "power of the covariances, whose inverse multiplies the momentum", above=0)
    eps: float = opt(1e-6, "added to the covariances, and their least eigenvalue", above=0)


@dataclass(frozen=True)
class Aurora:
    """Aurora (track 3, result 17): an orthogonal factor whose rows have equal norms, for matrices that are
    not square."""
    iterations: int = opt(2, "orthogonalisations, between which rows are rescaled (result 30: 3)", least=1)
    beta: float = opt(0.5, "power of the correction of a row (result 30: 0.25)", least=0)
    wide_only: bool = opt(False, "only for matrices with more columns than rows (result 30)", off=False)


@dataclass(frozen=True)
class DynMuon:
    """DynMuon (track 3, result 28): the singular values of the momentum to a power that changes.

    power = end + (start - end) / (1 + exp((step / steps - center) / width)), to second order in it.
    """
    start: float = opt(0.25, "power long before `center`")
    end: float = opt(-0.25, "power long after `center`")
    center: float = opt(0.04, "share of `steps` at which the power is half way")
    width: float = opt(0.04, "share of `steps` over which it changes", above=0)
    steps: int = opt(3200, "length of the schedule", unit="step", shrink="steps", least=1)
    divisor: float = opt(
        1.0, "divides the gradient, whose scale enters the result: the tokens of a step where the loss is a "
             "sum (result 28: 524288)", off=1.0, shrink="batch1", above=0
    )


@dataclass(frozen=True)
class SinkSoap:
    """SinkSOAP (track 3, result 26), in place of Newton-Schulz: the momentum in the eigenbases of the
    gradients' covariances, with rows and columns of equal weight."""
    beta: float = opt(0.95, "decay of the covariances", least=0, below=1)
    rounds: int = opt(10, "rounds of Sinkhorn's iteration", least=1)
    eps: float = opt(1e-8, "added to the covariances, to the squares and to their sums", above=0)


@dataclass(frozen=True)
class Contra:
    """Contra-Muon (track 3, result 11): the orthogonalised update minus a part of the momentum."""
    strength: float = opt(0.2, "part of the momentum at unit norm", above=0)
    steps: int | None = opt(None, "steps over which the strength falls linearly to 0 (result 20: 2000; off: "
                                  "it is constant)", unit="step", shrink="steps", least=1)


@dataclass(frozen=True)
class SoftMuon:
    """Soft-Muon (track 3, result 20): near the end the update turns to the momentum to the power 0.1.

    Its share rises linearly from 0 at `start` to 1 at `end`, and stops at `most`.
    """
    most: float = opt(0.8, "largest share", above=0, most=1)
    start: int = opt(2500, "step at which the share starts to rise", unit="step", shrink="steps", least=0)
    end: int = opt(3010, "step at which it would be 1", unit="step", shrink="steps", least=1)

    def check(self, s: Any) -> Iterator[str]:
        yield from order_faults("optim.muon.soft", self, "start", "end")


@dataclass(frozen=True)
class TemperedPolar:
    """Tempered polar factor (track 3, result 38): near the end it goes a part of the way to the momentum.

    The part rises linearly from 0 at `start` to `most` at `end`.
    """
    most: float = opt(0.05, "largest part of the way from the orthogonal factor to the momentum at unit norm",
                      above=0, most=1)
    cap: float = opt(0.25, "greatest length of the way, as a share of the norm of the orthogonal factor",
                     above=0)
    start: int = opt(2600, "step at which the part starts to rise", unit="step", shrink="steps", least=0)
    end: int = opt(2800, "step from which it is `most`", unit="step", shrink="steps", least=1)

    def check(self, s: Any) -> Iterator[str]:
        yield from order_faults("optim.muon.tempered", self, "start", "end")


@dataclass(frozen=True)
class Annealing:
    """Spectral annealing (@jn2clark, claim of 2540 steps of the optimizer track): while the learning rate
    falls, directions of high curvature are cooled first.

    In SOAP's bases the update is multiplied by r^(strength s): r is the learning-rate factor, s the
    standardised logarithm of the gradients' covariances in these bases.
    """
    strength: float = opt(0.25, "power of r at one standard deviation", above=0)
    least: float = opt(0.3, "least r, below which the learning rate changes nothing more", above=0, below=1)
    clip: float = opt(2.0, "standard deviations beyond which s stays", above=0)
    beta: float = opt(0.99, "decay of the covariances", least=0, below=1)


@dataclass(frozen=True)
class RowNorm:
    """Rows of the momentum divided by their root mean square before Newton-Schulz (claim of 2726 steps of the
    optimizer track, by an agent). The mean square is a moving average."""
    attn: float = opt(0.84, "decay of the average for q, k, v and o at the start", least=0, below=1)
    mlp: float = opt(0.86, "decay of the average for the MLPs at the start", least=0, below=1)
    rise: float = opt(0.1, "by how much both decays have risen at the end of the run", least=0, below=1)
    eps: float = opt(1e-8, "added to the root", above=0)

    def check(self, s: Any) -> Iterator[str]:
        if max(self.attn, self.mlp) + self.rise >= 1:
            yield (f"optim.muon.row_norm.rise = {self.rise} takes a decay to 1 or beyond: set a smaller one, "
                   "or smaller decays")


@dataclass(frozen=True)
class FadingDecay:
    """Decoupled weight decay that fades with the run (claim of 2726 steps of the optimizer track, by an
    agent): p <- p - lr a (1 - share of the run)^power p."""
    attn: float = opt(0.08, "a for q, k, v and o", least=0)
    attn_power: float = opt(2.25, "power for q, k, v and o", above=0)
    mlp: tuple[float, ...] = opt((0.16, 0.22, 0.28), "a for the MLPs, one for each part of the layers, the "
                                                     "first layers first", off=REFUSE, least=0)
    mlp_power: float = opt(2.5, "power for the MLPs", above=0)

    def check(self, s: Any) -> Iterator[str]:
        if not self.mlp:
            yield "optim.muon.fading_decay.mlp is empty: give one number at least"
        if s.optim.muon.weight_decay:
            yield ("optim.muon.weight_decay and optim.muon.fading_decay are both decoupled decays: set "
                   "optim.muon.weight_decay=0")


@dataclass(frozen=True)
class Circuit:
    """Circuit-Muon (track 3, result 41): the updates of v and o are balanced head by head."""
    eps: float = opt(1e-3, "added to the mean square of a head's weights, per channel", above=0)

    def check(self, s: Any) -> Iterator[str]:
        attn = s.model.attn
        if not s.optim.muon.split_qkv:
            yield ("optim.muon.circuit takes v apart from q and k: set optim.muon.split_qkv=true")
        if s.optim.muon.head_pairs or attn.narrow or attn.latent or attn.qk_dim:
            yield ("optim.muon.circuit needs q, k, v and o in one tensor: leave optim.muon.head_pairs, "
                   "model.attn.narrow, model.attn.latent and model.attn.qk_dim off")


@dataclass(frozen=True)
class LateFloor:
    """Another ratio of the floor near the end, which it takes linearly (track 3, result 38)."""
    ratio: float = opt(0.4, "least ratio of the norms from `end` on", above=0)
    start: int = opt(2400, "step at which the ratio starts to change", unit="step", shrink="steps", least=0)
    end: int = opt(2800, "step from which it is `ratio`", unit="step", shrink="steps", least=1)

    def check(self, s: Any) -> Iterator[str]:
        yield from order_faults("optim.muon.floor.late", self, "start", "end")


@dataclass(frozen=True)
class UpdateFloor:
    """Floor of the update (track 3, results 9 and 46): its norm is at least `ratio` times that of the
    weights, before the learning rate."""
    ratio: float = opt(0.35, "least ratio of the norms (result 20 on: 0.3825)", above=0)
    per: Literal["matrix", "row"] = opt("matrix", "whose norms. matrix: of each matrix (result 9). row: of "
                                                  "each row, an output channel (result 46)")
    late: LateFloor | None = opt(None, "late floor: another ratio near the end")


@dataclass(frozen=True)
class LateBrake:
    """Another factor of the radial brake near the end, which it takes linearly (track 3, result 38)."""
    factor: float = opt(0.4, "factor of the brake from `end` on", least=0, most=1)
    start: int = opt(2400, "step at which the factor starts to change", unit="step", shrink="steps", least=0)
    end: int = opt(2900, "step from which it is `factor`", unit="step", shrink="steps", least=1)

    def check(self, s: Any) -> Iterator[str]:
        yield from order_faults("optim.muon.late_brake", self, "start", "end")


@dataclass(frozen=True)
class Soda:
    """SODA (track 3, result 32): a pull towards the initial weights, 1 / (step + 2) of the way in each step.

    Its factor falls along half a cosine from `start` on.
    """
    start: int = opt(2000, "step from which the pull fades", unit="step", shrink="steps", least=0)
    steps: int = opt(750, "steps until it is gone", unit="step", shrink="steps", least=1)


# The slots between the gradient and the factors of shape, which a direction replaces.
BEFORE_SCALING = (
    "slow", "bi_maxwell", "squared", "soap", "pmuon", "row_norm", "aurora", "dyn", "sinksoap", "tempered",
    "contra", "soft", "smoothing"
)


@dataclass(frozen=True)
class UpdateSmoothing:
    """Update smoothing (medium record 13, @acutkosky): b <- s b + (1-s) v, v the orthogonalised update.

    The update becomes b, or with `lookahead` s b + (1-s) v with the new b.
    """
    coef: float = opt(0.2, "decay s of the buffer", least=0, below=1)
    start: float | None = opt(None, "s at step 0, from which it goes linearly to `coef` (off: constant)",
                              least=0, below=1)
    ramp_steps: int = opt(3000, "steps in which s goes from `start` to `coef`; without effect if `start` is "
                                "off", unit="step", shrink="steps", least=1)
    lookahead: bool = opt(False, "one step ahead: the update is s b + (1-s) v (off: b)", off=False)


@dataclass(frozen=True)
class Muon:
    """Muon (Jordan et al., kellerjordan.github.io/posts/muon): Nesterov momentum, orthogonalised."""
    lr: float = opt(0.018, "peak learning rate, which the schedule multiplies", least=0)
    weight_decay: float = opt(0.0, "decoupled weight decay: p <- p - lr weight_decay p", off=0.0, least=0)
    momentum: float = opt(0.95, "decay mu of the momentum buffer; the update looks one step ahead "
                                "(Nesterov)", least=0, below=1)
    momentum_ema: bool = opt(False, "momentum as a moving average: M <- mu M + (1-mu) g, update (1-mu) g + "
                                    "mu M (off: M <- mu M + g, update g + mu M). They differ while mu "
                                    "changes", off=False)
    momentum_warmup: MomentumWarmup | None = opt(None, "momentum warm-up over the first steps")
    momentum_cooldown: MomentumCooldown | None = opt(None, "momentum cooldown over the last steps")
    polar_express: bool = opt(False, "Polar Express (Amsel et al., arXiv 2505.16932; record 38): another "
                                     "polynomial in each iteration of Newton-Schulz", off=False)
    slow: SlowMomentum | None = opt(None, "slow momentum: a second momentum buffer",
                                    needs="optim.muon.momentum_ema")
    anvil_maps: bool = opt(
        False, "maps of ANVIL (record 92): six other polynomials in place of Newton-Schulz", off=False
    )
    normuon: NorMuon | None = opt(None, "NorMuon: a second moment per neuron")
    cautious_decay: MuonCautiousDecay | None = opt(None, "cautious weight decay of Muon's matrices")
    scale: Literal["none", "sqrt_max", "sqrt_ratio", "sqrt_aspect", "match_rms"] = opt(
        "none", "factor of the update by the shape of the orthogonalised matrix. none: 1. sqrt_max: "
                "sqrt(max(rows, cols)). sqrt_ratio: sqrt(max(1, rows/cols)). sqrt_aspect: the root of the "
                "longer side over the shorter. match_rms: 0.2 sqrt(max(rows, cols)) (Liu et al., arXiv "
                "2502.16982)")
    c_fc_orientation: Literal["out_in", "in_out"] = opt(
        "out_in", "orientation of the MLP's first matrix c_fc for `scale`. out_in: 4d x d. in_out: d x 4d, "
                  "as record 27 stores it")
    split_qkv: bool = opt(False, "separate orthogonalisation of q, k and v (off: as one 3d x d matrix)",
                          off=False)
    head_pairs: bool = opt(
        False, "pairs of heads (record 80, @samacqua): q and k are orthogonalised in pairs of "
        "adjacent heads (off: all heads as one matrix)", off=False, needs="optim.muon.split_qkv"
    )
    convergent: bool = opt(
        False, "convergent Newton-Schulz (track 3): 2X - 1.5 (XX^T)X + 0.5 (XX^T)^2 X, which with 12 steps "
        "takes the singular values to 1", off=False
    )
    polar_express_long: bool = opt(
        False, "long Polar Express: eight polynomials, the last of which repeats, for 12 steps (track 3, "
        "result 23)", off=False
    )
    norm: Literal["frobenius", "schatten4"] = opt(
        "frobenius", "norm by which the matrix is divided before Newton-Schulz, and which slots that rescale "
        "keep. schatten4: (sum of sigma^4)^(1/4) (track 3, result 20)"
    )
    squared: MuonSquared | None = opt(None, "Muon^2: a second moment per entry before Newton-Schulz")
    soap: Soap | None = opt(None, "SOAP-Muon: the momentum is whitened in slow eigenbases")
    pmuon: PMuon | None = opt(None, "PMuon: powers of the momentum's covariances")
    aurora: Aurora | None = opt(None, "Aurora: an orthogonal factor with rows of equal norm")
    dyn: DynMuon | None = opt(None, "DynMuon: a changing power of the singular values")
    sinksoap: SinkSoap | None = opt(None, "SinkSOAP: Sinkhorn's balance in eigenbases, in place of "
                                          "Newton-Schulz")
    tempered: TemperedPolar | None = opt(None, "tempered polar factor: a part of the way to the momentum "
                                               "near the end")
    contra: Contra | None = opt(None, "Contra-Muon: a part of the momentum is subtracted")
    soft: SoftMuon | None = opt(None, "Soft-Muon: a softer power of the momentum near the end",
                                needs="optim.muon.convergent")
    bi_maxwell: BiMaxwell | None = opt(None, "Bi-Maxwell momentum: a fast and a slow average from a step on",
                                       needs="optim.muon.momentum_ema")
    row_norm: RowNorm | None = opt(None, "rows of equal size: the momentum's rows are divided by their size")
    fading_decay: FadingDecay | None = opt(None, "fading weight decay, in place of weight_decay")
    annealing: Annealing | None = opt(
        None, "spectral annealing: directions of high curvature are cooled before the others",
        needs="optim.muon.soap"
    )
    circuit: Circuit | None = opt(None, "Circuit-Muon: v and o are balanced head by head")
    radial_brake: float | None = opt(
        None, "radial brake: factor of the part of a step that lengthens its matrix (track 3, result 29: "
              "0.5)", least=0, below=1
    )
    late_brake: LateBrake | None = opt(None, "late brake: another factor of the radial brake near the end",
                                       needs="optim.muon.radial_brake")
    floor: UpdateFloor | None = opt(None, "update floor: a least norm of the update relative to the weights")
    soda: Soda | None = opt(None, "SODA: a fading pull towards the initial weights")
    radius_pin: bool = opt(
        False, "radius pin: the norm of a matrix after the step is what the radial part of the step alone "
        "gives it (track 3, result 29)", off=False
    )
    late_decay: float | None = opt(
        None, "late cautious decay: W <- W (1 - lr late_decay) where the update and the old weight have one "
        "sign, after the step and the pin (track 3, result 46: 0.025)", above=0
    )
    hyperball: bool = opt(
        False, "hyperball: every matrix keeps its Frobenius norm R; the update is rescaled to R, and the "
        "matrix to R after the step, so a matrix of zeros stays one (track 3, result 5)", off=False
    )
    coefficients: tuple[tuple[float, float, float], ...] = opt(
        (), "coefficients [a, b, c] of each iteration of Newton-Schulz, aX + b(XX^T)X + c(XX^T)^2 X (medium "
        "record 4, @leloykun); the last ones repeat. Empty: [3.4445, -4.775, 2.0315] throughout", off=()
    )
    smoothing: UpdateSmoothing | None = opt(None, "update smoothing: a moving average of the updates")
    ns_steps: int = opt(5, "Newton-Schulz iterations", off=REFUSE, least=1, most=1000)
    update_idle_experts: bool = opt(
        False, "idle experts are updated too: an expert without tokens in a step moves by its momentum, "
               "whose orthogonalised update is of full size (off: it stays)", off=False,
        needs="model.mlp.moe")

    adam: AdamDirection | None = opt(
        None, "Adam's direction in place of momentum and orthogonalisation (AdamH, with hyperball)"
    )
    soap_h: SoapH | None = opt(None, "SOAP-H: SOAP's direction in place of orthogonalised momentum")
    kl_soap: KlSoap | None = opt(
        None, "KL-SOAP: its direction in place of orthogonalised momentum"
    )
    shampoo: Shampoo | None = opt(
        None, "Shampoo: its direction in place of momentum and orthogonalisation"
    )
    psgd: Psgd | None = opt(
        None, "PSGD: its direction in place of momentum and orthogonalisation; hyperball then adds 1e-10 to "
        "its norms"
    )
    muown: Muown | None = opt(
        None, "Muown: Muon moves the directions of the rows, Adam their gains"
    )

    def directions(self) -> list[str]:
        """The sections that stand in for momentum and orthogonalisation."""
        return [name for name in ("adam", "soap_h", "kl_soap", "shampoo", "psgd") if getattr(self, name)]

    def direction_faults(self) -> Iterator[str]:
        """One direction alone, without other slots of momentum; Muown keeps norms of its own."""
        names = self.directions()
        if len(names) > 1:
            yield (f"optim.muon.{' and optim.muon.'.join(names)} each are the direction of the step: keep "
                   "one")
        for name in BEFORE_SCALING if names else ():
            if getattr(self, name):
                yield (f"optim.muon.{name} is a part of orthogonalised momentum, and optim.muon.{names[0]} "
                       "stands in its place: keep one")
        if self.muown and self.hyperball:
            yield ("optim.muon.muown keeps the norms of rows, and optim.muon.hyperball those of matrices: "
                   "keep one")

    def polynomial_faults(self) -> Iterator[str]:
        """Messages on polynomials of Newton-Schulz of which one replaces another, or that are not used."""
        names = ("coefficients", "polar_express", "polar_express_long", "anvil_maps", "convergent")
        found = [name for name in names if getattr(self, name)]
        if len(found) > 1:
            yield f"optim.muon.{found[0]} and optim.muon.{found[1]} exclude each other: switch one off"
        if self.anvil_maps and self.ns_steps != 6:
            yield f"optim.muon.anvil_maps are six, and optim.muon.ns_steps = {self.ns_steps}: set it to 6"
        if len(self.coefficients) > self.ns_steps:
            yield (f"optim.muon.coefficients has {len(self.coefficients)} triples for optim.muon.ns_steps = "
                   f"{self.ns_steps}: leave some out, or take more steps")

    def moves_after(self) -> list[str]:
        """The settings whose slots change the parameter once more after the step."""
        after = ("soda", "radius_pin", "late_decay", "hyperball", "muown")
        return [name for name in after if getattr(self, name)]

    def tells_apart(self) -> bool:
        """Whether a slot treats q, k, v and o differently, so that they are one unit."""
        return (self.circuit is not None or bool(self.muown and self.muown.o_mul != 1)
                or (self.soap is not None and self.soap.tells_apart()))

    def check(self, s: Any) -> Iterator[str]:
        yield from self.direction_faults()
        yield from self.polynomial_faults()
        ways = [name for name in ("aurora", "dyn", "sinksoap", "soft") if getattr(self, name)]
        if len(ways) > 1:
            yield (f"optim.muon.{ways[0]} and optim.muon.{ways[1]} are two ways to orthogonalise: switch one "
                   "off")
        if self.slow and self.bi_maxwell:
            yield "optim.muon.slow and optim.muon.bi_maxwell are two momenta of two averages: keep one"
        if self.soft and self.ns_steps != 12:
            yield f"optim.muon.soft has 12 weights, and optim.muon.ns_steps = {self.ns_steps}: set it to 12"
        if self.radius_pin and self.hyperball:
            yield "optim.muon.radius_pin and optim.muon.hyperball set the same norm: switch one off"
        init = s.model.init
        if self.hyperball and init.zero_proj and None in (init.o_bound, init.c_proj_bound):
            yield ("optim.muon.hyperball keeps the norm of every matrix, so projections that start at zero "
                   "stay there: set model.init.zero_proj=false")
