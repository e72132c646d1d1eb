"""Laws of `records verify`, third part: kinds of bent claims that are many to one law. Where a law reads all of
a claim, several bends share one claim, and each must be named; laws of single lines are asked directly.
"""

import copy
import json
import math
import random
import re

import pytest

import runlog
from claim_builder import RECORD, Forgery, arm, built, claim, command, good, rewall
from common import untrusted
from common.errors import UserError
from evidence import ledger, manifest, plausible, run_laws, stack, verify, writeup
from settings import deltas
from test_bent_facts import fate, second_leg, tell_all


def names_each(folder, reasons):
    """Verify a claim: refused, every reason among the problems, and no problem without its reason."""
    results = verify.verify(folder)
    problems = results["problems"]
    missing = [r for r in reasons if not any(re.search(r, p) for p in problems)]
    odd = [p for p in problems if not any(re.search(r, p) for r in reasons)]
    assert results["verdict"] == "refused" and not missing and not odd, (missing, odd)


# ----- the folder -------------------------------------------------------------------------------------------

LOOSE = ("weights.bin", "conftest.py", "x.pth", ".gitattributes", "dirty-0123456789abcdef.diff", "upstream/a.py",
         "runs/{run}/model.py", "tiny/evil.py", "ｒｕｎｓ/x.txt", "runs2/run.jsonl")


def test_a_claim_folder_holds_what_a_law_reads_and_nothing_else(claim):
    run = claim.name(3)
    for name in LOOSE:
        path = claim.folder / name.format(run=run)
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    sources = next(claim.folder.glob("runs/sources-*.txt"))
    sources.with_name(sources.name + ".xz").write_bytes(b"anything")
    (claim.folder / "upstream/statistics.md").write_text("written by submit --format upstream")
    (claim.folder / "tiny/log.txt").write_text("a run at another scale, of a record")
    loose = [re.escape(name.format(run=run)) + ": no part of a claim folder" for name in LOOSE]
    names_each(claim.folder, [*loose, "^(runs2|ｒｕｎｓ): no part", "sources lie here twice, packed and not"])


@pytest.mark.parametrize("name, reason", [
    (".git", "is a repository of its own, whose settings git would follow"), (".GIT", "repository of its own"),
    ("GIT~1", "repository of its own"), ("-rf", "a command would take for an option"),
    ("aux", "not every system can store"), ("Com1.txt", "not every system can store"),
])
def test_names_that_act_are_refused_before_anything_is_read(name, reason, tmp_path):
    (tmp_path / "a" / name).mkdir(parents=True)
    with pytest.raises(UserError, match=reason):
        untrusted.survey(tmp_path)
    assert not untrusted.is_name(name)
    assert all(map(untrusted.is_name, ("auxiliary", "computer", "con1", ".gitignore", "a-rf", "good")))


# ----- lines ------------------------------------------------------------------------------------------------

SPELLINGS = [
    ('": ', '":  '), (", ", ",\t"), ('"val_loss"', '"val\\u005floss"'), ('"epoch": 0', '"epoch": -0'),
    ('"epoch": 0', '"epoch": 0e0'), ('"step": 9,', '"step": 9.0,'), ("5.25", "5.250"), ("5.25", "525e-2"),
]


def test_a_line_is_spelled_as_logs_are_written(tmp_path):
    """All hashes are right: they are of what a line means."""
    path = tmp_path / "run.jsonl"
    event = {"n": 0, "kind": "validation", "step": 9, "epoch": 0, "val_loss": 5.25}
    line, _ = runlog.chain_line(runlog.GENESIS, event)
    path.write_text(line + "\n")
    assert runlog.read_chain(path) == [event]
    for old, new in SPELLINGS:
        assert old in line
        path.write_text(line.replace(old, new) + "\n")
        with pytest.raises(UserError, match=r"line 1 \(validation\) (is spelled in another way|breaks the hash)"):
            runlog.read_chain(path)
    path.write_text("{" + ", ".join(reversed(line[1:-1].split(", "))) + "}\n")
    with pytest.raises(UserError, match="is spelled in another way"):
        runlog.read_chain(path)
    path.write_text(line)
    with pytest.raises(UserError, match="line 1 lacks its end"):
        runlog.read_chain(path)


