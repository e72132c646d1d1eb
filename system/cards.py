"""Published peaks of GPUs, for estimates (system.roofline) and for the command line, which names them."""

from typing import NamedTuple


class Card(NamedTuple):
    """Published peaks of one GPU."""
    bf16: float  # TFLOP/s, dense, sums in float32
    fp8: float | None  # the same of 8-bit operands; None: no units for them
    fp32: float  # TFLOP/s without tensor cores: what torch does in float32 by default
    memory: float  # TB/s
    link: float  # GB/s to the other GPUs of a machine, in one direction


# Dense figures; makers print those with 2:4 sparsity, twice as high.
CARDS = {
    # NVIDIA A100 datasheet (80 GB SXM): 312 TFLOPS, 2,039 GB/s, NVLink 600 GB/s in both directions
    "a100": Card(312, None, 19.5, 2.039, 300),
    # NVIDIA H100 datasheet (SXM): 1,979 TFLOPS and 3,958 with sparsity, 3.35 TB/s, NVLink 900 GB/s
    "h100": Card(989, 1979, 67, 3.35, 450),
    # NVIDIA H200 datasheet (SXM): the H100's units, 4.8 TB/s
    "h200": Card(989, 1979, 67, 4.8, 450),
    # NVIDIA HGX B200 datasheet, of one GPU: 4.5 and 9 PFLOPS with sparsity, 7.7 TB/s, NVLink 1.8 TB/s
    "b200": Card(2250, 4500, 75, 7.7, 900),
    # NVIDIA Ada architecture whitepaper, RTX 4090: 165.2 and 330.3 TFLOPS with sums in float32, 1,008 GB/s;
    # no NVLink: PCIe 4.0 x16
    "4090": Card(165.2, 330.3, 82.6, 1.008, 32),
    # NVIDIA RTX Blackwell architecture whitepaper, RTX 5090: 209.5 and 419 TFLOPS with sums in float32,
    # 1,792 GB/s; PCIe 5.0 x16
    "5090": Card(209.5, 419, 104.8, 1.792, 64),
}
