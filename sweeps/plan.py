"""What a sweep runs: its arms (the control and every change to it), resolved and checked before anything
starts.

A plan is a plain dict, written once as plan.json. An arm is {label, record, changes, role, ml_hash, report,
...} with role `control`, `arm`, `group` (all features of a section off at once) or `member` (of a group). The
first arm is the control.
"""

import argparse
import itertools
from pathlib import Path

from common import errors, repository
from common.errors import UserError
from settings import Settings, deltas, schema
from settings.declare import BEFORE, REFUSE, lookup
from settings.numerics import NUMERICS_VERSION

# the parts of the settings that a loss can depend on
AXES = ("model", "optim", "schedule", "data", "numerics")
SCREEN_FROM = 4  # features a group from which screening is worth its runs


def flags_of(plan: dict, arm: dict) -> list[tuple[str, str]]:
    """The arm's changes as (flag, value) pairs, those of the whole sweep first."""
    return [tuple(change.split(" ", 1)) for change in [*plan["common"], *arm["changes"]]]


def resolve(plan: dict, arm: dict) -> deltas.Resolved:
    """deltas.Resolved of an arm."""
    values = {flag: [] for flag in ("--set", "--with", "--without", "--revert")}
    for flag, value in flags_of(plan, arm):
        values[flag].append(value)
    return deltas.resolve_name(
        arm["record"], scale=plan["scale"], sets=values["--set"], with_=values["--with"],
        without=values["--without"], revert=values["--revert"]
    )


def make_arm(plan: dict, label: str, record: str, changes: list[str], role: str = "arm", **more) -> dict:
    """An arm, resolved: UserError if its changes are wrong. changes: flags like "--without model.norm"."""
    out = {"label": label, "record": record, "changes": changes, "role": role, **more}
    resolved = resolve(plan, out)
    out |= {"report": list(resolved.report), "ml_hash": schema.ml_hash(resolved.settings)}
    plan["settings"][out["ml_hash"]] = resolved.settings
    return out


def compared_with(plan: dict, arm: dict) -> dict:
    """The arm that an arm is measured against: the control, or in a chain its parent."""
    return next((a for a in plan["arms"] if a["label"] == arm.get("parent")), plan["arms"][0])


def is_inert(plan: dict, arm: dict) -> bool:
    """True if an arm computes what its control computes."""
    return arm["ml_hash"] == compared_with(plan, arm)["ml_hash"]


def pairs_of(plan: dict) -> list[tuple[dict, dict]]:
    """[(arm, what it is compared with)] of the arms that differ from it; arms of equal settings are compared
    once."""
    seen, out = set(), []
    for arm in plan["arms"][1:]:
        if not is_inert(plan, arm) and arm["ml_hash"] not in seen:
            out.append((arm, compared_with(plan, arm)))
            seen.add(arm["ml_hash"])
    return out


def has_one_control(plan: dict) -> bool:
    """Whether every comparison is with the control: then more runs of it serve all, if arms are compared by
    their means."""
    return plan["kind"] != "chain" or all(other is plan["arms"][0] for _, other in pairs_of(plan))


# ----- ablate -----------------------------------------------------------------------------------------------

def features(plan: dict, wanted: list[str]) -> list[str]:
    """Paths of the features to switch off, in the order of the vocabulary: what the chain's records set, and
    all switches.

    What is off already is no feature of this record, nor is a switch that the scale sets. wanted: features,
    or sections that stand for all features below them; [] for all.
    """
    resolved = resolve(plan, plan["arms"][0])
    record = resolved.record
    by_records = {path for link in deltas.chain(record) for path in link.delta}
    every = [
        f.path for f in schema.fields().values() if (f.path in by_records or f.is_feature)
        and f.path.split(".")[0] in AXES and not is_off(resolved.settings, f)
        and not set_by_scale(plan["scale"], f)
    ]
    out = []
    for path in wanted:
        field = schema.find_field(path)
        inside = [p for p in every if p.startswith(path + ".")]
        section = field.is_section and not field.optional
        if section and not inside:
            raise UserError(f"--features {path}: {record.ref} has no feature below it")
        out += inside if section else [path]
    return [path for path in schema.fields() if path in out] if wanted else every


