"""Time off the clock: bounded, charged and told.

The clock stands while the loss is validated. What lies next to the training then (the rests) is charged: the
excess of the new arm's rests over those of the parent's run of the same seed is added to its training time,
and training plus rests must be shorter too. So the settings of the validation cannot hide work in it. The
track's own settings of the validation are no business of a record (`check_track`).
"""

import statistics as middle
from collections.abc import Iterator

from evidence import run_laws
from evidence.claim_folder import Evidence

# A validation evaluates its tokens forwards only; training on as many takes two to three times as long.
# Medians of the 37 committed runs: 0.08 to 0.39 of the training of as many tokens.
VALIDATION_AS_TRAINING = 1.0
# Start and warm-up of a run, the most that any reason may explain. Upstream's longest, coordinate descent
# tuning, took 25 minutes.
BEFORE_MS = 2 * 3_600_000.0
TRACK = ("target", "tokens", "seq_len")  # settings of the validation that belong to the track


# ----- laws of the logs -------------------------------------------------------------------------------------

def check(found: Evidence) -> Iterator[str]:
    """Problems of the untimed parts of a claim's runs, by absolute bounds."""
    for log in found.logs.values():
        reset, last = log.one("reset"), log.validations[-1:]
        if reset is not None and reset["start_ms"] + reset["warmup_ms"] > BEFORE_MS:
            spent = (reset["start_ms"] + reset["warmup_ms"]) / 1000
            yield (f"{log.where}: work before the clock: start and warm-up take {spent:.0f} s, more than the "
                   f"{BEFORE_MS / 1000:.0f} s that any reason may explain")
        if log.settings is None or not last or last[0]["tokens"] <= 0 or last[0]["train_time_ms"] <= 0:
            continue
        per_token = last[0]["train_time_ms"] / last[0]["tokens"]
        limit = VALIDATION_AS_TRAINING * per_token * log.settings.validation.tokens + run_laws.UNTIMED_MS
        usual = middle.median(rest for _, _, rest in log.intervals)
        if usual > limit:
            yield (f"{log.where}: time taken off the clock: {usual / 1000:.1f} s at each validation, "
                   "training on "
                   f"as many tokens takes {limit / 1000:.1f} s")


def check_track(d: dict) -> Iterator[str]:
    """Problems of a declaration whose arms are not validated alike.

    Target, validation tokens and context belong to the track. A record that changes them is compared at its
    parent's, which all arms then have as a change of theirs (`shared_changes`).
    """
    arms = {n: a["settings"]["validation"] for n, a in d["arms"].items()
            if isinstance(a.get("settings"), dict) and isinstance(a["settings"].get("validation"), dict)}
    parent = arms.get("parent")
    if parent is None:
        return
    for name, own in arms.items():
        for key in TRACK:
            if own.get(key) != parent.get(key):
                yield (f"manifest.jsonl: arm {name} has validation.{key} {own.get(key)!r:.30}, arm parent "
                       f"{parent.get(key)!r:.30}: it belongs to the track, and all arms are measured at "
                       "the parent's")
    if parent.get("target") != d["target"]:
        yield f"manifest.jsonl: target {d['target']}, the settings of arm parent say {parent.get('target')}"


def shared_changes(settings: dict, parent: dict) -> list[str]:
    """The assignments PATH=VALUE that give settings the parent's target, validation tokens and context.

    Both are nested plain settings. Empty for a record that leaves them alone.
    """
    return [f"validation.{key}={'off' if parent['validation'][key] is None else parent['validation'][key]}"
            for key in TRACK if settings["validation"][key] != parent["validation"][key]]


def is_shared_change(change: str, parent: dict) -> bool:
    """Does a change like `--set validation.seq_len=1024` only give what the parent has by itself?"""
    path, _, value = change.removeprefix("--set ").partition("=")
    section, _, key = path.strip().partition(".")
    own = parent["validation"].get(key) if section == "validation" and key in TRACK else ...
    shown = "off" if own is None else str(own)
    return change.startswith("--set ") and own is not ... and value.strip() == shown


# ----- what is charged --------------------------------------------------------------------------------------

def rests_of(events: list[dict]) -> float:
    """Milliseconds of wall time of a run's events that lie next to the training, from the reset on."""
    return sum(rest for _, _, rest in run_laws.Log("", None, [(e, "") for e in events]).intervals)


def charge(rows: dict[str, list[dict]], rests: dict[str, list[float]], paired: bool) -> dict:
    """{excess_s, charged, with_rests}: mean excess of the new arm's rests, and two ratios of times to the
    parent's (statistics.ratio), or None where a time is not positive.

    rows: arm -> counted runs, sorted by seed. rests: arm -> milliseconds of each of them. Paired runs are
    charged against the run of their seed, others against the parent's mean.
    """
    from evidence import statistics
    times = {name: [r["train_time_ms"] for r in rows[name]] for name in ("new", "parent")}
    usual = rests["parent"] if paired else [middle.fmean(rests["parent"])] * len(rests["new"])
    excess = [max(0.0, mine - theirs) for mine, theirs in zip(rests["new"], usual)]
    both = {name: [t + max(0.0, r) for t, r in zip(times[name], rests[name])] for name in times}
    out = {"excess_s": middle.fmean(excess) / 1000,
           "rests_s": {name: middle.fmean(rests[name]) / 1000 for name in times}}
    if min(*times["new"], *times["parent"]) <= 0:
        return out | {"charged": None, "with_rests": None}
    charged = [t + x for t, x in zip(times["new"], excess)]
    return out | {"charged": statistics.ratio(charged, times["parent"], paired),
                  "with_rests": statistics.ratio(both["new"], both["parent"], paired)}


def told(row: dict) -> str:
    """The line of a verdict on what was off the clock."""
    rests = row["rests_s"]
    return (f"off the clock: {rests['new']:.1f} s next to the training of a run (parent "
            f"{rests['parent']:.1f} s), of "
            f"which {row['excess_s']:.1f} s are charged; a validation may take no longer than training on "
            "as many "
            f"tokens, start and warm-up {BEFORE_MS / 1000:.0f} s")
