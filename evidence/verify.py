"""`python -m records verify DIR`: does a claim hold? From its logs alone; none of its code is executed.

    python -m records verify records/short/012_name  # consistent? and is the claim shown?
    python -m records verify DIR --audit audit.json --reproduction OTHER  # higher grades
    python -m records verify FOLDER_OF_TXT --target 3.28  # upstream's text logs: statistics only

First the laws of the logs (evidence.run_laws, claims and provenance): all problems are listed, and one is
enough to refuse. Then the statistics: an ml claim must reach the target and be faster than its parent; a
systems claim must compute the same and be faster. Writes DIR/results.json (and DIR/README.md anew, if it is
there), and keeps what raised the grade as DIR/audit.json and DIR/reproduction/, which are read by default.
Exit code 0: consistent and shown, 3: consistent, not shown, 2: refused.
docs/evidence.md says what the grades mean, and what a consistent forgery can still do.
"""

import argparse
import contextlib
import functools
import json
import math
import secrets
import shutil
import statistics as middle
import sys
from pathlib import Path
from typing import Any

import runlog
from common import arguments as numbers, files, untrusted
from common.errors import UserError
from common.printable import printable
from evidence import (
    arms, claim_laws, compare, ledger, manifest, off_clock, provenance,
    signing, textlog, writeup
)
from evidence.claim_folder import Evidence
from evidence.provenance import last_ml
from settings import deltas, renames

SHOWN, REFUSED, NOT_SHOWN = 0, 2, 3
# Two programs that differ in the order of sums only: the same seed gives the same weights and the same
# untimed tokens. Relative difference of the loss, and of the two numbers that a probe has of each gradient.
# Measured between 1 and 8 logical ranks in a forward (records 5 and 11 at micro): gradients 2e-5 in float32
# and 2e-2 in bfloat16, losses 3e-7 in both; of the first eight timed training losses (two seeds) 3e-7 in
# float32 and 2e-5 in bfloat16.
# `first`: relative difference of the first timed training losses.
# Two seeds differed by 1e-3 within the first five.
PARITY = {"float64": {"loss": 1e-10, "gradient": 1e-8, "first": 1e-9},
          "float32": {"loss": 1e-5, "gradient": 1e-4, "first": 1e-5},
          "bfloat16": {"loss": 1e-3, "gradient": 5e-2, "first": 2e-4}}
FIRST_STEPS = 5  # timed training losses that are compared, before rounding has grown
KEPT = ("run", "seed", "status", "val_loss", "train_time_ms", "folder", "last_hash")
# gradients below this share of the largest one are rounding; they are held to it instead of to their own size
FLOOR = 1e-3
CANNOT_KNOW = (
    "that the sources of the claim are what ran, and that these logs are their output: whoever rewrites "
    "manifest, logs and summaries together passes every check here (audit and reproduction look at that)",
    "that no runs were made before the declaration and left out",
    "that the machine, its clocks and its name are what the logs say",
    "what was done in the start and warm-up before the clock, beyond that it left the state as it was",
    "that the parent is the fastest record at this time",
)


def arguments(p: argparse.ArgumentParser) -> None:
    """Options of `records verify`."""
    p.add_argument("folder", help="claim folder (manifest.jsonl, runs/), or a folder of upstream's .txt logs")
    p.add_argument("--audit", metavar="FILE|now",
                   help="for the grade `audited`. now: audit the claim's commit in this call. FILE: an "
                        "audit that "
                   "the judge signed (--judge-key)")
    p.add_argument("--judge-key", metavar="FILE",
                   help="ed25519 key of the judge, by which a kept audit counts (public half) and which "
                        "signs one "
                   "made now (default: $" + signing.KEY + ")")
    p.add_argument("--reproduction", metavar="DIR",
                   help="claim folder of another machine, for the grade `reproduced`")
    p.add_argument("--target", type=numbers.number(0, 100, above=True), metavar="LOSS",
                   help="for text logs: the loss to reach (claims declare theirs)")
    p.add_argument("--out", metavar="DIR",
                   help="where results.json and what raised the grade go (default: the claim folder)")
    p.add_argument("--json", action="store_true", help="print results.json instead of the report")


def run(options: argparse.Namespace) -> int:
    """The command. Returns the exit code."""
    folder = Path(options.folder)
    if folder.is_dir():
        untrusted.survey(folder)  # before any pattern is matched in it
    if is_text_logs(folder):
        if options.audit or options.reproduction:
            raise UserError(
                "text logs name neither code nor machine: --audit and --reproduction need a claim folder")
        results = text_logs(folder, options.target)
        print(files.json_text(results, indent=1)) if options.json else report_text_logs(results)
        return SHOWN if results["verdict"] == "shown" else NOT_SHOWN
    if options.target is not None and (folder / manifest.NAME).exists():
        raise UserError("--target is for text logs: a claim declares its target before the first run")
    key = signing.key_file(options.judge_key)
    made = audit_now(folder) if options.audit == NOW else None
    results = verify(folder, made or options.audit, options.reproduction, key=key)
    before = (read_results(folder) or {}).get("grade")
    out = Path(options.out or folder)
    try:
        if options.out:
            files.make_folder(out)
        keep(out, results, made or options.audit, options.reproduction, key)
        store(out, results, page=(folder / writeup.PAGE).exists(), claim=folder)
        where = f"results: {out / 'results.json'}"
    except UserError as error:  # a judge may read from a disk that is not theirs
        where = f"note: {error}"
    graded = before in GRADES and results["grade"] in GRADES
    if graded and GRADES.index(results["grade"]) < GRADES.index(before):
        where += f"\nnote: it was {before}, now it is {results['grade']}"
    print(files.json_text(results, indent=1)) if options.json else report(fit_to_print(results), where)
    return {"shown": SHOWN, "not shown": NOT_SHOWN, "refused": REFUSED}[results["verdict"]]


