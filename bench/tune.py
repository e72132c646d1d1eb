"""Try out tiles for the Triton kernels on this GPU and keep the fastest: `python bench/tune.py [--records ...] [--out JSON]`.

For the shapes of the records' banks and layers at full width, in bfloat16. What is faster than the kernel's own table goes to a
file of this card in the cache folder, which trainings read (kernels/tiles.py); tiles that the card cannot do are passed over.
"""

import argparse
import itertools
import sys

import measure
import torch

import deltas
from kernels import cross_entropy, linear_relu_sq, symmetric, tiles
from model import without_values
from optim import Engine
from settings import padded_vocab

TOKENS = 65536
GAIN = 0.98  # a tile must be this much faster than the default to be kept: less is noise


def tensor(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def symmetric_cases(s):
    """Gram matrices of the banks that Muon updates, and their squares: ((m, k), default, step)."""
    engine = Engine(without_values(s), s)
    shapes = {(len(piece), *sorted(piece.shape[1:])) for bank in engine.banks if bank.rule == "muon"
              for piece in engine.cut_of(bank).split(bank.param)}
    for n, m, k in shapes:
        x, square = tensor(n, m, k), tensor(n, m, m)
        yield (m, k), symmetric.default_tile(x), lambda x=x: symmetric.gram(x)
        yield (m, m), symmetric.default_tile(square), lambda a=square: symmetric.quadratic(a, 1.0, 1.0)


def linear_cases(s):
    d = s.model.model_dim
    f = s.model.mlp.expansion * d
    x, up = tensor(TOKENS, d), tensor(f, d)
    p, down, g = linear_relu_sq.forward(x, up), tensor(d, f), tensor(TOKENS, d)
    yield (f, d), linear_relu_sq.default_tile(x), lambda: (linear_relu_sq.forward(x, up),
                                                           linear_relu_sq.product_gradient(g, down.t(), p))


def loss_cases(s):
    classes = padded_vocab(s)
    x, weight = tensor(8192, s.model.model_dim).requires_grad_(), tensor(classes, s.model.model_dim).requires_grad_()
    targets = torch.randint(classes, (8192,), device="cuda")

    def step():
        losses = cross_entropy.linear_cross_entropy(x, weight, targets, softcap=s.model.head.softcap, backend="triton")
        torch.autograd.grad(losses.sum(), [x, weight])

    yield (classes,), cross_entropy.DEFAULT, step


# operation -> (its cases, the tiles to try)
OPERATIONS = {
    "symmetric": (symmetric_cases, [symmetric.Tile(*t) for t in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4, 5))]),
    "linear_relu_sq": (linear_cases, [linear_relu_sq.Tile(*t) for t in itertools.product((64, 128), (128, 256), (32, 64, 128), (4, 8),
                                                                                         (2, 3, 4))]),
    "cross_entropy": (loss_cases, [cross_entropy.Block(*t) for t in itertools.product((1024, 2048, 4096, 8192), (2, 4, 8, 16))])}


def fastest(operation, step, candidates, default, time):
    """(tile, ms, default's ms). time: function of a step that gives seconds."""
    with tiles.trying(operation, default):
        base = time(step)
    best, least = default, base
    for tile in candidates:
        try:
            with tiles.trying(operation, tile):
                seconds = time(step)
        except Exception as error:  # Triton has several for what does not fit; anything else fails for the default too
            print(f"    {tuple(tile)}: {(str(error).splitlines() or [type(error).__name__])[0][:90]}")
            continue
        if seconds < min(least, GAIN * base):
            best, least = tile, seconds
    return best, 1000 * least, 1000 * base


def main():
    p = argparse.ArgumentParser(prog="bench/tune.py", description=__doc__.splitlines()[0])
    p.add_argument("--records", nargs="+", default=["short/11", "short/33"], metavar="RECORD")
    p.add_argument("--repeats", type=int, default=10)
    p.add_argument("--out", metavar="JSON", help="also write the figures here")
    o = p.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here; on one this would try out " + ", ".join(f"{len(c)} tiles of {name}" for name, (_, c) in OPERATIONS.items()))
        sys.exit(0)
    torch.manual_seed(0)
    file, found = tiles.path(torch.device("cuda")), {}
    for ref, (operation, (cases, candidates)) in itertools.product(o.records, OPERATIONS.items()):
        for sizes, default, step in cases(deltas.resolve(ref).settings):
            name = tiles.key(operation, torch.bfloat16, sizes)
            if name in found:
                continue
            tile, ms, base = fastest(operation, step, candidates, default, lambda step: measure.best(step, o.repeats)[1])
            found[name] = {"tile": list(tile), "ms": round(ms, 4), "default_ms": round(base, 4)}
            print(f"{name:44} {base:8.3f} ms {tuple(default)} -> {ms:8.3f} ms {tuple(tile)}", flush=True)
    tiles.save(file, found)
    print(f"tiles: {file}")
    measure.write(o.out, tiles=found)


if __name__ == "__main__":
    main()
