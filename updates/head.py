"""Rules of the output head: Adam in an eigenbasis, and Adam after a preconditioner by the head's inputs.

Both are one-sided: they act on the model dimension of a head (V, D), and the classes stay as they are. A bank
has one unit, the whole head.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from schedule import StepPlan
from settings import Settings
from settings.optim import HeadEigenbasis, HeadKfac, Hyper
from updates.adam import AdamW, adamw_
from updates.norms import covariance_step, eigenvectors, frobenius, ramp
from updates.slots import kept_dtype
from updates.views import Views

INPUTS = "input_covariance"  # state that system.head_inputs fills before an update


@dataclass(frozen=True)
class HeadRule:
    """What both rules share: AdamW, whole heads as units, moments in at least float32."""
    adam: AdamW

    name: ClassVar[str] = "head"
    shared: ClassVar[bool] = False
    skips_idle: ClassVar[bool] = False
    eager: ClassVar[bool] = True  # eigendecompositions

    @property
    def lr(self) -> float:
        return self.adam.lr

    def unit(self, shape: tuple[int, ...], views: Views) -> tuple[int, ...]:
        return tuple(shape)

    def moments(self, unit: tuple[int, ...], dtype: torch.dtype) -> dict:
        return {name: (unit, kept_dtype(dtype)) for name in ("exp_avg", "exp_avg_sq")}

    def adam_step(
        self, p: torch.Tensor, g: torch.Tensor, state: dict[str, torch.Tensor], numbers: dict
    ) -> None:
        """AdamW's step on p by the gradient g."""
        a = self.adam
        adamw_(
            p, g, state["exp_avg"], state["exp_avg_sq"], lr=numbers["lr"], decay=a.decay, beta1=a.beta1,
            beta2=a.beta2, eps=a.eps, eps_after_correction=a.eps_after_correction,
            correction1=numbers["correction1"], correction2=numbers["correction2"], math_dtype=a.math_dtype,
            cautious=a.cautious, strict=a.strict
        )


@dataclass(frozen=True)
class EigenAdam(HeadRule):
    """Adam on the head in the eigenbasis of its gradients' covariance (jn2clark's claims of 2560 and 2540
    steps; read in the source of those trainers).

    From step `start` on, with a gradient G (V, D):

        C <- beta C + (1-beta) G^T G / V, begun as the first G^T G / V
        in steps start, start + every, ...: Q' the eigenvectors of C, R = Q^T Q' (before the first: Q = I),
            m <- m R,  v <- v (R * R),  Q <- Q'
        Adam's moments m, v of G Q and its update u;  p <- p - lr u Q^T

    Before `start` it is AdamW. Decoupled decay acts on p itself. Signs and order of eigenvectors do not
    matter: R takes them along.
    """
    settings: HeadEigenbasis

    name = "eigen_adam"

    @classmethod
    def of(cls, s: Settings, group: Hyper) -> "EigenAdam":
        """The rule for one group of a run."""
        return cls(AdamW.of(s, group), s.optim.lm_head.eigenbasis)

    def state(self, unit: tuple[int, ...], dtype: torch.dtype, views: Views) -> dict:
        square = (unit[-1], unit[-1]), kept_dtype(dtype)
        return self.moments(unit, dtype) | {"covariance": square, "basis": square}

    def numbers(self, plan: StepPlan, t: int) -> dict:
        since, every = plan.step - self.settings.start, self.settings.every
        return self.adam.numbers(plan, t) | {"rotated": since >= 0, "refresh": since % every == 0}

    def update_(
        self, p: torch.Tensor, g: torch.Tensor, state: dict[str, torch.Tensor], numbers: dict, views: Views
    ) -> None:
        if not numbers["rotated"]:
            self.adam_step(p, g, state, numbers)
            return
        m, v, basis = state["exp_avg"], state["exp_avg_sq"], state["basis"]
        g = g.to(m.dtype)
        covariance = covariance_step(state["covariance"], g.mT @ g / g.size(-2), self.settings.beta)
        if numbers["refresh"]:
            self.refresh(covariance, basis, m, v)
        a, q = self.adam, known(basis)
        rotated = g @ q
        m.lerp_(rotated, 1 - a.beta1)
        v.lerp_(rotated.square(), 1 - a.beta2)
        if a.eps_after_correction:
            u = (m / numbers["correction1"]) / ((v / numbers["correction2"]).sqrt() + a.eps)
        else:
            u = (numbers["correction2"] ** 0.5 / numbers["correction1"]) * m / (v.sqrt() + a.eps)
        if a.decay:
            p.sub_(numbers["lr"] * a.decay * p)
        p.sub_((numbers["lr"] * (u @ q.mT)).to(p.dtype))

    @staticmethod
    def refresh(covariance: torch.Tensor, basis: torch.Tensor, m: torch.Tensor, v: torch.Tensor) -> None:
        """Take the eigenvectors of the covariance as the basis, and the moments along."""
        new = eigenvectors(covariance)
        turn = known(basis).mT @ new
        m.copy_(m @ turn)
        v.copy_(v @ turn.square())
        basis.copy_(new)


