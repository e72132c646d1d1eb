"""Variants against their parent: `python bench/experts.py [RECORD ...] [--scale tiny] [--out JSON]`.

A training step of each variant (forward, backward, update) and of its parent, interleaved; for mixtures of
experts also where the time of their layers goes (route, permute, multiply, combine, shared expert; forward
and backward, all layers), and the same layer in plain torch, a loop over the experts. Minimum over repeats,
milliseconds. FLOPs need no measurement: `records variants`.
"""

import sys
import tempfile
from argparse import Namespace
from types import SimpleNamespace
from pathlib import Path

import measure
import torch

from common import arguments, console
import schedule
from data.corpus import corpus_for
from data.batch import to_rows
from data.stream import Stream, stream_arguments
from kernels import experts
from model import GPT
from optim import Optimizer
from report import Report, stop_in_order
from settings import deltas
from settings.data import LOGICAL_RANKS
from system.hooks import hooks_of
from system.microbatch import ranks_per_microbatch

ALONE = SimpleNamespace(total=lambda tally: tally)  # a World of one process
VARIANTS = [ref for ref in deltas.load_records() if ref.startswith("variants/")]


class Case:
    """A record ready to train one step, over and over, on the first batch."""

    def __init__(self, ref: str, scale: str, data: str | None = None) -> None:
        self.s = s = deltas.resolve(ref, scale=scale).settings
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = GPT(s).to(device)
        self.model.initialise(0)
        self.compiled = device.type == "cuda"  # as the trainer
        if self.compiled:
            self.model.prepare_compile()
        self.forward = torch.compile(self.model, dynamic=False) if self.compiled else self.model
        self.optimizer, self.plan = Optimizer(self.model, s, compiled=self.compiled), schedule.plan(s)[0]
        self.hooks = hooks_of(self.model)
        self.corpus = corpus_for(scale, data)
        self.microbatch = ranks_per_microbatch(s, LOGICAL_RANKS, self.compiled)
        batch = Stream(self.corpus, ranks=range(8), **stream_arguments(s)).next()
        self.x, self.y, self.documents = to_rows(batch, s.data.seq_len, device, self.corpus.bos)

    def gradients(self) -> None:
        for hook in self.hooks:
            hook.before_forwards(self.plan)
        for i in range(0, 8, self.microbatch):
            self.optimizer.expect(last=i + self.microbatch == 8)
            x, y = self.x[i:i + self.microbatch].flatten(0, 1), self.y[i:i + self.microbatch].flatten(0, 1)
            numbers, lengths = zip(*self.documents[i:i + self.microbatch])
            context = self.model.context(
                x, self.corpus.bos, self.plan.shape.windows, most=sum(numbers), longest=max(lengths),
                tokens_per_rank=self.plan.shape.tokens_per_rank
            )
            self.forward(x, y, context).mean().backward()
            self.optimizer.collect()

    def update(self) -> None:
        for hook in self.hooks:
            hook.before_update(self.plan, ALONE)
        self.optimizer.step(self.plan)


def backward(outputs: list[torch.Tensor], leaves: list[torch.Tensor]) -> None:
    """Backward from outputs, without keeping gradients on the leaves."""
    torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])


