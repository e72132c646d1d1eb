"""`train_gpt.py RECORD --dry-run`: print the plan of a run.

torch is imported only to count parameters and memory.
"""

import signal
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import schedule
from common import lines
from layers.specs import has_short_window, layer_specs
from schedule import Span, StepPlan, Windows
from settings import Settings, deltas, schema
from settings.data import LOGICAL_RANKS
from settings.deltas import Resolved
from settings.model import padded_vocab
from system import plan_plot, roofline
from system.cards import CARDS
from system.microbatch import ranks_per_microbatch, validation_rows_at_once

if TYPE_CHECKING:
    from model import GPT


@lines.fitted()
def print_plan(
    resolved: Resolved, picture: str | None = None, card: str | None = None, gpus: int = 1
) -> None:
    """Print the plan of a run.

    picture: file for a plot of its schedules (system.plan_plot), or None.
    card: name of one of roofline.CARDS, to estimate a step on `gpus` of these GPUs; None: no estimate.
    """
    if picture is not None:
        plan_plot.check(picture)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--dry-run | head` ends quietly
    s, record = resolved.settings, resolved.record
    name, of = (resolved.preset, f"{record.ref} at ") if resolved.preset else (record.ref, "")
    print(f"{name}  {record.title}  ({of}scale {resolved.scale})")
    for line in [*resolved.changes, *resolved.report]:
        print("  " + line)
    print_lines(from_parent(resolved))
    print(f"\nml_hash {schema.ml_hash(s)}  system_hash {schema.system_hash(s)}")
    print("\nsettings that differ from the defaults (record 1):")
    default = schema.flat(type(s)())
    for path, value in schema.flat(s).items():
        if value != default.get(path, ...):
            print(f"  {path} = {schema.show(value)}")
    plans = schedule.plan(s)
    print_lines(schedule_table(s, plans))
    validations = sum(schedule.validates(s, i) for i in range(len(plans) + 1))
    total, each = schedule.tokens_before(s, len(plans)), f" x {plans[0].tokens:,} tokens"
    print_lines(stage_table(s, plans))
    print(f"\n{len(plans)} steps{each if total == len(plans) * plans[0].tokens else ''} = {total:,} tokens; "
          f"{validations} validations of {s.validation.tokens:,} tokens")
    kinds = dict.fromkeys(
        (spec.attn.heads, spec.attn.qk, spec.attn.v) for spec in layer_specs(s) if spec.attn is not None
    )
    print(
        " or ".join(
            f"{heads} heads of {qk}" + (f" (values {v})" if v != qk else "") for heads, qk, v in kinds
        )
        + f", {padded_vocab(s)} classes"
    )
    print(size(s))
    print_lines(parameters(s))
    print_lines(exchanged(s))
    print_lines(graphs(s, plans))
    print_lines(held(s, card, gpus))
    print_lines(measured(resolved) if card is None else roofline.lines(resolved, card, gpus))
    if picture is not None:
        plan_plot.draw(resolved, picture)
        print(f"plot of the schedules: {picture}")


def print_lines(found: Iterable[str]) -> None:
    """Print lines as they come: a function that makes them may take seconds."""
    for line in found:
        print(line)


def schedule_table(s: Settings, plans: list[StepPlan]) -> Iterator[str]:
    """Lines of a table of the schedules, with the remarks of `schedule_remarks`.

    Rows: eighths of the run, and every step that changes the Shape or raises the learning-rate factor.
    """
    pairs = list(zip(plans[1:], plans))
    changes = {new.step for new, old in pairs if new.shape != old.shape}
    if s.schedule.lr_peaks:
        changes |= {new.step for new, old in pairs if new.lr_factor > old.lr_factor}
    shown = sorted({*range(0, len(plans), max(1, len(plans) // 8)), *changes, len(plans) - 1})
    rows = [["step", "learning-rate factor", "Muon momentum"]]
    rows += [[str(i), f"{plans[i].lr_factor:.4f}", f"{plans[i].momentum:.4f}"] for i in shown]

    def column(title, text):
        rows[0].append(title)
        for row, i in zip(rows[1:], shown):
            row.append(text(plans[i]))

    if s.schedule.matrix:
        column("of the matrices", lambda plan: f"{plan.matrix_lr_factor:.4f}")
    if len({plan.tokens for plan in plans}) > 1:
        column("tokens", lambda plan: f"{plan.tokens:,}")
    if plans[0].shape.windows:
        title = "window" + (" long / short" if has_short_window(s) else "")
        column(title, lambda plan: windows_text(s, plan.shape.windows).strip())
    if s.model.head.mtp:
        column("weights of the next tokens", lambda plan: "  ".join(f"{w:.4f}" for w in plan.target_weights))
    if s.model.head.candidates:
        column("classes of the softmax", lambda plan: f"{plan.shape.candidates or padded_vocab(s):,}")
    if s.model.head.prefix:
        column("weight of the prefix", lambda plan: f"{plan.prefix_weight:.4f}")
    widths = [max(map(len, cells)) for cells in zip(*rows)]
    yield "\nschedule:"
    for row in rows:
        yield "  " + "  ".join([cell.rjust(width) for cell, width in zip(row[:3], widths)]
                               + [cell.ljust(width) for cell, width in zip(row[3:], widths[3:])]).rstrip()
    yield from schedule_remarks(s, plans)


def schedule_remarks(s: Settings, plans: list[StepPlan]) -> Iterator[str]:
    """Lines on the final validation, on one-time events, and on groups that are frozen in some steps."""
    if plans[0].shape.windows:
        final = schedule.validation_windows(s, len(plans))
        last = f", last layer {span_text(final.last)}" if final.last != final.long else ""
        yield f"  final validation:{windows_text(s, final)}{last}"
    for path, effect in schedule.cuts(s, plans):
        yield f"  {path}: {effect}"
    for plan in plans:
        if "untie" in plan.events:
            yield f"  the embedding gets a table of its own after step {plan.step}"
    yield from wrapper_remarks(s)
    for group in sorted(set().union(*(plan.frozen for plan in plans))):
        steps = [plan.step for plan in plans if group in plan.frozen]
        yield f"  optim.{group} rests in {len(steps)} steps: {runs_text(steps)}"
    if s.model.mlp.moe and s.model.mlp.moe.balance and (still := sum(not plan.update_bias for plan in plans)):
        yield f"  the routers' biases stand still from step {len(plans) - still} on"


def wrapper_remarks(s: Settings) -> Iterator[str]:
    """Lines on what moves the weights between the updates, and on the weights that validations read."""
    optim, steps = s.optim, s.schedule.steps
    if (ahead := optim.ema_nesterov) is not None and ahead.start < min(ahead.stop, steps):
        yield f"  look-ahead (optim.ema_nesterov) in the steps {ahead.start}..{min(ahead.stop, steps) - 1}"
    if (outer := optim.outer) is not None:
        first = 1 if outer.first_step else outer.period
        count = len(schedule.outer_steps(s))
        yield f"  {count} outer steps (optim.outer), after every {outer.period} updates, first after {first}"
    if optim.rre is not None:
        found = schedule.extrapolations(optim.rre, steps)
        where = f" after the updates {', '.join(map(str, found))}" if found else ""
        yield f"  {len(found)} extrapolations (optim.rre){where}"
    for path, told in schedule.pulsed(optim):
        found = schedule.pulses(told, steps)
        where = f"pulses ({path}) after the updates {', '.join(map(str, found))}"
        yield f"  {where if found else f'no pulse ({path})'}"
    if (anchor := optim.anchor) is not None and anchor.gain and anchor.ramp_start + 1 < steps:
        first = max(anchor.ramp_start + 1, anchor.start)
        yield f"  gradients are taken away from an average (optim.anchor) in the steps {first}..{steps - 1}"
    read = {}
    for step in (step for step in range(steps + 1) if schedule.validates(s, step)):
        for one in schedule.readouts(s, step):
            read.setdefault(one, []).append(step)
    for one, at in read.items():
        raw = "; raw_val_loss next to it is that of the training's own weights" if one.undone else ""
        yield f"  val_loss is read at the weights of {one.setting} at step {', '.join(map(str, at))}{raw}"


def runs_text(steps: list[int]) -> str:
    """Growing step numbers as stretches, like `654..693, 1307..1346`."""
    starts = [i for i, step in enumerate(steps) if i == 0 or steps[i - 1] != step - 1]
    return ", ".join(f"{steps[a]}..{steps[b - 1]}" for a, b in zip(starts, [*starts[1:], len(steps)]))


def stage_table(s: Settings, plans: list[StepPlan]) -> Iterator[str]:
    """Lines on the stages of a run that has several: steps, batch, rows and tokens of each."""
    if len(schedule.stages(s)) == 1:
        return
    yield "\n  stage         steps  tokens per rank  row length  tokens of a step  tokens of the stage"
    for stage, steps in enumerate(schedule.stages(s)):
        if steps:
            shape, tokens = plans[steps.start].shape, plans[steps.start].tokens
            yield (f"  {stage:5d}  {f'{steps.start}..{steps.stop - 1}':>12}  {shape.tokens_per_rank:15,}  "
                   f"{shape.seq_len:10,}  {tokens:16,}  {len(steps) * tokens:19,}")


def from_parent(resolved: Resolved) -> Iterator[str]:
    """Lines on every setting that differs from the record's parent at the same scale.

    A mark shows the differences that come from the command or preset, not from the record.
    """
    record, s, scale = resolved.record, resolved.settings, resolved.scale
    parent = deltas.resolve(record.parent, scale=scale).settings if record.parent else type(s)()
    other = f"the parent, {record.parent}" if record.parent else "the defaults of settings/ (no parent)"
    yield f"\ndifferences from {other}, at scale {scale}:"
    unchanged = deltas.resolve(record.ref, scale=scale).settings
    asked = {path for path, *_ in schema.difference(unchanged, s)}
    rows, own = schema.difference(parent, s), f"  ({resolved.preset or 'by this command'})"
    for path, old, new in rows:
        yield f"  {path}: {schema.show(old)} -> {schema.show(new)}" + own * (path in asked)
    if not rows:
        yield "  none" + (f": {record.subsumed}" if record.subsumed else "")


def parameters(s: Settings) -> Iterator[str]:
    """Lines of a table of all parameters, by label and shape, with their update and communication.

    Communication is that of eight processes.
    """
    from model import without_values
    from optim import Optimizer
    from system.comm import communication
    names = ("label", "role", "shapes", "rule", "rate", "decay", "constants", "communication", "updated")
    rows = [names, *Optimizer(without_values(s), s, communication(s, 0, LOGICAL_RANKS)).table()]
    yield f"parameters (communication of {LOGICAL_RANKS} processes):"
    yield from lines.aligned(rows)


def exchanged(s: Settings) -> Iterator[str]:
    """A line on what workers that train apart exchange, if there are any."""
    if schedule.apart(s):
        from model import without_values
        from optim import Optimizer
        from system.workers import saved
        yield saved(s, Optimizer(without_values(s), s))


def graphs(s: Settings, plans: list[StepPlan]) -> Iterator[str]:
    """Lines on the graphs that one process compiles before the clock starts, with their shapes.

    They are the forward passes, in training with their backward, and the update of each bank.
    """
    from model import without_values
    from optim import Optimizer
    cuda = s.system.device != "cpu"
    microbatch = ranks_per_microbatch(s, LOGICAL_RANKS, cuda)
    shapes = Counter((shape.tokens_per_rank, shape.seq_len) for shape in schedule.shapes(plans))
    length = s.validation.seq_len
    validated = {(schedule.validation_windows(s, i), schedule.tied(s, i)) for i in range(len(plans) + 1)
                 if schedule.validates(s, i)}
    forwards = [
        *(
            ("training", microbatch * tokens // seq_len, seq_len, windows)
            for (tokens, seq_len), windows in sorted(shapes.items())
        ),
        (
            "validation",
            validation_rows_at_once(s.validation.tokens // LOGICAL_RANKS // length, length, cuda), length,
            len(validated)
        ),
    ]
    banks = Optimizer(without_values(s), s).banks
    yield (
        "compiled before the clock in one process, if it compiles: at most "
        f"{sum(n for *_, n in forwards) + len(banks)} graphs"
        + (" (FlexAttention and FlashAttention need one for all windows)" if plans[0].shape.windows else "")
    )
    for what, rows, tokens, windows in forwards:
        kinds = "windows" if plans[0].shape.targets == 1 else "windows, targets and shared or own tables"
        each = f", for each of {windows} {kinds}" if windows > 1 else ""
        yield f"  {what}: {rows} row{'s' if rows > 1 else ''} of {tokens} tokens{each}"
    for bank in banks:
        yield f"  update: {bank.name()}"


COMMON = (24, 80)  # GiB: a 4090 and an A100 or H100


def held(s: Settings, card: str | None = None, gpus: int = 1) -> Iterator[str]:
    """Lines on the memory of one GPU, part by part, and on the choices that make a step fit.

    card: name of the card to fit; None: those of COMMON. gpus: how many share the logical ranks.
    """
    from system import memory
    ranks = LOGICAL_RANKS // gpus
    microbatch = ranks_per_microbatch(s, ranks, cuda=s.system.device != "cpu")
    e = memory.estimate(s, ranks, microbatch, gpus)
    many = f" of {gpus}" if gpus > 1 else ""
    forward = f"{microbatch} logical rank{'s' if microbatch > 1 else ''}"
    yield (f"memory on one device{many}: parameters {mib(e.parameters)}, gradients {mib(e.gradients)}, "
           f"optimizer {mib(e.state)}; a forward of {forward} keeps {mib(e.kept)}, and {mib(e.passing)} pass "
           f"by; together {mib(e.total)}")
    one = f"each of {gpus} cards" if gpus > 1 else "a card"
    sizes = {f"{one} of {gib} GiB": gib for gib in COMMON if e.total > 2**30}
    if card is not None:
        gib = roofline.card(card).capacity
        each = f"each of {gpus} x " if gpus > 1 else ""
        sizes = {f"{each}{card.upper()}, {gib} GiB": gib}
    for name, gib in sizes.items():
        fitted, e = memory.fit(s, ranks, gib * 2**30, gpus)
        system = fitted.system
        how = [
            f"{system.ranks_per_microbatch} logical rank"
            + ("s" if system.ranks_per_microbatch > 1 else "") + " a forward"
        ]
        how += ["loss in chunks"] if memory.chunked(fitted) else []
        how += ["blocks recomputed"] if system.activation_checkpoint == "on" else []
        fits = e.total <= memory.SHARE * gib * 2**30
        yield f"  {name}: " + ", ".join(how) + f"; {mib(e.total)}" + ("" if fits else ": too much")
    if card is None and sizes:
        sizes[f"an H200, {CARDS['h200'].capacity} GiB"] = CARDS["h200"].capacity
    for name, gib in sizes.items():
        yield from largest_table(s, name, gib * 2**30, gpus)


def largest_table(s: Settings, name: str, capacity: int, gpus: int) -> Iterator[str]:
    """A line on the largest bigram table that fits the card of this name, if the record's does not."""
    from system import memory
    found = memory.largest_table(s, LOGICAL_RANKS // gpus, capacity, gpus)
    if found is None or found[0] >= s.model.embed.bigram.rows:
        return
    rows, e = found
    yield f"  {name}: " + (
        f"model.embed.bigram.rows={rows} is the largest table that fits; {mib(e.total)}" if rows
        else "no bigram table fits"
    )


def mib(size: int) -> str:
    """Bytes as MiB."""
    return f"{size / 2**20:,.1f} MiB"


def measured(resolved: Resolved, results: Path = roofline.RESULTS) -> Iterator[str]:
    """Lines on what bench/steps.py measured of this record at this scale."""
    for _, warm, where in roofline.measurements(resolved, results):
        memory = f", {warm['peak_memory_mib']:,} MiB" if warm["peak_memory_mib"] else ""
        yield f"measured: {warm['ms_per_step']:.1f} ms a step on {warm['device']}{memory} ({where})"


def span_text(span: Span) -> str:
    """A window size in words."""
    if span.blocks is None:
        return f"{span.tokens} tokens"
    blocks = f"{span.blocks} block" + ("s" if span.blocks > 1 else "")
    return blocks if span.tokens is None else f"{blocks} and {span.tokens} tokens"



def windows_text(s: Settings, windows: Windows | None) -> str:
    """The long and short window of a step in words."""
    if windows is None:
        return ""
    return f"  {span_text(windows.long)}" + (f" / {span_text(windows.short)}" if has_short_window(s) else "")


def size(s: Settings) -> str:
    """Parameters, those that one token meets, and FLOPs, in one line."""
    from model import without_values
    model = without_values(s)
    active, (products, attended) = model.num_active(), flops(s, model)
    return (
        f"{model.num_parameters():,} parameters"
        + (f", {active:,} active in a token" if s.model.mlp.moe else "")
        + f"; {(products + attended) / 1e6:,.0f} MFLOP a token in training, {attended / 1e6:,.0f} of them of "
        f"queries, keys and values ({context_text(s)})"
    )


def flops(s: Settings, model: "GPT") -> tuple[float, float]:
    """Training FLOPs per token, mean over the steps: (products with weights, attention's own products)."""
    steps = Counter(schedule.windows(s, i) for i in range(s.schedule.steps))
    attended = sum(n * model.attention_flops_per_token(windows) for windows, n in steps.items())
    return model.flops_per_token(), attended / s.schedule.steps


def context_text(s: Settings) -> str:
    """What attention's FLOPs are counted over."""
    how = (
        "every earlier token of the row seen" if s.model.attn.window is None
        else "windows averaged over the steps"
    )
    how += ", borders of documents not counted" if s.model.attn.document_mask else ""
    return f"rows of {s.data.seq_len:,} tokens, {how}"
