"""The one place that asks for $SPEEDRUN_NULL_DEVICE, which only the tests in tests/nullcuda set.

They run the CUDA path on a device that computes nothing and from which the host reads zeros. A check of
computed values cannot pass there and is left out: whether the GPU is alive (bench/report.py).
"""

import os


def computes() -> bool:
    """False on the null device: numbers that are read from the device mean nothing."""
    return os.environ.get("SPEEDRUN_NULL_DEVICE") != "1"
