"""What a sweep will need: shards and disk, memory of a GPU, seconds of a run. Each says where it is from.

Seconds of a run, the first that is known: the median of such runs on this machine; a trial of TRIAL_STEPS
steps here; the published time of the record on 8 x H100, by token and GPU. The last one is an estimate and is
called so.
"""

import subprocess
import sys
import tempfile

import runlog
import schedule
from common import files
from common.errors import UserError
from settings import Settings, deltas
from sweeps import queue, worker
from sweeps.plan import flags_of, resolve

TRIAL_STEPS = 10
TRIAL_TIMEOUT_S = 900  # a first compilation on a GPU takes minutes
PUBLISHED_GPUS = 8  # of every published time


def lines_before(plan: dict) -> list[str]:
    """Lines on data and memory that a sweep at this scale needs."""
    s = resolve(plan, plan["arms"][0]).settings
    lines = [f"data: {plan['lacking']}"] if plan.get("lacking") else []
    if plan["scale"] in ("small", "full"):
        lines += [data_line(plan, s), *memory_lines(s)]
    return lines


def data_line(plan: dict, s: Settings) -> str:
    """One line on the shards of FineWeb that a sweep reads, with their size."""
    from data import fineweb
    settings = [resolve(plan, arm).settings for arm in plan["arms"]]
    need = max(fineweb.shards_needed(x) for x in settings)
    return (f"disk: {need} train shard{'s' if need > 1 else ''} of FineWeb and the validation shard, "
            f"{(need + 1) * fineweb.SHARD_BYTES / 1e9:.1f} GB (python -m data.fineweb {need})")


def memory_lines(s: Settings) -> list[str]:
    """What system/memory.py counts for one GPU, and what would be chosen to fit common cards."""
    from system.dry_run import held
    first, *cards = held(s)
    return [f"{first} (counted, not measured)", *cards]


# ----- seconds ----------------------------------------------------------------------------------------------

def seconds_per_run(plan: dict, folders: list) -> tuple[float, int] | None:
    """(median wall seconds of a run of this size on this machine, number of runs), or None. folders:
    where runs lie."""
    here, s = runlog.machine()["machine"], resolve(plan, plan["arms"][0]).settings
    tokens, seconds = schedule.tokens_before(s, s.schedule.steps), {}
    for path in [p for folder in folders for p in files.listed(folder, f"*_{plan['scale']}_*_s*")[-50:]]:
        try:
            run = queue.read_run(path)
        except UserError:
            continue
        of_this_size = abs(run["tokens"] - tokens) < 0.1 * tokens
        if run["machine"] == here and run["status"] == "finished" and of_this_size:
            seconds[run["last_hash"]] = run["wall_ms"] / 1000
    return (sorted(seconds.values())[len(seconds) // 2], len(seconds)) if seconds else None


def expected(plan: dict, folders: list, try_out: bool, slot: dict) -> tuple[float | None, str]:
    """(seconds of a run or None, where from). try_out: may a trial be run, with the environment of `slot`?"""
    timed = seconds_per_run(plan, folders)
    if timed is not None:
        return timed[0], f"median of {timed[1]} run{'s' if timed[1] > 1 else ''} on this machine"
    if not try_out:
        return None, "none of this size was timed on this machine yet"
    if plan["scale"] in ("small", "full") and (plan.get("lacking") or not slot.get("CUDA_VISIBLE_DEVICES")):
        on_cpu = resolve(plan, plan["arms"][0]).settings.system.device == "cpu"
        return (None, "nobody has timed this scale on a CPU") if on_cpu else published(plan)
    try:
        return trial(plan, slot), f"extrapolated from a trial of {TRIAL_STEPS} steps on this machine just now"
    except UserError as error:
        return None, f"a trial of {TRIAL_STEPS} steps failed: {error}"


def trial(plan: dict, slot: dict) -> float:
    """Wall seconds of a run of the control, from a run of its first TRIAL_STEPS steps;
    UserError if that fails."""
    control = plan["arms"][0]
    s = resolve(plan, control).settings
    steps = min(TRIAL_STEPS, s.schedule.steps)
    changes = [
        x for flag, value in flags_of(plan, control) if value.partition("=")[0].strip() != "schedule.steps"
        for x in (flag, value)
    ]
    preset = control["record"] in deltas.preset_names()
    name = deltas.load_preset(control["record"])[0] if preset else {"name": control["record"], "sets": []}
    fixed = [
        x for text in name["sets"] if text.partition("=")[0].strip() != "schedule.steps"
        for x in ("--set", text)
    ]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, worker.trainer(), name["name"], "--scale", plan["scale"], *fixed, *changes,
            "--set", f"schedule.steps={steps}", "--out", folder,
            *(["--data", plan["data"]] if plan["data"] else [])
        ]
        try:
            done = subprocess.run(command, cwd=runlog.ROOT, env=worker.run_environment(slot),
                                  stdin=subprocess.DEVNULL, capture_output=True, text=True,
                                  timeout=TRIAL_TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UserError(f"{type(error).__name__} after {TRIAL_TIMEOUT_S} s") from None
        logs = files.listed(folder, "*/run.jsonl")
        if not logs or done.returncode not in worker.COMPLETE:
            said = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
            raise UserError(said.removeprefix("error: "))
        return extrapolated(runlog.read_chain(logs[-1]), s)


def extrapolated(events: list[dict], s: Settings) -> float:
    """Wall seconds of a whole run of settings s, from the log of a short one.

    Start and end count once, validations each, training by its tokens: steps may differ in them.
    """
    validations = [e for e in events if e["kind"] == "validation"]
    reset, last = next(e for e in events if e["kind"] == "reset"), validations[-1]
    token_ms = (last["train_time_ms"] - validations[0]["train_time_ms"]) / (
        last["tokens"] - validations[0]["tokens"]
    )
    validation_ms = validations[0]["wall_ms"] - reset["wall_ms"]  # the first one follows the reset at once
    count = sum(schedule.validates(s, i) for i in range(s.schedule.steps + 1))
    ends_ms = reset["wall_ms"] + events[-1]["wall_ms"] - last["wall_ms"]
    training_ms = schedule.tokens_before(s, s.schedule.steps) * token_ms
    return (ends_ms + training_ms + count * validation_ms) / 1000


def published(plan: dict) -> tuple[float | None, str]:
    """(seconds of a run on one GPU or None, where from): estimated from published minutes.

    They are those of the record, or of its nearest ancestor that has some.
    """
    resolved = resolve(plan, plan["arms"][0])
    record = next((r for r in deltas.chain(resolved.record)[::-1] if r.published.get("minutes")), None)
    if record is None:
        return None, "nothing was published about this record or the ones before it"
    full, s, minutes = deltas.resolve(record.ref).settings, resolved.settings, record.published["minutes"]
    whole, mine = (schedule.tokens_before(x, x.schedule.steps) for x in (full, s))
    rate = whole / (60 * minutes) / PUBLISHED_GPUS
    return mine / rate, (
        f"an ESTIMATE for one H100, not measured: {record.ref}'s published {minutes} min on {PUBLISHED_GPUS} "
        "x H100, by token and GPU, without start, compilation and validations; other cards differ, and no "
        "GPU has run this program yet")
