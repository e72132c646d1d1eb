"""The laws of one run's log: what a run folder must hold to be evidence. Nothing of the run is executed.

A run folder is run.jsonl (the chain) with log.txt and summary.json, which must follow from it. Each check is
a generator of problems, one line `artefact: reason` each, so that all of them are found and not only the
first. `evidence.claim_laws` checks what holds between runs, and between a run and the manifest that announced
it.
"""

import collections
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import settings
import runlog
import schedule
from common import files, untrusted
from common.errors import UserError
from layers.specs import layer_specs
from evidence import foreign
from settings import Settings, schema
from settings.numerics import NUMERICS_VERSION

NUMBER = (int, float)
TEXTS = {
    "start": [
        "utc", "sources", "record", "preset", "scale", "registered", "ml_hash", "system_hash", "corpus",
        "corpus_digest", "val_digest", "device", "attention", "comm", "torch", "code", "cpu", "platform",
        "python", "machine"
    ],
    "probe": ["tokens"],
    "reset": ["state_before", "state_after"],
    "validation": [],
    "experts": [],
    "stream": ["digest"],
    "checkpoint": [],
    "guard": ["what", "message"],
    "resume": ["utc"],
    "end": ["status"],
}
# of an experts event: a number for each layer with some
LOADS = ("layers", "max_vio", "idle", "dropped", "entropy", "max_bias")
LATER_LOADS = ("max_vio_steps", "max_vio_val")  # both or neither: later logs have them
OTHERS = {
    "start": {
        "settings": dict, "seed": int, "changes": list, "numerics_version": int, "parameters": int,
        "processes": int, "profiled": bool, "cores": (int, type(None))
    },
    "probe": {"step": int, "loss": NUMBER, "gradients": dict},
    "reset": {"warmup_steps": int, "start_ms": NUMBER, "warmup_ms": NUMBER},
    "validation": {
        "step": int, "scheduled_steps": int, "val_loss": NUMBER, "train_loss": list, "train_time_ms": NUMBER,
        "tokens": int, "epoch": int
    },
    "experts": {"step": int, **{name: list for name in LOADS}},
    "stream": {},
    "checkpoint": {"step": int, "copy_ms": NUMBER},
    "guard": {"step": int, "tensors": list},
    "resume": {"step": int, "train_time_ms": NUMBER, "lost_steps": int, "lost_ms": NUMBER, "passed": list},
    "end": {
        "steps": int, "scheduled_steps": int, "val_loss": (*NUMBER, type(None)), "train_time_ms": NUMBER,
        "tokens": int, "epoch": int, "target": (*NUMBER, type(None)), "reached": (bool, type(None)),
        "verdict": list
    },
}
# Fields of later logs: of the named type where they are there. system.load says what they mean.
LATER = {
    "start": {
        "load_start": (*NUMBER, type(None)), "fallbacks": (list, type(None)),
        "environment": (dict, type(None)), "active_parameters": (int, type(None)),
        "flops_per_token": (int, type(None))
    },
    "end": {
        "graphs_in_clock": (int, type(None)),
        "load_end": (*NUMBER, type(None)), "own_cores": (*NUMBER, type(None)),
        "other_cores": (*NUMBER, type(None)), "alone": (bool, type(None))
    },
}
# Fields that some logs have, of these types. All others are refused: nothing reads them.
OPTIONAL = {
    "start": {"log_version": int, "memory": (dict, type(None)), "sinks": list, "launch": str,
              "rescue": str},
    "reset": {"graphs": int, "imports_ms": NUMBER, "compile": dict},
    "experts": {"load": list, "max_vio_steps": list, "max_vio_val": list, "val_load": list},
    "validation": {"readout": list, "raw_val_loss": NUMBER, "grad_norm": list},
    "guard": {"last_steps": list, "since": int, "to": int, "checkpoint": str, "batches": int, "tokens": int},
    "checkpoint": {"file": str, "digest": str, "bytes": int, "write_ms": NUMBER, "error": str},
    "resume": {name: (str, int, type(None)) for name in (
        "checkpoint", "digest", "sources", "system_hash", "processes", "device", "torch", "code", "machine",
        "cpu", "cores", "comm", "attention")},
    "end": {"graphs_in_clock": int, "peak_memory_mib": (int, type(None))},
}
SAVED = ("bytes", "write_ms")  # that a checkpoint tells unless it has an `error`
CHAIN = ("n", "kind", "wall_ms")
ASSISTED = ("skip", "rewind", "spike")  # guards after which a run goes on
LETTERS = {
    "start": "s", "probe": "p", "reset": "r", "validation": "v", "experts": "x", "checkpoint": "k",
    "guard": "g", "stream": "t", "resume": "c", "end": "e"
}
# any log that a kill may leave, resumed or not; a whole one matches WHOLE
LIFE = "p?(r([kg]*vx?)*[kg]*t?)?e?"
BEGUN = re.compile(f"s{LIFE}(c{LIFE})*")
WHOLE = re.compile("sp?r([kg]*vx?)+[kg]*te")
LOSS_LIMIT = 20.0  # nats per token; ln(50304) = 10.8 is a uniform guess
ROUNDING_MS = 1.0
LONGER = 3  # times as long as another validation, start or warm-up of the same work; machines are not idle
# what a step-0 clock, a reset and a validation may differ by on a machine that is not idle
UNTIMED_MS = 1000.0


