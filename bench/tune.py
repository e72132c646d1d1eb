"""Try out tiles for the Triton kernels on this GPU and keep the fastest: `python bench/tune.py [--out JSON]`.

For the shapes of the records' banks and layers at full width, in bfloat16 and FP8. What is faster than the
kernel's own table goes at once to a file of this card in the cache folder, which trainings read
(kernels/tiles.py); tiles that the card cannot do are passed over.
"""

import functools
import itertools
import random
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import Any

import measure  # first: it finds the repository
import report
import torch

from common import arguments, console
from kernels import cross_entropy, linear_relu_sq, qk_rotary, symmetric, tiles
from kernels.device import FP8_SINCE, capability
from model import without_values
from optim import Optimizer
from settings import Settings, deltas
from settings.model import head_dim, padded_vocab

DEVICE, TOKENS = torch.device("cuda"), 65536
GAIN = 0.98  # a tile must be this much faster than the default to be kept: less is noise


def tensor(*shape: int) -> torch.Tensor:
    """Normal bfloat16 tensor on the GPU."""
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


# Each yields (dtype, sizes of tiles.key, default tile, step).

def symmetric_cases(s: Settings) -> Iterator[tuple]:
    """Gram matrices of the banks that Muon updates, and their squares."""
    banks = Optimizer(without_values(s), s).banks
    shapes = {(len(piece), *sorted(piece.shape[1:])) for bank in banks if bank.rule.name == "muon"
              for piece in bank.views.split(bank.param)}
    for n, m, k in shapes:
        x, square = tensor(n, m, k), tensor(n, m, m)
        yield x.dtype, (m, k), symmetric.default_tile(x), lambda x=x: symmetric.gram(x)
        yield (
            x.dtype, (m, m), symmetric.default_tile(square), lambda a=square: symmetric.quadratic(a, 1.0, 1.0)
        )


def linear_cases(s: Settings) -> Iterator[tuple]:
    """The up projection of the MLP with ReLU^2, forward and the gradient's product."""
    d = s.model.model_dim
    f = s.model.mlp.expansion * d
    x, up = tensor(TOKENS, d), tensor(f, d)
    p, down, g = linear_relu_sq.forward(x, up), tensor(d, f), tensor(TOKENS, d)
    yield (x.dtype, (f, d), linear_relu_sq.default_tile(x),
           lambda: (linear_relu_sq.forward(x, up), linear_relu_sq.product_gradient(g, down.t(), p)))


def fp8_linear_cases(s: Settings) -> Iterator[tuple]:
    """e4m3 operands, as numerics.fp8_mlp.c_proj asks: P in both precisions."""
    if capability(DEVICE) < FP8_SINCE:
        return
    d = s.model.model_dim
    x, up = (
        tensor(TOKENS, d).to(torch.float8_e4m3fn),
        tensor(s.model.mlp.expansion * d, d).to(torch.float8_e4m3fn),
    )
    one = torch.ones(1, device=DEVICE)
    yield (
        x.dtype, tuple(up.shape), linear_relu_sq.FP8.get(capability(x.device), linear_relu_sq.FP8["default"]),
        lambda: linear_relu_sq.fp8_linear_relu_sq(x, up, one, one, torch.bfloat16)
    )


def loss_cases(s: Settings) -> Iterator[tuple]:
    """The cross entropy of up to 8,192 tokens, forward and backward."""
    classes = padded_vocab(s)
    rows = min(8192, TOKENS)
    x, weight = (
        tensor(rows, s.model.model_dim).requires_grad_(),
        tensor(classes, s.model.model_dim).requires_grad_(),
    )
    targets = torch.randint(classes, (rows,), device=DEVICE)

    def step():
        losses = cross_entropy.linear_cross_entropy(
            x, weight, targets, softcap=s.model.head.softcap, backend="triton"
        )
        torch.autograd.grad(losses.sum(), [x, weight])

    yield x.dtype, (classes,), cross_entropy.DEFAULT, step


