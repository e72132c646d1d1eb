"""Triton kernels compiled ahead of time, on any machine, at the shapes that records launch them with:
`python bench/aot.py [RECORD ...] [--arch 90 ...] [--out JSON]`.

Each record runs one step of its full-width model and of Muon on tensors without values, with all our kernels
switched on. Their launches are recorded and compiled with the hints, constants and options that a launch on a
GPU would use. A row has the registers and spilled bytes of a thread and the shared memory of a block, as
ptxas reports them. Exit code 1 if a kernel spills, exceeds the shared memory of the card, or does not
compile. Needs no GPU and measures no time.

    calls = launches({module: "kernels"}, lambda: module.f(tensors on "meta"))
    kernel, grid, args, kwargs = calls[0]
    built = build(kernel, *args, arch=90, folder=..., **kwargs)

module.kernels() returns what triton.jit made, one kernel or a tuple. Triton must not be in interpreter mode.
"""

import contextlib
import functools
import os
import re
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import measure  # first: it finds the repository
import report
import torch

import schedule
from common import arguments, console
from common.errors import UserError
from kernels import cross_entropy, device, fp8_linear, linear_relu_sq, qk_rotary, symmetric, transpose
from model import without_values
from optim import Optimizer
from settings import Settings, deltas
from settings.data import LOGICAL_RANKS
from system.microbatch import ranks_per_microbatch

if TYPE_CHECKING:
    from triton.runtime import JITFunction

ROOT = Path(__file__).parent.parent
# A record per kind of launch, with settings where a kernel has no record of its own yet. Another landmark is
# one more line.
RECORDS = [
    "short/5", "short/11", "short/12", "short/20", "short/26", "short/29", "short/33",
    "short/33 numerics.fp8_mlp", "short/33 numerics.fp8_mlp numerics.fp8_mlp.c_proj",
]
KERNELS = {cross_entropy: "kernels", linear_relu_sq: "kernels", qk_rotary: "kernels", symmetric: "kernel",
           transpose: "kernel"}
SWITCHES = ("loss", "mlp", "muon", "qk", "transpose")
# bytes that a block can have; CUDA C++ guide, compute capabilities
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64",
            torch.int32: "*i32", torch.int16: "*i16", torch.int8: "*i8",
            torch.float8_e4m3fn: "*fp8e4nv", torch.float8_e5m2: "*fp8e5"}
OPTIONS = ("num_warps", "num_stages")


class Built(NamedTuple):
    """What ptxas says of a kernel."""
    shared: int  # bytes per block
    registers: int  # per thread
    spilled: int  # bytes of the stack per thread: our kernels have no arrays, so what is there was spilled
    ptx: str


class Recorder:
    """Stands for a kernel: recorder[grid](*args, **kwargs) notes the launch."""

    def __init__(self, fn: "JITFunction", calls: list[tuple]) -> None:
        self.fn, self.calls = fn, calls

    def __getitem__(self, grid: tuple) -> Callable:
        return lambda *args, **kwargs: self.calls.append((self.fn, grid, args, kwargs))


def launches(modules: dict[ModuleType, str], call: Callable[[], Any]) -> list[tuple]:
    """[(kernel, grid, args, kwargs)] of the launches of `call`, none of which runs.

    modules: {module: name of its function that returns its kernels}."""
    originals, calls = {module: getattr(module, name) for module, name in modules.items()}, []
    try:
        for module, name in modules.items():
            made = originals[module]()
            recorders = (
                tuple(Recorder(k, calls) for k in made) if isinstance(made, tuple) else Recorder(made, calls)
            )
            setattr(module, name, lambda recorders=recorders: recorders)
        device.LAUNCHES_ON_META = True
        call()
    finally:
        device.LAUNCHES_ON_META = False
        for module, name in modules.items():
            setattr(module, name, originals[module])
    return calls


