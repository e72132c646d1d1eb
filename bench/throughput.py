"""Tokens per second on this machine: `python bench/throughput.py [--quick] [--out JSON]`.

Measures training steps (forward, backward, update) of tiny records and of one full-width GPT-2-small block,
eager and compiled, float32 and bfloat16, and the harness's own work per step (loader, digests, log). Minimum
over repeats.
"""

import tempfile
import time
from collections.abc import Callable, Sequence

import measure
import torch
import torch.nn.functional as F

from common import allocator, arguments, console
import runlog
import schedule
from data.corpus import sample_corpus
from data.batch import to_rows
from data.stream import Stream, stream_arguments
from layers.attention import Attention, AttnMeta
from layers.mlp import MLP
from layers.rotary import Rotary
from layers.specs import layer_specs
from model import GPT
from optim import Optimizer
from report import Report
from settings import deltas
from settings.scales import SCALES


def record_step(
    ref: str, precision: str, compiled: bool, microbatch: int = 8, sets: Sequence[str] = ()
) -> tuple[Callable[[], None], int]:
    """(one training step as a function, tokens per step) of a record at tiny scale.

    microbatch: logical ranks in a forward. The tokens are real, because documents and so attention depend on
    them. The step is at three quarters of the run, where windows are long.
    """
    s = deltas.resolve(ref, scale="tiny", sets=[f"system.precision={precision}", *sets]).settings
    model = GPT(s)
    model.initialise(0)
    if compiled:
        model.prepare_compile()
    optimizer, plans = Optimizer(model, s), schedule.plan(s)
    plan = plans[3 * len(plans) // 4]
    forward = torch.compile(model, dynamic=False) if compiled else model
    corpus = sample_corpus()
    batch = Stream(corpus, ranks=range(8), **stream_arguments(s)).next()
    x, y, _ = to_rows(batch, s.data.seq_len, torch.device("cpu"), corpus.bos)

    model.update_yarn(plan.shape.windows)

    def step():
        for i in range(0, 8, microbatch):
            optimizer.expect(last=i + microbatch == 8)
            inputs, targets = x[i:i + microbatch].flatten(0, 1), y[i:i + microbatch].flatten(0, 1)
            context = model.context(
                inputs, corpus.bos, plan.shape.windows, tokens_per_rank=plan.shape.tokens_per_rank
            )
            forward(inputs, targets, context).mean().backward()
            optimizer.accumulate()
        optimizer.step(plan)

    return step, plan.tokens


# Shapes of records that the lineage has not reached, on record 33: 11 layers and their mean batch. What they
# add to it (more gates, n-gram tables) costs little next to this; it is here to try the ratios of the scales.
ELEVEN = ("model.num_layers=11", "model.attn.value_embed.tables=[0,1,2,-1,-1,-1,-1,-1,0,1,2]",
          "model.attn.window.long_layers=[3,10]")
LATER = (
    "model.residual.unet_skips=false", "model.attn.drop_layers=[6]", "data.tokens_per_rank=256",
    "data.seq_len=256"
)
SHAPES = {
    "shaped like 57": [*ELEVEN, *LATER],
    "shaped like 89": [*ELEVEN, *LATER, "model.mlp.drop_layers=[]"],
}


def block_step(precision: str, compiled: bool) -> tuple[Callable[[], None], int]:
    """(forward and backward of one full-width record-11 block on 2 x 1024 tokens, tokens)."""
    s = deltas.resolve("short/11", sets=[f"system.precision={precision}"]).settings
    spec = layer_specs(s)[0]
    attention, mlp, rotary = Attention(s, spec.attn), MLP(s, spec.mlp), Rotary(s, spec.attn.rotary)
    rotary.update_yarn()
    for p in [*attention.parameters(), *mlp.parameters()]:
        torch.nn.init.normal_(p, std=0.02)
    dtype = getattr(torch, s.numerics.matmul)

    def block(x):
        x = x + attention(F.rms_norm(x, x.shape[-1:]), rotary, None, AttnMeta(None, None))
        return x + mlp(F.rms_norm(x, x.shape[-1:]))

    forward = torch.compile(block, dynamic=False) if compiled else block
    x = torch.randn(2, 1024, s.model.model_dim, dtype=dtype, requires_grad=True)
    return (lambda: forward(x).float().square().mean().backward()), 2048


def harness_ms() -> tuple[float, float]:
    """Milliseconds per step at scale tiny: (the batch with digests, the log line of each validation)."""
    s = deltas.resolve("short/11", scale="tiny").settings
    stream = Stream(sample_corpus(), ranks=range(8), **stream_arguments(s))
    stream.next()
    began = time.perf_counter()
    for _ in range(200):
        stream.next()
    batch = (time.perf_counter() - began) / 200
    with tempfile.TemporaryDirectory() as folder:
        log = runlog.RunLog(folder, "bench")
        began = time.perf_counter()
        for i in range(200):
            log.event(
                "validation", step=i, scheduled_steps=200, val_loss=1.0, train_time_ms=1.0,
                train_loss=[1.0] * 22
            )
        line = (time.perf_counter() - began) / 200
    return 1000 * batch, 1000 * line / s.validation.every


def main() -> None:
    """Print the tokens per second of each kind of training step."""
    p = arguments.Parser(prog="bench/throughput.py", description=__doc__.splitlines()[0])
    p.add_argument("--quick", action="store_true", help="eager only, three repeats")
    p.add_argument("--out", metavar="JSON", help="also write the figures here")
    o = p.parse_args()
    allocator.keep_freed_memory()  # as the trainer does
    torch.manual_seed(0)
    repeats, report = (3 if o.quick else 6), Report(o.out, "Tokens per second of training steps")
    tiny = lambda ref, **more: lambda precision, compiled: record_step(ref, precision, compiled, **more)
    jobs = [(f"tiny {ref}", tiny(ref), True) for ref in ("short/1", "short/5", "short/11")]
    jobs += [(f"tiny {ref}", tiny(ref), False) for ref in ("short/21", "short/33")]
    jobs += [(f"tiny, {name}", tiny("short/33", sets=sets), False) for name, sets in SHAPES.items()]
    jobs += [("tiny short/11, one rank a forward", tiny("short/11", microbatch=1), True),
             ("GPT-2-small block, 2 x 1024", block_step, True)]
    print(f"{'what':36} {'dtype':9} {'mode':9} {'ms':>8} {'tokens/s':>9} {'first s':>8} {'tiny run s':>10}")
    for name, make, all_modes in jobs:
        for precision, label in (("float32", "float32"), ("record", "bfloat16"))[:2 if all_modes else 1]:
            for compiled in ((False,) if o.quick or not all_modes else (False, True)):
                torch._dynamo.reset()
                step, tokens = make(precision, compiled)
                first, seconds = measure.best(step, repeats)
                row = {
                    "what": name, "dtype": label, "mode": "compiled" if compiled else "eager",
                    "ms": round(1000 * seconds, 2), "tokens_per_second": round(tokens / seconds),
                    "first_s": round(first, 2)
                }
                if name.startswith("tiny"):  # training alone, without validation
                    row["tiny_run_s"] = round(SCALES["tiny"].budget_tokens / tokens * seconds, 1)
                report.add(row)
                print(f"{name:36} {label:9} {row['mode']:9} {row['ms']:8} {row['tokens_per_second']:9} "
                      f"{row['first_s']:8} {row.get('tiny_run_s', ''):>10}", flush=True)
    batch, line = harness_ms()
    one = {"what": "tiny short/11", "dtype": "float32", "mode": "eager"}
    step_ms = next(r["ms"] for r in report.rows if one.items() <= r.items())
    share = 100 * (batch + line) / step_ms
    print(f"harness per tiny step: batch and digests {batch:.3f} ms (in the background), log {line:.3f} ms: "
          f"{share:.2f} %")
    report.tables |= {"harness_ms": [batch, line], "harness_percent": share}
    report.finish()


if __name__ == "__main__":
    console.program(main)