def verify(
    folder: Path | str, audit: Path | str | dict | None = None, reproduction: Path | str | None = None,
    page: bool = True, key: Path | None = None
) -> dict:
    """results.json of a claim folder, as a dict. UserError only if there is no claim, or no audit, to read.

    audit, reproduction: a file and a folder; None: those that the claim folder keeps. audit may be the
    result itself of an audit that was made in this call. page: is a README.md held against it? key: the
    judge's key file, whose signature makes a kept audit count.

    What is judged are private copies, made after a look at the whole tree: a submission with links, devices,
    odd names or too much of anything is refused before a file of it is opened, and cannot change meanwhile.
    """
    folder = Path(folder)
    if not folder.is_dir():
        claim_laws.require_claim(folder)
    with contextlib.ExitStack() as stack:
        copies = {}
        for path in filter(None, (folder, reproduction)):
            copies[path] = stack.enter_context(untrusted.copied(path)) if Path(path).is_dir() else path
        try:
            results = judged(copies[folder], audit, reproduction and copies[reproduction], page, folder, key)
        except UserError as error:
            raise UserError(named(str(error), copies)) from None
    return named(results, copies)


def named(value: Any, copies: dict[Path | str, Path | str]) -> Any:
    """A text, or plain value, with the names of private copies replaced by those of the folders that they
    are of."""
    if isinstance(value, str):
        for path, copy in copies.items():
            value = value.replace(str(copy), str(path))
        return value
    if isinstance(value, dict):
        return {key: named(inner, copies) for key, inner in value.items()}
    return [named(inner, copies) for inner in value] if isinstance(value, list) else value


def fit_to_print(value: Any) -> Any:
    """A plain value whose texts act on no terminal, whoever wrote them."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {fit_to_print(key): fit_to_print(inner) for key, inner in value.items()}
    return [fit_to_print(inner) for inner in value] if isinstance(value, list) else value


def judged(
    folder: Path, audit: Path | str | dict | None, reproduction: Path | str | None, page: bool, place: Path,
    key: Path | None = None
) -> dict:
    """`verify` of private copies; place: where the claim folder itself lies."""
    found = claim_laws.examine(folder)
    d = found.declaration or {}
    results = {"version": 1, "claim": d.get("claim"), "record": d.get("record"), "scale": d.get("scale"),
               "verdict": "refused", "grade": "none", "reasons": [], "problems": found.problems,
               "unknown": [*found.unknown, *CANNOT_KNOW], "manifest": found.claim.last_hash}
    audited = read_audit(audit) if audit else None
    if found.problems:
        return results
    refused = dict(results)
    results |= {"grade": "consistent", "verdict": "shown"}
    if d["claim"] == "comparison":
        if audit or reproduction:
            raise UserError(
                f"{folder}: a comparison claims no record: --audit and --reproduction do not apply")
        return compare.analyse(found.claim) | results
    if audited is None and (folder / AUDIT).exists():
        audited = read_audit(folder / AUDIT)
    if reproduction is None and (folder / REPRODUCTION).exists():
        reproduction = folder / REPRODUCTION
    if found.claim.withdrawn is not None:
        results["reasons"] = [f"withdrawn {found.claim.withdrawn['utc']}: {found.claim.withdrawn['why']}"]
        results["verdict"] = "not shown"
        if not found.claim.ended:  # arms with different numbers of runs: no statistics
            return results
    withdrawn = results["reasons"]
    results |= describe(found) | {"attempts": ledger.told(found), "against": d.get("against")}
    results |= judge(found.claim, last_alpha(d, found.claim))
    results["reasons"] = withdrawn + results["reasons"] + check_looks(found)
    for name, row in results["statistics"]["arms"].items():
        row["untimed_s"] = untimed(found, name)
    if audited is not None:
        grade_audit(results, audited, d, key)
    if reproduction:
        grade_reproduction(results, found, reproduction)
    results["verdict"] = "not shown" if results["reasons"] else "shown"
    if page and not is_its_page(folder, results, place):
        return refused | {
            "problems": [
                f"{writeup.PAGE}: is not the page of these results: write it with `records submit "
                f"NAME --resume {folder.name}`, or remove it"
            ]
        }
    return results


def untimed(found: Evidence, name: str) -> dict[str, float] | None:
    """{start, warmup}: mean seconds before the clock of an arm's counted runs, or None without logs."""
    rows = [claim_laws.untimed(found.logs[r.run]) for r in found.claim.counted(name) if r.run in found.logs]
    rows = [row for row in rows if row is not None]
    return {
        key: middle.fmean(row[what] for row in rows) / 1000
        for key, what in (("start", "start"), ("warmup", "warm-up"))
    } if rows else None


