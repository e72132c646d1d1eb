"""The one place that asks for $SPEEDRUN_NULL_DEVICE, which only the tests in tests/nullcuda set.

They run the CUDA path on a device that computes nothing and from which the host reads zeros. Checks of computed values cannot
pass there and are left out: whether the GPU is alive (bench/report.py). Nothing else depends on the variable.
"""

import os


def computes() -> bool:
    """False on the null device: numbers that are read from the device mean nothing."""
    return os.environ.get("SPEEDRUN_NULL_DEVICE") != "1"