@dataclass
class Log:
    """A readable run folder. `where` is how messages name it, `settings` None when they are not valid."""
    where: str
    folder: Path
    links: list
    settings: Settings | None = None

    @property
    def events(self) -> list[dict]:
        return [event for event, _ in self.links]

    @property
    def last_hash(self) -> str:
        return self.links[-1][1]

    @property
    def whole(self) -> bool:
        """Did it get to its end, with a stream and a last validation?"""
        return bool(WHOLE.fullmatch(word(self.events)))

    @property
    def validations(self) -> list[dict]:
        return [e for e in self.events if e["kind"] == "validation"]

    @property
    def intervals(self) -> list[tuple[dict, float, float]]:
        """[(validation, ms of training since the one before, ms of wall time next to it)]; the first from the
        reset on."""
        reset = self.one("reset")
        wall, clock, out = (reset["wall_ms"] if reset else 0.0), 0.0, []
        for v in self.validations:
            spent = v["train_time_ms"] - clock
            out.append((v, spent, v["wall_ms"] - wall - spent))
            wall, clock = v["wall_ms"], v["train_time_ms"]
        return out

    def one(self, kind: str) -> dict | None:
        """The only event of a kind, or None."""
        return next((e for e in self.events if e["kind"] == kind), None)

    @property
    def start(self) -> dict:
        return self.events[0]

    @property
    def told_its_loss(self) -> bool:
        """Is there a result, in an `end` or as the validation of the last step? Then nothing may exclude the
        run."""
        end = self.one("end")
        told = end is not None and end["status"] in ("finished", "diverged")
        return told or any(v["step"] == v["scheduled_steps"] for v in self.validations)


def word(events: list[dict]) -> str:
    """The kinds of a log's events, a letter each."""
    return "".join(LETTERS.get(e["kind"], "?") if isinstance(e["kind"], str) else "?" for e in events)


# ----- reading ----------------------------------------------------------------------------------------------

def read_log(folder: Path, where: str) -> tuple[Log | None, list[str]]:
    """(Log, or None if nothing can be made of it; problems). `where` names the folder in messages."""
    artefact = f"{where}/run.jsonl"
    try:
        links = runlog.read_links(folder / "run.jsonl")
    except UserError as error:
        return None, [str(error).replace(str(folder), where)]
    except (RecursionError, ValueError) as error:
        return None, [f"{artefact}: cannot be read ({type(error).__name__})"]
    log = Log(where, folder, links)
    version = log.start.get("log_version")
    if version not in runlog.READABLE:
        return None, [f"{artefact}: log version {version!r}, this program reads versions "
                      f"{' and '.join(map(str, runlog.READABLE))}"]
    found = word(log.events)
    if found.count("s") > 1:
        return None, [
            f"{artefact}: holds {found.count('s')} start events: {found.count('s')} logs in one file"
        ]
    if not BEGUN.fullmatch(found):
        return None, [
            f"{artefact}: its events are out of order: {' '.join(str(e['kind']) for e in log.events)}"
        ]
    problems = [f"{artefact}: {p}" for event in log.events for p in misshapen(event)]
    return (None if problems else log), problems