def test_a_truth_value_is_no_number_and_every_field_has_its_type(claim):
    """In every event, whichever field: a value of a type that the field never has."""
    for event in claim.events(3):
        assert list(run_laws.misshapen(event)) == []
        for key in event.keys() - set(run_laws.CHAIN):
            for wrong in (not isinstance(event[key], bool), [{}], {"x": []}):
                if isinstance(wrong, type(event[key])) or (event["kind"], key) == ("start", "memory"):
                    continue
                told = "".join(run_laws.misshapen({**event, key: wrong}))
                assert key in told or "verdict" in told, (event["kind"], key, wrong)
    validation, probe = claim.events(3, "validation")[4], claim.events(3, "probe")[0]
    validation["train_loss"][2] = True
    probe["gradients"]["lm_head.weight"] = [True, 0.1]
    assert "something of the wrong type" in "".join(run_laws.misshapen(validation))
    assert "two numbers for each parameter" in "".join(run_laws.misshapen(probe))


@pytest.mark.parametrize("fields, reason", [
    ({}, "lacks bytes"), ({"bytes": "x", "write_ms": 1.0}, "bytes = 'x' has the wrong type"),
    ({"error": 3}, "error = 3 has the wrong type"),
])
def test_a_checkpoint_that_cannot_be_rendered_is_a_problem_and_no_traceback(fields, reason):
    event = {"n": 5, "kind": "checkpoint", "wall_ms": 1.0, "step": 9, "copy_ms": 1.0, **fields}
    assert reason in "".join(run_laws.misshapen(event))


# ----- the manifest -----------------------------------------------------------------------------------------

def change(path, value):
    """An edit: the value at a path of keys becomes another one."""
    def edit(declared):
        node = declared
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value
    return edit


NEW, LOOKS = ("arms", "new"), [{"runs": 2, "alpha": 0.005}, {"runs": 4, "alpha": 0.005}]
DECLARED = [
    (change(["machine", "note"], "fast"), "machine has a field 'note'"),
    (change(["machine", "cores"], True), "cores = True has the wrong type"),
    (change(["launcher"], "torchrun --evil"), "launcher must be one of"),
    (change(["aa"], "yes"), "aa = 'yes' has the wrong type"),
    (change(["data"], ["/etc"]), "data = .* has the wrong type"),
    (change(["corpus_prefixes"], [1, None]), "corpus_prefixes must be digests"),
    (change(["environment"], "x"), "environment = 'x' has the wrong type"),
    (change([*NEW, "argv"], "short/11"), "argv = .* has the wrong type"),
    (change([*NEW, "report"], "REACHED"), "report = .* has the wrong type"),
    (change([*NEW, "path"], "/etc/passwd"), "arm new of a record has a script's fields"),
    (change(["plan"], {"runs": 4, "looks": LOOKS}), "plan must hold runs or looks, not both"),
    (change(["plan"], {"looks": [{"runs": 4, "alpha": 0.01, "note": "x"}]}), "a list of {runs, alpha}"),
    (change(["order", 0, "seed"], -1), "is no {arm, seed, discard}"),
]


@pytest.mark.parametrize("edit, reason", DECLARED)
def test_every_field_of_a_declaration_is_held_to_a_type(edit, reason, good):
    declared = copy.deepcopy(manifest.read(good).declaration)
    edit(declared)
    with pytest.raises(UserError, match=reason):
        manifest.Claim(good / manifest.NAME).add(declared, "")


@pytest.mark.parametrize("name", ["x" * 300, "-rf", ".git", "a:b", "nul", "..", "a/b"])
def test_a_run_s_folder_has_a_name_that_every_system_stores(name, claim):
    book = manifest.Claim(claim.folder / manifest.NAME)
    for line in claim.lines[:2]:
        book.add(line, "")
    with pytest.raises(UserError, match="must be a name under runs/"):
        book.add({**claim.lines[2], "folder": name}, "")
    with pytest.raises(UserError, match="leftover counts"):
        book.add({**claim.lines[2], "leftover": -1}, "")


def test_a_moment_has_one_spelling():
    assert manifest.moment("2026-09-01T04:05:06Z") is not None
    for text in ("2026-9-1T4:5:6Z", "２０２６-09-01T04:05:06Z", "2026-09-01T04:05:06Z ", "2026-09-01t04:05:06Z"):
        assert manifest.moment(text) is None
    assert plausible.day("2026-01-01") is not None
    assert plausible.day("2026-1-1") is plausible.day("now") is None