def specialise(value: torch.Tensor | int | float) -> tuple[str, int | None, bool]:
    """(type, constant or None, divisible by 16) of an argument, by the rules of Triton's launcher."""
    if isinstance(value, torch.Tensor):  # torch allocates at multiples of 16
        return POINTERS[value.dtype], None, True
    if isinstance(value, float):
        return "fp32", None, False
    if value == 1:
        return "constexpr", 1, False
    return "i32" if -2**31 <= value < 2**31 else "i64", None, value % 16 == 0


def build(kernel: "JITFunction", *args, arch: int, folder: str | Path, **kwargs) -> Built:
    """Compile a kernel ahead of time.

    kernel: from triton.jit. args, kwargs: as in a launch; tensors may be on `meta`. arch: 90, for example.
    folder: for the files of the compiler.
    """
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


# ----- what a record launches -------------------------------------------------------------------------------

@contextlib.contextmanager
def pretending(arch: int) -> Iterator[None]:
    """Context in which kernels treat meta tensors as those of a GPU with this compute capability."""
    units = arch >= device.FP8_SINCE
    answers = {
        device.refusal: lambda where, dtype, least=80: None if arch >= least else f"needs {least / 10}",
        device.capability: lambda where: arch,
        fp8_linear.has_fp8_units: lambda x: units,
        fp8_linear.kept_in_bfloat16: lambda x: not units,
        cross_entropy.refusal: lambda where, plan: None,
        cross_entropy.operands: lambda a, b, plan: (a, b),
    }
    changed = [
        (module, name, value)
        for key, module in list(sys.modules.items()) if key.startswith(("kernels.", "layers."))
        for name, value in list(vars(module).items()) if any(value is known for known in answers)
    ]
    chunk = dict(cross_entropy.CHUNK)
    try:
        for module, name, value in changed:
            setattr(module, name, answers[value])
        cross_entropy.CHUNK["cpu"] = chunk["cuda"]
        yield
    finally:
        cross_entropy.CHUNK.update(chunk)
        for module, name, value in changed:
            setattr(module, name, value)


def settings_of(text: str) -> tuple[Settings, list[str]]:
    """(settings, switches) of "RECORD [PATH ...]": what is on as with `--with PATH`, and every kernel of ours
    that the record can have."""
    ref, *features = text.split()
    taken = []
    for name in SWITCHES:
        with contextlib.suppress(UserError):  # the record has no such operation
            deltas.resolve(ref, with_=features, sets=[f"system.kernels.{name}=triton"])
            taken.append(name)
    sets = [f"system.kernels.{name}=triton" for name in taken]
    return deltas.resolve(ref, with_=features, sets=sets).settings, taken


def step(s: Settings, switches: list[str]) -> None:
    """Forward, backward and Muon's products of one training step on one GPU, on tensors without values."""
    model, shape = without_values(s), schedule.largest_shape(s)
    microbatch = ranks_per_microbatch(s, LOGICAL_RANKS, cuda=True)
    rows = microbatch * shape.tokens_per_rank // shape.seq_len
    tokens = torch.empty(rows, shape.seq_len, dtype=torch.long, device="meta")  # (R, T)
    model.update_yarn(shape.windows)
    context = model.context(tokens, 0, shape.windows, tokens_per_rank=shape.tokens_per_rank)
    losses = model(tokens, torch.empty_like(tokens), context)
    losses.mean().backward()
    if "muon" not in switches:
        return
    for bank in Optimizer(model, s).banks:
        for piece in bank.views.split(bank.param) if bank.rule.name == "muon" else ():
            symmetric.step(torch.empty(piece.shape, dtype=torch.bfloat16, device="meta"), 1.0, 2.0, 3.0)


def key(kernel: "JITFunction", args: tuple, kwargs: dict) -> tuple:
    """All of a launch that decides what is compiled."""
    return kernel.fn.__name__, tuple(map(specialise, args)), tuple(sorted(kwargs.items()))


