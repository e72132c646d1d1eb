"""The directions that stand in for Muon's, against numbers of the original scripts of the optimizer track.

In float64, through the Optimizer; the tolerance is 1e-9 of a parameter's movement.
"""

import dataclasses

import numpy as np
import pytest
import torch
from golden_track3 import HIDDEN, QKVO, Replay, assert_equal

from optim import RULES
from updates.muon import Muon
from updates.psgd import Psgd

BALL = ("optim.muon.hyperball=true",)
BASES = {"left": ("Q_left", "Q.0"), "right": ("Q_right", "Q.1")}


def inject(replay):
    """Set the bases of matrices that are not square to those of the original.

    Its first statistics are rank deficient, which leaves a part of their eigenvectors arbitrary.
    """
    for bank in replay.optimizer.banks:
        for i, (name, _) in enumerate(bank.members if bank.label in HIDDEN else ()):
            theirs = f"basis/blocks.{name.rpartition('_')[2]}.{HIDDEN[bank.label]}"
            for side, keys in BASES.items():
                key = next(key for key in keys if f"{theirs}/{key}" in replay.numbers)
                bank.state[f"basis_{side}"][i].copy_(torch.from_numpy(replay.numbers[f"{theirs}/{key}"]))


def compare(replay, tolerance=1e-9):
    """Replay all calls, with the bases of the original after its call `basis_call`."""
    at = replay.config.get("basis_call")
    assert_equal(replay.errors(lambda call: inject(replay) if call == at else None), tolerance)


@pytest.mark.feature("optim.muon.adam")
def test_adam_on_the_ball():
    compare(Replay("t3_r04_adamh", *BALL, "optim.muon.adam={}", lr=0.018))


@pytest.mark.feature("optim.muon.soap_h")
def test_soap_on_the_ball():
    """1e-8: its first step divides rounding noise by eps."""
    compare(Replay("t3_r27_soaph", *BALL, "optim.muon.soap_h={}", lr=0.018), 1e-8)


@pytest.mark.feature("optim.muon.kl_soap")
def test_kl_soap_on_the_ball():
    compare(Replay("t3_r19_klsoaph", *BALL, "optim.muon.kl_soap={}", lr=0.018))


@pytest.mark.feature("optim.muon.muown", "optim.muon.polar_express_long")
def test_muown():
    compare(Replay("t3_r23_muown", "optim.muon.muown={}", "optim.muon.momentum_ema=false",
                   "optim.muon.convergent=false", "optim.muon.polar_express_long=true",
                   "optim.muon.scale=match_rms", lr=0.00325))


class InFloat32(Replay):
    """The learning rate passes through a float32 tensor."""

    def rate(self, call):
        lr, momentum = super().rate(call)
        return float(np.float32(lr)), momentum


@pytest.mark.feature("optim.muon.shampoo")
def test_shampoo():
    compare(InFloat32("t3_r21_shampoo", "optim.muon.shampoo={}", "optim.muon.scale=none",
                      "optim.muon.weight_decay=0.2", lr=0.0015))


class GivenNoise(Psgd):
    """The random numbers of the fixture."""
    numbers_of_fixture = None

    def draw(self, like, step):
        """V and nu of q, k, v and o, or of one matrix of the MLP."""
        names = {12: QKVO} if like.size(0) == 4 else {}
        names = names.get(like.size(-1)) or [HIDDEN["c_fc" if like.size(-2) > like.size(-1) else "c_proj"]]
        call = step.numbers["update"] - 1
        return tuple(torch.from_numpy(np.stack([
            self.numbers_of_fixture[f"noise/blocks.0.{name}/{key}"][call] for name in names
        ]).astype(np.float64)) for key in ("V", "nu"))


@pytest.mark.feature("optim.muon.psgd")
def test_psgd_on_the_ball(monkeypatch):
    def rule(s, group):
        muon = Muon.of(s, group)
        slots = tuple(GivenNoise(x.beta1, x.rate) if isinstance(x, Psgd) else x for x in muon.slots)
        return dataclasses.replace(muon, slots=slots)

    replay = Replay("t3_r33_psgd", *BALL, "optim.muon.psgd={}", lr=0.025, rules=RULES | {"muon": rule})
    monkeypatch.setattr(GivenNoise, "numbers_of_fixture", replay.numbers)
    compare(replay)