def rotary_cases(s: Settings) -> Iterator[tuple]:
    """QK norm and rotary of one row, forward and backward."""
    heads, width = s.model.attn.num_heads, head_dim(s)
    qkv, tables = (
        tensor(1, TOKENS, 3, heads, width).requires_grad_(),
        [tensor(TOKENS, width // 2) for _ in range(2)],
    )

    def step():
        q, k, v = qk_rotary.qkv_rotary(qkv, *tables, order="before_rope", eps=1e-6)
        torch.autograd.grad([q, k, v], qkv, [q, k, v])

    yield qkv.dtype, (heads, width), qk_rotary.DEFAULT, step


def grid(tile: type[tuple], *values) -> list[tuple]:
    """All combinations of the values as tiles (a NamedTuple)."""
    return [tile(*t) for t in itertools.product(*values)]


# operation -> (its cases, the tiles to try)
OPERATIONS = {
    "symmetric": (symmetric_cases, grid(symmetric.Tile, (64, 128), (32, 64), (4, 8), (3, 4))),
    "linear_relu_sq": (
        linear_cases,
        grid(linear_relu_sq.Tile, (64, 128), (128, 256), (32, 64), (4, 8), (3, 4)),
    ),
    "fp8_linear_relu_sq": (
        fp8_linear_cases,
        grid(linear_relu_sq.Tile, (64, 128), (128, 256), (64, 128), (4, 8), (3,)),
    ),
    "qk_rotary": (rotary_cases, grid(qk_rotary.Tile, (1024, 2048, 4096), (2, 4, 8))),
    "cross_entropy": (loss_cases, grid(cross_entropy.Block, (2048, 4096, 8192), (4, 8, 16))),
}


def fastest(
    operation: str, step: Callable[[], Any], candidates: Sequence[tuple], default: tuple,
    time: Callable[[Callable], float], limit: float = float("inf")
) -> tuple[tuple, float, float, int]:
    """(fastest tile, its milliseconds, those of the default, number of tiles tried).

    time: function (step) -> seconds. limit: seconds after which no other tile is tried.
    """
    stop = perf_counter() + limit
    with tiles.trying(operation, default):
        base = time(step)
    best, least, tried = default, base, 0
    for tile in candidates:
        if perf_counter() > stop:
            break
        tried += 1
        try:
            with tiles.trying(operation, tile):
                seconds = time(step)
        except Exception as error:
            # Triton has several for what does not fit; anything else fails for the default too
            print(f"    {tuple(tile)}: {report.first_line(error)[:90]}")
            if not report.alive():
                raise
            continue
        if seconds < min(least, GAIN * base):
            best, least = tile, seconds
    return best, 1000 * least, 1000 * base, tried


def tuned(
    name: str, operation: str, step: Callable[[], Any], candidates: Sequence[tuple], default: tuple,
    o: Namespace
) -> dict:
    """The row of one shape; what is faster is kept at once."""
    time = lambda step: measure.best(step, o.repeats)[1]
    tile, ms, base, tried = fastest(operation, step, candidates, default, time, o.limit)
    row = {"tile": list(tile), "ms": round(ms, 4), "default_ms": round(base, 4)}
    if tile != default:
        tiles.save(tiles.path(DEVICE), {name: row})
    return {**row, "default": list(default), "tried": f"{tried} of {len(candidates)}"}


def cases_of(operation: str, o: Namespace) -> Iterator[tuple[dict, Callable]]:
    """The cases of an operation for bench/report.py: each of its shapes in the records, once."""
    cases, candidates = OPERATIONS[operation]
    # those left out where time is short are no particular ones
    candidates, seen = random.Random(0).sample(candidates, len(candidates)), set()
    for ref in o.records:
        for dtype, sizes, default, step in cases(deltas.resolve(ref).settings):
            name = tiles.key(operation, dtype, sizes)
            if name not in seen:
                seen.add(name)
                yield {"shape": name}, lambda: tuned(name, operation, step, candidates, default, o)


def show(row: dict) -> str:
    """The printed line of a row."""
    return (f"{row['shape']:44} {row['default_ms']:8.3f} ms {tuple(row['default'])} -> {row['ms']:8.3f} ms "
            f"{tuple(row['tile'])}, tried {row['tried']}")


def main() -> None:
    """Try the tiles of the selected operations and keep the fastest; without a GPU only list them."""
    p = arguments.Parser(prog="bench/tune.py", description=__doc__.splitlines()[0])
    p.add_argument("--records", nargs="+", default=["short/11", "short/33"], metavar="RECORD",
                   help="whose shapes are tuned (default: short/11 short/33)")
    p.add_argument("--repeats", type=arguments.integer(1, 10 ** 6), default=10,
                   help="timings of each tile (default 10)")
    p.add_argument("--limit", type=arguments.number(0, above=True), default=float("inf"), metavar="SECONDS",
                   help="for each shape (default: all tiles)")
    report.add_arguments(p, OPERATIONS)
    o = p.parse_args()
    if not torch.cuda.is_available():
        tiles_of = [f"{len(candidates)} tiles of {name}" for name, (_, candidates) in OPERATIONS.items()]
        print("no GPU here; on one this would try out " + ", ".join(tiles_of))
        sys.exit(0)
    torch.manual_seed(0)
    groups = {operation: functools.partial(cases_of, operation, o) for operation in OPERATIONS}
    code = report.run(o, groups, "Tiles of the Triton kernels", show=show)
    if not o.child:
        print(f"tiles: {tiles.path(DEVICE)}")
    sys.exit(code)


if __name__ == "__main__":
    console.program(main)