def is_off(s: Settings, field: schema.Field) -> bool:
    """Whether a setting has the value that `--without` gives where that is a fixed one, or lies below
    something off."""
    value, off = lookup(s, field.path), field.metadata["off"]
    return value is None or (off not in (BEFORE, REFUSE) and value == off)


def set_by_scale(scale: str, field: schema.Field) -> bool:
    """Whether a scale turns a switch on or off, which overrules `--without`."""
    return scale != "full" and field.type is bool and bool(field.metadata["shrink"])


def ablation(plan: dict, options: argparse.Namespace) -> None:
    """The control, the groups if screening pays, and every feature; what cannot be switched off goes to
    `skipped`."""
    plan["arms"] = [make_arm(plan, plan["base"], plan["base"], [], "control")]
    control, members = plan["arms"][0]["ml_hash"], []
    for path in features(plan, options.features):
        try:
            members.append(
                make_arm(plan, f"--without {path}", plan["base"], [f"--without {path}"], feature=path)
            )
        except UserError as error:
            if path in options.features:
                raise
            plan["skipped"].append(
                {"feature": path, "reason": str(error).removeprefix(f"--without {path}: ")}
            )
    if not members:
        raise UserError(f"{plan['base']}: none of these features can be switched off: "
                        + "; ".join(f"{s['feature']}: {s['reason']}" for s in plan["skipped"]))
    groups = grouped([m["feature"] for m in members if m["ml_hash"] != control])
    pays = sum(map(len, groups.values())) >= SCREEN_FROM * max(1, len(groups))
    if options.screen or (pays and options.screen is None):
        for name, paths in groups.items():
            add_group(plan, name, paths, members)
    plan["screening"] = why_screening(plan, options.screen, groups)
    plan["arms"] += members


def grouped(paths: list[str]) -> dict[str, list[str]]:
    """{section: paths} of the features' sections; one that would hold a single feature joins the section
    above."""
    groups = {}
    for path in paths:
        groups.setdefault(path.rpartition(".")[0], []).append(path)
    for name in sorted(groups, key=lambda n: -n.count(".")):
        if len(groups[name]) == 1 and "." in name:
            groups.setdefault(name.rpartition(".")[0], []).extend(groups.pop(name))
    return {name: paths for name, paths in sorted(groups.items()) if len(paths) > 1}


def add_group(plan: dict, name: str, paths: list[str], members: list[dict]) -> None:
    """An arm with all of a group's features off at once; if these contradict each other the members go
    without one."""
    off = [p for p in paths if not any(q in paths for q in schema.prefixes(p))]  # what lies below goes along
    try:
        plan["arms"].append(make_arm(plan, f"--without {name} ({len(paths)} features)", plan["base"],
                                     [f"--without {p}" for p in off], "group", group=name))
    except UserError:
        return
    plan["groups"].append(name)
    for member in members:
        if member["feature"] in paths:
            member |= {"role": "member", "group": name}


def why_screening(plan: dict, asked: bool | None, groups: dict[str, list[str]]) -> str:
    """Why groups are, or are not, screened before their members."""
    total = sum(map(len, groups.values()))
    if plan["groups"]:
        return (
            f"{len(plan['groups'])} groups first; the members of a group without a visible effect are not "
            "run apart"
        )
    if asked is False:
        return "none, as asked"
    if not groups:
        return "none: no section has two of these features"
    return (f"none: to switch off whole sections first pays from {SCREEN_FROM} features a section, and here "
            f"{total} features are in {len(groups)} (--screen does it all the same)")


# ----- axis -------------------------------------------------------------------------------------------------

