"""`python -m records submit NAME`: try an idea as a claim: declare, run, verify, write it up.

    python -m records submit six_layers --delta my.toml --title "Six layers" --people @me --parent short/11 \
        --claim ml --scale micro --set validation.target=5.2 --runs 3 --commit
    python -m records submit my_idea --claim ml --scale full --runs 8 --nproc 8  # of attempts/my_idea
    python -m records submit unet_double_lr --record short/11 --claim ml --scale micro \
        --set validation.target=5.2 --looks 4,8
    python -m records submit six_layers --resume                    # after a kill; does nothing twice
    python -m records submit six_layers --resume --format upstream  # also in modded-nanogpt's layout

A claim is an attempt, the folder attempts/NAME: record.toml, which is committed before the runs because they
are made from a checkout of HEAD, then manifest, logs, results.json and README.md. `records promote NAME`
makes a record of one that was shown, `records withdraw NAME` gives one up. Whatever can be checked is checked
before anything is written or committed. Arms: new, parent and, for a systems record on a systems record,
base: the last ml record. Exit codes are those of verify.
"""

import argparse
import datetime
import functools
import json
import lzma
import shlex
import subprocess
import sys
from pathlib import Path

from common import arguments as numbers, errors
from common import environment, files, untrusted
from common.errors import UserError
from evidence import arms, attempts, compare, ledger, manifest, off_clock, stack, verify, writeup
from evidence.provenance import differing, last_ml
from settings import deltas, schema
from settings.model import padded_vocab
from settings.scales import SCALES

ALPHA = 0.01  # of a record
FACTS = ("title", "parent", "date", "people", "kind")  # lines that record.toml needs when it is claimed


def arguments(p: argparse.ArgumentParser) -> None:
    """Options of `records submit`."""
    p.add_argument(
        "name", help="name of the attempt: small letters, digits and _ (its folder is attempts/NAME)"
    )
    what = p.add_mutually_exclusive_group()
    what.add_argument("--record", metavar="R", help="claim a record that exists, like short/12")
    what.add_argument(
        "--delta", metavar="FILE",
        help="a new idea: TOML lines \"path\" = value, as in a [delta] (default: attempts/NAME/record.toml)"
    )
    p.add_argument("--people", action="append", default=[], metavar="@X",
                   help="with --delta: whose idea it is (may be repeated)")
    p.add_argument("--title", help="with --delta: what it does, in one line")
    p.add_argument("--notes", default="", help="with --delta: anything a reader must know")
    p.add_argument(
        "--parent", metavar="[REF:]R", help="record it builds on and is timed against (default: the head of "
        "short, or what record.toml says); REF: git ref to run it from"
    )
    p.add_argument("--claim", choices=("ml", "systems"),
                   help="to be given. ml: reaches the target faster; systems: computes the same faster")
    p.add_argument("--scale", choices=list(SCALES), help="size of the runs (to be given)")
    p.add_argument("--runs", type=numbers.runs, metavar="N",
                   help="runs of each arm, all of which count (--runs or --looks is to be given)")
    p.add_argument("--looks", type=numbers.rising, metavar="N,M",
                   help="instead of --runs: test after N, M, ... runs of each arm; they share alpha")
    p.add_argument(
        "--set", dest="sets", action="append", default=[], metavar="PATH=VALUE",
        help="for all arms, below scale full: e.g. validation.target=5.2, as those scales have no target"
    )
    p.add_argument("--seed0", type=numbers.first_seed, default=0, metavar="K", help="first seed (default 0)")
    p.add_argument(
        "--order-seed", type=numbers.seed, metavar="K", help="seed of the order of execution (default: drawn)"
    )
    p.add_argument(
        "--nproc", type=int, choices=(1, 2, 4, 8), metavar="P", help="start each run as so many processes"
    )
    p.add_argument(
        "--long-start", metavar="WHY",
        help="why start or warm-up of the record take more than three times the "
        "parent's and a minute; the claim tells it"
    )
    ledger_arguments(p)
    p.add_argument("--data", metavar="DIR", help="folder of shards, as for train_gpt.py")
    p.add_argument("--out", metavar="DIR", help="claim folder (default: attempts/NAME)")
    p.add_argument("--commit", action="store_true", help="git commit the attempt's record.toml, nothing else")
    p.add_argument(
        "--format", choices=("upstream",), help="write the layout of modded-nanogpt too, into DIR/upstream"
    )
    p.add_argument("--resume", nargs="?", const=True, metavar="DIR",
                   help="go on with the plan in DIR (default: attempts/NAME)")
    p.add_argument(
        "--fault", metavar="CAUSE=NOTE",
        help="with --resume: why the last run, without a loss, does not count"
    )