def shown(args: tuple) -> str:
    """The shapes of a launch in a few words."""
    tensors = dict.fromkeys(
        f"{'x'.join(map(str, a.shape))} {str(a.dtype).removeprefix('torch.')}"
        for a in args if isinstance(a, torch.Tensor) and a.dim() > 1
    )
    return ", ".join(tensors)


# ----- the program ------------------------------------------------------------------------------------------

def resources(kernel: "JITFunction", args: tuple, kwargs: dict, arch: int, folder: str | Path) -> dict:
    """The row of one kernel on one architecture."""
    built = build(kernel, *args, arch=arch, folder=folder, **kwargs)
    room = 65536 // (32 * kwargs["num_warps"])  # registers of a thread if one block fills a multiprocessor
    row = {"registers": built.registers, "spilled_bytes": built.spilled, "shared_bytes": built.shared}
    if built.spilled:
        row["failed"] = f"spills {built.spilled} bytes a thread ({built.registers} registers)"
    elif built.shared > SHARED[arch]:
        row["failed"] = f"wants {built.shared} bytes of shared memory, and a block has {SHARED[arch]}"
    elif built.registers > room:
        row["failed"] = f"wants {built.registers} registers a thread, and {room} are there"
    return row


def cases(o: Namespace, seen: set, folder: str | Path) -> Iterator[tuple[dict, Callable]]:
    """Of bench/report.py: every kernel of every record, once for an architecture."""
    for text in o.records:
        s, switches = settings_of(text)
        for arch in o.arch:
            if s.numerics.fp8_mlp and arch < device.FP8_SINCE:
                why = f"needs compute capability {device.FP8_SINCE / 10}"
                yield {"record": text, "arch": f"sm_{arch}"}, lambda why=why: {"not_run": why}
                continue
            with pretending(arch):
                calls = launches(KERNELS, functools.partial(step, s, switches))
            for kernel, _, args, kwargs in calls:
                name = (arch, key(kernel, args, kwargs))
                if name in seen:
                    continue
                seen.add(name)
                tile = " ".join(f"{k}={v}" for k, v in kwargs.items())
                fields = {"kernel": kernel.fn.__name__, "record": text, "arch": f"sm_{arch}",
                          "operands": shown(args), "constants": tile}
                yield fields, functools.partial(resources, kernel, args, kwargs, arch, folder)


def main() -> None:
    """The program. Exit code 1 if a kernel spills, has no room, or does not compile."""
    import triton
    p = arguments.Parser(prog="bench/aot.py", description=__doc__.partition("\n\n")[0])
    p.add_argument("records", nargs="*", default=RECORDS, metavar="RECORD",
                   help='"short/33", or "short/33 numerics.fp8_mlp" with features turned on')
    p.add_argument("--arch", nargs="+", type=int, choices=SHARED, default=list(SHARED),
                   help="compute capabilities, times ten (default: all)")
    p.add_argument("--out", metavar="JSON", help="default: bench/results/aot/triton-VERSION.json")
    o = p.parse_args()
    out = o.out or ROOT / f"bench/results/aot/triton-{triton.__version__}.json"
    title = f"Own Triton kernels, compiled ahead of time by Triton {triton.__version__}"
    table = report.Report(out, title, triton=triton.__version__)
    with tempfile.TemporaryDirectory() as folder:
        try:
            for fields, case in cases(o, set(), folder):
                row = table.attempt(fields, case)
                if "not_run" in row:
                    print(f"{row['arch']:7}{row['record']}: not run: {row['not_run']}", flush=True)
                    continue
                print(f"{row['arch']:7}{row['kernel']:17}{row.get('registers', '-'):>4} registers "
                      f"{row.get('spilled_bytes', '-'):>5} spilled {row.get('shared_bytes', '-'):>7} shared  "
                      f"{row['operands']}", flush=True)
        except UserError as error:  # an unknown record
            console.fail(error)
    sys.exit(table.finish())


if __name__ == "__main__":
    console.program(main)