def known(basis: torch.Tensor) -> torch.Tensor:
    """The basis (N, D, D); one of zeros, which has not begun, stands for the identity."""
    begun = basis.square().sum((-2, -1), keepdim=True) > 0
    return torch.where(begun, basis, torch.eye(basis.size(-1), dtype=basis.dtype, device=basis.device))


@dataclass(frozen=True)
class KfacAdam(HeadRule):
    """Output K-FAC (jn2clark's claims from 2625 to 2580 steps): AdamW by a gradient that is preconditioned by
    the covariance of the head's inputs; the formula is read in the source of those trainers.

    From step `start` on, with X (n, D) the sampled inputs of the step:

        F, S <- moving averages of X^T X / n with decays fast_beta and slow_beta, begun as the first one
        C = share F + (1-share) S

    From `apply` to before `stop`, with a ramp from `apply` to `full` between the two values of strength and
    damping:

        in steps apply, apply + every, ...: P = (C + damping mean(eigenvalues of C) I)^(-power)
        G' = G P at the norm of G;  Adam gets G + strength (G' - G) at the norm of G
    """
    settings: HeadKfac

    name = "kfac_adam"

    @classmethod
    def of(cls, s: Settings, group: Hyper) -> "KfacAdam":
        """The rule for one group of a run."""
        return cls(AdamW.of(s, group), s.optim.lm_head.kfac)

    def state(self, unit: tuple[int, ...], dtype: torch.dtype, views: Views) -> dict:
        square = (unit[-1], unit[-1]), kept_dtype(dtype)
        return self.moments(unit, dtype) | dict.fromkeys(
            (INPUTS, "fast_covariance", "slow_covariance", "inverse_power"), square
        )

    def numbers(self, plan: StepPlan, t: int) -> dict:
        settings, step = self.settings, plan.step
        x = ramp(step, settings.apply, settings.full)
        return self.adam.numbers(plan, t) | {
            "collect": settings.start <= step < settings.stop,
            "precondition": settings.apply <= step < settings.stop,
            "refresh": (step - settings.apply) % settings.every == 0,
            "strength": settings.strength_start + x * (settings.strength - settings.strength_start),
            "damping": settings.damping_start + x * (settings.damping - settings.damping_start)
        }

    def update_(
        self, p: torch.Tensor, g: torch.Tensor, state: dict[str, torch.Tensor], numbers: dict, views: Views
    ) -> None:
        settings = self.settings
        if numbers["collect"]:
            fast, slow = (
                covariance_step(state[f"{name}_covariance"], state[INPUTS], beta)
                for name, beta in (("fast", settings.fast_beta), ("slow", settings.slow_beta))
            )
            if numbers["precondition"]:
                if numbers["refresh"]:
                    both = slow.lerp(fast, settings.share)
                    state["inverse_power"].copy_(inverse_power(both, numbers["damping"], settings.power))
                g = self.preconditioned(g.to(slow.dtype), state["inverse_power"], numbers["strength"])
        self.adam_step(p, g.to(p.dtype), state, numbers)

    @staticmethod
    def preconditioned(g: torch.Tensor, inverse: torch.Tensor, strength: float) -> torch.Tensor:
        """The gradient (N, V, D) that Adam gets."""
        length = frobenius(g)
        natural = g @ inverse
        mixed = g.lerp(natural * (length / frobenius(natural, 1e-12)), strength)
        return mixed * (length / frobenius(mixed, 1e-12))


def inverse_power(covariance: torch.Tensor, damping: float, power: float) -> torch.Tensor:
    """(C + damping mean(eigenvalues of C) I)^(-power) of symmetric matrices (N, D, D)."""
    values, vectors = torch.linalg.eigh(covariance)
    added = damping * values.mean(-1, keepdim=True).clamp_min(1e-8)
    scales = (values.clamp_min(0) + added).pow(-power)
    return vectors * scales.unsqueeze(-2) @ vectors.mT