# ----- the ledger -------------------------------------------------------------------------------------------

ALLOWS = {"legs": 2, "alpha": 0.01}
LEDGER = [  # (line, edit, reason)
    (0, change(["note"], "x"), "has a field .'note'. that nothing reads"),
    (0, change(["rule", "note"], "x"), "has a field .'note'. that nothing reads"),
    (0, change(["rule", "text"], "whatever comes out is shown"), "the text of the rule is not that of its numbers"),
    (0, change(["idea"], "../../x"), "must be the name of a folder"),
    (0, change(["idea"], "x" * 300), "must be the name of a folder"),
    (1, change(["note"], "x"), "has a field .'note'. that nothing reads"),
    (1, change(["name"], "a/b"), "must be that of a folder"),
    (1, change(["machine"], {}), "machine is missing"),
    (1, change(["plan"], {}), "plan must hold runs or looks"),
    (1, change(["plan"], {"looks": [{}]}), "plan must hold runs or looks"),
    (1, change(["plan"], {"runs": "4"}), "plan must hold runs or looks"),
    (1, change(["against"], [1, {}]), "against must be names of attempts"),
    (2, change(["note"], "x"), "has a field .'note'. that nothing reads"),
    (3, change(["name"], "good"), "good is the folder of an earlier leg"),
]


@pytest.mark.parametrize("line, edit, reason", LEDGER)
def test_every_leg_of_a_ledger_is_held_to_its_form_not_only_the_claimed_one(line, edit, reason, claim):
    second_leg(claim)
    claim.book.insert(2, fate(claim, 1))
    for n, event in enumerate(claim.book):
        event["n"] = n
    claim.book[0]["rule"]["text"] = ledger.rule_text(claim.book[0]["rule"])
    lines = copy.deepcopy(claim.book)
    book = ledger.Ledger()
    for event in lines:
        book.add(event, "")
    lines = copy.deepcopy(claim.book)
    edit(lines[line])
    book = ledger.Ledger()
    with pytest.raises(UserError, match=reason):
        for event in lines:
            book.add(event, "")


@pytest.mark.parametrize("when, more, reason", [
    ("2046-01-01T00:00:00Z", {}, "line 3 is dated 2046-01-01T00:00:00Z, in the future"),
    (None, {}, "the fate of leg 1 was booked at .*, before the last line of its manifest"),
    ("last", {"runs": 2}, "the fate of leg 1 tells runs 2, its manifest has 9"),
])
def test_a_fate_comes_after_the_runs_and_counts_them(when, more, reason, claim):
    claim.book.append(fate(claim, 1, "shown", **more))
    claim.book[-1]["utc"] = {None: claim.book[-1]["utc"], "last": claim.lines[-1]["utc"]}.get(when, when)
    claim.seal()
    claim.book[-1]["manifest"] = manifest.read(claim.folder).last_hash
    claim.write_ledger()
    names_each(claim.folder, [reason])


def test_a_ledger_is_about_the_idea_and_record_of_its_manifest(claim):
    claim.book[0] |= {"idea": "another", "record": "short/89"}
    claim.lines[0]["ledger"] |= {"leg": 1}
    claim.seal()
    names_each(claim.folder, ["is about another, the manifest declares 'good'",
                              "leg 1 is about 'short/89', the manifest claims short/11"])
    for entry in ({"note": "x"}, {"leg": True}, {"leg": 1.0}):
        found = type("Found", (), {"declaration": {"ledger": {**claim.lines[0]["ledger"], **entry}},
                                   "folder": claim.folder})
        assert ["is no {idea, leg, hash}" in x for x in ledger.check(found)] == [True]


@pytest.mark.parametrize("path", ["validation.target", "validation.tokens", "validation.seq_len", "validation"])
def test_a_stack_leaves_the_track_alone(path):
    record, entry = deltas.find_record("short/11"), {"attempt": "attempts/other", "parent": "short/10"}
    found = list(stack.problems([{**entry, "delta": {path: 9}}], record))
    assert found == [f"attempts/other sets {path}, which belongs to the track"]
    odd = {**entry, "delta": {}, "note": 1}
    assert "is no {attempt, parent, delta}" in next(stack.problems([odd], record))