def is_a(value: Any, types: type | tuple[type, ...]) -> bool:
    """Is a value of one of these types? A truth value is no number."""
    types = types if isinstance(types, tuple) else (types,)
    return isinstance(value, types) and (bool in types or not isinstance(value, bool))


def misshapen(event: dict) -> Iterator[str]:
    """Fields of an event that are missing or of the wrong type."""
    kind = event["kind"]
    shape = {name: str for name in TEXTS[kind]} | OTHERS[kind] | {"wall_ms": NUMBER}
    if kind == "checkpoint" and "error" not in event:
        shape |= {name: OPTIONAL[kind][name] for name in SAVED}
    further = LATER.get(kind, {}) | OPTIONAL.get(kind, {})
    for name, types in {**shape, **{k: further[k] for k in further if k in event}}.items():
        value = event.get(name, ...)
        if value is ...:
            yield f"line {event['n'] + 1} ({kind}) lacks {name}"
        elif not is_a(value, types):
            yield f"line {event['n'] + 1} ({kind}): {name} = {value!r:.60} has the wrong type"
    for name in event.keys() - {*shape, *further, *CHAIN}:
        yield f"line {event['n'] + 1} ({kind}) has a field {name!r:.60} that nothing reads"
    lists = {"start": ("changes", str), "validation": ("train_loss", NUMBER), "end": ("verdict", str)}
    if kind in lists and isinstance(event.get(lists[kind][0]), list):
        if not all(is_a(x, lists[kind][1]) for x in event[lists[kind][0]]):
            yield f"line {event['n'] + 1} ({kind}): {lists[kind][0]} holds something of the wrong type"
    if any(isinstance(x, int) and abs(x) >= 2 ** 63 for _, x in numbers(event, "")):
        yield f"line {event['n'] + 1} ({kind}) holds a number of more than 64 bits"
    sinks = event.get("sinks", [])  # versions before 3 have none
    if kind == "start" and isinstance(sinks, list) and not all(isinstance(x, str) for x in sinks):
        yield f"line {event['n'] + 1} (start): sinks wants a list of names"
    if kind == "reset" and "compile" in event:
        if not runlog.is_account(event["compile"]) or not is_a(event.get("graphs"), int):
            yield (
                f"line {event['n'] + 1} (reset): compile must be numbers, with hits, next to a number of "
                "graphs"
            )
    norms = event.get("grad_norm", [])
    if isinstance(norms, list) and not all(isinstance(x, NUMBER) and not isinstance(x, bool) for x in norms):
        yield f"line {event['n'] + 1} ({kind}): grad_norm wants a list of numbers"
    readout = event.get("readout", [])
    if isinstance(readout, list) and not all(isinstance(x, str) for x in readout):
        yield f"line {event['n'] + 1} ({kind}): readout wants a list of settings"
    if kind == "experts" and all(isinstance(event.get(name), list) for name in LOADS):
        yield from misshapen_loads(event)
    if kind == "probe" and isinstance(event.get("gradients"), dict):
        if not all(isinstance(m, list) and len(m) == 2 and all(is_a(x, NUMBER) for x in m)
                   for m in event["gradients"].values()):
            yield f"line {event['n'] + 1} (probe): gradients must be two numbers for each parameter"


