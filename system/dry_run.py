"""`train_gpt.py RECORD --dry-run`: what a run would do. What counts parameters and memory imports torch."""

import json
import signal
from collections import Counter
from pathlib import Path

import deltas
import schema
import schedule
from common import files, lines
from layers.specs import layer_specs
from settings import LOGICAL_RANKS, padded_vocab
from system.microbatch import ranks_per_forward, validation_rows_at_once


@lines.fitted()
def print_plan(resolved):
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--dry-run | head` ends quietly
    s, record = resolved.settings, resolved.record
    name, of = (resolved.preset, f"{record.ref} at ") if resolved.preset else (record.ref, "")
    print(f"{name}  {record.title}  ({of}scale {resolved.scale})")
    for line in [*resolved.changes, *resolved.report]:
        print("  " + line)
    for line in from_parent(resolved):
        print(line)
    print(f"\nml_hash {schema.ml_hash(s)}  system_hash {schema.system_hash(s)}")
    print("\nsettings that differ from the defaults (record 1):")
    default = schema.flat(type(s)())
    for path, value in schema.flat(s).items():
        if value != default.get(path, ...):
            print(f"  {path} = {schema.show(value)}")
    plans = schedule.plan(s)
    columns = ["learning-rate factor", "Muon momentum"]
    columns += ["window" + (" long / short" if split(s) else "")] if plans[0].shape.windows else []
    print(f"\nschedule (step: {', '.join(columns)}):")
    changes = [i for i in range(1, len(plans)) if plans[i].shape != plans[i - 1].shape]
    for i in sorted({*range(0, len(plans), max(1, len(plans) // 8)), *changes, len(plans) - 1}):
        print(f"  {i:6d}: {plans[i].lr_factor:.4f}  {plans[i].momentum:.4f}" + windows_text(s, plans[i].shape.windows))
    if plans[0].shape.windows:
        final = schedule.validation_windows(s, len(plans))
        last = f", last layer {span_text(final.last)}" if final.last != final.long else ""
        print(f"  final validation:{windows_text(s, final)}{last}")
    if still := sum(not plan.moves_bias for plan in plans) if s.model.mlp.moe and s.model.mlp.moe.balance else 0:
        print(f"  the routers' biases stand still from step {len(plans) - still} on")
    validations = sum(schedule.validates(s, i) for i in range(len(plans) + 1))
    total, each = schedule.tokens_before(s, len(plans)), f" x {plans[0].tokens:,} tokens"
    for line in stage_table(s, plans):
        print(line)
    print(f"\n{len(plans)} steps{each if total == len(plans) * plans[0].tokens else ''} = {total:,} tokens; "
          f"{validations} validations of {s.validation.tokens:,} tokens")
    kinds = dict.fromkeys((spec.attn.heads, spec.attn.qk, spec.attn.v) for spec in layer_specs(s) if spec.attn is not None)
    print(" or ".join(f"{heads} heads of {qk}" + (f" (values {v})" if v != qk else "") for heads, qk, v in kinds)
          + f", {padded_vocab(s)} classes")
    print(size(s))
    for line in parameters(s):
        print(line)
    for line in graphs(s, plans):
        print(line)
    for line in held(s):
        print(line)
    for line in measured(resolved):
        print(line)


def stage_table(s, plans):
    """Lines on the stages of a run that has several: steps, batch, rows and tokens of each."""
    if len(schedule.stages(s)) == 1:
        return
    yield "\n  stage         steps  tokens per rank  row length  tokens of a step  tokens of the stage"
    for stage, steps in enumerate(schedule.stages(s)):
        if steps:
            shape, tokens = plans[steps.start].shape, plans[steps.start].tokens
            yield (f"  {stage:5d}  {f'{steps.start}..{steps.stop - 1}':>12}  {shape.tokens_per_rank:15,}  {shape.seq_len:10,}  "
                   f"{tokens:16,}  {len(steps) * tokens:19,}")


def from_parent(resolved):
    """Lines on every setting that differs from the record's parent at the same scale; marked: not by the record."""
    record, s, scale = resolved.record, resolved.settings, resolved.scale
    parent = deltas.resolve(record.parent, scale=scale).settings if record.parent else type(s)()
    other = f"the parent, {record.parent}" if record.parent else "the defaults of settings.py (no parent)"
    yield f"\ndifferences from {other}, at scale {scale}:"
    unchanged = deltas.resolve(record.ref, scale=scale).settings
    asked = {path for path, *_ in schema.difference(unchanged, s)}
    rows, own = schema.difference(parent, s), f"  ({resolved.preset or 'by this command'})"
    for path, old, new in rows:
        yield f"  {path}: {schema.show(old)} -> {schema.show(new)}" + own * (path in asked)
    if not rows:
        yield "  none" + (f": {record.subsumed}" if record.subsumed else "")


def parameters(s):
    """Lines of a table of all parameters, by label and shape: how they are updated, and communicated by eight processes."""
    from model import without_values
    from optim import Optimizer
    from system.comm import communication
    names = ("label", "role", "shapes", "rule", "rate", "decay", "constants", "communication", "updated")
    rows = [names, *Optimizer(without_values(s), s, communication(s, 0, LOGICAL_RANKS)).table()]
    widths = [max(map(len, column)) for column in zip(*rows)]
    yield f"parameters (communication of {LOGICAL_RANKS} processes):"
    for row in rows:
        yield "  " + "  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip()


def graphs(s, plans):
    """Lines on all that one process compiles before the clock starts, with its shapes: the forward passes, with their backward
    in training, and the update of each bank."""
    from model import without_values
    from optim import Optimizer
    cuda = s.system.device != "cpu"
    at_once = ranks_per_forward(s, LOGICAL_RANKS, cuda)
    shapes = Counter((shape.tokens_per_rank, shape.seq_len) for shape in {p.shape for p in plans})
    length = s.validation.seq_len
    validated = {schedule.validation_windows(s, i) for i in range(len(plans) + 1) if schedule.validates(s, i)}
    forwards = [*(("training", at_once * tokens // seq_len, seq_len, windows) for (tokens, seq_len), windows in sorted(shapes.items())),
                ("validation", validation_rows_at_once(s.validation.tokens // LOGICAL_RANKS // length, length, cuda), length,
                 len(validated))]
    banks = Optimizer(without_values(s), s).banks
    yield (f"compiled before the clock in one process, if it compiles: at most {sum(n for *_, n in forwards) + len(banks)} graphs"
           + (" (FlexAttention and FlashAttention need one for all windows)" if plans[0].shape.windows else ""))
    for what, rows, tokens, windows in forwards:
        each = f", for each of {windows} windows" if windows > 1 else ""
        yield f"  {what}: {rows} row{'s' if rows > 1 else ''} of {tokens} tokens{each}"
    for bank in banks:
        yield f"  update: {bank.name()}"


CARDS = (24, 80)  # GiB: a 4090 and an A100 or H100


def held(s):
    """Lines on the memory of one GPU, part by part, and on what would be chosen to fit cards of CARDS GiB."""
    from system import memory
    at_once = ranks_per_forward(s, LOGICAL_RANKS, cuda=s.system.device != "cpu")
    e = memory.estimate(s, LOGICAL_RANKS, at_once)
    yield (f"memory on one device: parameters {mib(e.parameters)}, gradients {mib(e.gradients)}, optimizer {mib(e.state)}; "
           f"a forward of {at_once} logical rank{'s' if at_once > 1 else ''} keeps {mib(e.kept)}, "
           f"and {mib(e.passing)} pass by; "
           f"together {mib(e.total)}")
    for card in CARDS if e.total > 2**30 else ():
        fitted, e = memory.fit(s, LOGICAL_RANKS, card * 2**30)
        system = fitted.system
        how = [f"{system.ranks_per_forward} logical rank{'s' if system.ranks_per_forward > 1 else ''} a forward"]
        how += ["loss in chunks"] if memory.chunked(fitted) else []
        how += ["blocks recomputed"] if system.recompute == "on" else []
        fits = e.total <= memory.SHARE * card * 2**30
        yield f"  a card of {card} GiB: " + ", ".join(how) + f"; {mib(e.total)}" + ("" if fits else ": too much")


def mib(size):
    return f"{size / 2**20:,.1f} MiB"


def measured(resolved, results=Path(__file__).parent.parent / "bench/results"):
    """Lines on what bench/steps.py measured of this record at this scale."""
    for path in files.listed(results, "**/steps*.json"):
        table = json.loads(path.read_text(encoding="utf-8"))
        plain = table["scale"] == resolved.scale and not resolved.changes and not table["settings"]
        for row in table["rows"]:
            if plain and row["record"] == resolved.record.ref:
                memory = f", {row['warm']['peak_memory_mib']:,} MiB" if row["warm"]["peak_memory_mib"] else ""
                yield (f"measured: {row['warm']['ms_per_step']:.1f} ms a step on {row['warm']['device']}{memory} "
                       f"(bench/results/{path.relative_to(results)})")


def span_text(span):
    if span.blocks is None:
        return f"{span.tokens} tokens"
    blocks = f"{span.blocks} block" + ("s" if span.blocks > 1 else "")
    return blocks if span.tokens is None else f"{blocks} and {span.tokens} tokens"


def split(s):
    """Do some layers see a shorter window?"""
    return any(spec.attn is not None and spec.attn.window == "short" for spec in layer_specs(s))


def windows_text(s, windows):
    if windows is None:
        return ""
    return f"  {span_text(windows.long)}" + (f" / {span_text(windows.short)}" if split(s) else "")


def size(s):
    """Parameters, those that one token meets, and FLOPs, in one line."""
    from model import without_values
    model = without_values(s)
    active, (products, attended) = model.num_active(), flops(s, model)
    return (f"{model.num_parameters():,} parameters" + (f", {active:,} active in a token" if s.model.mlp.moe else "")
            + f"; {(products + attended) / 1e6:,.0f} MFLOP a token in training, {attended / 1e6:,.0f} of them of queries, keys and "
            f"values ({context_text(s)})")


def flops(s, model):
    """FLOPs of a token in training, mean over the steps: (of matrix products with weights, of attention's own products)."""
    steps = Counter(schedule.windows(s, i) for i in range(s.schedule.steps))
    attended = sum(n * model.attention_flops_per_token(windows) for windows, n in steps.items())
    return model.flops_per_token(), attended / s.schedule.steps


def context_text(s):
    """What attention's FLOPs are counted over."""
    how = "every earlier token of the row seen" if s.model.attn.window is None else "windows averaged over the steps"
    how += ", borders of documents not counted" if s.model.attn.documents else ""
    return f"rows of {s.data.seq_len:,} tokens, {how}"
