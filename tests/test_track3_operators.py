"""The operators of Muon's chain alone against the original functions, in float64."""

import numpy as np
import pytest
import torch
from golden_records import load

from kernels.newton_schulz import newton_schulz, schatten4
from updates.aurora import Aurora
from updates.chain import SOFT
from updates.contra import spectral_norm
from updates.slots import Orthogonalise, Step
from updates.views import Views

F64 = torch.float64
GOLDEN = load("t3_operators")[0]
INPUTS = [name.removeprefix("in/") for name in GOLDEN if name.startswith("in/")]


def convergent(norm, **more):
    """Twelve steps of the convergent Newton-Schulz as a slot."""
    return Orthogonalise(12, F64, F64, "factored", False, F64, one_by_one=False, fused=False, convergent=True,
                         by_schatten4=norm == "schatten4", **more)


def aurora(norm, *how):
    return lambda x: Aurora(convergent(norm), *how)(x, Step(x, x, {}, {}, Views(), "", {}))


def exact(x, **how):
    return newton_schulz(x, dtype=F64, norm_dtype=F64, **how)


OPERATORS = {
    "ns12_fro": convergent("frobenius").iterated,
    "ns12_s4": convergent("schatten4").iterated,
    "ns12_s4_aurora_r30": aurora("schatten4", 3, 0.25, True),
    "aurora_r17": aurora("frobenius", 2, 0.5, False),
    "soft_p0.1": lambda x: convergent("schatten4", soft=SOFT).iterated(x)[1],
    "unit_operator_norm_r11": lambda x: x / spectral_norm(x),
    "unit_s4_r20": lambda x: x / schatten4(x),
    "polar_express_m18": lambda x: exact(x, polar_express=True),
    "ns5_m02": exact,
}


@pytest.mark.feature("optim.muon.aurora", "optim.muon.aurora.wide_only", "optim.muon.convergent",
                     "optim.muon.soft", "optim.muon.contra")
@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_is_the_original_function(name):
    for matrix in INPUTS:
        if f"{name}/{matrix}" not in GOLDEN:
            continue
        x = torch.from_numpy((GOLDEN[f"in/{matrix}"].astype(np.uint32) << 16).view(np.float32)).to(F64)
        with torch.no_grad():
            got = OPERATORS[name](x[None])[0].flatten()[::41 if matrix.endswith("_big") else 5]
        assert np.abs(got.numpy() - GOLDEN[f"{name}/{matrix}"]).max() < 1e-10, matrix