def misshapen_loads(event: dict) -> Iterator[str]:
    """Lists of an experts event that do not hold one number, or one row, for each layer."""
    names = LOADS + (LATER_LOADS if any(name in event for name in LATER_LOADS) else ())
    lists = [event.get(name) for name in names]
    if not all(isinstance(x, list) for x in lists) or not event["layers"] or (
        len({len(x) for x in lists}) > 1 or not all(is_a(x, NUMBER) for values in lists for x in values)
    ):
        yield f"line {event['n'] + 1} (experts): wants one number for each layer in " + ", ".join(names)
    for name in ("load", "val_load"):
        rows = event.get(name, [])
        if not isinstance(rows, list) or not all(
            isinstance(row, list) and all(is_a(x, int) for x in row) for row in rows
        ):
            yield f"line {event['n'] + 1} (experts): {name} wants a list of rows for each layer"


# ----- the checks -------------------------------------------------------------------------------------------

def check_run(log: Log) -> Iterator[str]:
    """All problems of one log by itself; sets log.settings."""
    if resumed := [str(e["step"]) for e in log.events if e["kind"] == "resume"]:
        yield (f"{log.where}/run.jsonl: resumed at step {', '.join(resumed)} after an interruption: a record "
               "is trained in one piece")
    if rewound := [f"{e['step']} to {e['to']}" for e in log.events if e["kind"] == "guard" and "to" in e]:
        yield (f"{log.where}/run.jsonl: assisted (--rescue rewind): went back from step "
               f"{', '.join(rewound)}: no record")
    if resumed or rewound:
        return  # the laws below are those of one piece
    yield from check_settings(log)
    yield from check_untouched(log)
    yield from check_guards(log)
    if log.settings is not None:
        yield from check_reset(log)
        yield from check_steps(log)
        yield from check_experts(log)
    yield from check_numbers(log)
    yield from check_clock(log)
    if log.whole:
        yield from check_end(log)
        yield from check_files(log)
    elif not rendering(log).startswith(text_log(log)):
        # killed between two writes: the text may lag, not differ
        yield f"{log.where}/log.txt: is not what run.jsonl renders to"


def rendering(log: Log) -> str:
    """The text log that the events of a run render to."""
    return "".join(line + "\n" for event in log.events for line in runlog.render(event))


def text_log(log: Log) -> str:
    """The text log that lies next to the events."""
    try:
        return untrusted.text_of(log.folder / "log.txt")
    except UserError:
        return "(no text)"


def check_files(log: Log) -> Iterator[str]:
    """log.txt and summary.json follow from the chain."""
    text, rendered = text_log(log), rendering(log)
    if text != rendered:
        pairs = zip([*text.splitlines(), ""], [*rendered.splitlines(), ""])
        line = next((n for n, (a, b) in enumerate(pairs, 1) if a != b), None)
        yield (
            f"{log.where}/log.txt: line {line or 'count'} is not what run.jsonl renders to: the text was "
            "edited"
        )
    path = log.folder / "summary.json"
    try:
        summary = untrusted.json_file(path)
    except untrusted.Malformed:
        yield f"{log.where}/summary.json: missing or not whole JSON"
        return
    except UserError as error:
        why = str(error).replace(str(log.folder), log.where)
        yield why if path.exists() else f"{log.where}/summary.json: missing or not whole JSON"
        return
    try:
        derived = runlog.summarise(log.events, log.last_hash)
    except (ValueError, OverflowError):  # a time that is not finite
        yield f"{log.where}/summary.json: does not follow from run.jsonl, whose numbers are not finite"
        return
    if not isinstance(summary, dict):
        yield f"{log.where}/summary.json: is not a table"
    elif canonical(summary) != canonical(derived):
        names = [
            k for k in sorted({*derived, *summary}) if canonical(summary.get(k)) != canonical(derived.get(k))
        ]
        yield f"{log.where}/summary.json: {', '.join(names)} not as in run.jsonl: the summary was edited"


def canonical(value: Any) -> str:
    """A value as text, so that values of two runs can be compared."""
    # as text nan equals nan, and the null that a strict file has for it
    return files.json_text(value, sort_keys=True)


