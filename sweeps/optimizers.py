"""`sweep.py optimizers`: update rules compared at equal budget, each with its own best learning rate.

Two sweeps in two queues. `tune` trains every rule with each learning rate of a declared grid
(sweeps/optimizers.toml) on seed 0; the comparison trains every rule with its best one on seeds of its own
(1, 2, ...), so that no rule is judged on the seed that chose for it.
"""

import tomllib
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import runlog
from common.errors import UserError
from settings import Settings, deltas, schema
from settings.declare import lookup
from sweeps import queue
from sweeps.plan import make_arm, resolve

RULES = Path(__file__).parent / "optimizers.toml"
VALIDATIONS = 20  # of a run of the comparison
FIRST_SEED = 1  # of the comparison; seed 0 chose the learning rates


class Rule(NamedTuple):
    """One row of the table of rules. rate: path of the learning rate that is tuned."""
    name: str
    record: str
    rate: str


def read_rules(path: str | Path | None) -> tuple[list[float], list[Rule]]:
    """(factors, rules, the baseline first) of a table like sweeps/optimizers.toml. UserError otherwise."""
    path = Path(path or RULES)
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
        rules = [Rule(**rule) for rule in found["rules"]]
        factors = [float(x) for x in found["factors"]]
        baseline = next(rule for rule in rules if rule.name == found["baseline"])
    except OSError as error:
        raise UserError(f"--rules {path}: {error.strerror or error}; name a table like "
                        "sweeps/optimizers.toml") from None
    except (tomllib.TOMLDecodeError, KeyError, TypeError, ValueError, StopIteration) as error:
        raise UserError(
            f"{path}: not a table of rules ({type(error).__name__}: {error}): give factors, baseline (a "
            "rule's name) and rules of name, record and rate, like sweeps/optimizers.toml"
        ) from None
    if len({rule.name for rule in rules}) < len(rules) or not factors or min(factors) <= 0:
        raise UserError(f"{path}: names of rules must differ, and factors be positive, at least one of them")
    return factors, [baseline, *(rule for rule in rules if rule is not baseline)]


def own_rate(plan: dict, rule: Rule) -> float:
    """The learning rate that the rule's record has at the plan's scale. UserError if it has none."""
    schema.find_field(rule.rate)
    rate = lookup(resolved(plan, {"record": deltas.find_record(rule.record).ref, "changes": []}), rule.rate)
    if not isinstance(rate, float):
        raise UserError(f"rule {rule.name}: {rule.record} has no learning rate at {rule.rate}")
    return rate


def change(plan: dict, rule: Rule, factor: float) -> list[str]:
    """The flags that multiply the rule's learning rate; none for 1."""
    return [] if factor == 1 else [f"--set {rule.rate}={own_rate(plan, rule) * factor:.6g}"]


def tuning(plan: dict, options: Namespace) -> None:
    """Fill in the arms of the tuning: every rule with every learning rate. The control is the baseline's."""
    factors, rules = read_rules(options.rules)
    for rule in rules:
        for factor in factors:
            plan["arms"].append(make_arm(
                plan, f"{rule.name} x{factor:g}", deltas.find_record(rule.record).ref,
                change(plan, rule, factor), "arm" if plan["arms"] else "control", rule=rule.name,
                factor=factor
            ))


def comparison(plan: dict, options: Namespace) -> None:
    """Fill in the arms of the comparison: every rule with the factor in options.chosen.

    Every run validates often enough to tell the step at which it reaches a loss.
    """
    _, rules = read_rules(options.rules)
    plan["first_seed"] = FIRST_SEED
    steps = resolved(plan, {"record": deltas.find_record(rules[0].record).ref, "changes": []}).schedule.steps
    plan["common"] = [*plan["common"], f"--set validation.every={max(1, steps // VALIDATIONS)}"]
    for rule in rules:
        factor, note = options.chosen[rule.name]
        plan["arms"].append(make_arm(
            plan, rule.name, deltas.find_record(rule.record).ref, change(plan, rule, factor),
            "arm" if plan["arms"] else "control", rule=rule.name, factor=factor, note=note
        ))


