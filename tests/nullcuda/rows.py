"""The rows of tests/cuda.sh: short runs of the trainer on the null device, and a table of what they did.

Without ROW all are run, otherwise those whose name holds one of the words. Rows that were measured with the
code as it is now are kept. Results: table.md and table.json next to this file. Exit code 0 if every row that
was asked for keeps the bounds.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from common import arguments, files, repository

STEPS, VALIDATION_TOKENS = 4, 2_097_152
TIMEOUT = 7200  # seconds of a row, with the lowest priority on a busy machine
MEMORY = {"eager": 0.02, "compiled": 0.1}  # peak and estimate may differ by this share
# A row is measured anew when a file of these folders, or of the root, changes.
ROOMS = ("common", "data", "kernels", "layers", "records", "system", "updates", "tests/nullcuda")
SOURCES = (".py", ".toml", ".c", ".h", ".sh", ".txt")

RECORDS = (
    "1", "5", "11", "12", "14", "20", "21", "26", "29", "33", "48", "57", "62", "77", "85", "89", "90", "92"
)
VARIANTS = ("2", "4", "5")
# Records with less of what is too large: with 92's table of 84.6 M rows a step takes 149 GiB, by estimate.
# The trainer hashes all of it twice.
REDUCED = {"short/92": ("rows=1.3M", "model.embed.bigram.rows=1321920")}  # a 64th
KERNELS = ("loss", "muon", "mlp", "qk", "transpose")
COMM = ("replicated", "bucketed", "sharded", "allreduce_updates")
MODES = {"eager": ("system.compile=off",), "compiled": ()}
FEW_TOKENS = "data.tokens_per_rank=8192", "data.seq_len=8192"
FP8_MLP = "numerics.fp8_mlp={c_proj = {}}"  # both products


def rows() -> dict[str, list[str]]:
    """{name: arguments of train_gpt.py}, in the order in which the rows are run."""
    out = {}

    def add(name, record, *lines, processes=1):
        launch = ["--nproc", str(processes)] if processes > 1 else []
        out[name] = [record, *launch, *(x for line in lines for x in ("--set", line))]

    for mode, how in MODES.items():
        for record in [*(f"short/{n}" for n in RECORDS), *(f"variants/{n}" for n in VARIANTS)]:
            word, *lines = REDUCED.get(record, ("",))
            add(" ".join([record, *word.split(), mode]), record, *lines, *how)
        add(f"optimizer/36 {mode}", "optimizer/36", *how)
    for mode, how in MODES.items():
        for kernel in KERNELS:
            add(f"short/33 {kernel}=triton {mode}", "short/33", f"system.kernels.{kernel}=triton", *how)
        add(f"short/33 all=triton {mode}", "short/33", *(f"system.kernels.{k}=triton" for k in KERNELS), *how)
        for n in (1, 2, 8):
            ranks = f"system.ranks_per_microbatch={n}"
            # an eager forward of eight whole ranks would keep 330 GB
            few, word = (FEW_TOKENS, " tokens=8K") if n == 8 and mode == "eager" else ((), "")
            add(f"short/33 fp8_mlp ranks={n}{word} {mode}", "short/33", FP8_MLP, ranks, *few, *how)
        add(f"short/33 cuda_graphs {mode}", "short/33", "system.cuda_graphs=true", *how)
    for comm in COMM:
        lines = f"system.comm={comm}", *MODES["eager"]
        add(f"short/33 two processes {comm} eager", "short/33", *lines, processes=2)
    add("short/33 two processes compiled", "short/33", processes=2)
    return out


def code() -> str:
    """A digest of the files that a row depends on: a commit of anything else keeps the rows."""
    listed = repository.line("ls-files", "-co", "--exclude-standard", "--", *ROOMS, "*.py", "*.sh")
    digest = hashlib.sha256()
    for name in sorted(set(listed.splitlines())):
        room = name.rpartition("/")[0]
        inside = not room or any(room == r or room.startswith(f"{r}/") for r in ROOMS)
        if inside and name.endswith(SOURCES) and (ROOT / name).exists():
            digest.update(name.encode() + b"\0" + (ROOT / name).read_bytes())
    return digest.hexdigest()[:16]


def commit() -> str:
    """The commit of the checkout, with `-dirty` if a tracked file other than the table differs."""
    tables = [f":!tests/nullcuda/table.{kind}" for kind in ("json", "md")]
    changed = repository.line("status", "--porcelain", "--untracked-files=no", "--", ".", *tables)
    return repository.line("rev-parse", "HEAD") + ("-dirty" if changed else "")


# ----- one row


def shards() -> Path:
    """A folder of random GPT-2 tokens with the frequencies of a text, in documents, made once."""
    folder = files.default_cache() / "nullcuda-text"
    if not (folder / "corpus.json").exists():
        import measure
        folder.mkdir(parents=True, exist_ok=True)
        measure.synthetic_shards(folder, 12_000_000, 2_200_000)
    return folder


def measured(args: list[str], data: Path) -> dict:
    """What one run did: exit code, counts of a step, memory."""
    with tempfile.TemporaryDirectory() as scratch:
        out, reports = Path(scratch, "out"), Path(scratch, "reports")
        reports.mkdir()
        processes = int(args[args.index("--nproc") + 1]) if "--nproc" in args else 1
        command = [HERE / "run.sh", "train_gpt.py", *args, "--check-sync", "--data", data, "--out", out]
        command += ["--set", f"schedule.steps={STEPS}", "--set", f"validation.every={STEPS}"]
        command += ["--set", f"validation.tokens={VALIDATION_TOKENS}"]
        env = os.environ | {"NULLCUDA_REPORT": str(reports), "NULLCUDA_DEVICES": str(processes),
                            "SPEEDRUN_CACHE": str(files.default_cache())}
        try:
            done = subprocess.run([str(x) for x in command], cwd=ROOT, env=env, capture_output=True,
                                  text=True, errors="replace", timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            return {"exit": None, "said": f"longer than {TIMEOUT} s"}
        found = {"exit": done.returncode}
        if done.returncode:
            found["said"] = last_words(done.stderr)
        logs = list(out.glob("*/run.jsonl"))
        lines = logs[0].read_text(encoding="utf-8").splitlines() if logs else []
        reported = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(reports.glob("*.json"))]
        counted = from_reports([r for r in reported if r["steps"]] or reported, processes)
        return found | from_log([json.loads(line) for line in lines]) | counted


def last_words(stderr: str) -> str:
    """The trainer's own error line, otherwise the last line."""
    lines = [line for line in stderr.splitlines() if line.strip() and not line.startswith("null device")]
    return next((line for line in lines if line.startswith("error")), lines[-1] if lines else "")[:300]