def check_settings(log: Log) -> Iterator[str]:
    """Settings are valid in this vocabulary and hash to what was logged."""
    start, artefact = log.start, f"{log.where}/run.jsonl: settings"
    try:
        s, unknown = foreign.projected(start["settings"])
        log.settings = settings.check(s)
    except (UserError, TypeError, AttributeError, ValueError) as error:
        yield f"{artefact} are not valid here ({error}): verify with a checkout of the code that wrote them"
        return
    if start["numerics_version"] != NUMERICS_VERSION:
        yield (f"{log.where}/run.jsonl: numerics version {start['numerics_version']}, here "
               f"{NUMERICS_VERSION}: results changed since")
    if unknown:  # evidence.provenance asks the code that knows them
        return
    if odd := misspelled(log.settings):
        yield f"{artefact}: {odd} is a value of another type than this setting has"
    same = start["numerics_version"] == NUMERICS_VERSION
    if same and start["ml_hash"] != schema.ml_hash(log.settings):
        yield (
            f"{artefact} hash to ml_hash {schema.ml_hash(log.settings)}, logged {start['ml_hash']}: they "
            "were edited"
        )
    if start["system_hash"] != schema.system_hash(log.settings):
        yield (f"{artefact} hash to system_hash {schema.system_hash(log.settings)}, logged "
               f"{start['system_hash']}: they were edited")


def misspelled(s: settings.Settings) -> str:
    """The first path at which settings hold a value that only equals one of their type, like 1.0 or true for
    1, or ''."""
    return next((path for path, value in schema.flat(s).items() if value is not None and
                 json.dumps(value) != json.dumps(schema.typed(schema.find_field(path), value, path))), "")


def check_untouched(log: Log) -> Iterator[str]:
    """Nothing but training was at work while the clock ran: no profiler, and no sink, whose package may send
    on."""
    if log.start["profiled"]:
        yield f"{log.where}/run.jsonl: profiled run: not what is timed"
    if sinks := log.start.get("sinks"):
        yield f"{log.where}/run.jsonl: run with --log-to {', '.join(sinks)}: not what is timed"


def check_guards(log: Log) -> Iterator[str]:
    """A run that a guard stopped did not finish, and one that was assisted is no record."""
    end, found = log.one("end"), [e for e in log.events if e["kind"] == "guard"]
    skipped = [str(e["step"]) for e in found if e["what"] == "skip"]
    if log.start.get("rescue") == "rewind":
        yield f"{log.where}/run.jsonl: assisted (--rescue rewind), though it never went back: no record"
    elif skipped or log.start.get("rescue"):
        yield (f"{log.where}/run.jsonl: assisted (--rescue): updates skipped at steps "
               f"{', '.join(skipped) or 'none'}: no record")
    found = [e for e in found if e["what"] not in ASSISTED]
    if found and end is not None and end["status"] == "finished":
        yield (f"{log.where}/run.jsonl: finished, though a guard stopped it at step {found[0]['step']} "
               f"({found[0]['message']})")


def check_reset(log: Log) -> Iterator[str]:
    """The warm-up is that of the settings, came before the first validation, and left nothing behind."""
    reset, probe, artefact = log.one("reset"), log.one("probe"), f"{log.where}/run.jsonl: reset"
    if reset is None:
        return
    if reset["state_before"] != reset["state_after"]:
        yield (f"{artefact}: the warm-up leaked: state {reset['state_before'][:12]} before it, "
               f"{reset['state_after'][:12]} after the reset")
    system, steps = log.settings.system, warmup_steps(log)
    if reset["warmup_steps"] != steps:
        yield f"{artefact}: {reset['warmup_steps']} warm-up steps, the settings say {steps}"
    if (probe is not None) != (steps > 0):
        yield f"{log.where}/run.jsonl: probe {'missing' if probe is None else 'without warm-up steps'}"
    elif probe is not None and (probe["step"] != steps - 1 or probe["tokens"] != system.warmup_tokens):
        yield (f"{log.where}/run.jsonl: probe of step {probe['step']} on {probe['tokens']} tokens, the "
               f"settings say step {steps - 1} on {system.warmup_tokens} tokens")
    untold = abs(reset["wall_ms"] - reset["start_ms"] - reset["warmup_ms"])
    if untold > UNTIMED_MS or reset["start_ms"] < log.start["wall_ms"]:
        yield (f"{artefact}: work before the clock: {reset['wall_ms'] / 1000:.1f} s since the process began, "
               f"but start ({reset['start_ms'] / 1000:.1f} s) and warm-up ({reset['warmup_ms'] / 1000:.1f} "
               "s) do not account for it")


