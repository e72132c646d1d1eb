"""Compiles Triton kernels ahead of time, on any machine, as a launch on a GPU would: same hints, constants
and options.

    calls = launches(module, "kernels", lambda: module.f(tensors on "meta"))     [(kernel, grid, args,
    kwargs)] build(kernel, *args, arch=90, folder=..., **kwargs)                          -> Built

module.kernels() returns what triton.jit made, one kernel or a tuple. Triton must not be in interpreter mode.
"""

import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import torch

# bytes that a block can have; CUDA C++ guide, compute capabilities
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64",
            torch.int32: "*i32", torch.int16: "*i16", torch.int8: "*i8",
            torch.float8_e4m3fn: "*fp8e4nv", torch.float8_e5m2: "*fp8e5"}
OPTIONS = ("num_warps", "num_stages")


class Built(NamedTuple):
    shared: int  # bytes per block
    registers: int  # per thread
    spilled: int  # bytes of the stack per thread: our kernels have no arrays, so what is there was spilled
    ptx: str


class Recorder:
    """Stands for a kernel: recorder[grid](*args, **kwargs) notes the launch."""

    def __init__(self, fn, calls):
        self.fn, self.calls = fn, calls

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.calls.append((self.fn, grid, args, kwargs))


def launches(module, name, call):
    """What `call` gives to the kernels that module's function `name` returns: [(kernel, grid, args, kwargs)].
    None runs."""
    original, calls = getattr(module, name), []
    made = original()
    stand_ins = tuple(Recorder(k, calls) for k in made) if isinstance(made, tuple) else Recorder(made, calls)
    setattr(module, name, lambda: stand_ins)
    try:
        call()
    finally:
        setattr(module, name, original)
    return calls


def specialise(value):
    """(type, constant or None, divisible by 16) of an argument, as Triton's launcher does: a stride of 1 is a
    constant."""
    if isinstance(value, torch.Tensor):  # torch allocates at multiples of 16
        return POINTERS[value.dtype], None, True
    if isinstance(value, float):
        return "fp32", None, False
    if value == 1:
        return "constexpr", 1, False
    return "i32" if -2**31 <= value < 2**31 else "i64", None, value % 16 == 0


def build(kernel, *args, arch, folder, **kwargs):
    """kernel: from triton.jit; args, kwargs as in a launch, tensors on `meta` will do. arch: 90, say. folder:
    for files."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
    names = kernel.arg_names
    found = {name: specialise(value) for name, value in zip(names, args)}
    constants = {name: constant for name, (_, constant, _) in found.items() if constant is not None} | kwargs
    signature = {name: "constexpr" if name in constants else found[name][0] for name in names}
    hints = {(names.index(name),): [["tt.divisibility", 16]] for name, (_, _, even) in found.items() if even}
    source = ASTSource(kernel, signature, constants, hints)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    cubin = Path(folder) / "kernel.cubin"
    cubin.write_bytes(built.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run(
        [tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    registers, stack, local = (
        int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK", "LOCAL")
    )
    return Built(built.metadata.shared, registers, stack + local, built.asm["ptx"])