# ----- what a claim folder keeps ----------------------------------------------------------------------------

AUDIT, REPRODUCTION = "audit.json", "reproduction"
NOW = "now"  # in the place of an audit's file: made in this call
GRADES = ("none", "consistent", "audited", "reproduced")
GRADED = ("grade", "audit", "reproduction")  # of results.json: what another call may have found


def read_results(folder: Path) -> dict | None:
    """The results.json of a claim folder, or None if there is no whole one."""
    try:
        return writeup.read_results(folder)
    except UserError:
        return None


def is_its_page(folder: Path, results: dict, place: Path) -> bool:
    """Is README.md, if there is one, written from these results or from the results.json next to it?
    place: where the folder lies, of which this one may be a copy."""
    path = folder / writeup.PAGE
    if not path.exists():
        return True
    kept = read_results(folder)
    try:
        if kept is not None and any(p.split(".")[0].split("[")[0] not in GRADED
                                    for p in differences(kept, results)):
            kept = None  # not these logs' results: a page of them rests on nothing
        return untrusted.text_of(path) in [
            writeup.readme(folder, x, place) for x in (results, kept) if x is not None
        ]
    except (UserError, LookupError, TypeError, AttributeError, ValueError):
        return False  # results.json of another making: then the page has nothing to rest on


def store(folder: Path, results: dict, page: bool, claim: Path | None = None) -> None:
    """Write results.json and, if asked for and there is something to tell, README.md.

    claim: the claim folder, where it is not `folder` itself.
    """
    untrusted.put(folder, "results.json", files.json_text(results, indent=1) + "\n")
    if page and results.get("statistics") and results["claim"] != "comparison":
        untrusted.put(folder, writeup.PAGE, writeup.readme(claim or folder, results))


def keep(
    folder: Path, results: dict, audit: Path | str | dict | None, reproduction: Path | str | None,
    key: Path | None = None
) -> None:
    """Keep the audit and the reproduction that counted in the claim folder, so that the grade can be checked
    again. An audit that was made in this call is signed, if there is a private key."""
    if audit and results.get("audit", {}).get("counts"):
        made = isinstance(audit, dict)
        whole = audit if made else untrusted.json_file(audit)
        whole = signing.signed(whole, key) if made and key is not None else whole
        untrusted.put(folder, AUDIT, files.json_text(whole, indent=1) + "\n")
    kept = folder / REPRODUCTION
    if reproduction and results["grade"] == "reproduced" and Path(reproduction).resolve() != kept.resolve():
        if kept.exists():
            raise UserError(f"{kept} holds another reproduction: remove it, then give this one again")
        unfinished = folder / f".{REPRODUCTION}.{secrets.token_hex(8)}.tmp"
        try:
            untrusted.copy(reproduction, unfinished,
                           leave=lambda path: path.rpartition("/")[2] in (REPRODUCTION, "upstream"))
            if manifest.read(unfinished).last_hash != results["reproduction"]["manifest"]:
                raise UserError(f"{reproduction} changed while it was judged: judge it again")
            unfinished.rename(kept)
        except OSError as error:
            raise UserError(f"cannot write {kept}: {error.strerror or error}") from None
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def differences(stored: Any, fresh: Any, path: str = "") -> list[str]:
    """Paths at which a stored results.json differs from what verify finds now;
    what is `unknown`, and which `attempts` followed, depends on the checkout."""
    if isinstance(stored, dict) and isinstance(fresh, dict):
        return [p for key in sorted({*stored, *fresh} - {"unknown", "attempts"})
                for p in differences(stored.get(key), fresh.get(key), f"{path}.{key}" if path else key)]
    if isinstance(stored, list) and isinstance(fresh, list) and len(stored) == len(fresh):
        return [p for i, pair in enumerate(zip(stored, fresh)) for p in differences(*pair, f"{path}[{i}]")]
    if type(stored) is type(fresh) is float:  # another scipy may round otherwise
        return [] if math.isclose(stored, fresh, rel_tol=1e-6, abs_tol=1e-12) else [path]
    return [] if stored == fresh else [path]


