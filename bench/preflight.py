"""Is this machine fit for a run? `python bench/preflight.py [RECORD] [--scale full] [--nproc 8]`

Checks devices, other programs, driver and torch against known faults (known_faults.toml), peer access and
collectives over all processes, disk, clock and memory; none takes longer than some seconds. `--brief` prints
one line if everything is fine. On a CPU it says what could not be checked.

Exit codes: 0 fit (warnings included), 2 not fit or bad input.
"""

import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from common import environment  # refuses a Python that is too old

environment.require(*environment.TRAINING)

import torch
import torch.distributed as dist

import schedule
from common import arguments, console, files
from common.errors import UserError
from data.corpus import corpus_for
from settings import deltas
from settings.data import LOGICAL_RANKS
from settings.deltas import Resolved
from settings.scales import SCALES
from system import load, memory
from system.launch import launch
from system.place import Place
from system.world import uses_gpus

OK, WARN, FAIL, UNKNOWN = "ok", "warning", "NOT FIT", "not checked"
FAULTS = Path(__file__).parent / "known_faults.toml"
MIB = 2 ** 20
SAMPLE = 64 * MIB  # bytes of a shard that are read
SPARE = 4  # times as fast as the loader needs it the disk is to be
TOKEN_BYTES = 2
CLOCK_S, CLOCK_ERROR = 0.2, 0.005  # length of the comparison of clocks; relative difference
NUMBERS = 2 ** 22  # of a collective: 16 MiB in float32
WAIT_S = 60  # for all processes to answer


class Line(NamedTuple):
    """The outcome of one check."""
    status: str
    name: str
    text: str


# ----- what the machine has ---------------------------------------------------------------------------------

def smi(query: str) -> list[list[str]] | None:
    """Rows of an nvidia-smi query; None where there is no such program."""
    try:
        done = subprocess.run(["nvidia-smi", query, "--format=csv,noheader,nounits"], capture_output=True,
                              text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return None
    return [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]


def devices(resolved: Resolved, nproc: int, cuda: bool) -> Iterator[Line]:
    """GPUs there and alike, or a CPU with enough cores."""
    if not cuda:
        cores = os.cpu_count() or 1
        status = WARN if nproc > cores else OK
        yield Line(status, "devices", f"CPU, {cores} core{'s' if cores > 1 else ''} for {nproc} "
                                      f"process{'es' if nproc > 1 else ''}")
        if resolved.scale in ("full", "small") and resolved.settings.system.device == "auto":
            yield Line(FAIL, "devices", f"scale {resolved.scale} needs a GPU: add --scale tiny")
        return
    names = [torch.cuda.get_device_name(i) for i in range(nproc)]
    alike = len(set(names)) == 1
    yield Line(OK if alike else WARN, "devices",
               f"{nproc} x {names[0]}" if alike else f"different GPUs: {', '.join(names)}")


def others(cuda: bool) -> Iterator[Line]:
    """Other programs on the GPUs or cores."""
    if cuda:
        rows = smi("--query-compute-apps=pid,process_name,used_memory")
        if rows is None:
            yield Line(UNKNOWN, "other programs", "nvidia-smi does not answer")
            return
        found = [row for row in rows if row[0] != str(os.getpid())]
        told = "; ".join(f"process {row[0]} ({row[1]}, {row[2]} MiB)" for row in found if len(row) > 2)
        yield Line(WARN if found else OK, "other programs",
                   f"on a GPU: {told}" if found else "none on the GPUs")
        return
    meter, cores = load.Meter(), os.cpu_count() or 1
    meter.start()
    time.sleep(CLOCK_S)
    meter.stop()
    found = load.account(meter, meter.own_s, cores)
    if found["other_cores"] is None:
        yield Line(UNKNOWN, "other programs", "this system does not tell how busy its cores are")
    else:
        yield Line(OK if found["alone"] else WARN, "other programs",
                   f"use {found['other_cores']:.1f} of {cores} cores")


# ----- versions ---------------------------------------------------------------------------------------------

def numbers(version: str) -> tuple[int, ...]:
    """(2, 13, 0) of "2.13.0+cu130"."""
    parts = version.split("+")[0].split(".")
    return tuple(int(part) if part.isdigit() else 0 for part in parts[:3])


def holds(fault: dict[str, Any], found: dict[str, str]) -> bool:
    """Whether all conditions of a fault hold. found: versions by name, "" where there is none."""
    version, cuda = found["torch"], found["cuda"]
    tests = {
        "driver_below": lambda x: found["driver"] != "" and numbers(found["driver"])[0] < x,
        "torch": lambda x: version.startswith(tuple(x)),
        "torch_has": lambda x: any(part in version for part in x),
        "torch_since": lambda x: numbers(version) >= numbers(x),
        "cuda_since": lambda x: cuda != "" and numbers(cuda) >= numbers(x),
        "attention": lambda x: found["attention"] in x,
    }
    return all(tests[name](fault[name]) for name in fault if name in tests)


def known_faults() -> list[dict[str, Any]]:
    """The faults of known_faults.toml."""
    return tomllib.loads(FAULTS.read_text(encoding="utf-8"))["fault"]


def versions(resolved: Resolved, cuda: bool) -> Iterator[Line]:
    """Driver and torch, and the known faults of both."""
    rows = smi("--query-gpu=driver_version") if cuda else None
    found = {"torch": torch.__version__, "cuda": torch.version.cuda or "",
             "driver": rows[0][0] if rows else "", "attention": resolved.settings.system.attention}
    told = f"torch {found['torch']}" + (f", driver {found['driver']}" if found["driver"] else "")
    if not cuda:
        yield Line(OK, "versions", f"{told}; the known faults are those of GPUs")
        return
    faults = [fault for fault in known_faults() if holds(fault, found)]
    if not found["driver"]:
        yield Line(UNKNOWN, "versions", f"{told}: the driver's version is not told")
    for fault in faults:
        yield Line(FAIL if fault["severity"] == "fault" else WARN, "versions",
                   f"{told}: {fault['what']}: {fault['remedy']} ({fault['source']})")
    if not faults and found["driver"]:
        yield Line(OK, "versions", f"{told}: no known fault")


# ----- processes --------------------------------------------------------------------------------------------

def peers(nproc: int, cuda: bool) -> Iterator[Line]:
    """Peer access between all GPUs, and the collectives of a step over all processes."""
    if cuda and nproc > 1:
        apart = [f"{a}-{b}" for a in range(nproc) for b in range(nproc)
                 if a != b and not torch.cuda.can_device_access_peer(a, b)]
        yield Line(WARN if apart else OK, "peer access",
                   f"none between GPUs {', '.join(apart[:6])}" if apart else f"between all {nproc} GPUs")
    if nproc == 1:
        yield Line(OK, "collectives", "none with one process")
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "speed")
        own = dict(os.environ, PYTHONPATH=str(ROOT), PREFLIGHT_CUDA="1" * cuda)
        code = launch([sys.executable, __file__, "--as-rank", str(path)], nproc, own)
        if code or not path.exists():
            yield Line(FAIL, "collectives", f"{nproc} processes do not reduce and gather together (exit code "
                                            f"{code}): NCCL_DEBUG=INFO says more")
            return
        speed = json.loads(path.read_text(encoding="utf-8"))
    yield Line(OK, "collectives", f"right over {nproc} processes; all-reduce {speed:.1f} GB/s")


