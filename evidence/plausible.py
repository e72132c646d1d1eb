"""What a log suffices to see: numbers that no honest run has, whatever else agrees.

Every bound comes from logs that are committed here, records/*/*/tiny (84 runs) and the published curves
records/*/*/reference.csv, and stands with what was measured there; tests/test_plausible.py measures again
that none of them is refused. What lies within the bounds is not seen: docs/evidence.md lists it.
"""

import datetime
import itertools
import math
import time
from collections.abc import Iterator, Sequence

from common.errors import UserError
from evidence import manifest, model_facts
from evidence.claim_folder import Evidence
from evidence.run_laws import Log
from settings import deltas, renames
from settings.model import padded_vocab

# Step 0 of a zero head is the uniform guess ln(classes): within 5e-8 nats in all 48 committed logs of one.
STEP_0_NATS = 1e-4
# Other heads begin 0.018 to 0.34 nats above ln(vocab_size): a guess that knows nothing of the text is no
# better than the uniform one.
BELOW_UNIFORM_NATS = 0.05
# What the last drop of the validation loss has beyond the faster of the two before it, per step: at most
# 0.0180 nats in the committed logs (record 21t at tiny, whose last interval is short) and 0.0010 in the
# published curves of the short and medium track.
JUMP_NATS = {"full": 0.007, "small": 0.007, "tiny": 0.036, "micro": 0.036}
# Near-copies. The training losses of two runs follow the same batches; what is left of one's step-to-step
# changes after a fit on the other's is noise that only rounding and time can make. Smallest of different
# programs that do not compute the same: 2.0e-3 nats (records 9 and 10 at tiny, which differ in rounding),
# of two seeds of one program 2.2e-2 (three of record 11 at micro). Half of the smaller one is the bound.
COPY_NATS = 1.0e-3
# An honest pair that close lies as far apart in its losses as in its changes; 7.1 times as far was seen.
SHIFTED, ROUNDING_NATS = 10, 1e-5
SETTLED = 5  # first training losses, which weights of a seed may share, left out of the comparison
# A validation loss is a mean in float64: at least 13 decimals in all committed logs.
DECIMALS = 6
TRAIN_DECIMALS = 4  # they are logged with six
# Seeds whose validations lie closer, all of them: spread of seeds at full scale is 1e-3 nats at the end.
SAME_NATS = 1e-5
# Times. Steps of a run take more or less, from one validation to the next by 3 % of the mean or more in the
# committed logs, and so does their ratio to those of another run. Times are logged to a thousandth of a ms.
EVEN, CLOCK_MS = 1e-5, 2e-3
LONGEST = 200  # characters of a title or a name, and names
CLAIMABLE = ("ml", "systems")  # kinds of a record that a claim brings; the others tell of upstream's history
FILLERS = "\u115f\u1160\u3164\uffa0"  # letters that show nothing
LARGEST_LOSS = 1e6  # nats; a NaN is not below it
DAY_S = 86_400.0  # time zones, and dates without an hour
NAMED = ("record", "scale", "ml_hash", "system_hash", "corpus", "corpus_digest", "val_digest", "device",
         "attention", "comm", "torch", "code", "cpu", "platform", "python", "machine")


def check(found: Evidence) -> Iterator[str]:
    """Problems of all logs of a claim by themselves and next to each other."""
    for log in found.logs.values():
        yield from check_named(log)
        if log.settings is not None:
            yield from check_counts(found, log)
            yield from check_stream(log)
            yield from check_first_loss(log)
            yield from check_jump(log)
        yield from check_digits(log)
        yield from check_pace(log)
    yield from check_seeds_differ(found)
    yield from check_shifted(found)
    yield from check_times_differ(found)


# ----- one log ----------------------------------------------------------------------------------------------

def check_named(log: Log) -> Iterator[str]:
    """Nothing that a log names is without a name."""
    for key in NAMED:
        if not is_visible(log.start[key]):
            yield f"{log.where}/run.jsonl: {key} is empty"


def is_visible(text: str) -> bool:
    """Has a text a letter or a digit, of any script, that a reader can see?"""
    return any(c.isalnum() and c not in FILLERS for c in text)