def ledger_arguments(p: argparse.ArgumentParser) -> None:
    """Options on how an attempt stands to others."""
    p.add_argument("--legs", type=numbers.integer(1, ledger.MOST_LEGS), metavar="L",
                   help="of a first attempt: how many attempts at this idea may share alpha (default 1); "
                        "the rule is "
                   "written before the first run")
    p.add_argument("--idea", metavar="NAME",
                   help="a further attempt at the idea of attempts/NAME, in whose ledger it is booked")
    p.add_argument("--against", metavar="A,B",
                   help="open attempts on which it is an increment: both arms run with their deltas")


def run(options: argparse.Namespace) -> int:
    """The command. Returns the exit code of verify, or 130."""
    if options.fault and not options.resume:
        raise UserError("--fault explains a run of a plan that is under way: it goes with --resume")
    if options.resume:
        folder = resumed(options)
    else:
        check_options(options)
        environment.check_training()
        folder = begin(options)
        if folder is None:
            return 0
    try:
        carry_out(folder, options.data, options.fault)
    except KeyboardInterrupt:
        print(f"interrupted: nothing that was finished is lost; go on with `records submit {options.name} "
              f"--resume {folder}`", file=sys.stderr)
        return compare.INTERRUPTED
    pack_sources(folder / "runs")
    results = booked(folder)
    verify.store(folder, results, page=True)
    if options.format == "upstream" and results["verdict"] != "refused":
        print(f"upstream's layout: {writeup.upstream(folder)}")
    verify.report(results, f"results: {folder / 'results.json'}")
    if results["verdict"] == "shown":
        print(f"it stays an attempt until you make it a record: python -m records promote {options.name}")
    return {"shown": verify.SHOWN, "not shown": verify.NOT_SHOWN, "refused": verify.REFUSED}[
        results["verdict"]
    ]


def booked(folder: Path) -> dict:
    """Results of the claim, after its fate was written into the ledger of its idea."""
    results = verify.verify(folder, page=False)
    claim = manifest.read(folder)
    if claim.ended or claim.withdrawn is not None:
        ledger.settle(folder, claim, results)
    return verify.verify(folder, page=False)


def check_options(options: argparse.Namespace) -> None:
    """UserError for options of a submission that are missing or contradict each other."""
    attempts.check_name(options.name)
    for flag in ("claim", "scale"):
        if getattr(options, flag) is None:
            raise UserError(f"--{flag} is missing: choose one (`records submit --help`)")
    if bool(options.runs) == bool(options.looks):
        raise UserError(
            "say before the first run how many there will be: --runs N, or --looks N,M,... (one of the two)"
        )
    if options.runs is not None and options.runs < 2:
        raise UserError(f"--runs {options.runs}: at least 2, one run has no spread")
    if options.looks:
        looks_of(options.looks)
    if options.sets and options.scale == "full":
        raise UserError(
            f"--set {options.sets[0]}: at scale full a record runs as it is; put it into the delta"
        )


def resumed(options: argparse.Namespace) -> Path:
    """The folder of a plan that was declared: --resume DIR, --out, or attempts/NAME."""
    if isinstance(options.resume, str) or options.out:
        return Path(options.resume if isinstance(options.resume, str) else options.out)
    folder = deltas.ATTEMPTS / options.name
    if not (folder / manifest.NAME).exists():
        known = [p.parent.name for p in files.listed(deltas.ATTEMPTS, f"*/{manifest.NAME}")]
        raise UserError(f"no plan of the name {options.name} was declared{errors.near(options.name, known)}; "
                        "one made with --out DIR goes on with --resume DIR")
    return folder


# ----- what is claimed --------------------------------------------------------------------------------------