def describe(found: Evidence) -> dict:
    """What was run, where, by which code: the part of results.json that is copied from the logs."""
    d, start = found.declaration, next(iter(found.logs.values())).start
    keys = ("device", "torch", "cpu", "cores", "machine", "corpus", "corpus_digest", "val_digest",
            "numerics_version")
    named = ("text", "record", "changes", "ref", "commit", "tree", "ml_hash", "system_hash")
    arms = {name: {**{k: arm.get(k) for k in named}, "steps": arm["settings"]["schedule"]["steps"]}
            for name, arm in d["arms"].items()}
    excluded = [{
        "run": r.run, "arm": r.arm, "seed": r.seed, "cause": r.fault["cause"], "note": r.fault["note"]
    } for r in found.claim.runs if r.fault]
    return {
        "arms": arms, "target": d["target"], "alpha": d["alpha"], "plan": d["plan"], "pairing": d["pairing"],
        "margin": d["margin"], "processes": d["processes"],
        **{k: start[k] for k in keys}, "excluded": excluded, "declared": d["utc"],
        "looks": [{k: x[k] for k in ("runs", "decision", "utc")} for x in found.claim.looks]
    }


# ----- statistics -------------------------------------------------------------------------------------------

def last_alpha(d: dict, claim: manifest.Claim) -> float:
    """What the test may use: alpha, or with looks the share of the last one that was taken."""
    return d["plan"]["looks"][len(claim.looks) - 1]["alpha"] if "looks" in d["plan"] else d["alpha"]


def judge(claim: manifest.Claim, alpha: float, runs: int | None = None) -> dict:
    """{statistics, reasons}: what the counted runs of a record claim show at level alpha; no reasons:
    it is shown.

    runs: only the first so many of each arm (a look); None: all. Works while a plan is under way, too.
    """
    from evidence import statistics
    d = claim.declaration
    found = {
        name: sorted(rows[:runs], key=lambda r: r["seed"]) for name, rows in compare.outcomes(claim).items()
    }
    paired, out, reasons = d["pairing"] == "seed", {"alpha": alpha, "arms": {}}, []
    for name, rows in found.items():
        done = [r for r in rows if r["status"] == "finished"]
        lost = [f"{r['seed']} ({r['status']})" for r in rows if r["status"] != "finished"]
        if lost:
            reasons.append(
                f"arm {name}: no final loss of seed {', '.join(lost)}: every registered run counts"
            )
        out["arms"][name] = {
            "n": len(done), "loss": statistics.describe([r["val_loss"] for r in done]) if done else None,
            "time_ms": statistics.describe([r["train_time_ms"] for r in done]) if done else None,
            "runs": [{k: r[k] for k in KEPT} for r in rows]}
    if not reasons:
        compared = compare.compare_arms("new", "parent", found, paired, 0.95, d["margin"])
        out |= {k: compared[k] for k in ("loss", "time", "equivalent")}
        reasons += judge_loss(d, claim, found, alpha, paired, out) + judge_time(out["time"], alpha)
        rests = {
            name: [off_clock.rests_of(events_of(claim, r)) for r in found[name]] for name in ("new", "parent")
        }
        out["off_clock"] = off_clock.charge(found, rests, paired)
        if judge_time(out["time"], alpha) == []:
            reasons += judge_time(out["off_clock"]["charged"], alpha, "time with the excess of its rests")
            reasons += judge_time(out["off_clock"]["with_rests"], alpha, "time with all rests")
    return {"statistics": out, "reasons": reasons}


def judge_loss(
    d: dict, claim: manifest.Claim, found: dict[str, list[dict]], alpha: float, paired: bool, out: dict
) -> list[str]:
    """Reasons why the losses do not carry the claim; adds target, parity and noninferior to `out`."""
    from evidence import statistics
    losses, reasons = {name: [r["val_loss"] for r in rows] for name, rows in found.items()}, []
    if d["target"] is not None:
        test = out["target"] = statistics.target_test(losses["new"], d["target"], alpha)
        if not test["passed"]:
            p = "no p (the runs have no spread)" if test["p"] is None else f"p = {test['p']:.4g}"
            reasons.append(
                f"target {d['target']:g}: mean {test['mean']:.5f} of {test['n']} runs, {p}, needed p < "
                f"{alpha:.4g}"
            )
    if d["claim"] == "ml":
        if d["target"] is None:
            reasons.append(f"scale {d['scale']} has no target to reach: set one for all arms (--set "
                           "validation.target=...)")
        return reasons
    parity = out["parity"] = check_parity(claim, found)
    reasons += [f"parity: {text}" for text in parity["failures"]]
    base = "base" if "base" in losses else "parent"
    test = out["noninferior"] = {"against": d["arms"][base]["record"], **statistics.noninferior(
        losses["new"], losses[base], d["margin"], paired, alpha)}
    last = last_ml(deltas.load_records().get(test["against"]))
    if last is not None and last.ref != test["against"]:
        reasons.append(f"loss: {test['against']} computes what its parent does: run the last ml record, "
                       f"{last.ref}, as arm base")
    elif not test["passed"]:
        upper = "unknown (no spread)" if test["upper"] is None else f"{test['upper']:+.5f}"
        reasons.append(
            f"loss against {test['against']}: {test['estimate']:+.5f}, upper bound {upper}, must be below "
            f"{d['margin']}"
        )
    return reasons