def check_experts(log: Log) -> Iterator[str]:
    """A mixture tells after each validation but the first how the step before shared out its rows, and
    nothing else does."""
    s, artefact = log.settings, f"{log.where}/run.jsonl: experts"
    moe, steps = s.model.mlp.moe, [e["step"] for e in log.events if e["kind"] == "experts"]
    due = [e["step"] for e in log.validations if e["step"]] if moe else []
    # killed between the two
    if steps != due and not (steps == due[:-1] and log.events[-1]["kind"] == "validation"):
        yield f"{artefact}: told at steps {steps}, due at {due}"
        return
    for event in (e for e in log.events if e["kind"] == "experts"):
        layers = [i for i, spec in enumerate(layer_specs(s)) if spec.moe]
        if event["layers"] != layers:
            yield f"{artefact}: of layers {event['layers']}, the settings have them in {layers}"
        elif "load" in event and [sum(row) + lost for row, lost in zip(event["load"], event["dropped"])] != [
                moe.top_k * tokens_of(s, event["step"] - 1)] * len(layers):
            yield (f"{artefact}: loads and dropped rows are not {moe.top_k} x "
                   f"{tokens_of(s, event['step'] - 1)} rows in each layer: they were edited")
        else:
            yield from check_max_vio(event, moe.top_k * s.validation.tokens, artefact)


def check_max_vio(event: dict, validated: int, artefact: str) -> Iterator[str]:
    """The loads that an experts event lists are those its MaxVio came from, and a validation's are complete.

    validated: rows of a validation, top_k for each token.
    """
    if "val_load" in event and [sum(row) for row in event["val_load"]] != [validated] * len(event["layers"]):
        yield f"{artefact}: val_load does not add up to {validated} rows in each layer: it was edited"
        return
    for loads, name in (("load", "max_vio"), ("val_load", "max_vio_val")):
        for layer, row, told in zip(event["layers"], event.get(loads, []), event.get(name, [])):
            if sum(row) and abs(max(row) * len(row) / sum(row) - 1 - told) > 1e-4:
                yield f"{artefact}: {name} of layer {layer} is not that of its {loads}: one was edited"


def warmup_steps(log: Log) -> int:
    """Number of untimed steps: as set, otherwise three and, on a compiled model, one for each Shape that
    these have not seen."""
    system, cpu = log.settings.system, log.start["device"].startswith("CPU")
    if system.warmup_steps >= 0:
        return system.warmup_steps
    if system.compile == "off" or (system.compile == "auto" and cpu):
        return 3
    shapes = [plan.shape for plan in schedule.plan(log.settings)]
    return 3 + len(set(shapes) - set(shapes[:3]))


def tokens_of(s: settings.Settings, step: int) -> int:
    """Tokens of one step of a run with these settings."""
    return schedule.tokens_before(s, step + 1) - schedule.tokens_before(s, step)


