"""`python -m records task RECORD`: a folder that asks a program to improve on a record, for `records
referee`.

The folder holds TASK.md (goal, rules, budget, hints), task.json (the same for the referee) and candidate/:
the sources of the starting record, without later records, to be edited in place. What is measured, on how
many seeds and at which budget is declared here, before any candidate exists; the seeds are the referee's.

The task is that of Meta's Automated LLM Speedrunning Benchmark (Zhao et al., 2506.22419: one transition,
three levels of hints, the fraction of the speed-up recovered) and, open-ended, of Intology's NanoGPT-Bench.
No torch here.
"""

import argparse
import dataclasses
import hashlib
import shutil
from pathlib import Path

from common import arguments as numbers, files, repository
from common.errors import UserError
from runlog import ROOT
from settings import deltas, schema
from settings.scales import SCALES

VERSION = 1
HINTS = ("none", "formula", "text", "near")
MEASURES = ("loss", "time")
SEEDS = {"full": 10, "small": 3, "tiny": 3, "mini": 3, "micro": 2}
FAIR_SEEDS = 2  # an interval needs two
CANDIDATE = "attempts/candidate"  # what the referee trains
RECORD_TOML = f"{CANDIDATE}/record.toml"
ABOUT = "candidate.json"
# what a candidate may change: what is learned and how, not how it is fed, timed, judged or written down
EDITABLE = ("model.py", "optim.py", "schedule.py", "settings/model.py", "settings/init.py",
            "settings/mixing.py", "settings/optim.py", "settings/muon.py", "settings/wrappers.py",
            "layers/*.py", "updates/*.py", "kernels/*.py", RECORD_TOML, ABOUT)
TAKEN = ("*.py", "common/*.py", "data/*.py", "data/*.txt", "data/*.xz", "data/sample/*", "kernels/*.py",
         "layers/*.py", "settings/*.py", "system/*.py", "updates/*.py", "records/__init__.py")
LEFT = ("sweep.py", "sample.py")  # programs that no training needs
FIELDS = (  # of task.json
    "version", "parent", "goal", "next", "head", "open", "transitions", "dates", "minutes", "scale", "steps",
    "data", "measure", "seeds", "hints", "editable", "parent_ml_hash", "code", "files"
)

RULES = """\
- Edit the files named below, and add new ones of the same kinds. A candidate that differs anywhere else is
  invalid: data, clock, validation, log, scales and budgets are the task's.
- The referee trains `attempts/candidate`: write the change as lines of its record.toml, on the parent that
  stands there, with new settings in the editable files of settings/ and code where it acts.
- The settings of `validation` stay, and so does the corpus. {budget}
- Code that differs from the task's is audited: causal, normalised, nothing kept from validation, nothing done
  outside the clock, no trace between runs (`python -m records audit --help` lists all tests).
- Runs are made by the referee, on seeds that it does not tell, without network and with empty caches. Time is
  taken outside of the candidate's process, from the end of the untimed warm-up to the end of the run.
- candidate.json says until when the author has knowledge: {{"knowledge": "2025-06-30"}}. It changes no
  score."""


def arguments(p: argparse.ArgumentParser) -> None:
    """Options of `records task`."""
    p.add_argument("record", help="the record to start from, like short/33")
    goal = p.add_mutually_exclusive_group()
    goal.add_argument("--to", metavar="RECORD", help="the record to catch up with (default: the next one)")
    goal.add_argument("--open", action="store_true",
                      help="open-ended: improve as far as possible; the goal that is measured is the head")
    p.add_argument("--scale", choices=list(SCALES), default="tiny", help="size of all runs (default tiny)")
    p.add_argument("--hints", choices=HINTS, default="none",
                   help="none; formula: what the changed settings mean; text: title and notes of the "
                   "records; near: also which settings change, without their values")
    p.add_argument("--measure", choices=MEASURES,
                   help="loss at equal tokens, or time at no worse loss (default: time at full scale and "
                   "for a systems record, otherwise loss)")
    p.add_argument("--seeds", type=numbers.integer(FAIR_SEEDS, 100), metavar="N",
                   help="runs of each arm, on seeds that the referee draws (default 10 at full scale, 3 at "
                   "small, tiny and mini, 2 at micro)")
    p.add_argument("--steps", type=numbers.integer(1, 10**6), metavar="N",
                   help="a budget of so many steps instead of that of the scale, to try a harness out")
    p.add_argument("--data", metavar="DIR",
                   help="folder of shards that the runs will read (default: as in training)")
    p.add_argument("--out", metavar="DIR", help="the task folder (default tasks/<record>_<scale>)")


def run(options: argparse.Namespace) -> None:
    """`records task`: write the folder that the options ask for."""
    about = declare(options)
    out = Path(options.out or f"tasks/{about['parent'].replace('/', '-')}_{about['scale']}")
    if out.exists():
        raise UserError(f"{out} is there already: choose another --out, or remove it")
    write(about, out)
    print(f"{out}: from {about['parent']} to {about['goal']} at scale {about['scale']}, measure "
          f"{about['measure']}, {about['seeds']} seeds, hints {about['hints']}\n"
          f"edit {out}/candidate, then: python -m records referee {out} {out}/candidate")