def from_log(events: list[dict]) -> dict:
    """Estimate of memory, and the graphs that were compiled while the clock was running."""
    found = {}
    for event in events:
        if event.get("memory"):
            found["estimate_gib"] = round(event["memory"]["mib"]["total"] / 1024, 2)
            found["parts_mib"] = event["memory"]["mib"]
            found["ranks_per_microbatch"] = event["memory"]["ranks_per_microbatch"]
        if "graphs_in_clock" in event:
            found["late_graphs"] = event["graphs_in_clock"]
    return found


def reason(text: str) -> str:
    """Why dynamo left a graph, in a line: what it says first, and its explanation."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join([*lines[:1], *(line for line in lines if line.startswith("Explanation"))])[:240]


OF_STEP = ("kernels", "gemms", "inductor", "triton", "syncs", "reads", "sends", "mallocs", "collectives",
           "replays")
FLASH = {"grid": "waste", "blocks": "blocks", "least_blocks": "least_blocks",
         "longest_blocks": "longest_blocks", "mean_blocks": "mean_blocks"}
OF_RUN = ("graphs", "generated", "peak_gib", "step_peak_gib")


def from_reports(reported: list[dict], processes: int) -> dict:
    """What the processes of a run counted; of a step, the largest count over steps and processes."""
    if not reported:
        return {}
    steps = [step for r in reported for step in r["steps"]]
    found = {name: max((step[name] for step in steps), default=None) for name in OF_STEP}
    found |= {name: max(r[name] for r in reported) for name in OF_RUN}
    flash = [r for r in reported if r["blocks"]]
    worst = max(flash, key=lambda r: (r["blocks"] / r["least_blocks"], r["waste"]), default=reported[0])
    found |= {name: worst[key] for name, key in FLASH.items()}
    found["refused"] = sum(r["total"]["refused"] for r in reported)
    found["own"] = sorted({name for r in reported for name in r["own"]})
    found["breaks"] = sum(sum(r["breaks"].values()) for r in reported)
    found["why_broken"] = sorted({reason(text) for r in reported for text in r["breaks"]})
    if processes > 1:
        found["in_step"] = len(reported) == processes and len({r["collectives"] for r in reported}) == 1
    return found


ZERO = {"breaks": "graph breaks", "late_graphs": "graphs compiled inside the clock", "syncs": "host syncs",
        "reads": "reads of the device", "mallocs": "cudaMalloc in a step", "refused": "refused launches"}


def faults(name: str, row: dict) -> list[str]:
    """The bounds that a row does not keep, in words."""
    out = [] if row["exit"] == 0 else [f"exit code {row['exit']}: {row.get('said', '')}"]
    out += [f"{row[name]} {text}" for name, text in ZERO.items() if row.get(name)]
    if row.get("estimate_gib") and row.get("step_peak_gib") and row["exit"] == 0:
        ratio = row["step_peak_gib"] / row["estimate_gib"]
        if abs(ratio - 1) > MEMORY[name.rpartition(" ")[2]]:
            out.append(f"memory {ratio:.2f} of the estimate")
    # However many have no work: the interface starts the longest document's blocks for every document.
    if row.get("least_blocks") and row["blocks"] > row["least_blocks"]:
        out.append(f"FlashAttention starts {row['blocks']:,} blocks, and {row['least_blocks']:,} would do")
    if row.get("in_step") is False:
        out.append("the processes called different collectives")
    return out


# ----- the table

COLUMNS = {
    "exit": "exit", "breaks": "breaks", "graphs": "graphs", "late_graphs": "late", "syncs": "syncs",
    "reads": "reads", "sends": "sends", "step_peak_gib": "step GiB", "estimate_gib": "estimate",
    "peak_gib": "run GiB", "blocks": "blocks", "grid": "grid / work", "longest_blocks": "longest",
    "mean_blocks": "mean", "kernels": "torch", "gemms": "products", "inductor": "Inductor", "triton": "own",
    "generated": "generated", "collectives": "NCCL", "replays": "replays"
}
HEAD = f"""# The CUDA path on a device that computes nothing