def begin(options: argparse.Namespace) -> Path | None:
    """Check everything, then write, commit and declare. Returns the claim folder; None if a commit has to
    come first."""
    record, text = existing(options) if options.record else attempt(options)
    folder = Path(options.out) if options.out else deltas.ATTEMPTS / options.name
    if (folder / manifest.NAME).exists():
        raise UserError(
            f"{folder} already holds a plan: continue it with --resume {folder}, or choose another name"
        )
    check_idea(options, record)
    preflight(options, record)
    if not options.record and not committed(record, text, options.commit):
        return None
    declaration, diff = plan(options, record, prepared(options, record))
    home, legs = home_of(options, folder)
    declaration["ledger"] = ledger.begin(home, folder, declaration, options.idea or options.name, legs)
    compare.declare(folder, declaration, diff=diff)
    if home != folder:
        files.write(folder / ledger.NAME, (home / ledger.NAME).read_bytes())
    if folder.resolve() != record.folder.resolve():
        files.write(folder / "record.toml", text)
    return folder


def check_idea(options: argparse.Namespace, record: deltas.Record) -> None:
    """UserError if this idea was tried under another name and is not declared as a further attempt at it, or
    if its ledger takes no further one."""
    if not options.idea:
        if known := ledger.same_idea(record):
            raise UserError(f"{record.ref} is the idea of attempts/{known}, which was tried already: "
                            "declare it as a "
                            f"further attempt with --idea {known}")
        return
    home, _ = home_of(options, None)
    book = ledger.read(home / ledger.NAME)
    if len(book.legs) >= book.opened["rule"]["legs"]:
        raise UserError(f"--idea {options.idea}: its rule, written before the first attempt, allows "
                        f"{book.opened['rule']['legs']}, and {len(book.legs)} were made")
    if book.open_leg is not None:
        raise UserError(f"--idea {options.idea}: nothing says what became of {book.open_leg.line['name']}: "
                        "finish it "
                        "with --resume, or withdraw it")


def home_of(options: argparse.Namespace, folder: Path | None) -> tuple[Path | None, int | None]:
    """(folder that holds the idea's ledger, how many legs its rule will allow, or None for a later leg)."""
    if not options.idea:
        return folder, options.legs or 1
    if options.legs:
        raise UserError("--legs belongs to the rule, which was written before the first attempt: leave it "
                        "out")
    home = attempts.folder_of(options.idea)
    if not (home / ledger.NAME).exists():
        raise UserError(f"--idea {options.idea}: {home} holds no ledger; its attempt was made without one")
    return home, None


def alpha_of(options: argparse.Namespace) -> float:
    """What this attempt may use: alpha shared among the legs of the rule."""
    if options.idea:
        home, _ = home_of(options, None)
        return ledger.read(home / ledger.NAME).share
    return ALPHA / (options.legs or 1)


def existing(options: argparse.Namespace) -> tuple[deltas.Record, str]:
    """(Record, text of its record.toml) of --record; its own file says who, what and on what."""
    record = deltas.find_record(options.record)
    if options.title or options.people or options.notes:
        raise UserError(
            f"--title, --people and --notes go with --delta: {record.folder.name}/record.toml has its own"
        )
    if options.name not in (record.slug, record.attempt):
        raise UserError(f"{record.ref} is named {record.slug}, not {options.name}")
    if not record.people:
        raise UserError(f"{record.folder.name}/record.toml names no people: credit whose idea it is")
    if record.parent is None:
        raise UserError(f"{record.ref} has no parent to be faster than")
    return record, (record.folder / "record.toml").read_text(encoding="utf-8")


def attempt(options: argparse.Namespace) -> tuple[deltas.Record, str]:
    """(Record, text of its record.toml) of a new idea: from --delta, or from attempts/NAME/record.toml.
    Writes nothing."""
    taken = next((r for r in deltas.load_records().values() if options.name in (r.slug, r.attempt)), None)
    if taken is not None:
        raise UserError(f"the name {options.name} is taken by {taken.ref} ({taken.title}): choose another, "
                        f"or claim that one with --record {taken.ref}")
    path = deltas.ATTEMPTS / options.name / "record.toml"
    if options.delta is None:
        return written(options, path)
    if not options.title or "\n" in options.title:
        raise UserError("a new idea needs --title \"what it does, in one line\"")
    if not options.people or not all(x.strip() for x in options.people):
        raise UserError(
            "a new idea needs --people @name: credit whose idea it is, the paper's authors included"
        )
    parent = deltas.find_record((options.parent or "short/head").rpartition(":")[2])
    delta, subsumed = read_delta(Path(options.delta))
    check_delta(parent, delta, subsumed, options)
    if path.exists():
        record = deltas.find_attempt(options.name)
        if (record.delta, record.parent, record.subsumed) != (delta, parent.ref, subsumed):
            raise UserError(f"the name {options.name} is taken by {record.ref} ({record.title}): choose "
                            "another, or claim what is written there, without --delta")
        return record, path.read_text(encoding="utf-8")
    text = record_text(options, parent, delta, subsumed)
    return attempts.record_of(text, path), text