def declare(options: argparse.Namespace) -> dict:
    """task.json of the options, checked."""
    parent = deltas.find_record(options.record)
    if parent.ref.startswith(deltas.ATTEMPT):
        raise UserError(f"{parent.ref} is an attempt: a task starts at a record")
    following = children(parent)
    if not following:
        raise UserError(f"{parent.ref} is the head of its lineage: name a record that another one follows")
    goal = following[-1] if options.open else deltas.find_record(options.to) if options.to else following[0]
    if goal not in following:
        raise UserError(f"--to {options.to}: it does not descend from {parent.ref}; its descendants are "
                        f"{', '.join(r.ref for r in following[:8])}" + (" ..." if following[8:] else ""))
    links = deltas.chain(goal)
    steps = [r for r in links if r in following]
    systems = options.scale == "full" or all(r.kind in ("systems", "retiming") for r in steps)
    resolved = deltas.resolve(parent, scale=options.scale, sets=budget(options.steps))
    return {
        "version": VERSION, "parent": parent.ref, "goal": goal.ref, "next": following[0].ref,
        "head": following[-1].ref, "open": options.open, "transitions": [r.ref for r in steps],
        "dates": {r.ref: r.date for r in steps},
        "minutes": {r.ref: r.published.get("minutes") for r in (parent, following[0], goal, following[-1])},
        "scale": options.scale, "steps": options.steps,
        "data": options.data and str(Path(options.data).absolute()),
        "measure": options.measure or ("time" if systems else "loss"),
        "seeds": options.seeds or SEEDS[options.scale], "hints": options.hints, "editable": list(EDITABLE),
        "parent_ml_hash": schema.ml_hash(resolved.settings), "code": repository.code_version(),
        "files": {name: digest(data) for name, data in sources(parent).items()},
    }


def budget(steps: int | None) -> list[str]:
    """The --set lines of a task's own number of steps."""
    return [f"schedule.steps={steps}"] if steps else []


def children(parent: deltas.Record) -> list[deltas.Record]:
    """The records that descend from this one in its own lineage, in order, without claims."""
    lineage = parent.ref.split("/")[0]
    records = [
        r for r in deltas.load_records().values() if r.ref.split("/")[0] == lineage and not r.claimed
    ]
    return [r for r in records if r != parent and parent in deltas.chain(r)]


def digest(data: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()


def sources(parent: deltas.Record) -> dict[str, bytes]:
    """{path: bytes} of a task's candidate folder: the trainer, the chain of records up to the parent, and an
    attempt that changes nothing."""
    taken = {path for pattern in TAKEN for path in files.listed(ROOT, pattern) if path.is_file()}
    kept = sorted(path for path in taken if path.name not in LEFT)
    found = {str(path.relative_to(ROOT)): path.read_bytes() for path in kept}
    for record in deltas.chain(parent):
        path = record.folder / "record.toml"
        found[str(path.relative_to(ROOT))] = path.read_bytes()
    return found | {RECORD_TOML: template(parent).encode(), ABOUT: b'{"knowledge": ""}\n'}


def template(parent: deltas.Record) -> str:
    """record.toml of a candidate that changes nothing yet."""
    return (f'title = "Candidate"\nparent = "{parent.ref}"\nkind = "ml"\n'
            'subsumed = "nothing is changed yet: remove this line with the first change"\n\n[delta]\n')


def write(about: dict, out: Path) -> None:
    """The task folder, whole or not at all."""
    scratch = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        for name, data in sources(deltas.find_record(about["parent"])).items():
            files.write(scratch / "candidate" / name, data, parents=True)
        files.write(scratch / "task.json", files.json_text(about, indent=1) + "\n")
        files.write(scratch / "TASK.md", page(about))
        scratch.rename(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}; choose another --out") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


# ----- the page ---------------------------------------------------------------------------------------------

def page(about: dict) -> str:
    """TASK.md."""
    steps = f" with {about['steps']} steps" if about["steps"] else ""
    count = len(about["transitions"])
    followed = "the record" if count == 1 else f"the {count} records"
    what = "as far as possible" if about["open"] else f"as far as {followed} that followed it"
    measured = {
        "loss": "the final validation loss at the same number of tokens, paired by seed with the parent's",
        "time": "the training time of a run whose loss is no worse than the task's",
    }[about["measure"]]
    tokens = ("The number of training tokens stays." if about["measure"] == "loss" else
              "The number of steps may change.")
    words = f" --set schedule.steps={about['steps']}" if about["steps"] else ""
    command = "python -m records referee TASK CANDIDATE"
    editable = "\n".join(f"    {name}" for name in about["editable"])
    return f"""# Improve {about['parent']}

Start from record {about['parent']} of the NanoGPT speedrun (candidate/) and improve it {what}.

Scale {about['scale']}{steps}, {about['seeds']} seeds.
Measured is {measured}.
The score is the share of the goal's improvement on the parent: 0 is the parent, 1 is the goal.

## Rules

{RULES.format(budget=tokens)}

Files that may change:

{editable}

## Try it

    cd candidate
    python train_gpt.py {CANDIDATE} --scale {about['scale']}{words}

`{command}`, run from the project, answers with the verdict.
{hints(about)}"""


def hints(about: dict) -> str:
    """The section of hints, of the task's level."""
    level = HINTS.index(about["hints"])
    if level == 0:
        return ""
    parts = ["\n## Hints\n"]
    for ref in about["transitions"]:
        record = deltas.find_record(ref)
        paths = [path for path in record.delta if path != "schedule.steps"]
        lines = list(dict.fromkeys(map(sentence, paths)))  # learning rates of several groups are one sentence
        if level >= 2:
            lines = [record.title + ".", " ".join(record.notes.split()), *lines]
        if level >= 3:
            lines += [f"`{path} = ...`" for path in paths]
        parts.append("\n".join(f"- {line}" for line in lines if line) + "\n")
    return "\n".join(parts)


def sentence(path: str) -> str:
    """What a setting that a record changes means, and the explanation of a section, in one line."""
    field = schema.find_field(path)
    words = [field.metadata["doc"]]
    if field.is_section and dataclasses.is_dataclass(field.type):
        words.append(" ".join((field.type.__doc__ or "").split()))
    return "; ".join(word.rstrip(".") for word in words if word) + "."
