"""Published peaks of GPUs, for estimates (system.roofline) and for the command line, which names them.

Each figure was compared with the maker's publication that its line names, or with a page that quotes it.
"""

from typing import NamedTuple


class Card(NamedTuple):
    """Published peaks of one GPU."""
    bf16: float  # TFLOP/s, dense, sums in float32
    fp8: float | None  # the same of 8-bit operands; None: no units for them
    fp32: float  # TFLOP/s without tensor cores: what torch does in float32 by default
    memory: float  # TB/s
    link: float  # GB/s to the other GPUs of a machine, in one direction
    capacity: int  # "GB" of the maker, who counts them nearly as GiB: an H200 of 141 has 140 GiB


# Dense figures; makers print those with 2:4 sparsity, twice as high, and NVLink's of both directions.
CARDS = {
    # NVIDIA A100 datasheet (1758950, 80GB SXM): 312 TFLOPS, 19.5 in FP32, 2,039 GB/s, NVLink 600 GB/s
    "a100": Card(312, None, 19.5, 2.039, 300, 80),
    # NVIDIA H100 datasheet (SXM): 1,979 and 3,958 TFLOPS with sparsity, 67 in FP32, 3.35 TB/s, NVLink
    # 900 GB/s
    "h100": Card(989, 1979, 67, 3.35, 450, 80),
    # NVIDIA H200 datasheet (SXM): the units of the H100, 141 GB with 4.8 TB/s
    "h200": Card(989, 1979, 67, 4.8, 450, 141),
    # NVIDIA Blackwell datasheet, a GPU of HGX B200: 4.5 and 9 PFLOPS with sparsity, 75 TFLOPS in FP32, 180 GB
    # with 7.7 TB/s, NVLink 1.8 TB/s. (A GPU of GB200 NVL72 has 5 and 10 PFLOPS, 80 TFLOPS, 186 GB, 8 TB/s.)
    "b200": Card(2250, 4500, 75, 7.7, 900, 180),
    # NVIDIA Ada GPU architecture whitepaper, RTX 4090: 165.2 and 330.3 TFLOPS with sums in FP32, 82.6 in
    # FP32, 24 GB with 1,008 GB/s; no NVLink: PCIe 4.0 x16
    "4090": Card(165.2, 330.3, 82.6, 1.008, 32, 24),
    # NVIDIA RTX Blackwell GPU architecture whitepaper, RTX 5090: 209.5 and 419 TFLOPS with sums in FP32,
    # 104.8 in FP32, 32 GB with 1,792 GB/s; PCIe 5.0 x16
    "5090": Card(209.5, 419, 104.8, 1.792, 64, 32),
}
