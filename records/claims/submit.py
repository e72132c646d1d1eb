"""`python -m records submit NAME`: claim a record: declare, run, verify, write it up.

    python -m records submit twice_the_lr --delta my.toml --title "Twice the learning rate" --people @me \
        --claim ml --scale full --runs 8 --nproc 8 --commit
    python -m records submit twice_the_lr --record short/12 --claim ml --scale micro --set validation.target=5.2 --looks 4,8
    python -m records submit twice_the_lr --resume                      # after a kill; does nothing twice
    python -m records submit twice_the_lr --resume --format upstream    # besides, the layout of KellerJordan/modded-nanogpt

A new record is a folder records/<lineage>/<id>_<NAME>/ with its record.toml, which has to be committed before the runs,
because they are made from a checkout of HEAD. Manifest, logs, results.json and README.md come to lie beside it, or in --out.
Arms: new, parent and, for a systems record on a systems record, base: the last ml record. Exit codes are those of verify.
"""

import datetime
import json
import lzma
import re
import shlex
import sys
import tomllib
from pathlib import Path

import deltas
import environment
from records.claims import arms, compare, manifest, verify, writeup
from records.claims.provenance import differing, last_ml
from settings import SCALES, UserError

ALPHA = 0.01  # of a record


def arguments(p):
    p.add_argument("name", help="name of the record: small letters, digits and _ (its folder becomes <id>_<name>)")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--record", metavar="R", help="a record that has its folder already, like short/12")
    what.add_argument("--delta", metavar="FILE", help="a new record: TOML lines \"path\" = value, as in a [delta]")
    p.add_argument("--people", action="append", default=[], metavar="@X",
                   help="with --delta: whose idea it is (may be repeated)")
    p.add_argument("--title", help="with --delta: what it does, in one line")
    p.add_argument("--notes", default="", help="with --delta: anything a reader must know")
    p.add_argument("--parent", metavar="[REF:]R", help="record it builds on and is timed against (default: the head of "
                   "short, or what record.toml says); REF: git ref to run it from")
    p.add_argument("--claim", choices=("ml", "systems"),
                   help="ml: reaches the target faster; systems: computes the same faster")
    p.add_argument("--scale", choices=list(SCALES), help="size of the runs")
    p.add_argument("--runs", type=int, metavar="N", help="runs of each arm, all of which count")
    p.add_argument("--looks", metavar="N,M",
                   help="instead of --runs: test after N, M, ... runs of each arm; they share alpha")
    p.add_argument("--set", dest="sets", action="append", default=[], metavar="PATH=VALUE",
                   help="for all arms, below scale full: e.g. validation.target=5.2, as those scales have no target")
    p.add_argument("--seed0", type=int, default=0, metavar="K", help="first seed (default 0)")
    p.add_argument("--order-seed", type=int, metavar="K", help="seed of the order of execution (default: drawn)")
    p.add_argument("--nproc", type=int, choices=(1, 2, 4, 8), metavar="P", help="start runs by torch.distributed.run")
    p.add_argument("--long-start", metavar="WHY", help="why start or warm-up of the record take more than three times the "
                   "parent's and a minute; the claim tells it")
    p.add_argument("--data", metavar="DIR", help="folder of shards, as for train_gpt.py")
    p.add_argument("--out", metavar="DIR", help="claim folder (default: the folder of the record)")
    p.add_argument("--commit", action="store_true", help="with --delta: git commit the new record.toml, nothing else")
    p.add_argument("--format", choices=("upstream",), help="write the layout of modded-nanogpt too, into DIR/upstream")
    p.add_argument("--resume", nargs="?", const=True, metavar="DIR",
                   help="go on with the plan in DIR (default: the record's folder)")
    p.add_argument("--fault", metavar="CAUSE=NOTE", help="with --resume: why the last run, without a loss, does not count")


