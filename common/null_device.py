"""The one place that asks for $SPEEDRUN_NULL_DEVICE, which only the tests in tests/nullcuda set.

They run the CUDA path on a device that computes nothing. The trainer then leaves out the checks of computed values, which
such a device cannot pass: the proof of the reset after the warm-up, and whether the GPU is alive (bench/report.py). Nothing
else depends on the variable.
"""

import os


def computes() -> bool:
    """False on the null device: numbers that are read from the device mean nothing."""
    return os.environ.get("SPEEDRUN_NULL_DEVICE") != "1"