def check_counts(found: Evidence, log: Log) -> Iterator[str]:
    """Parameters, active ones, FLOPs and the probe's parameters are those of the settings' model."""
    artefact = f"{log.where}/run.jsonl"
    unknown = "number and names of parameters: torch is not installed here"
    try:
        counts = model_facts.counts(log.settings)
    except UserError as error:
        yield f"{artefact}: {error}"
        return
    if counts is None:
        found.unknown += [unknown] if unknown not in found.unknown else []
        return
    for key in ("parameters", "active_parameters", "flops_per_token"):  # older logs tell the first one only
        told = log.start.get(key, getattr(counts, key))
        if told != getattr(counts, key):
            yield f"{artefact}: {key} {told!r:.40}, the model of its settings has {getattr(counts, key)}"
    probe = log.one("probe")
    if probe is None:
        return
    named = {model_facts.FORMER.get(n, n) for n in renames.present_parameters(probe["gradients"])}
    if extra := sorted(named - counts.names):
        yield f"{artefact}: probe of {extra[0]!r:.60}, which is no parameter of its settings' model"
    elif lacking := sorted(counts.names - named):
        yield f"{artefact}: probe without the parameter {lacking[0]} of its settings' model"


def check_stream(log: Log) -> Iterator[str]:
    """A finished run read the tokens that its data settings draw from the corpus, where that is at hand."""
    end = log.one("end")
    if not log.whole or end["status"] != "finished":
        return
    try:
        digest = model_facts.stream_digest(log.start["corpus"], log.settings)
    except UserError as error:
        yield f"{log.where}/run.jsonl: stream: these data settings cannot be read here: {error}"
        return
    told = log.one("stream")["digest"]
    if digest is not None and told != digest:
        yield (f"{log.where}/run.jsonl: stream digest {told[:12]}, the settings read {digest[:12]} from the "
               f"corpus {log.start['corpus']!r}: other tokens, or another order")


def check_first_loss(log: Log) -> Iterator[str]:
    """The loss of step 0 is one that untrained weights of these settings can have."""
    first = next((v["val_loss"] for v in log.validations if v["step"] == 0), None)
    if first is None or not math.isfinite(first):
        return
    m, at = log.settings.model, f"{log.where}/run.jsonl: validation of step 0: loss {first:.6f}"
    zero = m.head.untied is not None and m.head.untied.init == "zero" and m.init.head_std is None
    if zero and m.head.untied.tied_until is None:
        uniform = math.log(padded_vocab(log.settings))
        if abs(first - uniform) > STEP_0_NATS:
            yield f"{at}, a head that starts at zero gives ln({padded_vocab(log.settings)}) = {uniform:.6f}"
    elif first < math.log(m.vocab_size) - BELOW_UNIFORM_NATS:
        yield (f"{at}, below the uniform guess ln({m.vocab_size}) = {math.log(m.vocab_size):.6f}: these "
               "are no "
               "untrained weights")