def run(options):
    """The command. Returns the exit code of verify, or 130."""
    if options.fault and not options.resume:
        raise UserError("--fault explains a run of a plan that is under way: it goes with --resume")
    if options.resume:
        folder = resumed(options)
    else:
        check_options(options)
        environment.check_training()
        record = existing(options) if options.record else new_record(options)
        if record is None:
            return 0
        folder = declare(options, record)
    try:
        carry_out(folder, options.data, options.fault)
    except KeyboardInterrupt:
        print(f"interrupted: nothing that was finished is lost; go on with `records submit {options.name} --resume "
              f"{folder}`", file=sys.stderr)
        return compare.INTERRUPTED
    pack_sources(folder / "runs")
    results = verify.verify(folder, page=False)
    verify.store(folder, results, page=True)
    if options.format == "upstream" and results["verdict"] != "refused":
        print(f"upstream's layout: {writeup.upstream(folder)}")
    verify.report(results, f"results: {folder / 'results.json'}")
    return {"shown": verify.SHOWN, "not shown": verify.NOT_SHOWN, "refused": verify.REFUSED}[results["verdict"]]


def check_options(options):
    if not re.fullmatch("[a-z][a-z0-9_]*", options.name):
        raise UserError(f"name {options.name!r}: small letters, digits and _ only, like twice_the_lr")
    if not options.record and not options.delta:
        raise UserError("name the record with --record short/12, or give a new one with --delta FILE")
    for flag in ("claim", "scale"):
        if getattr(options, flag) is None:
            raise UserError(f"--{flag} is missing: choose one (`records submit --help`)")
    if bool(options.runs) == bool(options.looks):
        raise UserError("say before the first run how many there will be: --runs N, or --looks N,M,... (one of the two)")
    if options.runs is not None and options.runs < 2:
        raise UserError(f"--runs {options.runs}: at least 2, one run has no spread")
    if options.sets and options.scale == "full":
        raise UserError(f"--set {options.sets[0]}: at scale full a record runs as it is; put it into the delta")
    if options.seed0 < 0:
        raise UserError(f"--seed0 {options.seed0}: must not be negative")


def resumed(options):
    """The folder of a plan that was declared: --resume DIR, --out, or the folder of the record of this name."""
    if isinstance(options.resume, str):
        return Path(options.resume)
    if options.out:
        return Path(options.out)
    found = [r for r in deltas.load_records().values() if r.slug == options.name]
    if not found:
        raise UserError(f"no record is named {options.name}{deltas.near(options.name, slugs())}; a plan made with --out DIR "
                        "goes on with --resume DIR")
    return found[-1].folder


def slugs():
    return [r.slug for r in deltas.load_records().values()]


# ----- the record -----------------------------------------------------------------------------------------------------

def existing(options):
    """The Record of --record; its own record.toml says who, what and on what."""
    record = deltas.find_record(options.record)
    if options.title or options.people or options.notes:
        raise UserError(f"--title, --people and --notes go with --delta: {record.folder.name}/record.toml has its own")
    if record.slug != options.name:
        raise UserError(f"{record.ref} is named {record.slug}, not {options.name}")
    if not record.people:
        raise UserError(f"{record.folder.name}/record.toml names no people: credit whose idea it is")
    if record.parent is None:
        raise UserError(f"{record.ref} has no parent to be faster than")
    return record


def new_record(options):
    """Write records/<lineage>/<id>_<name>/record.toml from --delta. The Record; None if it has to be committed first."""
    if not options.title or "\n" in options.title:
        raise UserError("a new record needs --title \"what it does, in one line\"")
    if not options.people or not all(x.strip() for x in options.people):
        raise UserError("a new record needs --people @name: credit whose idea it is, the paper's authors included")
    parent = deltas.find_record((options.parent or "short/head").rpartition(":")[2])
    delta, subsumed = read_delta(Path(options.delta))
    lineage = parent.ref.partition("/")[0]
    taken = {r.slug: r for r in deltas.load_records().values() if r.ref.startswith(lineage + "/")}
    record = taken.get(options.name)
    if record is not None and (record.delta, record.parent) != (delta, parent.ref):
        raise UserError(f"the name {options.name} is taken by {record.ref} ({record.title}): choose another, or claim that "
                        f"one with --record {record.ref}")
    if record is None:
        check_delta(parent, delta, subsumed, options)
        record = write_record(options, parent, lineage, delta, subsumed)
    return record if committed(record, options.commit) else None