# ----- logs: copies, rounded numbers, times -----------------------------------------------------------------

def told(claim, run):
    """The end of a run repeats its last validation."""
    last, end = claim.events(run, "validation")[-1]["val_loss"], claim.events(run, "end")[0]
    end |= {"val_loss": last, "reached": last <= 5.2, "verdict": [f"final validation loss {last:.4f}"]}


def test_numbers_that_were_copied_or_rounded_are_named(claim):
    draw = random.Random(1)
    a, b, c, d = claim.counted()
    for mine, theirs in zip(claim.events(b, "validation")[1:], claim.events(a, "validation")[1:]):
        mine["val_loss"] = theirs["val_loss"] + 1e-6 * draw.random()
    told(claim, b)
    for v in claim.events(c, "validation")[1:]:
        v["val_loss"] = round(v["val_loss"], 3)
    told(claim, c)
    for v in claim.events(d, "validation"):
        v["train_loss"] = [round(x, 2) for x in v["train_loss"]]
    probe = claim.events(a, "probe")[0]
    claim.events(c, "probe")[0] |= {key: probe[key] for key in ("loss", "gradients")}
    parent = claim.counted("parent")[0]
    claim.events(parent, "end")[0]["verdict"] += ["target 3.28 REACHED: 3.2712"]
    claim.seal()
    names_each(claim.folder, [
        r"has the validation losses of seed \d in .*: a copy", "is rounded, a mean of losses has more digits",
        "its training losses are rounded to 4 decimals", r"has the very probe of seed \d in .*: a copy",
        "its verdict says 'target 3.28 REACHED"
    ])


def timed(claim, run, times):
    """The times of a run become these, by step, and its wall time follows."""
    for event in claim.events(run):
        if "train_time_ms" in event:
            event["train_time_ms"] = round(times[event.get("step", 72)], 3)
    rewall(claim, run)


def test_times_that_no_clock_has_are_named(claim):
    (a, b, *_), parent = claim.counted(), claim.counted("parent")[0]
    timed(claim, a, {v["step"]: 0.83 * v["train_time_ms"] for v in claim.events(parent, "validation")})
    timed(claim, b, {v["step"]: 1995 * v["step"] + 0.063 for v in claim.events(b, "validation")})
    claim.seal()
    names_each(claim.folder, [r"its times are those of \S+ times (0\.83|1\.2048): a copy",
                              "take the same time from one validation to the next within 1e-05"])


def test_times_that_are_shortened_in_the_logs_alone_leave_a_gap_in_the_manifest(claim):
    draw = random.Random(2)
    for run in [e["run"] for e in claim.of("register") if e["arm"] == "new"]:
        factor = 0.7 + 0.01 * draw.random()
        timed(claim, run, {v["step"]: factor * v["train_time_ms"] + 3 * draw.random() * bool(v["step"])
                           for v in claim.events(run, "validation")})
    claim.seal()
    names_each(claim.folder, [r"arm new: \d\d s of a run from its registration to its end are not in its log, of "
                              r"arm parent \d s"])


def test_a_seed_that_is_run_again_has_its_losses_again(claim):
    run = claim.counted()[1]
    claim.again(run)
    events = claim.events(run)[:-3]  # killed before its last validation, for a loss that looked poor
    for v in events:
        if v.get("step") and v["kind"] == "validation":
            v["val_loss"] += 0.4
    claim.logs[claim.name(run)] = events
    claim.of("finish", run)[0]["status"] = "failed"
    claim.seal()
    names_each(claim.folder, [r"seed \d has loss \d\.\d+ at step 9, in \S+ it had \S+: one seed has one curve"])


def test_what_the_arms_declare_of_themselves_is_held_against_the_rest(claim):
    new, parent = (claim.lines[0]["arms"][name] for name in ("new", "parent"))
    new["argv"] = [*new["argv"], "--out", "/root/.ssh"]
    parent["tree"] = "main"
    claim.lines[0] |= {"code": "9" * 40, "aa": True}
    tell_all(claim, device="CPU of the moon")
    claim.seal(spell=False)
    names_each(claim.folder, [
        "arm new is started with .*--out /root/.ssh', declared are", "arm parent: 'main' is no tree of a commit",
        "declared by code 999999999999, arm new runs 111111111111", "aa is true",
        "device 'CPU of the moon' is none of 1 processes on a CPU", "two trees, and no difference is declared"
    ])


