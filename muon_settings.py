"""The section `optim.muon`: the chain of slots that updates the block matrices, one section per slot.

updates/chain.py puts the slots in order. A new slot is a section here, a class in updates/ and a line there.
"""

from dataclasses import dataclass
from typing import Literal

from declare import BEFORE, REFUSE, opt


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


@dataclass(frozen=True)
class MuonCautiousDecay:
    """Cautious weight decay of Muon (Chen et al., arXiv 2510.12402; record 43).

    p <- p - lr mul (u + lr weight_decay p), with the second term only where u p >= 0; mul are the update's
    factors by shape and label.
    """
    weight_decay: float = opt(1.2, "weight decay, which the learning rate multiplies twice", above=0)
    gate: Literal["update", "slow"] = opt(
        "update", "what must have the sign of the weight for it to decay. update: the update. slow: the slow "
                  "momentum buffer (record 92)")


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
    scale: Literal["none", "sqrt_max", "sqrt_ratio"] = opt(
        "none", "factor of the update by the shape of the orthogonalised matrix. none: 1. sqrt_max: "
                "sqrt(max(rows, cols)). sqrt_ratio: sqrt(max(1, rows/cols))")
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
    norm: Literal["frobenius", "schatten4"] = opt(
        "frobenius", "norm by which the matrix is divided before Newton-Schulz, and which slots that rescale "
        "keep. schatten4: (sum of sigma^4)^(1/4) (track 3, result 20)"
    )
    hyperball: bool = opt(
        False, "hyperball: every matrix keeps its Frobenius norm R; the update is rescaled to R, and the "
        "matrix to R after the step (track 3, result 5)", off=False
    )
    ns_steps: int = opt(5, "Newton-Schulz iterations", off=REFUSE, least=1, most=1000)
    update_idle_experts: bool = opt(
        False, "idle experts are updated too: an expert without tokens in a step moves by its momentum, "
               "whose orthogonalised update is of full size (off: it stays)", off=False,
        needs="model.mlp.moe")

    def moves_after(self) -> list[str]:
        """The settings whose slots change the parameter once more after the step."""
        return [name for name in ("hyperball",) if getattr(self, name)]
