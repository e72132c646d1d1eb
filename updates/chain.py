"""The chain of Muon: the slots that the settings ask for, in their order."""

import torch

from updates.geometry import Hyperball
from updates.slots import CautiousDecay, Decay, Momentum, NorMuon, Orthogonalise, Scale, TwoRails


def chain(s, group) -> tuple:
    """The slots that the settings ask for, in their order. group: optim_settings.Hyper."""
    muon, n = s.optim.muon, s.numerics
    slots = [Momentum(muon.momentum_ema) if muon.slow is None else TwoRails(muon.slow.beta)]
    slots.append(
        Orthogonalise(
            muon.ns_steps, getattr(torch, n.newton_schulz), getattr(torch, n.newton_schulz_norm),
            n.newton_schulz_form, muon.polar_express, getattr(torch, n.muon_update),
            one_by_one=s.system.reduction == "ordered", fused=s.system.kernels.muon == "triton",
            anvil=muon.anvil_maps, convergent=muon.convergent, by_schatten4=muon.norm == "schatten4"
        )
    )
    if muon.normuon:
        slots.append(NorMuon(muon.normuon.beta2, muon.normuon.floor, getattr(torch, n.newton_schulz)))
    if muon.cautious_decay:
        decay = muon.cautious_decay
        slots.append(CautiousDecay(decay.weight_decay, getattr(torch, n.muon_decay), decay.gate == "slow"))
    if muon.scale != "none" or group.lr_mul != 1:
        slots.append(Scale(muon.scale, group.lr_mul))
    if group.weight_decay:
        slots.append(Decay(group.weight_decay))
    if muon.hyperball:
        slots.append(Hyperball())
    return tuple(slots)
