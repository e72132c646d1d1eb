"""The chain of Muon: the slots that the settings ask for, in their order."""

import torch

from settings import Settings
from settings.model import head_dim
from settings.muon import Muon
from settings.optim import Hyper
from updates import soap
from updates.annealing import Annealing, KeepBases
from updates.aurora import Aurora
from updates.circuit import Circuit
from updates.contra import Contra, SoftBlend, Tempered
from updates.directions import direction
from updates.geometry import Hyperball, LateDecay, RadialBrake, RadiusPin, UpdateFloor
from updates.muown import Muown
from updates.noise import ExplorationNoise
from updates.row_norm import FadingDecay, RowNorm
from updates.sinksoap import SinkSoap
from updates.soda import Soda
from updates.spectral import DynMuon, MuonSquared, PMuon
from updates.slots import CautiousDecay, Decay, Momentum, NorMuon, Orthogonalise, Scale, Slot, Smooth
from updates.two_averages import TwoAverages


# Soft-Muon's weights of the iterates X_0 ... X_11 of the convergent Newton-Schulz (track 3, result 20).
SOFT = (0.1091613623, 0.07085664498, 0.05210528973, 0.05457295795, 0.05011334061, 0.03334622198,
        0.05022104481, 0.1053727358, 0.1187323776, 0.1185061091, 0.1185059576, 0.1185059576)


def chain(s: Settings, group: Hyper) -> tuple:
    """The slots that the settings ask for, in their order."""
    muon = s.optim.muon
    slots = [Muown(muon.muown)] if muon.muown else []
    slots += direction(muon) or orthogonal_momentum(s)
    return (*slots, *scaling(s, group), *geometry(s, group))


def orthogonal_momentum(s: Settings) -> list:
    """Momentum, what whitens it, the orthogonaliser, and what is added to its result."""
    muon = s.optim.muon
    slots = [momentum(muon)]
    if muon.squared:
        slots.append(MuonSquared(muon.squared.beta2, muon.squared.eps))
    if muon.annealing:
        slots.append(KeepBases(muon.soap.matrices))
    if muon.soap:
        slots.append(soap.slot(s))
    if muon.pmuon:
        slots.append(PMuon(muon.pmuon.beta, muon.pmuon.power, muon.pmuon.eps))
    if rows := muon.row_norm:
        slots.append(RowNorm(rows.attn, rows.mlp, rows.rise, rows.eps, s.schedule.steps))
    slots.append(orthogonaliser(s))
    if smooth := muon.smoothing:
        start = smooth.coef if smooth.start is None else smooth.start
        dtype = getattr(torch, s.numerics.newton_schulz)
        slots.append(Smooth(smooth.coef, start, smooth.ramp_steps, smooth.lookahead, dtype))
    if warm := muon.tempered:
        slots.append(Tempered(warm.most, warm.cap, warm.start, warm.end, muon.norm))
    if muon.contra:
        slots.append(Contra(muon.contra.strength, muon.contra.steps, muon.norm))
    if muon.soft:
        slots.append(SoftBlend(muon.soft.most, muon.soft.start, muon.soft.end, muon.norm))
    return slots


def momentum(muon: Muon) -> Slot:
    """The slot that keeps the momentum. muon: settings.optim.muon."""
    if two := muon.bi_maxwell:
        return TwoAverages(two.fast_beta, two.slow_beta, two.share, two.start + 1)
    if slow := muon.slow:
        return TwoAverages(slow.fast_beta, slow.beta, slow.share, slow.start, always_slow=True)
    return Momentum(muon.momentum_ema)


def orthogonaliser(s: Settings) -> Slot:
    """The slot that makes the update orthogonal, or what stands in its place."""
    muon, n = s.optim.muon, s.numerics
    if sink := muon.sinksoap:
        return SinkSoap(sink.beta, sink.rounds, sink.eps)
    plain = Orthogonalise(
        muon.ns_steps, getattr(torch, n.newton_schulz), getattr(torch, n.newton_schulz_norm),
        n.newton_schulz_form, muon.polar_express, getattr(torch, n.muon_update),
        one_by_one=s.system.reduction == "ordered", fused=s.system.kernels.muon == "triton",
        anvil=muon.anvil_maps, convergent=muon.convergent, by_schatten4=muon.norm == "schatten4",
        soft=SOFT if muon.soft else (), long=muon.polar_express_long, coefficients=muon.coefficients
    )
    if aurora := muon.aurora:
        return Aurora(plain, aurora.iterations, aurora.beta, aurora.wide_only)
    if dyn := muon.dyn:
        return DynMuon(plain, dyn.start, dyn.end, dyn.center, dyn.width, dyn.steps, dyn.divisor)
    return plain


def scaling(s: Settings, group: Hyper) -> list:
    """NorMuon and its noise, cautious decay and the factors of shape and label."""
    muon, n, slots = s.optim.muon, s.numerics, []
    if normuon := muon.normuon:
        dtype = getattr(torch, n.newton_schulz)
        slots.append(NorMuon(normuon.beta2, normuon.floor, dtype, muon.norm, normuon.square))
        if noise := normuon.noise:
            slots.append(ExplorationNoise(noise.sigma, noise.ramp_steps, noise.end(s)))
    if muon.cautious_decay:
        decay = muon.cautious_decay
        slots.append(CautiousDecay(decay.weight_decay, getattr(torch, n.muon_decay), decay.gate == "slow"))
    if muon.scale != "none" or group.lr_mul != 1:
        slots.append(Scale(muon.scale, group.lr_mul))
    return slots


def geometry(s: Settings, group: Hyper) -> list:
    """Slots that look at the parameter as well as at the update, and those that act after the step."""
    muon, slots = s.optim.muon, []
    if cool := muon.annealing:
        slots.append(Annealing(cool.strength, cool.least, cool.clip, cool.beta, muon.soap.matrices))
    if muon.circuit:
        slots.append(Circuit(head_dim(s), muon.circuit.eps))
    if muon.radial_brake is not None:
        slots.append(RadialBrake(muon.radial_brake, muon.late_brake))
    if muon.floor:
        slots.append(UpdateFloor(muon.floor.ratio, muon.floor.per, muon.floor.late))
    if muon.soda:
        slots.append(Soda(muon.soda.start, muon.soda.steps))
    if group.weight_decay and not s.numerics.matrix_mantissa:  # those decay before the step (Muon.update_)
        slots.append(Decay(group.weight_decay))
    if fade := muon.fading_decay:
        slots.append(FadingDecay(fade.attn, fade.attn_power, fade.mlp, fade.mlp_power, s.schedule.steps))
    if muon.radius_pin:
        slots.append(RadiusPin())
    if muon.late_decay:
        slots.append(LateDecay(muon.late_decay))
    if muon.hyperball:
        slots.append(Hyperball(added=muon.psgd is not None))
    return slots
