"""Update rules at the shapes of GPT-2 small: `python bench/optim.py [--layers 1] [--out JSON]`.

For each rule an update of a table (rows, 768), or of the matrices of --layers layers (q, k, v, o of 768 x 768
and an MLP of 3072 x 768): milliseconds of process CPU time (on a GPU: of its clock), bytes of state per
parameter, and MiB that the update needs besides parameters, gradients and state. Torch's own AdamW too.
"""

import ctypes
import itertools
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import torch

from common import arguments, console
from optim import RULES
from report import Report, stop_in_order
from schedule import plan
from settings import Settings, deltas
from updates import views

POLAR = ["optim.muon.polar_express=true", "numerics.newton_schulz_form=symmetric"]
NORMUON = [*POLAR, "optim.muon.normuon={}"]
CAUTIOUS = [*NORMUON, "optim.muon.cautious_decay={}"]
ADAM = ["optim.adam.cautious_decay={weight_decay=0.005, strict=true}"]
BF16 = ["numerics.table=bfloat16"]
BALL = ["optim.muon.hyperball=true"]
KEPT = ["numerics.matrix=bfloat16", "numerics.matrix_mantissa=true"]

# name -> (kind of parameters, settings on record 33)
CASES = {
    "AdamW": ("table", ["numerics.table=float32", "numerics.adam_state=parameter"]),
    "AdamW, cautious decay": ("table", ["numerics.table=float32", "numerics.adam_state=parameter", *ADAM]),
    "AdamW, bfloat16": ("table", [*BF16, "numerics.adam_state=bfloat16", *ADAM]),
    "AdamW, bfloat16, moments in float32": ("table", [*BF16, "numerics.adam_state=float32", *ADAM]),
    "Muon, Newton-Schulz, factored": ("matrix", ["numerics.newton_schulz_form=factored"]),
    "Muon, Newton-Schulz, symmetric": ("matrix", POLAR[1:]),
    "Muon, Polar Express": ("matrix", POLAR),
    "NorMuon": ("matrix", NORMUON),
    "NorMuon, cautious decay": ("matrix", CAUTIOUS),
    "NorMuon, cautious decay, kept mantissa": ("matrix", [*CAUTIOUS, *KEPT]),
    "AdamH": ("matrix", [*BALL, "optim.muon.adam={}"]),
    "SOAP-H": ("matrix", [*BALL, "optim.muon.soap_h={}"]),
    "KL-SOAP-H": ("matrix", [*BALL, "optim.muon.kl_soap={}"]),
    "Shampoo, roots in every update": ("matrix", ["optim.muon.shampoo={every=1}"]),
    "PSGD Kron": ("matrix", [*BALL, "optim.muon.psgd={}"]),
    "Muown, 12 steps": ("matrix", ["optim.muon.muown={}", "optim.muon.polar_express_long=true",
                                   "optim.muon.ns_steps=12"]),
}
TORCH = {"torch AdamW, for-loop": dict(foreach=False), "torch AdamW, foreach": dict(foreach=True),
         "torch AdamW, fused": dict(fused=True)}


def parameters(
    s: Settings, kind: str, layers: int, rows: int
) -> list[tuple[str, str, views.Views, torch.Tensor]]:
    """[(role, label, views, tensor)] of a kind of parameters."""
    if kind == "table":
        dtype = getattr(torch, s.numerics.table)
        return [("embed", "embed", views.Views(), torch.zeros(rows, 768, dtype=dtype))]
    dtype = getattr(torch, s.numerics.matrix)
    return [("matrix", "qkvo", views.qkvo(s), torch.zeros(layers, 4, 768, 768, dtype=dtype)),
            ("matrix", "c_fc", views.c_fc(s), torch.zeros(layers, 3072, 768, dtype=dtype)),
            ("matrix", "c_proj", views.c_proj(s), torch.zeros(layers, 768, 3072, dtype=dtype))]