def judge_time(ratio: dict | None, alpha: float, what: str = "time") -> list[str]:
    """Reasons why a time ratio does not show that the new arm is faster; empty if it does."""
    if ratio is None:
        return [f"{what}: the logs hold none above zero"]
    if ratio["p_less"] is None or not ratio["p_less"] < alpha:
        p = "no p (the times have no spread)" if ratio["p_less"] is None else f"p = {ratio['p_less']:.4g}"
        return [f"{what}: {ratio['estimate']:.4f} of the parent's, {p}, needed p < {alpha:.4g}: not shown to "
                "be faster"]
    return []


def check_looks(found: Evidence) -> list[str]:
    """Reasons against a claim that was not ended when it had to be:
    each look is taken again from the logs."""
    d = found.declaration
    reasons = []
    for look, declared in zip(found.claim.looks, d["plan"].get("looks", [])):
        passes = not judge(found.claim, declared["alpha"], look["runs"])["reasons"]
        if passes != (look["decision"] == "passed"):
            reasons.append(f"the look at {look['runs']} runs was booked as {look['decision']!r}, its runs "
                           f"{'pass' if passes else 'do not pass'} at {declared['alpha']:.4g}")
    return reasons


def check_parity(claim: manifest.Claim, found: dict[str, list[dict]]) -> dict:
    """Loss and gradients of the last untimed step, and the first timed training losses: new against parent,
    seed by seed."""
    logs = {name: {r["seed"]: events_of(claim, r) for r in found[name]} for name in ("new", "parent")}
    precision = precision_of(claim.declaration["arms"]["new"]["settings"])
    limits, rows, failures = PARITY[precision], [], []
    for seed in sorted(set(logs["new"]) & set(logs["parent"])):
        new, old = (next((e for e in logs[name][seed] if e["kind"] == "probe"), None)
                    for name in ("new", "parent"))
        if new is None or old is None or new["tokens"] != old["tokens"] or new["step"] != old["step"]:
            failures.append(f"seed {seed}: no probes of the same untimed step (system.warmup_steps = 0?)")
            continue
        if len({runlog.covers_all(logs[name][seed][0]) for name in ("new", "parent")}) > 1:
            failures.append(
                f"seed {seed}: the log of one arm (version 2, several processes) has losses and gradients "
                "of process 0 alone: run both arms again")
            continue
        row = {**parity(new, old), "train_loss": first_losses_apart(logs["new"][seed], logs["parent"][seed])}
        rows.append({"seed": seed, **row})
        if row["loss"] > limits["loss"]:
            failures.append(
                f"seed {seed}: loss differs by {row['loss']:.1e} (relative, allowed {limits['loss']:.0e})")
        if row["train_loss"] > limits["first"]:
            failures.append(f"seed {seed}: the first {FIRST_STEPS} timed training losses differ by "
                            f"{row['train_loss']:.1e} (relative, allowed {limits['first']:.0e})")
        if max(row["worst"], row["median"]) > limits["gradient"]:
            failures.append(
                f"seed {seed}: gradients differ by {row['worst']:.1e} ({row['parameter']}; median "
                f"{row['median']:.1e}; relative, allowed {limits['gradient']:.0e})")
    if not rows and not failures:
        failures.append("no seed was run by both arms: pair them by seed")
    return {"precision": precision, **limits, "floor": FLOOR, "rows": rows, "failures": failures}


def precision_of(settings: dict) -> str:
    """The coarsest dtype of plain settings: a key of PARITY."""
    return next((p for p in ("bfloat16", "float32", "float64") if p in settings["numerics"].values()),
                "float32")


def events_of(claim: manifest.Claim, row: dict) -> list[dict]:
    """All events of a run of a claim."""
    return runlog.read_chain(claim.folder / "runs" / row["folder"] / "run.jsonl")


def first_losses_apart(new: list[dict], old: list[dict]) -> float:
    """Largest relative difference of the first timed training losses of two runs of one seed."""
    a, b = ([x for e in events if e["kind"] == "validation" for x in e["train_loss"]][:FIRST_STEPS]
            for events in (new, old))
    return (
        max((abs(x - y) / abs(y) for x, y in zip(a, b)), default=math.inf) if len(a) == len(b) else math.inf
    )


def parity(new: dict, old: dict) -> dict:
    """{loss, worst, parameter, median}: relative differences of two probes.

    worst: over all parameters, relative to the gradient's norm (at least FLOOR of the largest one). median:
    relative to each one's own norm, so that small gradients have a say as well.
    """
    # the two arms may be commits that name parameters differently
    a, b = (renames.present_parameters(probe["gradients"]) for probe in (new, old))
    out = {"loss": abs(new["loss"] - old["loss"]) / abs(old["loss"])}
    odd = sorted(set(a) ^ set(b))
    if odd or not a:
        return out | {
            "worst": float("inf"), "median": float("inf"), "parameter": odd[0] if odd else "no parameter"
        }
    tiny = 1e-30  # a gradient that is zero in both programs agrees
    floor = FLOOR * max(norm for norm, _ in b.values()) + tiny
    apart = {name: max(abs(x - y) for x, y in zip(a[name], b[name])) for name in a}
    worst, parameter = max((apart[name] / max(b[name][0], floor), name) for name in a)
    median = middle.median(difference / (b[name][0] + tiny) for name, difference in apart.items())
    return out | {"worst": worst, "parameter": parameter, "median": median}


