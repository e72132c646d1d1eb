"""The section `optim.muon`: the chain of slots that updates the block matrices, one section per slot.

updates/chain.py puts the slots in order. A new slot is a section here, a class in updates/ and a line there.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from declare import BEFORE, REFUSE, opt


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
    graft_eps: float = opt(1e-10, "constant added to the root of Adam's second moment", least=0)
    every: int = opt(5, "updates from one computation of the roots to the next; Adam's direction before the "
                        "first one", unit="step", off=1, least=1)
    pseudo_inverse: bool = opt(
        False, "pseudo-inverse: eigenvalues at or below 0 are left out of the roots, in place of `eps` (track "
        "3, result 35)", off=False
    )


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
    scale: Literal["none", "sqrt_max", "sqrt_ratio", "match_rms"] = opt(
        "none", "factor of the update by the shape of the orthogonalised matrix. none: 1. sqrt_max: "
                "sqrt(max(rows, cols)). sqrt_ratio: sqrt(max(1, rows/cols)). match_rms: 0.2 sqrt(max(rows, "
                "cols)) (Liu et al., arXiv 2502.16982)")
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
    hyperball: bool = opt(
        False, "hyperball: every matrix keeps its Frobenius norm R; the update is rescaled to R, and the "
        "matrix to R after the step (track 3, result 5)", off=False
    )
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
        """One direction alone, which has its own momentum; Muown keeps norms of its own."""
        names = self.directions()
        if len(names) > 1:
            yield (f"optim.muon.{' and optim.muon.'.join(names)} each are the direction of the step: leave "
                   "one")
        if names and self.slow:
            yield (f"optim.muon.slow is a momentum of Muon, and optim.muon.{names[0]} has its own: set "
                   "optim.muon.slow=false")
        if self.muown and self.hyperball:
            yield ("optim.muon.muown keeps the norms of rows, and optim.muon.hyperball those of matrices: "
                   "leave one")

    def moves_after(self) -> list[str]:
        """The settings whose slots change the parameter once more after the step."""
        return [name for name in ("hyperball", "muown") if getattr(self, name)]