def rule_case(kind: str, sets: list[str], layers: int, rows: int, device: str) -> tuple[Callable, int, int]:
    """(function that makes one update, numbers of parameters, bytes of state)."""
    s = deltas.resolve("short/33", sets=sets).settings
    of_step, updates, count, held = plan(s)[400], [], 0, 0
    for role, label, of, x in parameters(s, kind, layers, rows):
        group = s.optim.group(role, label)
        rule = RULES[group.rule](s, group)
        unit = rule.unit(tuple(x.shape[1:]), of)
        p = x.to(device).view(-1, *unit).normal_(std=0.02)
        state = {name: torch.zeros((len(p), *shape), dtype=dtype, device=device)
                 for name, (shape, dtype) in rule.state(unit, p.dtype, of).items()}
        updates.append((rule, p, torch.randn_like(p) * 1e-3, state, of))
        count, held = count + p.numel(), held + sum(x.nbytes for x in state.values())
    done = itertools.count(1)

    def update():
        t = next(done)  # the first update of some rules starts their state
        for rule, p, g, state, of in updates:
            rule.update_(p, g, state, rule.numbers(of_step, t), of)

    return update, count, held


def torch_case(options: dict[str, bool], rows: int, device: str) -> tuple[Callable, int, int]:
    """The same of torch's AdamW on the table."""
    p = torch.nn.Parameter(torch.randn(rows, 768, device=device) * 0.02)
    p.grad = torch.randn_like(p) * 1e-3
    adam = torch.optim.AdamW([p], lr=0.6, betas=(0.8, 0.95), **options)
    adam.step()
    return adam.step, p.numel(), sum(x.nbytes for x in adam.state[p].values() if x.dim())


def peak_mib(update: Callable[[], Any]) -> float | None:
    """MiB that an update holds at most on top of what was there; None where the system does not tell."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        update()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        ctypes.CDLL(None).malloc_trim(0)  # glibc: freed memory goes back to the system
        clear.write_text("5", encoding="ascii")  # the peak is now what is resident
        before = status.read_text(encoding="ascii")
        update()
        kib = [int(re.search(rf"{key}:\s+(\d+)", text)[1])
               for key, text in (("VmHWM", status.read_text(encoding="ascii")), ("VmRSS", before))]
    except (OSError, AttributeError):
        return None
    return (kib[0] - kib[1]) / 1024


@torch.no_grad()
def measured(case: tuple[Callable, int, int], repeats: int) -> dict:
    """Row of a case: its least time, its state, its peak."""
    update, count, held = case
    update()
    peak = peak_mib(update)
    if torch.cuda.is_available():
        ms = 1000 * measure.best(update, repeats)[1]
    else:
        times = []
        for _ in range(repeats):
            began = time.process_time()
            update()
            times.append(time.process_time() - began)
        ms = 1000 * min(times)
    return {"parameters": count, "ms": round(ms, 2), "ns_per_parameter": round(ms * 1e6 / count, 3),
            "state_bytes_per_parameter": round(held / count, 3),
            "peak_mib": None if peak is None else round(peak, 1)}


def main() -> None:
    """Measure all rules and print a line for each."""
    p = arguments.Parser(prog="bench/optim.py", description=__doc__.splitlines()[0])
    p.add_argument("--layers", type=arguments.integer(1, 1000), default=1,
                   help="layers whose matrices are stepped (default 1)")
    p.add_argument("--table-rows", type=arguments.integer(1, 10 ** 7), default=50304,
                   help="rows of the token table (default 50304)")
    p.add_argument("--repeats", type=arguments.integer(1, 10 ** 6), default=5,
                   help="timings of each (default 5)")
    p.add_argument("--out", metavar="JSON", help="also write the figures here")
    o = p.parse_args()
    torch.manual_seed(0)
    stop_in_order()
    # As in a training: once a large piece was freed, glibc keeps small ones, which otherwise are mapped anew
    # in every operation.
    torch.zeros(7 * 2 ** 20)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report = Report(
        o.out, "Update rules at the shapes of GPT-2 small", layers=o.layers, table_rows=o.table_rows
    )
    cases = {name: lambda kind=kind, sets=sets: rule_case(kind, sets, o.layers, o.table_rows, device)
             for name, (kind, sets) in CASES.items()}
    cases |= {name: lambda how=how: torch_case(how, o.table_rows, device) for name, how in TORCH.items()}
    for name, make in cases.items():
        row = report.attempt({"rule": name}, lambda make=make: measured(make(), o.repeats))
        if "failed" not in row:
            print(f"{name}: {row['ms']:.1f} ms, {row['ns_per_parameter']:.2f} ns and "
                  f"{row['state_bytes_per_parameter']:.2f} bytes of state per parameter, peak "
                  f"{row['peak_mib']} MiB", flush=True)
    sys.exit(report.finish())


if __name__ == "__main__":
    console.program(main)