def written(options: argparse.Namespace, path: Path) -> tuple[deltas.Record, str]:
    """The attempt that was written by hand, or by an earlier submit."""
    if not path.exists():
        raise UserError("name the record with --record short/12, give a new idea with --delta FILE, or "
                        f"write it to {path}{errors.near(options.name, deltas.attempt_names())}")
    record = deltas.find_attempt(options.name)
    if options.title or options.people or options.notes:
        raise UserError(f"--title, --people and --notes go with --delta: {path} has its own")
    text, toml = untrusted.toml_file(path)
    for line in FACTS:
        if not toml.get(line):
            like = {
                "people": "credit whose idea it is, like [\"@me\"]", "date": "like 2026-11-29",
                "kind": "like \"ml\""
            }
            raise UserError(f"{path}: a claim needs the line {line}: {like.get(line, 'in one line')}")
    check_delta(deltas.find_record(record.parent), record.delta, record.subsumed, options, path)
    return record, text


def read_delta(path: Path) -> tuple[dict, str]:
    """(delta, subsumed) of a file of delta lines, bare or below [delta]; UserError for anything that is
    none."""
    toml = untrusted.toml_file(path)[1]
    subsumed = toml.pop("subsumed", "")
    delta = toml.pop("delta", None)
    if delta is not None and toml:
        raise UserError(
            f"{path}: {', '.join(toml)} next to [delta]: title, people and parent are options of this command"
        )
    delta = toml if delta is None else delta
    if not isinstance(delta, dict) or not isinstance(subsumed, str):
        raise UserError(f"{path}: expected lines like \"optim.muon.lr\" = 0.05, bare or below [delta]")
    return deltas.quoted(delta, path), subsumed


def check_delta(
    parent: deltas.Record, delta: dict, subsumed: str, options: argparse.Namespace,
    where: Path | str | None = None
) -> None:
    """Every line changes its parent; an empty delta is code, and says why in `subsumed`."""
    where = where or options.delta
    if parent.ref.startswith(deltas.ATTEMPT):
        raise UserError(f"--parent {parent.ref}: an attempt is no parent: promote it first, or put its lines "
                        "into your delta")
    s = deltas.resolve(parent.ref).settings
    for path, value in delta.items():
        changed = schema.assign(s, path, value, where)
        if deltas.lookup(changed, path) == deltas.lookup(s, path):
            raise UserError(
                f"{where}: {path} = {schema.show(value)} changes nothing: {parent.ref} has it already"
            )
        s = changed
    if not delta and not (subsumed and options.claim == "systems"):
        raise UserError(
            f"{where}: a delta that changes nothing: a record that is only new code is a systems claim "
            "and says subsumed = \"what the code does now\""
        )


def record_text(options: argparse.Namespace, parent: deltas.Record, delta: dict, subsumed: str) -> str:
    """Text of the attempt's record.toml."""
    quoted = functools.partial(json.dumps, ensure_ascii=False)  # a JSON string is a TOML string
    head = {
        "title": quoted(options.title), "parent": quoted(parent.ref),
        "date": datetime.date.today().isoformat(), "people": quoted(options.people),
        "kind": quoted(options.claim), "source": quoted("log")
    }
    head |= {k: quoted(v) for k, v in (("notes", options.notes), ("subsumed", subsumed)) if v}
    lines = [f"{k} = {v}" for k, v in head.items()] + ["", "[delta]"]
    lines += [f"{quoted(path)} = {schema.show(value)}" for path, value in delta.items()]
    return "\n".join(lines) + "\n"


# ----- everything that can be known before the first run ----------------------------------------------------

def preflight(options: argparse.Namespace, record: deltas.Record) -> None:
    """Refuse what would fail later: git, tools, parent, settings, target, data, GPUs. Nothing is written or
    committed.

    The idea is resolved by this checkout's code, which is that of the commit to come, as its record.toml is
    all that is new.
    """
    deltas.resolve(record, scale=options.scale, sets=options.sets)
    attempts.require_git(options.commit)
    attempts.require_clean(record.folder / "record.toml")
    found = prepared(options, record, before=True)
    declaration, _ = plan(options, record, found)
    manifest.Claim(deltas.ATTEMPTS / options.name / manifest.NAME).add(
        {"n": 0, "kind": "declare", **declaration}, ""
    )
    check_data(options, found)
    arms.require_tools()
    if options.scale == "full":
        check_machine(record.parent, options.nproc, options.data)


