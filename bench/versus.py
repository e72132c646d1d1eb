"""Our training step against that of a nanoGPT checkout (github.com/karpathy/nanoGPT), on the CPU:

    python bench/versus.py PATH_TO_NANOGPT [--rounds 9] [--quick]

Equal work: layers, width, heads, tokens, vocabulary, weight tying, learned positions, GELU, no bias in linear
layers, no dropout, AdamW, gradient norm clipped at 1. In float32, and with bfloat16 products: theirs by
autocast, as its train.py does, ours by system.precision=bf16_matmul. One difference is left: our LayerNorms
have a bias, less than 1 % of the parameters, which every case checks.

Each side has a process of its own, which times its step in CPU time of the process. One step of ours and one
of theirs alternate, so that both meet the same machine. Ours keeps freed memory as the trainer does
(common/allocator.py), theirs runs as its train.py does. The ratio of a round is their time / ours; above 1,
ours is faster. The table has its median and quartiles.
"""

import ast
import contextlib
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import measure
import torch

import schedule
from common import allocator, arguments, console, files, repository
from common.errors import UserError
from model import GPT
from optim import Optimizer
from report import Report
from settings import deltas

ROOT = Path(__file__).parent.parent
OUT = ROOT / "bench/results/versus-cpu.json"
REMEDY = "give the folder of a clone of https://github.com/karpathy/nanoGPT"
TITLE = "Training steps against nanoGPT on a CPU"
WARM_UP = 2  # steps before the first round; the first one compiles
RANKS = 8  # logical ranks of a step of ours; all go through one forward pass
# name -> layers, width, heads, tokens of a row, rows of a batch, vocabulary
SHAPES = {
    "tiny: 12 x 96, 64 x 64 tokens": dict(
        layers=12, width=96, heads=6, length=64, rows=64, vocabulary=1280),
    "baby: 6 x 384, 8 x 128 tokens": dict(
        layers=6, width=384, heads=6, length=128, rows=8, vocabulary=1280),
}
MODES, PRECISIONS = ("eager", "compiled"), ("float32", "bfloat16")


# ----- the two sides ----------------------------------------------------------------------------------------