def as_rank(path: str) -> int:
    """One process of the collective test. Returns its exit code; process 0 writes GB/s to the path."""
    place, cuda = Place.read(), bool(os.environ.get("PREFLIGHT_CUDA"))
    device = torch.device("cuda", place.local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(seconds=WAIT_S))
    x = torch.empty(NUMBERS, device=device)
    for _ in range(2):  # the first one connects
        x.fill_(place.rank + 1)
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(x)
        right = bool((x == place.size * (place.size + 1) / 2).all())  # waits for the device
        spent = time.perf_counter() - began
    parts = [torch.empty(8, device=device) for _ in range(place.size)]
    dist.all_gather(parts, torch.full((8,), float(place.rank), device=device))
    right = right and all(bool((part == rank).all()) for rank, part in enumerate(parts))
    if place.rank == 0:
        files.write(Path(path), files.json_text(x.nbytes / spent / 1e9))
    dist.destroy_process_group()
    return 0 if right else 2


# ----- disk, clock, memory ----------------------------------------------------------------------------------

def read_speed(path: Path) -> float:
    """Bytes per second of reading the beginning of a file, which is asked not to come from the cache."""
    with open(path, "rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began, done = time.perf_counter(), 0
        while done < SAMPLE and (block := file.read(4 * MIB)):
            done += len(block)
        return done / max(time.perf_counter() - began, 1e-9)


def disk(resolved: Resolved, data: str | None, out: str, held: memory.Estimate) -> Iterator[Line]:
    """Reading as fast as the loader needs it, and room for checkpoints."""
    s = resolved.settings
    try:
        corpus = corpus_for(resolved.scale, data, s)
        speed = read_speed(corpus.train[0])
        tokens = schedule.tokens_before(s, s.schedule.steps)
        minutes = resolved.record.published.get("minutes") if resolved.scale == "full" else None
        if minutes:
            need = TOKEN_BYTES * tokens / (60 * float(minutes))
            yield Line(OK if speed >= SPARE * need else WARN, "disk",
                       f"reads {speed / 1e6:,.0f} MB/s; the loader needs {need / 1e6:.1f} MB/s at the "
                       "published time")
        else:
            total = TOKEN_BYTES * tokens / 1e6
            yield Line(OK, "disk", f"reads {speed / 1e6:,.0f} MB/s; the run reads {total:,.1f} MB in all")
    except UserError as error:
        yield Line(FAIL, "disk", str(error))
    from system.checkpoint import ROOM, room
    folder = Path(out).absolute()
    while not folder.exists():
        folder = folder.parent
    size = held.parameters + held.state
    try:
        room(folder, 3 * size)  # the two that stay, and the one that is being written
        yield Line(OK, "room",
                   f"for three checkpoints of about {ROOM * size / 1e6:,.0f} MB in {folder.name or '/'}")
    except UserError as error:
        yield Line(WARN, "room", f"{error} (three checkpoints)")


def clock(cuda: bool, sleep: Callable[[float], None] = time.sleep) -> Iterator[Line]:
    """The clocks of the machine agree, and with that of the GPU."""
    began = time.perf_counter(), time.monotonic(), time.time()
    if cuda:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        began = time.perf_counter(), time.monotonic(), time.time()
        first.record()
    sleep(CLOCK_S)
    if cuda:
        last.record()
        torch.cuda.synchronize()
    spent = [b - a for a, b in zip(began, (time.perf_counter(), time.monotonic(), time.time()))]
    if cuda:
        spent.append(first.elapsed_time(last) / 1000)
    apart = max(spent) - min(spent)
    names = "perf_counter, monotonic, wall" + (", GPU" if cuda else "")
    fine = apart <= 0.001 + CLOCK_ERROR * spent[0]
    yield Line(OK if fine else FAIL, "clock",
               f"{names} agree within {1000 * apart:.2f} ms" if fine else
               f"{names} say {', '.join(f'{1000 * x:.1f}' for x in spent)} ms of the same time: a clock is "
               "being set or is wrong")
    if time.time() < FAULTS.stat().st_mtime - 86400:
        yield Line(WARN, "clock", "the date lies before that of this checkout's files: set it")


def room_in_memory(held: memory.Estimate, nproc: int, cuda: bool) -> Iterator[Line]:
    """The estimate of a step's memory against what the device has free."""
    needed = held.total * (1 if cuda else nproc)
    if cuda:
        free = min(torch.cuda.mem_get_info(i)[0] for i in range(nproc))
        where = "free on each GPU"
    else:
        free = free_memory()
        where = "free"
    told = f"about {needed / 2**30:.1f} GiB"
    if free is None:
        yield Line(UNKNOWN, "memory", f"{told}; this system does not tell what is free")
        return
    fits = needed <= memory.SHARE * free
    yield Line(OK if fits else WARN, "memory",
               f"{told} of {free / 2**30:.1f} GiB {where}" + ("" if fits else ": choose a smaller --scale"))


def free_memory() -> int | None:
    """Bytes of main memory that programs may still take; None where the system does not tell."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
        rows = dict(line.split(":") for line in text.splitlines())
        return int(rows["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        return None


# ----- the program ------------------------------------------------------------------------------------------

def check(o: Namespace) -> list[Line]:
    """All checks. UserError for a record that cannot be run at all."""
    resolved = deltas.resolve_name(o.record, scale=o.scale)
    s = resolved.settings
    cuda = uses_gpus(s, o.nproc)
    ranks = LOGICAL_RANKS // o.nproc
    if cuda:
        capacity = min(torch.cuda.get_device_properties(i).total_memory for i in range(o.nproc))
        held = memory.fit(s, ranks, capacity, o.nproc)[1]
    else:
        held = memory.estimate(memory.with_system(s, device="cpu"), ranks, 1, o.nproc)
    return [
        *devices(resolved, o.nproc, cuda), *others(cuda), *versions(resolved, cuda), *peers(o.nproc, cuda),
        *disk(resolved, o.data, o.out, held), *clock(cuda), *room_in_memory(held, o.nproc, cuda)
    ]


def summary(found: list[Line], name: str) -> str:
    """The line about all checks together."""
    counts = {status: sum(line.status == status for line in found) for status in (FAIL, WARN, UNKNOWN)}
    if counts[FAIL]:
        return f"preflight: {name} is not fit to run here"
    kinds = ((counts[WARN], "to look at"), (counts[UNKNOWN], "not checked"))
    told = [f"{n} {what}" for n, what in kinds if n]
    return f"preflight: {name} can run here" + (f" ({', '.join(told)})" if told else "; nothing to say")


def parser() -> arguments.Parser:
    """The command line."""
    p = arguments.Parser(prog="bench/preflight.py", description=__doc__.partition("\n\n")[0])
    p.add_argument("record", nargs="?", default="short/head", help="a record or a preset (short/head)")
    p.add_argument("--scale", choices=list(SCALES), help="default: full, or that of the preset")
    p.add_argument("--nproc", type=int, choices=(1, 2, 4, 8), default=1, help="processes of the run (1)")
    p.add_argument("--data", metavar="DIR", help="folder of shards")
    p.add_argument("--out", metavar="DIR", default="runs", help="where run folders go (runs)")
    p.add_argument("--brief", action="store_true", help="only the summary and what is not fine")
    return p


def main() -> None:
    """Print a line for each check and one for all."""
    if sys.argv[1:2] == ["--as-rank"] and len(sys.argv) == 3:
        sys.exit(as_rank(sys.argv[2]))
    o = parser().parse_args()
    try:
        found = check(o)
    except UserError as error:
        console.fail(error)
    for line in found:
        if line.status != OK or not o.brief:
            print(f"{line.status:11}  {line.name:14}  {line.text}")
    print(summary(found, o.record))
    sys.exit(2 if any(line.status == FAIL for line in found) else 0)


if __name__ == "__main__":
    console.program(main)