def check_machine(ref: str, nproc: int | None, data: str | None) -> None:
    """Print what bench/preflight.py says of this machine, in one line if all is fine. UserError if it is not
    fit."""
    command = [sys.executable, "-m", "bench.preflight", ref, "--nproc", str(nproc or 1), "--brief"]
    command += ["--data", str(Path(data).absolute())] if data else []
    done = subprocess.run(command, cwd=arms.ROOT, capture_output=True, text=True)
    print(done.stdout, end="")
    if done.returncode:
        said = done.stderr.strip() or "the lines above say why; `python bench/preflight.py` checks again"
        raise UserError(f"this machine is not fit for a full-scale run: {said}")


def prepared(options: argparse.Namespace, record: deltas.Record, before: bool = False) -> dict[str, dict]:
    """{name: arm} of new, parent and perhaps base. before: the record is not committed yet, and so resolved
    here."""
    parent = options.parent or record.parent
    ref, colon, name = parent.rpartition(":")
    if deltas.find_record(name).ref != record.parent:
        raise UserError(f"--parent {parent}: the parent of {record.ref} is {record.parent}")
    texts = {"parent": ref + colon + record.parent}
    last = last_ml(deltas.find_record(record.parent))
    if options.claim == "systems" and last is not None and last.ref != record.parent:
        texts["base"] = ref + colon + last.ref
    sets = shared_sets(options, record)
    changes = "".join(f" --set {shlex.quote(x)}" for x in sets)
    if not before:
        texts["new"] = record.ref
        return {name: arms.prepare(texts[name] + changes, options.scale)[0] for name in sorted(texts)}
    resolved = deltas.resolve(record, scale=options.scale, sets=sets)
    s = resolved.settings
    new = {
        "text": record.ref + changes, "kind": "record", "ref": None, "commit": arms.commit_of("HEAD"),
        "tree": arms.line("rev-parse", "HEAD^{tree}"), "dirty": None, "argv": [record.ref],
        "record": record.ref, "preset": "", "scale": options.scale, "changes": list(resolved.changes),
        "ml_hash": schema.ml_hash(s), "system_hash": schema.system_hash(s), "settings": schema.plain(s),
        "report": []
    }
    return {
        "new": new,
        **{name: arms.prepare(texts[name] + changes, options.scale)[0] for name in sorted(texts)},
    }


def shared_sets(options: argparse.Namespace, record: deltas.Record) -> list[str]:
    """The changes that all arms of a claim have: the stack it is an increment on, the parent's target,
    tokens and context of the validation where the record has others, and those of --set."""
    stacked = stack.changes(stack.entries(options.against.split(","), record), record.parent,
                            options.scale) if options.against else []
    plain = [schema.plain(deltas.resolve(x, scale=options.scale).settings) for x in (record, record.parent)]
    own = [x for x in off_clock.shared_changes(*plain)
           if not any(s.partition("=")[0].strip() == x.partition("=")[0] for s in options.sets)]
    if own:
        print(f"{record.ref} is measured as its parent is, which belongs to the track: {', '.join(own)}")
    return [*stacked, *own, *options.sets]


def plan(options: argparse.Namespace, record: deltas.Record, found: dict[str, dict]) -> tuple[dict, str]:
    """(declaration, code diff) of checked arms. UserError where they cannot run here or cannot carry the
    claim."""
    check_arms(options, record, found)
    diff = arms.code_diff(found["parent"], found["new"])
    runs = {"runs": options.runs} if options.runs else {"looks": looks_of(options.looks, alpha_of(options))}
    return compare.declaration_of(
        found, runs, claim=options.claim, record=record.ref,
        target=found["new"]["settings"]["validation"]["target"], alpha=alpha_of(options), pairing="seed",
        seed0=options.seed0, order_seed=options.order_seed, processes=options.nproc, data=options.data,
        diff=diff, long_start=options.long_start,
        **({"against": stack.entries(options.against.split(","), record)} if options.against else {})
    ), diff