def jump(curve: list[tuple[int, float]]) -> float | None:
    """Nats by which the last drop of [(step, loss)] exceeds what the faster of the two drops before it would
    give over the same steps; None of fewer than four points or of losses that are not finite."""
    if len(curve) < 4 or not all(math.isfinite(loss) for _, loss in curve[-4:]):
        return None
    rates = [(a[1] - b[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(curve[-4:]) if b[0] > a[0]]
    return (rates[-1] - max(rates[:-1])) * (curve[-1][0] - curve[-2][0]) if len(rates) == 3 else None


def check_jump(log: Log) -> Iterator[str]:
    """The last validation, which is the one that counts, goes on where the ones before it led."""
    excess = jump([(v["step"], v["val_loss"]) for v in log.validations])
    limit = JUMP_NATS.get(log.start["scale"], max(JUMP_NATS.values()))
    if log.whole and excess is not None and excess > limit:
        yield (f"{log.where}/run.jsonl: validation of step {log.validations[-1]['step']} jumps: its loss "
               "lies "
               f"{excess:.4f} nats below where the two drops before it lead, honest logs at most {limit:g}")


def check_digits(log: Log) -> Iterator[str]:
    """Validation losses are measured numbers, not rounded ones."""
    for v in log.validations:
        loss = v["val_loss"]
        if math.isfinite(loss) and loss == round(loss, DECIMALS):
            yield (f"{log.where}/run.jsonl: validation of step {v['step']}: loss {loss!r} is rounded, a mean "
                   "of losses has more digits")
            return
    told = [x for v in log.validations for x in v["train_loss"]]
    if len(told) > SETTLED and all(math.isfinite(x) and x == round(x, TRAIN_DECIMALS) for x in told):
        yield f"{log.where}/run.jsonl: its training losses are rounded to {TRAIN_DECIMALS} decimals or fewer"


def check_pace(log: Log) -> Iterator[str]:
    """No run takes the very same time for each step."""
    spent = [(v["step"] - before["step"], v["train_time_ms"] - before["train_time_ms"])
             for before, v in itertools.pairwise(log.validations)]
    if log.whole and even([ms for _, ms in spent], [steps for steps, _ in spent]):
        yield (f"{log.where}/run.jsonl: its steps take the same time from one validation to the next within "
               f"{EVEN:g}: no clock is that even")


def even(times: Sequence[float], others: Sequence[float]) -> bool:
    """Are the ratios of four or more pairs of positive numbers the same within EVEN, beyond the rounding of
    times in ms?"""
    if len(times) < 4 or len(times) != len(others) or min(*times, *others) <= 0:
        return False
    ratios = [a / b for a, b in zip(times, others)]
    return max(ratios) / min(ratios) - 1 < EVEN + CLOCK_MS / min(times)


# ----- logs next to each other ------------------------------------------------------------------------------

def train_losses(log: Log) -> list[float]:
    """All training losses of a log from SETTLED on."""
    return [x for v in log.validations for x in v["train_loss"]][SETTLED:]


def closeness(a: list[float], b: list[float]) -> tuple[float, float] | None:
    """(rms of a - b, rms of what is left of a's changes after a fit on b's) of two curves, in nats.

    None where the curves differ in length, are short, or hold what is no loss (squares of 1e308 overflow). A
    shift, a factor or any slow drift between two curves leaves the second number as it is.
    """
    if len(a) != len(b) or len(a) < 8 or not all(abs(x) < LARGEST_LOSS for x in [*a, *b]):
        return None
    da, db = ([y - x for x, y in itertools.pairwise(c)] for c in (a, b))
    da, db = ([x - math.fsum(d) / len(d) for x in d] for d in (da, db))
    power = math.fsum(x * x for x in db)
    slope = math.fsum(x * y for x, y in zip(da, db)) / power if power else 0.0
    left = math.sqrt(math.fsum((x - slope * y) ** 2 for x, y in zip(da, db)) / len(da))
    return math.sqrt(math.fsum((x - y) ** 2 for x, y in zip(a, b)) / len(a)), left


def check_seeds_differ(found: Evidence) -> Iterator[str]:
    """No seed's curve is another seed's with a little noise, a shift or a factor on it."""
    for name in found.declaration["arms"]:
        runs = [(r.seed, found.logs[r.run]) for r in found.claim.runs
                if r.arm == name and r.run in found.logs]
        curves = [(seed, log, train_losses(log)) for seed, log in runs if log.whole]
        for (seed, log, a), (other, twin, b) in itertools.combinations(curves, 2):
            near = closeness(b, a) if seed != other else None
            if seed != other and same_validations(log, twin):
                yield (f"{twin.where}: seed {other} has the validation losses of seed {seed} in {log.where}: "
                       "a copy")
            # the very same losses are claim_laws.check_copies' business
            if near is not None and near[1] < COPY_NATS and near[0] > 0:
                yield (f"{twin.where}: seed {other} follows the curve of seed {seed} in {log.where} within "
                       f"{near[1]:.1e} nats, two seeds never do: a copy")


def same_validations(log: Log, other: Log) -> bool:
    """Have two runs, whose training losses differ, the same validation losses from the second one on?"""
    a, b = ([v["val_loss"] for v in x.validations[1:]] for x in (log, other))
    return len(a) == len(b) > 2 and train_losses(log) != train_losses(other) and all(
        abs(x - y) < SAME_NATS for x, y in zip(a, b))


def check_shifted(found: Evidence) -> Iterator[str]:
    """No run is one of another arm with its losses shifted: programs that close give losses that close."""
    arms = found.declaration["arms"]
    logs = {name: [(log, train_losses(log)) for log in found.of(name) if log.whole] for name in arms}
    for a, b in itertools.combinations(sorted(arms), 2):
        for (log, mine), (other, theirs) in itertools.product(logs[a], logs[b]):
            near = closeness(mine, theirs)
            if near is not None and near[1] < COPY_NATS and near[0] > max(SHIFTED * near[1], ROUNDING_NATS):
                yield (f"{log.where}: follows the curve of {other.where} within {near[1]:.1e} nats, "
                       f"{near[0]:.1e} "
                       f"apart: a shifted copy of a run of arm {b}")


def check_times_differ(found: Evidence) -> Iterator[str]:
    """No run has the times of another one, multiplied by a number."""
    logs = [log for log in found.logs.values() if log.whole]
    spent = [(log, [ms for _, ms, _ in log.intervals[1:]]) for log in logs]
    for (log, mine), (other, theirs) in itertools.combinations(spent, 2):
        if mine != theirs and even(mine, theirs):  # the very same ones are claim_laws.check_copies' business
            yield (f"{other.where}: its times are those of {log.where} times "
                   f"{sum(theirs) / sum(mine):.4f}: a copy")


# ----- dates and names of a record --------------------------------------------------------------------------

def now() -> float:
    """Seconds since the epoch: of the clock here, or of the newest record of this checkout if it is
    behind."""
    return max(time.time(), *(day(r.date) or 0.0 for r in deltas.load_records().values()))


def day(date: object) -> float | None:
    """Seconds since the epoch of the beginning of a date like 2026-11-30, or None."""
    try:
        if len(str(date)) != 10 or not str(date).isascii():
            return None
        midnight = datetime.datetime.strptime(str(date), "%Y-%m-%d")
    except ValueError:
        return None
    return midnight.replace(tzinfo=datetime.timezone.utc).timestamp()


def check_calendar(found: Evidence, dates: list[tuple[int, str, float, str]]) -> Iterator[str]:
    """Nothing of a claim lies in the future, nor before the parent it builds on.

    dates: [(line, kind, seconds since the epoch, text)] of the manifest.
    """
    late = now() + DAY_S
    for line, kind, at, text in dates:
        if at > late:
            yield f"{manifest.NAME}: line {line} ({kind}) is dated {text}, in the future"
            return
    parent = found.declaration["arms"].get("parent", {}).get("record")
    parent = deltas.load_records().get(parent) if isinstance(parent, str) else None
    if parent is None or found.declaration["claim"] == "comparison":
        return
    since = day(parent.date)
    for line, kind, at, text in dates[:1]:
        if since is not None and at < since - DAY_S:
            yield (f"{manifest.NAME}: line {line} ({kind}) is dated {text}, before the parent {parent.ref} "
                   "of "
                   f"{parent.date}")


def check_record(record: deltas.Record) -> Iterator[str]:
    """A record.toml names its people and itself, and its date lies between its parent's and now."""
    if not is_visible(record.title):
        yield "record.toml: title is empty"
    if len(record.title) > LONGEST or len(record.people) > LONGEST or any(
            len(str(x)) > LONGEST for x in record.people):
        yield f"record.toml: title and people hold at most {LONGEST} characters, and as many names"
    if day(record.date) is None:
        yield f"record.toml: date {record.date!r:.60} is none like 2026-11-30"
    unowned = record.kind == "retiming" and not record.people  # nobody's idea: another release of a library
    if not unowned and not (
        record.people and all(isinstance(x, str) and is_visible(x) for x in record.people)
    ):
        yield "record.toml: people holds an empty name: credit whose idea it is"
    parent, since = deltas.load_records().get(record.parent), day(record.date)
    if since is not None and since > now() + DAY_S:
        yield f"record.toml: date {record.date} lies in the future"
    if parent is not None and since is not None and since < (day(parent.date) or since):
        yield f"record.toml: date {record.date} is before that of its parent {parent.ref}, {parent.date}"


def check_new_record(record: deltas.Record) -> Iterator[str]:
    """A record that a claim brings has no history yet: no published time, no place, no kind of its own."""
    if record.published:
        yield ("record.toml: published is of records that upstream has published: a claim's times are in its "
               "logs")
    if record.kind not in CLAIMABLE:
        yield f"record.toml: kind {record.kind}: a claim is one of {', '.join(CLAIMABLE)}"
    if record.ref.startswith(deltas.ATTEMPT) and record.order != math.inf:
        yield "record.toml: order: an attempt has no place in a lineage, it gets one when it becomes a record"