def batch(shape: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets (rows, T) int64: random ids, the same on both sides."""
    ids = torch.randint(shape["vocabulary"], (shape["rows"], shape["length"] + 1),
                        generator=torch.Generator().manual_seed(0))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def our_step(case: dict) -> tuple[Callable, int]:
    """(a training step of record 1 with nanoGPT's shape, number of parameters)."""
    allocator.keep_freed_memory()
    shape, compiled = case["shape"], case["mode"] == "compiled"
    precision = {"float32": "float32", "bfloat16": "bf16_matmul"}[case["precision"]]
    tokens = shape["rows"] * shape["length"]
    s = deltas.resolve("short/1", sets=[
        f"model.num_layers={shape['layers']}", f"model.model_dim={shape['width']}",
        f"model.attn.num_heads={shape['heads']}", f"model.vocab_size={shape['vocabulary']}",
        f"data.seq_len={shape['length']}", f"data.tokens_per_rank={tokens // RANKS}",
        f"validation.seq_len={shape['length']}", f"validation.tokens={tokens}",
        "model.bias=false", "model.mlp.activation=gelu", "optim.grad_clip=1.0", "system.device=cpu",
        f"system.precision={precision}"
    ]).settings
    model = GPT(s)
    model.initialise(0)
    if compiled:
        model.prepare_compile()
    forward = torch.compile(model, dynamic=False) if compiled else model
    optimizer, plan = Optimizer(model, s, compiled=compiled), schedule.plan(s)[-1]
    x, y = batch(shape)

    def step():
        optimizer.expect(last=True)
        loss = forward(x, y, model.context(x, 0, plan.shape.windows)).mean()
        loss.backward()
        optimizer.accumulate()
        optimizer.step(plan)
        return loss.item()

    return step, sum(p.numel() for p in model.parameters())


def their_step(case: dict) -> tuple[Callable, int]:
    """(a training step of the checkout, number of parameters): what its train.py does for one batch."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(case["path"]) / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    shape = case["shape"]
    torch.manual_seed(0)
    model = module.GPT(module.GPTConfig(
        block_size=shape["length"], vocab_size=shape["vocabulary"], n_layer=shape["layers"],
        n_head=shape["heads"], n_embd=shape["width"], dropout=0.0, bias=False
    ))
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cpu")
    forward = torch.compile(model) if case["mode"] == "compiled" else model
    narrow = contextlib.nullcontext()
    if case["precision"] == "bfloat16":
        narrow = torch.autocast("cpu", dtype=torch.bfloat16)
    x, y = batch(shape)

    def step():
        with narrow:
            _, loss = forward(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step, sum(p.numel() for p in model.parameters())


SIDES = {"ours": our_step, "nanogpt": their_step}


def child(case: dict) -> None:
    """One side: prints its number of parameters, then makes a step for every line on stdin and prints its CPU
    seconds."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what a model prints is no answer
    torch.set_num_threads(case["threads"])
    step, parameters = SIDES[case["side"]](case)
    for _ in range(WARM_UP):
        step()
    print(files.json_text(parameters), file=answers, flush=True)
    for _ in sys.stdin:
        began = time.process_time()
        step()
        print(files.json_text(time.process_time() - began), file=answers, flush=True)


# ----- alternation ------------------------------------------------------------------------------------------

class Side:
    """A process that makes a step of one side when it is asked to."""

    def __init__(self, case: dict, side: str) -> None:
        self.name = side
        self.said = tempfile.TemporaryFile("w+")  # a pipe that nobody reads would fill up
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--child", files.json_text({**case, "side": side})], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said
        )

    def answer(self) -> float:
        """The next line of the process, read. RuntimeError with its last words if it has ended."""
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.said.seek(0)
            said = self.said.read().strip().splitlines() or ["no reason given"]
            raise RuntimeError(f"{self.name} ended with {code}: {said[-1]}")
        return json.loads(line)

    def seconds(self) -> float:
        """CPU seconds of one more step."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.said.close()


def compare(case: dict, rounds: int) -> dict:
    """The result of one case: milliseconds of both sides, and the ratio theirs / ours with its quartiles."""
    sides, counts = [], []
    try:
        for name in SIDES:  # one after the other: they would compile against each other
            sides.append(Side(case, name))
            counts.append(sides[-1].answer())
        ours, theirs = sides
        if abs(counts[0] - counts[1]) > 0.01 * counts[1]:
            raise RuntimeError(f"no equal work: {counts[0]:,} parameters here, {counts[1]:,} in nanoGPT")
        times = [(ours.seconds(), theirs.seconds()) for _ in range(rounds)]
    finally:
        for side in sides:
            side.close()
    return summary(times) | {"rounds": rounds, "parameters": counts[0], "nanogpt_parameters": counts[1]}


def summary(times: list[tuple[float, float]]) -> dict:
    """Medians and ratios of [(CPU seconds of a step of ours, of one of theirs)], at least two rounds."""
    low, middle, high = statistics.quantiles([b / a for a, b in times], n=4, method="inclusive")
    ours, theirs = (1000 * statistics.median(side) for side in zip(*times))
    return {
        "ours_ms": round(ours, 1), "nanogpt_ms": round(theirs, 1), "ratio": round(middle, 3),
        "quartile_1": round(low, 3), "quartile_3": round(high, 3)
    }


# ----- the program ------------------------------------------------------------------------------------------

def require_nanogpt(path: Path) -> None:
    """UserError unless the folder holds nanoGPT: a model.py with the classes GPT and GPTConfig."""
    file = path / "model.py"
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        raise UserError(f"{path} holds no nanoGPT, because {file} cannot be read: {REMEDY}") from None
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    methods = {node.name for node in getattr(classes.get("GPT"), "body", ()) if hasattr(node, "name")}
    if "GPTConfig" not in classes or "configure_optimizers" not in methods:
        raise UserError(f"{path} holds no nanoGPT, because {file} has no GPTConfig or no "
                        f"GPT.configure_optimizers: {REMEDY}")


def commit_of(path: Path) -> str:
    """Commit of the checkout; `unknown` if git has none."""
    try:
        return repository.line("rev-parse", "HEAD", cwd=path)
    except UserError:
        return "unknown"


def cases(quick: bool) -> Iterator[tuple[dict, dict]]:
    """(columns of the table, what the processes are told) of each case; quick: the first shape, eager."""
    for name, shape in list(SHAPES.items())[:1 if quick else None]:
        for mode in MODES[:1 if quick else None]:
            for precision in PRECISIONS:
                yield ({"shape": name, "mode": mode, "precision": precision},
                       {"shape": shape, "mode": mode, "precision": precision})


def main() -> int:
    """The program: `bench`, whose refusals are one line."""
    try:
        return bench()
    except UserError as error:
        console.fail(error)


def bench() -> int:
    """Measure every case and write the table; returns the exit code. UserError for wrong arguments."""
    p = arguments.Parser(prog="bench/versus.py", description=__doc__.splitlines()[0])
    p.add_argument("path", type=Path, nargs="?", metavar="PATH_TO_NANOGPT", help="a checkout of nanoGPT")
    p.add_argument("--rounds", type=int, default=9, help="alternations of a case, at least 2")
    p.add_argument("--threads", type=int, default=1,
                   help="threads of each side (1: CPU time has no part in which threads wait for each other)")
    p.add_argument("--quick", action="store_true", help="the first shape only, eager")
    p.add_argument("--out", metavar="JSON", default=str(OUT), help="Markdown goes next to it")
    p.add_argument("--child", type=json.loads, help="used by the bench itself: one side of one case")
    o = p.parse_args()
    if o.child:
        child(o.child)
        return 0
    if o.path is None:
        raise UserError(f"a path is missing: {REMEDY}")
    require_nanogpt(o.path)
    for name, least in (("rounds", 2), ("threads", 1)):
        if getattr(o, name) < least:
            raise UserError(f"--{name} {getattr(o, name)}: give at least {least}")
    about, commit = measure.about(), commit_of(o.path)
    title = f"{TITLE} ({about['cpu']}, threads: {o.threads}; nanoGPT {commit[:12]})"
    report = Report(o.out, title, nanogpt=commit, step_threads=o.threads)
    for columns, case in cases(o.quick):
        case |= {"path": str(o.path.resolve()), "threads": o.threads}
        row = report.attempt(columns, lambda: compare(case, o.rounds))
        if "failed" not in row:
            print(f"{row['shape']:30} {row['mode']:9} {row['precision']:9} ours {row['ours_ms']:8} ms, "
                  f"nanoGPT {row['nanogpt_ms']:8} ms: {row['ratio']:.2f} ({row['quartile_1']:.2f} to "
                  f"{row['quartile_3']:.2f})", flush=True)
    return report.finish()


if __name__ == "__main__":
    console.program(main)