def check_steps(log: Log) -> Iterator[str]:
    """Validations exactly where the settings put them, with the tokens and training losses between them."""
    s, artefact = log.settings, f"{log.where}/run.jsonl: validation"
    steps, seen = s.schedule.steps, [v["step"] for v in log.validations]
    wanted = [i for i in range(steps + 1) if schedule.validates(s, i)]
    complete = log.whole and log.one("end")["status"] == "finished"
    if complete and seen and seen[-1] < steps and seen == wanted[:len(seen)]:
        yield (
            f"{artefact}: stopped at step {seen[-1]} of {steps}: the settings fix the number of steps, no "
            "run does"
        )
    elif seen != (wanted if complete else wanted[:len(seen)]):
        odd = sorted(set(seen) ^ set(wanted)) or seen
        yield (f"{artefact}: not at the steps of the settings (every {s.validation.every} of {steps}), the "
               f"first other one is {odd[0]}")
    before, epoch = 0, 0
    for v in log.validations:
        at = f"{artefact} of step {v['step']}"
        if len(v["train_loss"]) != v["step"] - before:
            yield f"{at}: {len(v['train_loss'])} training losses for {v['step'] - before} steps"
        if v["scheduled_steps"] != steps:
            yield f"{at}: scheduled for {v['scheduled_steps']} steps, the settings say {steps}"
        if v["tokens"] != schedule.tokens_before(s, v["step"]):
            each = (
                f" of {tokens_of(s, 0)}" if len(schedule.stages(s)) == 1
                else f": {schedule.tokens_before(s, v['step'])}"
            )
            yield f"{at}: {v['tokens']} tokens, not {v['step']} steps{each}"
        if v["epoch"] < epoch:
            yield f"{at}: epoch goes back from {epoch} to {v['epoch']}"
        if log.start["scale"] == "full" and v["epoch"]:
            yield f"{at}: epoch {v['epoch']}: at full scale no token is read twice"
        yield from check_readout(v, s, at)
        before, epoch = v["step"], max(epoch, v["epoch"])


def check_readout(event: dict, s: settings.Settings, at: str) -> Iterator[str]:
    """A loss of averaged or extrapolated weights names them, and no other loss does."""
    wanted = schedule.readouts(s, event["step"])
    names, told = [one.setting for one in wanted], event.get("readout", [])
    if told != names and not (names == ["optim.tail"] and not told):  # not told before there were others
        yield (f"{at}: says it reads the weights of {', '.join(told) or 'training'}, and the settings make "
               f"it read those of {', '.join(names) or 'training'}")
    if ("raw_val_loss" in event) != any(one.undone for one in wanted):
        yield (f"{at}: raw_val_loss stands where training goes on without the weights that were read, and "
               "nowhere else")


def check_numbers(log: Log) -> Iterator[str]:
    """Finite everywhere, and losses that a language model can have; only losses of a diverged run may be
    otherwise."""
    end = log.one("end")
    diverged = end is not None and end["status"] == "diverged"
    skips = log.start.get("rescue") == "skip"
    for event in log.events:
        at = f"{log.where}/run.jsonl: {event['kind']}" + (
            f" of step {event['step']}" if "step" in event else ""
        )
        for path, value in numbers(event, ""):
            loss = path.partition("[")[0] in ("val_loss", "raw_val_loss", "train_loss", "loss")
            if diverged and (loss or path.startswith(("gradients", "grad_norm"))):
                continue
            if skips and path.startswith("grad_norm"):  # a skipped update has none
                continue
            if not math.isfinite(value):
                yield (
                    f"{at}: {path} is {value}, in a run that "
                    f"{'diverged' if diverged else 'says it did not diverge'}"
                )
            elif loss and not 0 < value < LOSS_LIMIT:
                yield f"{at}: {path} = {value:g} is no loss (nats per token, 0 to {LOSS_LIMIT:g})"