def layer_parts(case: Case, repeats: int) -> dict[str, float]:
    """{part: ms} of all mixture layers together, on normed random input of a step's size.

    `plain` is the loop over experts.
    """
    layers = case.model.mixtures()
    moe, forwards = layers[0][1], 8 // case.microbatch
    rows, length = case.x[:case.microbatch].flatten(0, 1).shape
    matmul = getattr(torch, case.s.numerics.matmul)
    x = torch.randn(
        rows, length, case.s.model.model_dim, device=case.x.device, dtype=matmul, requires_grad=True
    )
    backend = experts.choose(
        case.s.system.experts, x.device, matmul, (moe.c_fc.size(1), moe.c_fc.size(2)), case.compiled
    )
    chosen, gates, _ = moe.router(x)
    gates = gates.detach().to(matmul).requires_grad_()
    p = experts.plan(chosen, moe.num_experts, backend)
    sorted_rows = experts.gather(x.flatten(0, 1), p).detach().requires_grad_()
    done = moe.feed(sorted_rows, p).detach().requires_grad_()
    leaf = x.detach().flatten(0, 1).requires_grad_()

    def permute():
        backward([experts.gather(leaf, experts.plan(chosen, moe.num_experts, backend))], [leaf])

    def plain():
        y = torch.zeros_like(leaf)
        for e in range(moe.num_experts):
            token, choice = (chosen == e).nonzero(as_tuple=True)
            hidden = moe.activation(leaf[token] @ moe.c_fc[e].to(matmul).mT)
            y = y.index_add(0, token, (hidden @ moe.c_proj[e].to(matmul).mT) * gates[token, choice, None])
        backward([y], [leaf, gates, moe.c_fc, moe.c_proj])

    def ours():
        q = experts.plan(chosen, moe.num_experts, backend)
        y = experts.combine(moe.feed(experts.gather(leaf, q), q), gates, q)
        backward([y], [leaf, gates, moe.c_fc, moe.c_proj])

    steps = {"route": lambda: backward([moe.router(x)[1]], [x, moe.router.weight]), "permute": permute,
             "multiply": lambda: backward([moe.feed(sorted_rows, p)], [sorted_rows, moe.c_fc, moe.c_proj]),
             "combine": lambda: backward([experts.combine(done, gates, p)], [done, gates])}
    if moe.shared is not None:
        steps["shared"] = lambda: backward([moe.shared(x)], [x, *moe.shared.parameters()])
    steps |= {"routed": ours, "plain": plain}
    return {
        name: 1000 * measure.best(step, repeats)[1] * len(layers) * forwards for name, step in steps.items()
    }


def main() -> None:
    """Time each variant against its parent and exit with the report's code."""
    p = arguments.Parser(prog="bench/experts.py", description=__doc__.splitlines()[0])
    p.add_argument("records", nargs="*", default=VARIANTS, metavar="RECORD",
                   help="variants (default: all)")
    p.add_argument("--scale", default="tiny", help="size of the records (default tiny)")
    p.add_argument(
        "--data", metavar="DIR", help="folder of shards (default: the embedded corpus, or random tokens)"
    )
    p.add_argument("--repeats", type=arguments.integer(1, 10 ** 6), default=5,
                   help="timings of each (default 5)")
    p.add_argument("--out", metavar="JSON", help="also write the figures here")
    o = p.parse_args()
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64
    stop_in_order()
    report = Report(o.out, "Variants against their parents", scale=o.scale)
    with tempfile.TemporaryDirectory() as scratch:
        if o.data is None and o.scale in ("full", "small"):
            o.data = scratch
            measure.synthetic_shards(Path(scratch), 2_000_000, 200_000)
        for ref in o.records:
            report.attempt({"record": ref}, lambda: measured(ref, o))
            torch._dynamo.reset()
    sys.exit(report.finish())


def measured(ref: str, o: Namespace) -> dict:
    """Print and return the row of a record."""
    case, parent = (Case(r, o.scale, o.data) for r in (ref, deltas.find_record(ref).parent))
    times = {}
    for _ in range(o.repeats):  # interleaved: a machine's mood meets both
        for name, step in (("parent_ms", parent.gradients), ("parent_update_ms", parent.update),
                           ("ms", case.gradients), ("update_ms", case.update)):
            times[name] = min(times.get(name, 1e9), 1000 * measure.best(step, 1)[1])
    row = {"parameters": case.model.num_parameters(), "active_parameters": case.model.num_active(),
           "parent": deltas.find_record(ref).parent, **{k: round(v, 2) for k, v in times.items()}}
    mine, theirs = row["ms"] + row["update_ms"], row["parent_ms"] + row["parent_update_ms"]
    row["ratio"] = round(mine / theirs, 3)
    print(f"{ref}: step {mine:.1f} ms, {row['ratio']:.2f} of {row['parent']}'s {theirs:.1f} ms; update "
          f"{row['update_ms']:.1f} and {row['parent_update_ms']:.1f} ms", flush=True)
    if case.model.mixtures():
        row["parts_ms"] = {k: round(v, 2) for k, v in layer_parts(case, o.repeats).items()}
        parts = dict(row["parts_ms"])
        routed, plain = parts.pop("routed"), parts.pop("plain")
        print(
            "    layers: " + ", ".join(f"{k} {v:.1f}" for k, v in parts.items())
            + f" ms; routed part {routed:.1f} ms, as a loop over experts in plain torch {plain:.1f} ms",
            flush=True
        )
    return row


if __name__ == "__main__":
    console.program(main)