def read_delta(path):
    """(delta, subsumed) of a file of delta lines, bare or below [delta]; UserError for anything that is none."""
    try:
        toml = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: {error}") from None
    subsumed = toml.pop("subsumed", "")
    delta = toml.pop("delta", None)
    if delta is not None and toml:
        raise UserError(f"{path}: {', '.join(toml)} beside [delta]: title, people and parent are options of this command")
    delta = toml if delta is None else delta
    for key in delta:
        if "." not in key:
            raise UserError(f"{path}: {key}: write the whole path in quotes, like \"optim.muon.lr\" = 0.05")
    return delta, subsumed


def check_delta(parent, delta, subsumed, options):
    """Every line changes its parent; an empty delta is code, and says why in `subsumed`."""
    s = deltas.resolve(parent.ref).settings
    for path, value in delta.items():
        changed = deltas.assign(s, path, value, options.delta)
        if deltas.lookup(changed, path) == deltas.lookup(s, path):
            raise UserError(f"{options.delta}: {path} = {deltas.show(value)} changes nothing: {parent.ref} has it already")
        s = changed
    if not delta and not (subsumed and options.claim == "systems"):
        raise UserError(f"{options.delta}: a delta that changes nothing: a record that is only new code is a systems claim "
                        "and says subsumed = \"what the code does now\"")


def write_record(options, parent, lineage, delta, subsumed):
    numbers = [int(m.group()) for r in deltas.load_records().values() if r.ref.startswith(lineage + "/")
               and (m := re.match(r"\d+", r.ref.partition("/")[2]))]
    number = max(numbers, default=0) + 1
    folder = deltas.RECORDS / lineage / f"{number:03d}_{options.name}"
    quoted = json.dumps  # a JSON string is a TOML string
    head = {"id": quoted(str(number)), "title": quoted(options.title), "parent": quoted(parent.ref),
            "date": datetime.date.today().isoformat(), "people": quoted(options.people), "kind": quoted(options.claim),
            "source": quoted("log")}
    head |= {k: quoted(v) for k, v in (("notes", options.notes), ("subsumed", subsumed)) if v}
    lines = [f"{k} = {v}" for k, v in head.items()] + ["", "[delta]"]
    lines += [f"{quoted(path)} = {deltas.show(value)}" for path, value in delta.items()]
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from None
    compare.write(folder / "record.toml", "\n".join(lines) + "\n")
    deltas.load_records.cache_clear()
    try:
        record = deltas.find_record(f"{lineage}/{number}")
        deltas.resolve(record.ref, scale=options.scale, sets=options.sets)
    except UserError:  # a value that contradicts others: the record never was
        (folder / "record.toml").unlink()
        folder.rmdir()
        deltas.load_records.cache_clear()
        raise
    print(f"{record.ref}: {folder / 'record.toml'}")
    return record


def committed(record, commit):
    """Is the record's record.toml in HEAD? With --commit it is put there, alone."""
    path = str(record.folder / "record.toml")
    if not arms.is_checkout():
        raise UserError("this is no git checkout: a record needs a commit that others can fetch; clone the repository")
    if not arms.line("status", "--porcelain", "--untracked-files=all", "--", path):
        return True
    if commit:
        arms.git("add", "--", path)
        arms.git("commit", "--quiet", "--message", f"{record.ref}: {record.title}", "--", path)
        return True
    print("Its runs are made from a commit, which others can fetch: commit it and give the same command again (or add "
          f"--commit):\n  git add {path} && git commit -m {json.dumps(f'{record.ref}: {record.title}')} -- {path}")
    return False


# ----- the plan -------------------------------------------------------------------------------------------------------

