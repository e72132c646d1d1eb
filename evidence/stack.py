"""Increments: a claim against other open attempts instead of the parent record alone.

    python -m records submit my_idea --against attempts/other,attempts/third ...

The parent of the claim is then its parent record with the deltas of these attempts, and so is its own base:
both arms run with the stack's settings as changes of theirs. What is shown is the increment on this stack;
nothing becomes a record by it before the stack has.
"""

import dataclasses
from collections.abc import Iterator

from common.errors import UserError
from evidence import off_clock
from evidence.claim_folder import Evidence
from settings import deltas, schema

ENTRY = {"attempt": str, "parent": str, "delta": dict}


def entries(names: list[str], record: deltas.Record) -> list[dict]:
    """What a plan declares of its stack: [{attempt, parent, delta}]. UserError if these cannot be stacked."""
    found = []
    for name in names:
        attempt = deltas.find_attempt(name.removeprefix(deltas.ATTEMPT).rstrip("/"))
        if not attempt.ref.startswith(deltas.ATTEMPT):
            raise UserError(f"--against {name}: it has become {attempt.ref}: build on that record instead")
        if attempt.ref == record.ref:
            raise UserError(f"--against {name}: an attempt is no increment on itself")
        plain = {path: schema.plain(value) if dataclasses.is_dataclass(value) else value
                 for path, value in attempt.delta.items()}
        found.append({"attempt": attempt.ref, "parent": attempt.parent, "delta": plain})
    if problem := next(problems(found, record), None):
        raise UserError(f"--against: {problem}")
    return found


def problems(stack: list, record: deltas.Record) -> Iterator[str]:
    """Why a declared stack is none under a record (a deltas.Record, whose own delta lies on top)."""
    taken = dict.fromkeys(record.delta, record.ref)
    seen = set()
    for entry in stack:
        if not isinstance(entry, dict) or set(entry) != set(ENTRY) or not all(
                isinstance(entry[k], t) for k, t in ENTRY.items()):
            yield f"{entry!r:.60} is no {{attempt, parent, delta}}"
            return
        if entry["attempt"] in seen:
            yield f"{entry['attempt']} stands twice in the stack"
        seen.add(entry["attempt"])
        if entry["parent"] != record.parent:
            yield (f"{entry['attempt']} builds on {entry['parent']}, {record.ref} on {record.parent}: a "
                   "stack has one "
                   "parent")
        for path in entry["delta"]:
            if path in ("validation", *(f"validation.{key}" for key in off_clock.TRACK)):
                yield f"{entry['attempt']} sets {path}, which belongs to the track"
            clash = next((p for p in taken if (p + ".").startswith(path + ".") or
                          (path + ".").startswith(p + ".")), None)
            if clash is not None:
                yield f"{entry['attempt']} and {taken[clash]} both set {path}: their order would decide"
            taken[path] = entry["attempt"]


def changes(stack: list[dict], parent: str, scale: str) -> list[str]:
    """The assignments PATH=VALUE by which the stack differs from its parent record at a scale."""
    merged = {path: value for entry in stack for path, value in entry["delta"].items()}
    base = deltas.load_records()[parent]
    whole = dataclasses.replace(base, ref=deltas.ATTEMPT + "stack", parent=parent, delta=merged, attempt="")
    one, other = (deltas.resolve(x, scale=scale).settings for x in (base, whole))
    return [f"{path}={schema.show(new)}" for path, _, new in schema.difference(one, other)]


def check(found: Evidence, record: deltas.Record | None) -> Iterator[str]:
    """Problems of a claim's stack: it is what it says, and all arms run on it and on nothing else of their
    own.

    record: the deltas.Record that is claimed, or None if it is unknown here.
    """
    d = found.declaration
    stack = d.get("against")
    if stack is None:
        return
    if not isinstance(stack, list) or not stack or record is None:
        yield "manifest.jsonl: against: no list of attempts under a known record"
        return
    wrong = list(problems(stack, record))
    yield from (f"manifest.jsonl: against: {text}" for text in wrong)
    if wrong:
        return
    for entry in stack:
        try:
            known = deltas.find_attempt(entry["attempt"].removeprefix(deltas.ATTEMPT))
        except UserError:
            found.unknown.append(f"whether {entry['attempt']} is an open attempt with the delta that is "
                                 "declared: "
                                 "it is not in this checkout")
            continue
        if known.delta != deltas.present_delta(entry["delta"]):
            yield f"manifest.jsonl: against: {entry['attempt']} has another delta in this checkout"
    due = [f"--set {x}" for x in changes(stack, record.parent, d["scale"])]
    for name, arm in d["arms"].items():
        if lacking := [x for x in due if x not in arm.get("changes", [])]:
            yield f"manifest.jsonl: against: arm {name} runs without {lacking[0]} of the stack"


def allowed(found: Evidence, change: object) -> bool:
    """May an arm have this change at full scale: a line of its stack, or the parent's own validation?"""
    d = found.declaration
    parent = d["arms"].get("parent", {})
    record = deltas.load_records().get(parent.get("record"))
    if record is None or not isinstance(change, str):
        return False
    own = schema.plain(deltas.resolve(record.ref, scale=d["scale"]).settings)
    if off_clock.is_shared_change(change, own):
        return True
    stack = d.get("against")
    below = dataclasses.replace(record, parent=record.ref, delta={})
    if not isinstance(stack, list) or list(problems(stack, below)):
        return False
    return change.removeprefix("--set ") in changes(stack, record.ref, d["scale"])