def axis(plan: dict, options: argparse.Namespace) -> None:
    """The control and every combination of the axes' values."""
    axes = {}
    for text in options.axes:
        path, _ = schema.parse_assignment(text, "axis")
        field = schema.find_field(path)
        if path in axes:
            raise UserError(f"axis {path} is given twice: write all its values in one, {path}=a,b,c")
        axes[path] = [schema.parse_assignment(f"{path}={v}", "axis")[1] for v in split(text)]
        for value in axes[path]:
            schema.typed(field, value, "axis")
    plan["arms"] = [make_arm(plan, plan["base"], plan["base"], [], "control")]
    for values in itertools.product(*axes.values()):
        sets = [f"{path}={schema.show(value)}" for path, value in zip(axes, values)]
        plan["arms"].append(make_arm(plan, " ".join(sets), plan["base"], [f"--set {x}" for x in sets]))
    labels = [a["label"] for a in plan["arms"]]
    if len(set(labels)) < len(labels):
        raise UserError(f"axis: {next(x for x in labels if labels.count(x) > 1)} is given twice")


def split(text: str) -> list[str]:
    """Values of `path=a,b,...`: what lies between commas outside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for c in text.partition("=")[2]:
        quote = "" if c == quote else (c if c in "\"'" and not quote else quote)
        depth += 0 if quote else (c in "[{") - (c in "]}")
        if c == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += c
    if not all(p.strip() for p in parts):
        raise UserError(f"axis {text}: there is an empty value between its commas")
    return [p.strip() for p in parts]


# ----- chain ------------------------------------------------------------------------------------------------

def chain(plan: dict, options: argparse.Namespace) -> None:
    """Every record from the first to the last, or of a whole lineage, each compared with its parent."""
    first, dots, last = options.base.partition("..")
    if dots and last:
        plan["base"], links = between(first, last)
    elif options.base in deltas.LINEAGES:
        plan["base"], links = options.base, whole_lineage(options.base)
    else:
        here = [x for x in deltas.LINEAGES if any(ref.startswith(x + "/") for ref in deltas.load_records())]
        raise UserError(f"chain {options.base}: expected FIRST..LAST, like short/1..short/11, or a lineage: "
                        f"{' or '.join(here)}{errors.near(options.base, here)}")
    for record, parent in links:
        more = {"parent": parent} if parent else {}
        plan["arms"].append(
            make_arm(plan, record.ref, record.ref, [], "arm" if plan["arms"] else "control", **more)
        )


def between(first: str, last: str) -> tuple[str, list[tuple[deltas.Record, str | None]]]:
    """("FIRST..LAST", [(record, ref of its parent, None for the first)]) of the records from one to a
    descendant."""
    name, first, last = f"{first}..{last}", deltas.find_record(first), deltas.find_record(last)
    links = deltas.chain(last)
    if first not in links or first is last:
        raise UserError(f"chain {name}: {first.ref} is not an ancestor of {last.ref}")
    links = links[links.index(first):]
    return f"{first.ref}..{last.ref}", [
        (record, None if record is first else record.parent) for record in links
    ]


def whole_lineage(lineage: str) -> list[tuple[deltas.Record, str | None]]:
    """[(record, ref of what it is compared with)]: the control (None), then a lineage's records that have a
    parent.

    The first record's parent is the control. Another parent outside the lineage runs before its first child,
    compared with its nearest ancestor among those before it (None: the control), because every arm of a sweep
    is compared with one.
    """
    records = deltas.load_records()
    members = [
        r for r in records.values() if r.ref.startswith(lineage + "/") and r.parent and not r.claimed
    ]
    if not members:
        raise UserError(f"chain {lineage}: no record of this lineage has a parent to be compared with")
    out = {members[0].parent: None}
    for record in members:
        if record.parent not in out and records[record.parent] not in members:
            out[record.parent] = next(
                (r.ref for r in deltas.chain(records[record.parent])[::-1] if r.ref in out), None
            )
        out[record.ref] = record.parent
    return [(records[ref], parent) for ref, parent in out.items()]


def within_seeds(options: argparse.Namespace) -> bool:
    """Whether effects are differences within seeds: the default, unless more runs of the control are asked
    for, which only a comparison of means can use. Decided here, before the first run."""
    if options.paired is None:
        return options.controls in (None, options.seeds)
    return options.paired


# ----- the plan ---------------------------------------------------------------------------------------------

def make_plan(options: argparse.Namespace) -> dict:
    """The whole sweep from the command line, everything resolved and checked; UserError if anything is
    wrong."""
    if options.seeds < 1 or (options.controls is not None and options.controls < options.seeds):
        raise UserError(
            f"--seeds {options.seeds}"
            + ("" if options.controls is None else f" --controls {options.controls}")
            + ": at least one seed, and at least as many controls"
        )
    common = [
        f"--{kind} {x}" for kind in ("revert", "with", "without", "set")
        for x in getattr(options, f"all_{kind}")
    ]
    preset = options.base in deltas.preset_names()
    scale = options.scale or (deltas.load_preset(options.base)[0]["scale"] if preset else "micro")
    base = options.base if preset or options.kind == "chain" else deltas.find_record(options.base).ref
    plan = {
        "version": 1, "kind": options.kind, "name": "", "base": base, "scale": scale, "common": common,
        "seeds": options.seeds, "controls": options.seeds, "paired": within_seeds(options),
        "confidence": options.confidence,
        "method": "within seeds" if within_seeds(options) else "means",
        "groups": [], "screening": "", "skipped": [], "arms": [],
        "settings": {}, "data": str(Path(options.data).resolve()) if options.data else None,
        "numerics_version": NUMERICS_VERSION, "code": repository.code_version()
    }
    fill = {"ablate": ablation, "axis": axis, "chain": chain}.get(options.kind) or options.fill
    fill(plan, options)
    plan["name"] = f"{plan['kind']}_{plan['base'].replace('/', '-').replace('..', '_to_')}_{scale}"
    compared = len(pairs_of(plan))
    if not compared:
        raise UserError(
            f"{plan['base']}: at scale {scale} every arm computes the same as what it is compared with; "
            "there is nothing to run"
        )
    # sqrt(arms) times as many is best for comparisons with one control
    if has_one_control(plan) and not plan["paired"]:
        plan["controls"] = options.controls or round(options.seeds * compared ** 0.5)
    elif options.controls not in (None, options.seeds):
        raise UserError(
            "--controls: within seeds (--paired), and in a chain of several parents, all arms have the same "
            "number of runs; leave it out"
        )
    settings = plan.pop("settings")
    try:
        plan["digests"] = digests(plan, settings)
    except UserError as error:  # a dry run says what is missing
        if not getattr(options, "plan", False):
            raise
        plan["digests"], plan["lacking"] = {}, str(error)
    return plan


def digests(plan: dict, settings: dict[str, Settings]) -> dict[str, dict[str, str]]:
    """{ml_hash: corpus_digest and val_digest} that the runs must have; UserError if the data cannot serve
    them.

    settings: {ml_hash: Settings}. The number of shards read, and so the corpus digest, may differ between
    arms.
    """
    from data import fineweb
    from data.corpus import corpus_for
    from data.shards import corpus_digest, val_digest
    from data.stream import require_shards, stream_arguments
    corpus = corpus_for(plan["scale"], plan["data"], max(settings.values(), key=fineweb.shards_needed))
    out, known = {}, {}
    for ml_hash, s in settings.items():
        used = require_shards(corpus, steps=s.schedule.steps, **stream_arguments(s))
        key = (used, s.validation.tokens)
        if key not in known:
            known[key] = {"corpus_digest": corpus_digest(corpus, used),
                          "val_digest": val_digest(corpus, s.validation.tokens)}
        out[ml_hash] = known[key]
    return out