def chosen(plan: dict, done: dict) -> dict[str, tuple[float, str]]:
    """{rule: (best factor, what must be said of it)} of a tuning that has run.

    UserError for a rule of which no run finished.
    """
    best: dict[str, tuple[float, float]] = {}
    grid: dict[str, list[float]] = {}
    for arm in plan["arms"]:
        grid.setdefault(arm["rule"], []).append(arm["factor"])
        run = done.get(queue.name_of(arm, 0))
        if run is not None and run["status"] == "finished":
            best[arm["rule"]] = min(best.get(arm["rule"], (float("inf"), 0.0)),
                                    (run["val_loss"], arm["factor"]))
    if lacking := [rule for rule in grid if rule not in best]:
        raise UserError(f"tuning: no run of {', '.join(lacking)} finished; give other factors with --rules")
    edges = {rule: (min(factors), max(factors)) for rule, factors in grid.items()}
    return {rule: (factor, "best at the edge of the grid" if factor in edges[rule] else "")
            for rule, (_, factor) in best.items()}


# ----- what the comparison tells ----------------------------------------------------------------------------

def rows(root: str | Path, plan: dict, done: dict) -> list[dict[str, Any]]:
    """One row per rule: its learning rate, the steps to the baseline's loss, its time and its memory.

    `steps`: for every seed that got there, the step at which its validation loss reaches the mean final loss
    of the baseline, between two validations on a line.
    """
    baseline = [run["val_loss"] for run in finished(plan, plan["arms"][0], done)]
    target = sum(baseline) / len(baseline) if baseline else None
    found = []
    for arm in plan["arms"]:
        runs = finished(plan, arm, done)
        logs = [runlog.read_chain(Path(root) / "runs" / run["folder"] / "run.jsonl") for run in runs]
        curves = [list(curve(events)) for events in logs]
        steps = [] if target is None else [runlog.crossing(points, target) for points in curves]
        found.append({
            "rule": arm["rule"], "record": arm["record"], "factor": arm["factor"], "note": arm["note"],
            "runs": len(runs), "target": target, "steps": sorted(step for step in steps if step is not None),
            "scheduled_steps": curves[0][-1][0] if curves else None,
            "ms_per_step": median([run["train_time_ms"] / c[-1][0] for run, c in zip(runs, curves)]),
            "state_bytes": state_bytes(resolved(plan, arm))
        })
    return found


def finished(plan: dict, arm: dict, done: dict) -> list[dict[str, Any]]:
    """The results of an arm's runs that finished, by seed."""
    names = [queue.name_of(arm, seed) for seed in queue.seeds_of(plan, arm)]
    return [done[name] for name in names if name in done and done[name]["status"] == "finished"]


def resolved(plan: dict, arm: dict) -> Settings:
    """The settings of an arm."""
    return resolve(plan, arm).settings


def curve(events: list[dict]) -> Iterator[tuple[int, float]]:
    """(step, validation loss) of a run's log."""
    for event in runlog.standing(events):
        if event["kind"] == "validation":
            yield event["step"], event["val_loss"]


def median(values: list[float]) -> float | None:
    """The median; None of nothing."""
    values = sorted(values)
    return values[len(values) // 2] if values else None


def state_bytes(s: Settings) -> int:
    """Bytes of the optimizer's state for the whole model."""
    from model import GPT
    from optim import Optimizer
    return Optimizer(GPT(s), s).state_bytes()


HEAD = ("rule", "record", "learning rate", "loss", "against the baseline", "steps to its loss", "ms a step",
        "optimizer state", "note")


def cells(row: dict[str, Any], mean: float | None, effect: str) -> list[str]:
    """One row of the table of rules. mean, effect: of its final loss, as the sweep's report has them."""
    steps, n, last = row["steps"], row["runs"], row["scheduled_steps"]
    if not steps:
        when = f"not within {last}" if n else "-"
    else:
        when = f"{median(steps):.0f}" + (f" ({steps[0]:.0f} to {steps[-1]:.0f})" if len(steps) > 1 else "")
        when += f", {len(steps)} of {n}" if len(steps) < n else ""
    return [row["rule"], row["record"], f"x{row['factor']:g}", "-" if mean is None else f"{mean:.4f}", effect,
            when, "-" if row["ms_per_step"] is None else f"{row['ms_per_step']:.1f}",
            f"{row['state_bytes'] / 2 ** 20:.1f} MiB", row["note"]]


def table(found: dict[str, Any], effect_text: Callable[[dict], str]) -> list[list[str]]:
    """The table of rules of a report, the lowest mean loss first. effect_text: row of the report -> text."""
    control = found["control"]
    about = {control["arm"]: (control["mean"], "baseline")}
    about |= {row["arm"]: (row["mean"], effect_text(row)) for row in found["rows"]}
    order = sorted(found["rules"], key=lambda row: (about[row["rule"]][0] is None, about[row["rule"]][0]))
    return [cells(row, *about[row["rule"]]) for row in order]