def numbers(value: Any, path: str) -> Iterator[tuple[str, float]]:
    """(path, number) of every number inside a value."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from numbers(inner, f"{path}[{i}]")
    elif isinstance(value, NUMBER) and not isinstance(value, bool):
        yield path, value


def check_clock(log: Log) -> Iterator[str]:
    """Times run forward, fit into the wall time, and leave no work between them unexplained.

    Between two validations the wall time is the timed training plus one validation; so is that from the reset
    to the first one. All validations of a run do nearly the same work (windows grow), so the untimed rests
    must agree: one that is much longer than the shortest hides work (tolerance: three times that plus a
    second; machines are not idle). The shortest, because what is taken off every interval alike would be the
    usual rest; no training precedes step 0 that could be hidden in its rest. `evidence.claim_laws` holds the
    rests of the arms against each other.
    """
    artefact, walls = f"{log.where}/run.jsonl", [e["wall_ms"] for e in log.events]
    if any(b < a for a, b in zip([0.0, *walls], walls)):
        yield f"{artefact}: wall time goes back"
        return
    plain, clock, usual = True, 0.0, min((rest for _, _, rest in log.intervals), default=0.0)
    for v, spent, rest in log.intervals:
        at, wrong, passed = f"{artefact}: validation of step {v['step']}", "", spent + rest
        if v["train_time_ms"] < 0:
            wrong = f"negative training time {v['train_time_ms']:.3f} ms"
        elif spent < 0:
            wrong = f"training time goes back from {clock:.0f} to {v['train_time_ms']:.0f} ms"
        elif spent > passed + ROUNDING_MS:
            wrong = f"{spent:.0f} ms of training in {passed:.0f} ms of wall time"
        elif v["step"] == 0 and v["train_time_ms"] > UNTIMED_MS:
            wrong = f"{v['train_time_ms']:.0f} ms on the clock before the first step"
        if wrong:
            yield f"{at}: {wrong}"
        plain, clock = plain and not wrong, v["train_time_ms"]
    for v, _, rest in log.intervals if plain else ():  # after one broken time all others look broken
        passes = 2 if "raw_val_loss" in v else 1  # over the validation tokens
        if rest > passes * LONGER * usual + UNTIMED_MS:
            what = "work before the clock" if v["step"] == 0 else "time taken off the clock"
            yield (f"{artefact}: validation of step {v['step']}: {what}: {rest / 1000:.1f} s that are not "
                   f"training, where the shortest validation takes {usual / 1000:.1f} s")


def check_end(log: Log) -> Iterator[str]:
    """The last event repeats the last validation and judges it as the target says."""
    end, last, artefact = log.one("end"), log.validations[-1], f"{log.where}/run.jsonl: end"
    if end["status"] not in ("finished", "diverged"):
        yield f"{artefact}: status {end['status']!r} in a log with a stream digest"
        return
    if end["status"] == "diverged":
        return
    same = {"val_loss": last["val_loss"], "train_time_ms": last["train_time_ms"], "steps": last["step"],
            "scheduled_steps": last["scheduled_steps"], "tokens": last["tokens"], "epoch": last["epoch"]}
    for name, value in same.items():
        if end[name] != value and not (isinstance(value, float) and math.isnan(value)):
            yield f"{artefact}: {name} {end[name]}, its last validation says {value}"
    target = log.settings.validation.target if log.settings is not None else end["target"]
    if end["target"] != target:
        yield f"{artefact}: target {end['target']}, the settings say {target}"
    reached = None if target is None else last["val_loss"] <= target
    if end["reached"] != reached:
        yield (
            f"{artefact}: reached is {end['reached']}, loss {last['val_loss']:.4f} against target {target} "
            f"is {reached}"
        )
    if f"{last['val_loss']:.4f}" not in " ".join(end["verdict"]):
        yield f"{artefact}: its verdict tells another loss than {last['val_loss']:.4f}"
    for line in end["verdict"]:
        told = re.search("REACHED|MISSED", line)
        due = None if target is None else f"target {target:g} {'REACHED' if reached else 'MISSED'}: "
        if told and (due is None or not line.startswith(due)):
            yield f"{artefact}: its verdict says {line!r:.60}, and target {target} is reached: {reached}"


# ----- used between logs ------------------------------------------------------------------------------------

def alike(labelled: list[tuple[str, Any]], what: str) -> Iterator[str]:
    """Problems of those of [(label, value)] that differ from the most frequent value."""
    keys = [json.dumps(value, sort_keys=True) for _, value in labelled]
    if len(set(keys)) < 2:
        return
    usual = collections.Counter(keys).most_common(1)[0][0]
    for (label, value), key in zip(labelled, keys):
        if key != usual:
            yield (
                f"{label}: {what} {str(value):.70} differs from that of the other runs "
                f"({str(json.loads(usual)):.70})"
            )