`tests/cuda.sh` ran each row with torch 2.11.0 for CUDA: {STEPS} steps at full width with `--check-sync`.
What the device is and what it cannot show: [README.md](README.md).

- exit: of the trainer. breaks: graph breaks. graphs: compiled in all; late: while the clock was running.
- syncs: calls that wait for the device; reads: copies to the host that it waits for; sends: to pinned memory,
  which wait for nothing (of a step, the largest of all steps).
- step GiB, run GiB: what torch's allocator gave out at most in a step, and in the run, with validation.
  estimate: of a step, by system/memory.py.
- blocks: that FlashAttention starts in a forward pass of a layer in training; grid / work: over those that
  have work; longest, mean: blocks of the documents of this pass. Where grid / work is longest / mean, the
  interface cannot do with fewer.
- Launches of a step: torch's kernels, products of cuBLAS, kernels of Inductor, Triton kernels of the project.
  generated: kernels that Inductor wrote in all.
- NCCL: collectives of a step and process. replays: of CUDA graphs in a step.
- commit: at which the row was run, + with changes.

"""


def markdown(table: dict) -> str:
    """table.md."""
    lines = ["| row | " + " | ".join(COLUMNS.values()) + " | outside the bounds | commit |",
             "|---|" + "---:|" * len(COLUMNS) + "---|---|"]
    for name, row in table["rows"].items():
        cells = ["" if row.get(key) is None else f"{row[key]:,}" for key in COLUMNS]
        at = row["commit"][:9] + "+" * row["commit"].endswith("dirty")
        lines.append("| " + " | ".join([name, *cells, "; ".join(faults(name, row)), at]) + " |")
    return HEAD + "\n".join(lines) + "\n"


def read() -> dict:
    """The table so far."""
    path = HERE / "table.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": {}}


def write(name: str, row: dict) -> None:
    """Add a row to table.json and table.md, in the order of rows(); another run may have added some."""
    order, found = {name: i for i, name in enumerate(rows())}, read()["rows"]
    found[name] = row
    table = {"rows": dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))}
    files.write(HERE / "table.json", files.json_text(table) + "\n")
    files.write(HERE / "table.md", markdown(table))


def main() -> int:
    """Run the rows that are asked for and not measured yet."""
    p = arguments.Parser(prog="tests/cuda.sh", description=__doc__.partition("\n\n")[0])
    p.add_argument("words", metavar="ROW", nargs="*")
    p.add_argument("--list", action="store_true", help="print the names of the rows")
    p.add_argument("--again", action="store_true", help="measure rows anew that the table has for this code")
    o = p.parse_args()
    wanted = {name: args for name, args in rows().items()
              if not o.words or any(word in name for word in o.words)}
    if not wanted:
        print(f"error: no row has {' or '.join(o.words)} in its name: tests/cuda.sh --list prints them",
              file=sys.stderr)
        return 2
    if o.list:
        print("\n".join(wanted))
        return 0
    version, data, bad = code(), shards(), 0
    for name, args in wanted.items():
        row = read()["rows"].get(name)
        if row is None or row["code"] != version or o.again:
            row = {**measured(args, data), "code": version, "commit": commit()}
            write(name, row)
        found = faults(name, row)
        bad += bool(found)
        print(f"{name}: {'; '.join(found) or 'ok'}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