# ----- grades -----------------------------------------------------------------------------------------------

def read_audit(path: Path | str | dict) -> tuple[dict, dict, bool]:
    """The result of `records audit --json`: of a file, or as a dict one that was made in this call."""
    made = isinstance(path, dict)
    try:
        audit = path if made else untrusted.json_file(path)
        if audit["version"] != 1 or not isinstance(audit["passed"], bool):
            raise ValueError
        checks = {check["name"]: check["passed"] for check in audit["checks"]}
        facts = {
            "commit": audit["commit"], "tree": audit["tree"], "record": audit.get("record"),
            "passed": audit["passed"], "checks": checks, "confined": dict(audit["confined"]), "counts": False
        }
    except (UserError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{path}: not the result of an audit; write one with `records audit COMMIT --json FILE`"
        ) from None
    return facts, audit, made


def audit_now(folder: Path) -> dict:
    """The result of an audit of a claim's commit and record by this checkout. UserError if the claim names no
    commit of this repository."""
    from evidence import audit
    new = (manifest.read(folder).declaration or {}).get("arms", {}).get("new", {})
    if not isinstance(new.get("commit"), str) or not isinstance(new.get("record"), str):
        raise UserError(f"{folder}: --audit now: the claim names no commit and record to audit")
    say = functools.partial(print, file=sys.stderr, flush=True)
    return audit.audit(arms.commit_of(new["commit"]), new["record"], say=say,
                       seeds=seeds_of(manifest.read(folder).declaration))


def seeds_of(declaration: dict) -> list[int]:
    """The seeds of the counted runs that a claim declares for its record, in order."""
    return sorted({x["seed"] for x in declaration["order"] if x["arm"] == "new" and not x["discard"]})


def grade_audit(
    results: dict, audit: tuple[dict, dict, bool], declaration: dict, key: Path | None = None
) -> None:
    """`audited` if an audit of the very code and record passed, which this call made or the judge's key
    signed; a failed one speaks against the claim whoever made it."""
    from evidence.audit import CHECKS
    audit, whole, made = audit
    new, looked = declaration["arms"]["new"], whole.get("seeds")
    looked = [x for x in looked if type(x) is int] if isinstance(looked, list) else []
    results["audit"] = audit
    if (audit["commit"], audit["tree"]) != (new["commit"], new["tree"]):
        results["unknown"].append(f"the audit is of commit {str(audit['commit'])[:12]}, the runs are of "
                                  f"{new['commit'][:12]}: it does not count")
    elif audit["record"] != new["record"]:
        results["unknown"].append(
            f"the audit is of {audit['record']}, the claim of {new['record']}: it does not count")
    elif not (audit["confined"].get("network") == "cut off"
              and str(audit["confined"].get("writes")).startswith("limited")):
        results["unknown"].append(
            "the audit ran without a sandbox (network or writes were open): it does not count")
    elif not audit["passed"] or not all(audit["checks"].values()):
        failed = ", ".join(name for name, passed in audit["checks"].items() if not passed)
        results["reasons"].append(f"the audit of its code failed: {failed}")
        audit["counts"] = True
    elif lacking := sorted(set(CHECKS) - set(audit["checks"])):
        results["unknown"].append(f"the audit lacks {', '.join(lacking)}: it does not count")
    elif left := [x for x in seeds_of(declaration) if x not in looked]:
        results["unknown"].append(f"the audit did not look at seeds {', '.join(map(str, left))} of the claim "
                                  "(its --seed): it does not count")
    elif why := uncounted(whole, made, new, key):
        results["unknown"].append(f"{why}: it does not count")
    else:
        results["grade"], audit["counts"] = "audited", True


def tree_of(commit: str) -> str | None:
    """The tree of a commit of this repository, or None."""
    try:
        return arms.line("rev-parse", "--verify", "--quiet", "--end-of-options", f"{commit}^{{tree}}")
    except UserError:
        return None


def uncounted(whole: dict, made: bool, new: dict, key: Path | None) -> str:
    """Why an audit that passed does not count, or '': it must be this call's or the judge's, of a commit that
    this repository has."""
    tree = tree_of(new["commit"])
    if tree is None:
        return f"the audit is of commit {new['commit'][:12]}, which this repository does not have (fetch it)"
    if tree != new["tree"]:
        return f"the audit is of tree {new['tree'][:12]}, commit {new['commit'][:12]} has {tree[:12]}"
    if made:
        return ""
    if key is None:
        return "the audit is text that anyone can type: name the judge's key (--judge-key), or --audit now"
    if not signing.valid(whole, key):
        return f"the audit is not signed by the key {key.name}"
    return ""


