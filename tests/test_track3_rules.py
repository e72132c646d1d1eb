"""The update rules of the optimizer track against numbers of the original scripts, in float64.

The tolerance is 1e-9 of a parameter's movement.
"""

import pytest
from golden_track3 import Replay, assert_equal

MUON = ("optim.muon.weight_decay=0.05",)
RULES = {  # fixture -> (peak learning rate, settings)
    "t3_r36_muon": (0.025, MUON),
    "t3_r05_muonh": (0.018, ("optim.muon.hyperball=true",)),
}


@pytest.mark.feature("optim.muon.convergent", "optim.muon.hyperball", "optim.muon.weight_decay")
@pytest.mark.parametrize("name", RULES)
def test_a_rule_matches_the_original_script(name):
    lr, sets = RULES[name]
    assert_equal(Replay(name, *sets, lr=lr).errors())