@pytest.mark.parametrize("text", ["\u2800", "\u3164", "\u00a0", "@", "-"])
def test_a_name_that_shows_nothing_is_none(text):
    assert not plausible.is_visible(text) and plausible.is_visible(text + "名")


# ----- record.toml and the page -----------------------------------------------------------------------------

TOML = [
    ("[delta]", "[published]\nminutes = 0.01\n[delta]", "published is of records that upstream has published"),
    ('"systems"', '"retiming"', "kind retiming: a claim is one of ml, systems"),
    ("2026-01-01", "2026-01-01T00:00:00Z", "is none like 2026-11-30"),
    ("2026-01-01", '"2026-1-1"', "is none like 2026-11-30"), ("2026-01-01", '"soon"', "is none like 2026-11-30"),
    ('"t"', '"' + "t" * 5000 + '"', "hold at most 200 characters"),
    ('["@x"]', "[" + ", ".join(['"@x"'] * 5000) + "]", "and as many names"),
]


def test_a_record_that_a_claim_brings_has_no_history_yet(tmp_path):
    for before, after, reason in TOML:
        folder = tmp_path / "short" / "901_x"
        toml = untrusted.toml_value(RECORD.replace(before, after), "x")
        record = deltas.parse_record(toml, folder / "x", "short")
        found = [*plausible.check_record(record), *plausible.check_new_record(record)]
        assert [reason in x for x in found] == [True], (after[:30], found)
    with pytest.raises(UserError, match="expected the name of a folder in attempts/"):
        toml = untrusted.toml_value('attempt = "../../etc"\n' + RECORD, "x")
        deltas.parse_record(toml, tmp_path / "x", "short")


def test_a_claim_that_types_its_own_minutes_is_refused(tmp_path):
    s = deltas.resolve("short/5", scale="micro", sets=["system.ranks_per_microbatch=1"]).settings
    arms = {"new": arm("short/901", [], s=s), "parent": arm("short/5", [])}
    (tmp_path / "record.toml").write_text(RECORD.replace("[delta]", "[published]\nminutes = 0.01\n[delta]"))
    results = built(tmp_path, arms, claim="systems", record="short/901", target=None)
    assert ["published is of records" in p for p in results["problems"]] == [True]


def test_a_page_rests_on_these_logs_and_not_on_a_results_file_next_to_it(claim):
    results = verify.verify(claim.folder)
    forged = json.loads(json.dumps(results))
    forged["statistics"]["target"]["p"] = 1e-30
    (claim.folder / "results.json").write_text(json.dumps(forged))
    (claim.folder / "README.md").write_text(writeup.readme(claim.folder, forged))
    assert "README.md: is not the page" in verify.verify(claim.folder)["problems"][0]
    (claim.folder / "results.json").write_text(json.dumps(results | {"grade": "audited"}))
    (claim.folder / "README.md").write_text(writeup.readme(claim.folder, results | {"grade": "audited"}))
    assert verify.verify(claim.folder)["verdict"] == "shown"  # the grade of a call that had the judge's key


def test_texts_of_a_submission_make_no_link_and_no_heading_on_a_page():
    assert writeup.tame("[x](javascript:alert(1))") == r"[x]\(javascript:alert(1))"
    notes = "notes = '''a\n# short/1: SHOWN\n```\n'''\n[delta]"
    toml = untrusted.toml_value(RECORD.replace("[delta]", notes), "x")
    record = deltas.parse_record(toml, deltas.RECORDS, "short")
    results = {"verdict": "not shown", "scale": "micro", "claim": "systems", "grade": "none", "reasons": []}
    lines = writeup.heading(writeup.tame_record(record), results)
    assert [x for x in lines if "SHOWN" in x and x.startswith("#")] == [] and "> # short/1: SHOWN" in lines


def test_the_good_claim_is_still_shown(good):
    assert command(good) == verify.SHOWN
    assert math.isfinite(Forgery(good).events(3, "end")[0]["val_loss"])