def grade_reproduction(results: dict, found: Evidence, folder: Path | str) -> None:
    """`reproduced` if the same claim of another machine is consistent,
    and its runs show all of it by themselves."""
    other = claim_laws.examine(folder)
    why = not_a_reproduction(found, other)
    if why:
        results["unknown"].append(f"the reproduction offered is none: {why}")
        return
    judged = judge(other.claim, last_alpha(other.declaration, other.claim))
    reasons = judged["reasons"] + check_looks(other)
    start = next(iter(other.logs.values())).start
    results["reproduction"] = {"manifest": other.claim.last_hash, "passed": not reasons, **{
        k: start[k] for k in ("machine", "device", "torch")}, "arms": judged["statistics"]["arms"]}
    if not reasons:
        results["grade"] = "reproduced"
    else:
        results["unknown"].append(
            f"the reproduction offered is none: its own runs do not show the claim ({reasons[0]})")


def not_a_reproduction(found: Evidence, other: Evidence) -> str:
    """Why another claim folder is no rerun of this one elsewhere, or ''."""
    if other.problems:
        return f"it is refused itself ({other.problems[0]})"
    mine, theirs = found.declaration, other.declaration
    if not provenance.same_record(mine["record"], theirs["record"]):
        return f"its record is {theirs['record']}, here {mine['record']}"
    for key in ("claim", "scale", "target"):
        if theirs[key] != mine[key]:
            return f"its {key} is {theirs[key]}, here {mine[key]}"
    code_only = all(mine["arms"]["new"][k] == mine["arms"]["parent"][k] for k in ("ml_hash", "system_hash"))
    for name in ("new", "parent"):
        # without a delta the code is the claim
        for key in ("ml_hash", "system_hash", *(["tree"] if code_only else [])):
            if theirs["arms"][name][key] != mine["arms"][name][key]:
                return f"its arm {name} has another {key}"
    a, b = (next(iter(x.logs.values())).start for x in (found, other))
    if a["machine"] == b["machine"]:
        return "it ran on the same machine"
    if a["val_digest"] != b["val_digest"]:
        return "it was measured on other validation tokens"
    if clocks_of(found) & clocks_of(other):
        return "it holds runs of this claim"
    return ""


def clocks_of(found: Evidence) -> set[tuple[float, ...]]:
    """The training times at the validations of each run of a claim, as a set: no two runs have the same."""
    return {tuple(v["train_time_ms"] for v in log.validations) for log in found.logs.values()}


# ----- text logs --------------------------------------------------------------------------------------------

def is_text_logs(folder: Path) -> bool:
    """No claim and no run folders, but text files: here or one level down,
    as upstream's records have them."""
    marks = (manifest.NAME, "run.jsonl", "*/run.jsonl")
    return folder.is_dir() and not any(files.listed(folder, m) for m in marks) and any(
        files.listed(folder, m) for m in ("*.txt", "*/*.txt"))


def text_logs(folder: Path, target: float | None) -> dict:
    """Statistics of a folder of upstream's text logs, one run a file.
    UserError if they are not one group of runs."""
    from evidence import statistics
    paths = files.listed(folder, "*.txt")
    if not paths:
        inner = sorted({p.parent.name for p in files.listed(folder, "*/*.txt")})
        raise UserError(
            f"{folder}: its logs lie in {', '.join(inner[:4])}: name one of these, each is a group of its own"
        )
    if target is None:
        raise UserError(f"{folder}: text logs: name the loss to reach, like --target 3.28")
    logs, seen = {}, {}
    for path in paths:
        log, _ = textlog.read(path)
        twin = seen.setdefault(json.dumps(log["curve"]), path.name)
        if twin != path.name:
            raise UserError(f"{path}: the same run as {twin}: a copy; remove one")
        logs[path.name] = log
    lengths = sorted({log["scheduled_steps"] or log["steps"] for log in logs.values()})
    if len(lengths) > 1:
        raise UserError(f"{folder}: runs of {', '.join(map(str, lengths))} steps are different experiments: "
                        "put each in a folder of its own")
    lost = [name for name, log in logs.items() if log["diverged"] or not log["complete"]]
    done = [log for name, log in logs.items() if name not in lost]
    test = statistics.target_test([log["val_loss"] for log in done], target) if done else None
    times = [log["train_time_ms"] for log in done]
    reasons = [f"{name}: no final loss: it counts as failed" for name in lost]
    if test and not test["passed"]:
        p = "no p (one run, or no spread)" if test["p"] is None else f"p = {test['p']:.4g}"
        reasons.append(f"target {target:g}: mean {test['mean']:.5f}, {p}")
    return {
        "version": 1,
        "claim": "text logs",
        "grade": "none (text logs)",
        "verdict": "not shown" if reasons else "shown",
        "reasons": reasons,
        "target": test,
        "steps": lengths[0],
        "files": sorted(logs),
        "time_ms": statistics.describe(times) if times and None not in times else None,
        "unknown": [
            "which runs were left out, on which machine and data and with which code these ran: text logs "
            "tell nothing that cannot be typed", *CANNOT_KNOW[3:]
        ],
    }


# ----- what is printed --------------------------------------------------------------------------------------

def number(value: float | None, form: str) -> str:
    """A number in a format, or a dash for None."""
    return "-" if value is None else format(value, form)