def declare(options, record):
    """Write the plan into the claim folder. Returns the folder."""
    folder = Path(options.out) if options.out else record.folder
    parent = options.parent or record.parent
    ref, colon, _ = parent.rpartition(":")
    if deltas.find_record(parent[len(ref + colon):]).ref != record.parent:
        raise UserError(f"--parent {parent}: the parent of {record.ref} is {record.parent}")
    texts = {"new": record.ref, "parent": parent}
    last = last_ml(deltas.find_record(record.parent))
    if options.claim == "systems" and last is not None and last.ref != record.parent:
        texts["base"] = ref + colon + last.ref
    changes = "".join(f" --set {shlex.quote(x)}" for x in options.sets)
    found = {name: arms.prepare(texts[name] + changes, options.scale)[0] for name in sorted(texts)}
    check_arms(options, record, found)
    code = arms.code_diff(found["parent"], found["new"])
    plan = {"runs": options.runs} if options.runs else {"looks": looks_of(options.looks)}
    compare.declare(folder, compare.declaration_of(
        found, plan, claim=options.claim, record=record.ref, target=found["new"]["settings"]["validation"]["target"],
        alpha=ALPHA, pairing="seed", seed0=options.seed0, order_seed=options.order_seed, processes=options.nproc,
        data=options.data, diff=code, long_start=options.long_start), diff=code)
    if folder.resolve() != record.folder.resolve():
        compare.write(folder / "record.toml", (record.folder / "record.toml").read_bytes())
    return folder


def check_arms(options, record, found):
    """The claim says something: the arms differ, in what the claim is about."""
    new, parent = found["new"], found["parent"]
    if arms.same(new, parent):
        raise UserError(f"at scale {options.scale} {record.ref} and {record.parent} are the same program with the same "
                        "settings: the delta changes nothing here")
    paths = differing(new["settings"], parent["settings"])
    if options.claim == "systems" and new["ml_hash"] != parent["ml_hash"]:
        ml = [p for p in paths if not p.startswith("system.")]
        raise UserError(f"{record.ref} changes what is computed ({', '.join(ml)}): that is --claim ml")
    if "validation.tokens" in paths or "validation.target" in paths:
        raise UserError(f"{record.ref} changes how it is measured (validation.tokens or target): it cannot be held against "
                        f"{record.parent}")
    if options.claim == "ml" and new["settings"]["validation"]["target"] is None:
        raise UserError(f"scale {options.scale} has no target: an ml claim needs one, --set validation.target=LOSS for all "
                        "arms")


def looks_of(text):
    """[{runs, alpha}] of --looks 4,8: the shares add up to alpha."""
    from records.statistics import spend
    try:
        counts = [int(x) for x in text.split(",")]
    except ValueError:
        raise UserError(f"--looks {text}: expected numbers of runs, like 4,8") from None
    return [{"runs": n, "alpha": a} for n, a in zip(counts, spend(counts, ALPHA))]


# ----- running it -----------------------------------------------------------------------------------------------------

def carry_out(folder, data, fault):
    """Make the declared runs from where the plan stands; with looks, stop at the first that decides."""
    book = manifest.resume(folder)  # mends a line that a kill has cut
    claim = book.claim
    book.close()
    if claim.declaration["claim"] == "comparison":
        raise UserError(f"{folder} holds a comparison: go on with `records compare --resume {folder}`")
    looks = claim.declaration["plan"].get("looks")
    if looks is None:
        compare.run_plan(folder, data=data, fault=fault)
        return
    for number, look in enumerate(looks):
        if number < len(claim.looks):
            continue
        if claim.looks and claim.looks[-1]["decision"] != "continue":
            return
        claim = compare.run_plan(folder, until=look["runs"], data=data, fault=fault)
        fault = None
        decision = decide(claim, look, last=number == len(looks) - 1)
        book = manifest.resume(folder)
        try:
            book.append("look", runs=look["runs"], decision=decision)
        finally:
            book.close()
        print(f"look at {look['runs']} runs of each arm, alpha {look['alpha']:.4g}: {decision}")
        claim = book.claim


def decide(claim, look, last):
    """passed, failed or continue: the test that verify will take again."""
    if not verify.judge(claim, look["alpha"], look["runs"])["reasons"]:
        return "passed"
    lost = any(r.status != "finished" for arm in claim.declaration["arms"] for r in claim.counted(arm))
    return "failed" if last or lost else "continue"  # a run without a loss fails every later look, too


def pack_sources(runs):
    """sources-<hash>.txt -> .txt.xz, as the repository keeps them."""
    for path in sorted(runs.glob("sources-*.txt")):
        compare.write(path.with_name(path.name + ".xz"), lzma.compress(path.read_bytes()))
        path.unlink()
