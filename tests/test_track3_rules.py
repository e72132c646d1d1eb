"""The update rules of the optimizer track against numbers of the original scripts, in float64.

The tolerance is 1e-9 of a parameter's movement.
"""

import pytest
from golden_track3 import Extrapolation, LookAhead, Replay, assert_equal

S4 = ("optim.muon.norm=schatten4",)
FLOOR = ("optim.muon.floor={ratio=0.35}",)
NORMUON = ("optim.muon.normuon={}",)
CONTRA = ("optim.muon.contra={}",)
MLP_SOAP = ('optim.muon.soap={matrices=["c_fc","c_proj"], eps_form="added"}',)
SOFT = (*S4, *NORMUON, "optim.muon.contra={steps=2000}", "optim.muon.soft={}",
        'optim.muon.soap={matrices=["c_fc","c_proj","v"], attn_floor=0.55, v_share=0.95}',
        "optim.muon.floor={ratio=0.3825}")
PIN = ("optim.muon.radial_brake=0.5", "optim.muon.radius_pin=true")
R30 = (*S4, *SOFT[3:], *PIN, "optim.muon.soft=false", "optim.muon.contra={steps=2500}",
       "optim.muon.aurora={iterations=3, beta=0.25, wide_only=true}")
R44 = (*S4, *PIN, "optim.muon.soap={every=1, trust={}}", "optim.muon.floor={ratio=0.3825}")
RULES = {  # fixture -> (peak learning rate, settings)
    "t3_r36_muon": (0.025, ("optim.muon.weight_decay=0.05",)),
    "t3_r05_muonh": (0.018, ("optim.muon.hyperball=true", "model.init.zero_proj=false")),
    "t3_r07_muonsq": (0.1, ("optim.muon.weight_decay=0.0125", "optim.muon.squared={}")),
    "t3_r09_skylight": (0.0375, (*NORMUON, *FLOOR)),
    "t3_r10_normuon": (0.035, ("optim.muon.weight_decay=0.025", *NORMUON)),
    "t3_r11_contra": (0.0375, (*CONTRA, *NORMUON, *FLOOR)),
    "t3_r11_contra_b": (0.0375, (*CONTRA, *NORMUON, *FLOOR)),
    "t3_r14_soapmuon": (0.0375, (*CONTRA, *NORMUON, *FLOOR, *MLP_SOAP)),
    "t3_r17_aurora": (0.0375, (*CONTRA, *FLOOR, "optim.muon.aurora={}")),
    "t3_r17_aurora_b": (0.0375, (*CONTRA, *FLOOR, "optim.muon.aurora={}")),
    "t3_r20_soft": (0.0375, SOFT),
    "t3_r28_dynmuon": (0.02, ("optim.muon.weight_decay=0.025", "optim.muon.momentum_ema=false",
                              "optim.muon.dyn={divisor=524288.0}")),
    "t3_r29_brake": (0.0375, (*SOFT, *PIN)),
}
AHEAD = {  # the same under EMA-Nesterov
    "t3_r41_circuit": (0.0375, (*R30, "optim.muon.circuit={}")),
    "t3_r44_soapall": (0.0375, R44),
    "t3_r46": (0.0375, (*R44, 'optim.muon.floor.per="row"', "optim.muon.late_decay=0.025")),
}


@pytest.mark.feature("optim.muon.convergent", "optim.muon.hyperball", "optim.muon.weight_decay")
@pytest.mark.parametrize("name", RULES)
def test_a_rule_matches_the_original_script(name):
    lr, sets = RULES[name]
    assert_equal(Replay(name, *sets, lr=lr).errors())


@pytest.mark.parametrize("name", AHEAD)
def test_a_rule_matches_the_original_script_under_a_look_ahead(name):
    lr, sets = AHEAD[name]
    replay = Replay(name, *sets, lr=lr)
    ahead = LookAhead(replay)
    assert_equal(replay.errors(ahead.before, ahead.after))


def test_result_30_matches_the_original_script_under_extrapolation():
    replay = Replay("t3_r34_rre", *R30, lr=0.0375)
    assert_equal(replay.errors(after=Extrapolation(replay).after))


def test_pmuon_matches_the_original_script_from_its_random_start():
    """The fixture's random matrices take the place of ours."""
    replay = Replay("t3_r18_pmuon", "optim.muon.weight_decay=0.025", "optim.muon.pmuon={}", lr=0.035)
    for name, value in replay.numbers.items():
        if name.startswith("noise/"):
            _, of, side = name.split("/")
            replay.inject(of, {"cov_Q": "pmuon_right_basis", "out_Q": "pmuon_left_basis"}[side], value)
    assert_equal(replay.errors())