def seconds(ms: float | None) -> float | None:
    """Milliseconds to seconds; None stays None."""
    return None if ms is None else ms / 1000


def report_text_logs(results: dict) -> None:
    """Print what a folder of published text logs shows."""
    test, ms = results["target"], results["time_ms"]
    print(f"{len(results['files'])} text logs of {results['steps']} steps")
    if test:
        print(f"loss  n {test['n']}  mean {test['mean']:.5f}  sd {number(test['sd'], '.5f')}  target "
              f"{test['target']:g}  t {number(test['t'], '.3f')}  p {number(test['p'], '.4g')}")
    if ms:
        print(f"time  mean {seconds(ms['mean']):.3f} s  sd {number(seconds(ms['sd']), '.3f')}")
    finish_report(results, test)


def report(results: dict, where: str) -> None:
    """The problems, or the statistics, then verdict, grade, and what is not known."""
    if results["claim"] == "comparison" and not results["problems"]:
        compare.report(results)
    elif results.get("statistics"):
        report_record(results)
    finish_report(results, (results.get("statistics") or {}).get("target"))
    print(where)


def report_record(results: dict) -> None:
    """Print what a claim shows: arms, statistics, parity."""
    print(f"{results['record']} at scale {results['scale']}: claim {results['claim']}, {results['pairing']} "
          f"pairing, {results['device']}, torch {results['torch']}")
    s = results["statistics"]
    for name, row in s["arms"].items():
        arm, loss, ms = results["arms"][name], row["loss"] or {}, row["time_ms"] or {}
        print(f"  {name:7} {arm['record']:10} n {row['n']:<3} loss {number(loss.get('mean'), '.5f')} sd "
              f"{number(loss.get('sd'), '.5f')}  time {number(seconds(ms.get('mean')), '.3f')} s sd "
              f"{number(seconds(ms.get('sd')), '.3f')}  {arm['steps']} steps"
              + ("  before the clock: start {start:.1f} s, warm-up {warmup:.1f} s".format(**row["untimed_s"])
                 if row["untimed_s"] else ""))
    if s.get("target"):
        print(
            f"target {s['target']['target']:g}: mean {s['target']['mean']:.5f}, p "
            f"{number(s['target']['p'], '.4g')} (needed < {s['alpha']:.4g}, which takes a mean "
            f"{number(s['target']['margin'], '.5f')} below it)"
        )
    if s.get("time"):
        print(f"time: {s['time']['estimate']:.4f} of the parent's [{number(s['time']['low'], '.4f')}, "
              f"{number(s['time']['high'], '.4f')}], p {number(s['time']['p_less'], '.4g')}")
    if s.get("off_clock"):
        print(off_clock.told(s["off_clock"]))
    if s.get("loss"):
        print(f"loss: {s['loss']['estimate']:+.5f} against the parent [{number(s['loss']['low'], '+.5f')}, "
              f"{number(s['loss']['high'], '+.5f')}]")
    if s.get("parity") and s["parity"]["rows"]:
        rows = s["parity"]["rows"]
        loss, first, worst, median = (max(r[k] for r in rows)
                                      for k in ("loss", "train_loss", "worst", "median"))
        print(f"parity ({s['parity']['precision']}, {len(rows)} seeds): loss within {loss:.1e}, first "
              f"training losses {first:.1e}, gradients within {worst:.1e}, median {median:.1e} (allowed "
              f"{s['parity']['loss']:.0e}, {s['parity']['first']:.0e} and {s['parity']['gradient']:.0e})")
    if s.get("noninferior"):
        print(f"loss against {s['noninferior']['against']}: {s['noninferior']['estimate']:+.5f}, upper bound "
              f"{number(s['noninferior']['upper'], '+.5f')} (margin {s['noninferior']['margin']})")
    if results.get("against"):
        print("an increment on " + ", ".join(x["attempt"] for x in results["against"])
              + ": it stays an attempt until they are records")
    if results.get("attempts"):
        print(*ledger.lines(results["attempts"]), sep="\n")
    for x in results["excluded"]:
        print(f"excluded: run {x['run']} ({x['arm']}, seed {x['seed']}), {x['cause']}: {x['note']}")


def finish_report(results: dict, test: dict | None) -> None:
    """Print the verdict, its reasons, the grade and what verification cannot know."""
    if results["verdict"] == "refused":
        problems = results["problems"]
        print(f"REFUSED: {len(problems)} problem{'s' if len(problems) > 1 else ''}",
              *(f"  {p}" for p in problems), sep="\n")
    elif results["reasons"]:
        print("NOT SHOWN:", *(f"  {r}" for r in results["reasons"]), sep="\n")
    elif results["claim"] != "comparison":
        print("SHOWN")
    if test and not test["passed"] and test["runs_for"]:
        print(f"a FRESH set with this mean and sd would need {test['runs_for']} runs to pass with 90 % "
              "power; this one may not be extended")
    print(f"grade: {results['grade']}", "what this cannot know:", *(f"  {u}" for u in results["unknown"]),
          sep="\n")
