"""What a device can run: shared by the Triton kernels.

torch.compile traces the checks of a kernel together with the kernel, and a question to the environment breaks
the graph there. So the environment is asked once, at import, and the checks read constants.
"""

import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Callable

import torch

FP8_SINCE = 89  # compute capability from which a GPU multiplies 8-bit floats
DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # of the matrix products


def capability(device: torch.device) -> int | None:
    """80 for compute capability 8.0, and so on; None if it is no GPU."""
    return int("{}{}".format(*torch.cuda.get_device_capability(device))) if device.type == "cuda" else None


def triton_version() -> str | None:
    """Of the installed package, not imported; None without one."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def c_compiler() -> str | None:
    """What Triton calls to build its launchers: $CC, gcc or clang; None if there is none."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's interpreter runs the kernels on a CPU
HAS_C_COMPILER = c_compiler() is not None


LAUNCHES_ON_META = False  # set while bench/aot.py records what a kernel would be launched with


def operator(function: Callable, op: Callable, x: torch.Tensor) -> Callable:
    """`op`, the custom operator, while torch.compile traces or if x has no values; otherwise `function`.

    On tensors without values (device meta) an operator gives shapes, so system/memory.py counts what a kernel
    keeps.
    """
    return op if torch.compiler.is_compiling() or (x.is_meta and not LAUNCHES_ON_META) else function


def missing(device: torch.device) -> str | None:
    """Why no Triton kernel can run on a device (the rest of a sentence), or None; meta runs none."""
    if device.type == "meta":
        return None
    if device.type != "cuda" and not INTERPRETED:
        return f"needs CUDA, and this is {device.type}"
    if not HAS_TRITON:
        return "needs the package triton"
    if device.type == "cuda" and not HAS_C_COMPILER:
        return "needs a C compiler (gcc, clang or $CC), and none was found"
    return None


def refusal(device: torch.device, dtype: torch.dtype, least: int = 80) -> str | None:
    """Why a Triton matrix product in dtype cannot run on a device (the rest of a sentence), or None.

    least: compute capability that it needs; FP8_SINCE for FP8.
    """
    why = missing(device)
    if why is not None or device.type == "meta":
        return why
    if dtype not in DTYPES:
        return f"has no {str(dtype).removeprefix('torch.')}"
    if device.type == "cuda" and capability(device) < least:
        return f"needs compute capability {least / 10}, and this is {capability(device) / 10}"
    return None