def check_data(options: argparse.Namespace, found: dict[str, dict]) -> None:
    """The corpus serves every arm: enough shards, enough validation tokens, a row of the model for every
    token."""
    from data.corpus import corpus_for
    from data.shards import open_shard
    from data.stream import require_shards, stream_arguments
    corpus = corpus_for(options.scale, options.data)
    for arm in found.values():
        s = schema.from_plain(arm["settings"])
        require_shards(corpus, steps=s.schedule.steps, **stream_arguments(s))
        have = len(open_shard(corpus.val))
        if have <= s.validation.tokens:
            raise UserError(f"{corpus.val} holds {have:,} tokens, {s.validation.tokens + 1:,} are needed: "
                            "choose another --data")
        if corpus.vocab_size > padded_vocab(s):
            raise UserError(f"{corpus.folder} holds token ids up to {corpus.vocab_size - 1}, the model of "
                            f"{arm['record']} has {padded_vocab(s)} rows: choose another --data")


def committed(record: deltas.Record, text: str, commit: bool) -> bool:
    """Is the attempt's record.toml in HEAD? If it is missing it is written; with --commit it is committed,
    alone."""
    path = record.folder / "record.toml"
    new = not path.exists()
    if new:
        attempts.make(path, text)
    if not arms.line("status", "--porcelain", "--untracked-files=all", "--", str(path)):
        return True
    message = f"{record.ref}: {record.title}"
    if commit:
        try:
            attempts.commit([path], message)
        except UserError:
            if new:
                attempts.unmake(path)
            raise
        print(f"committed {record.ref}: {path}")
        return True
    print(f"{record.ref}: {path}\nIts runs are made from a commit, which others can fetch: commit it and "
          f"give the same command again (or add --commit):\n  git add {shlex.quote(str(path))} && git commit "
          f"-m {shlex.quote(message)} -- {shlex.quote(str(path))}")
    return False


def check_arms(options: argparse.Namespace, record: deltas.Record, found: dict[str, dict]) -> None:
    """The claim says something: the arms differ, in what the claim is about."""
    new, parent = found["new"], found["parent"]
    if arms.same(new, parent):
        raise UserError(
            f"at scale {options.scale} {record.ref} and {record.parent} are the same program with the same "
            "settings: the delta changes nothing here"
        )
    paths = differing(new["settings"], parent["settings"])
    if options.claim == "systems" and new["ml_hash"] != parent["ml_hash"]:
        ml = [p for p in paths if not p.startswith("system.")]
        raise UserError(f"{record.ref} changes what is computed ({', '.join(ml)}): that is --claim ml")
    if "validation.tokens" in paths or "validation.target" in paths:
        raise UserError(
            f"{record.ref} changes how it is measured (validation.tokens or target): it cannot be held "
            f"against {record.parent}"
        )
    if options.claim == "ml" and new["settings"]["validation"]["target"] is None:
        raise UserError(f"scale {options.scale} has no target: an ml claim needs one, --set "
                        "validation.target=LOSS for all arms")


def looks_of(counts: list[int], alpha: float = ALPHA) -> list[dict]:
    """[{runs, alpha}] of --looks 4,8: the shares add up to alpha."""
    from evidence.statistics import spend
    return [{"runs": n, "alpha": a} for n, a in zip(counts, spend(counts, alpha))]


# ----- running it -------------------------------------------------------------------------------------------

def carry_out(folder: Path, data: str | None, fault: str | None) -> None:
    """Make the declared runs from where the plan stands; with looks, stop at the first that decides."""
    book = manifest.resume(folder)  # mends a line that a kill has cut
    claim = book.claim
    book.close()
    if claim.declaration["claim"] == "comparison":
        raise UserError(f"{folder} holds a comparison: go on with `records compare --resume {folder}`")
    if claim.withdrawn is not None:
        raise UserError(
            f"{folder}: the claim was withdrawn ({claim.withdrawn['why']}): try it anew under another name"
        )
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


def decide(claim: manifest.Claim, look: dict, last: bool) -> str:
    """passed, failed or continue: the test that verify will take again."""
    if not verify.judge(claim, look["alpha"], look["runs"])["reasons"]:
        return "passed"
    lost = any(r.status != "finished" for arm in claim.declaration["arms"] for r in claim.counted(arm))
    return "failed" if last or lost else "continue"  # a run without a loss fails every later look, too


def pack_sources(runs: Path) -> None:
    """sources-<hash>.txt -> .txt.xz, as the repository keeps them."""
    for path in files.listed(runs, "sources-*.txt"):
        files.write(path.with_name(path.name + ".xz"), lzma.compress(path.read_bytes()))
        path.unlink()
