"""Laws of `records submit`: one record claimed by real runs, killed and resumed; and what is refused before
any run."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from claim_builder import FakeTime, advance, arm, build, declaration
from evidence import compare, manifest, submit, verify, writeup
from common.errors import UserError
from settings import deltas

ROOT = Path(__file__).parent.parent
SETS = ["validation.target=7.2", "schedule.steps=3", "validation.tokens=4096"]


def git(*args, cwd):
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
    return subprocess.run(
        ["git", *identity, *args], cwd=cwd, check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A repository of its own with the present files of this one, committed."""
    folder = tmp_path_factory.mktemp("submit") / "repository"
    try:
        names = git("ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")[:-1]
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git checkout")
    for name in names:
        if (ROOT / name).is_file() and not name.startswith(("site/", "tests/golden", "evidence/results")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    git("init", "--quiet", cwd=folder)
    git("config", "user.name", "t", cwd=folder)
    git("config", "user.email", "t@t", cwd=folder)
    git("add", "--all", cwd=folder)
    git("commit", "--quiet", "--message", "all", cwd=folder)
    return folder


def start(checkout, *args):
    cache = os.environ.get("SPEEDRUN_CACHE") or str(ROOT / "data/cache")
    shared = checkout.parent / "cache"  # worktrees of this repository, the corpus of the real one
    if Path(cache, "sample-v1").is_dir() and not shared.exists():
        shutil.copytree(Path(cache, "sample-v1"), shared / "sample-v1")
    env = {**os.environ, "SPEEDRUN_CACHE": str(shared), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "records", "submit", *args], cwd=checkout, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finished(checkout, *args):
    process = start(checkout, *args)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def submitted(checkout):
    """A new record, declared, killed after its second run, resumed. (claim folder, what the steps
    printed)."""
    (checkout.parent / "my.toml").write_text('"optim.muon.lr" = 0.0543\n')
    args = [
        "faster_muon", "--delta", str(checkout.parent / "my.toml"), "--title", "A higher rate", "--parent",
        "short/11", "--people", "@me", "--people", "@you", "--claim", "ml", "--scale", "micro", "--runs", "2",
        *(x for s in SETS for x in ("--set", s))
    ]
    asked = finished(checkout, *args)
    assert asked[0] == 0, asked[2]
    first = start(checkout, *args, "--commit")
    record = checkout / "attempts/faster_muon"
    book, deadline = record / "manifest.jsonl", time.monotonic() + 600
    while (
        time.monotonic() < deadline
        and first.poll() is None
        and not (
            book.exists() and book.read_text().count('"kind": "finish"') == 2
            and book.read_text().count('"register"') == 3
        )
    ):
        time.sleep(0.05)
    assert first.poll() is None, first.communicate()
    first.send_signal(signal.SIGKILL)
    first.communicate()
    before = book.read_text()
    while time.monotonic() < deadline:
        done = finished(checkout, "faster_muon", "--resume", "--format", "upstream")
        if "is still running" not in done[2]:
            break
        time.sleep(0.5)
    return record, asked, before, done


def test_a_new_record_is_written_down_and_has_to_be_committed_first(submitted, checkout):
    record, (code, out, err), _, _ = submitted
    assert code == 0 and err == "" and "git add" in out and "or add --commit" in out
    assert not list((checkout / "records").glob("*/*faster_muon*"))
    toml = (record / "record.toml").read_text()
    assert (
        'parent = "short/11"' in toml and '"optim.muon.lr" = 0.0543' in toml
        and 'people = ["@me", "@you"]' in toml
    )
    assert (
        git("log", "-1", "--format=%s", "--name-only", cwd=checkout) .split("\n")[0]
        .endswith(": A higher rate")
    )
    # --commit takes the record and nothing else
    assert git("show", "--stat", "--format=", cwd=checkout).count("|") == 1


def test_a_killed_submission_resumes_without_repeating_runs(submitted):
    record, _, before, (code, out, err) = submitted
    assert code in (0, 3), err
    book = (record / "manifest.jsonl").read_text()
    assert book.startswith(before)
    claim = manifest.read(record)
    assert claim.complete and [len(claim.counted(name)) for name in ("new", "parent")] == [2, 2]
    assert sum(r.fault is None for r in claim.runs) == 5 and len(claim.runs) <= 6


def test_a_real_submission_is_consistent(submitted):
    record, _, _, (code, out, err) = submitted
    results = json.loads((record / "results.json").read_text())
    assert results["problems"] == [] and results["grade"] == "consistent", results["problems"]
    assert results["claim"] == "ml" and results["statistics"]["target"]["n"] == 2
    assert not any("sources of arm" in u for u in results["unknown"])  # they were compared with the commit
    assert list((record / "runs").glob("sources-*.txt.xz")) and not list(
        (record / "runs").glob("sources-*.txt")
    )


def test_the_readme_has_its_numbers_from_the_results(submitted):
    record, *_ = submitted
    page, results = (record / "README.md").read_text(), json.loads((record / "results.json").read_text())
    assert (
        "By @me, @you" in page and '"optim.muon.lr" = 0.0543' in page
        and "since short/3 by @kellerjordan0" in page
    )
    assert "## What was not measured" in page and "these runs are of scale `micro`" in page
    for arm_name in ("new", "parent"):
        assert f"{results['statistics']['arms'][arm_name]['loss']['mean']:.5f}" in page
    assert ("**SHOWN**" in page) == (results["verdict"] == "shown")
    results["statistics"]["arms"]["new"]["loss"]["mean"] = 1.23456
    (record.parent / "copy").mkdir()
    for name in ("record.toml", "results.json"):
        shutil.copy(record / name, record.parent / "copy" / name)
    (record.parent / "copy/results.json").write_text(json.dumps(results))
    assert "1.23456" in writeup.readme(record.parent / "copy")
    shutil.rmtree(record.parent / "copy")


def test_upstream_s_layout_gives_the_same_statistics_as_text_logs(submitted):
    record, *_ = submitted
    results = json.loads((record / "results.json").read_text())
    folder = record / "upstream" / f"{results['declared'][:10]}_FasterMuon"
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "baseline", "statistics.md", "this_pr"]
    logs = sorted((folder / "this_pr").iterdir())
    assert len(logs) == 2 and all(
        re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\.txt", p.name) for p in logs
    )
    text = logs[0].read_text()
    assert text.startswith("# ----- train_gpt.py") and text.count("\n" + "=" * 100 + "\n") == 2
    assert re.search(r"^step:3/3 val_loss:\d\.\d{6} train_time:\d+ms step_avg:\d+\.\d\dms$", text, re.M)
    again = verify.text_logs(folder / "this_pr", 7.2)["target"]
    assert abs(again["mean"] - results["statistics"]["target"]["mean"]) < 1e-6
    assert "scipy.stats.ttest_1samp(losses, 7.2" in (folder / "statistics.md").read_text()


def test_an_edited_number_in_a_real_submission_is_refused(submitted, tmp_path):
    record, *_ = submitted
    shutil.copytree(record, tmp_path / "claim")
    name = manifest.read(record).counted("new")[0].finish["folder"]
    path = tmp_path / "claim/runs" / name / "log.txt"
    path.write_text(re.sub(r"(step:3/3 val_loss:)\d", r"\g<1>6", path.read_text()))
    results = verify.verify(tmp_path / "claim")
    assert results["verdict"] == "refused" and any("log.txt: line" in p for p in results["problems"])


def test_the_same_submission_again_names_resume(submitted, checkout):
    record, *_ = submitted
    code, _, err = finished(checkout, "faster_muon", "--claim", "ml", "--scale", "micro", "--runs", "2",
                            *(x for s in SETS for x in ("--set", s)))
    assert code == 2 and err.count("\n") == 1 and "already holds a plan: continue it with --resume" in err


# ----- looks ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("loss, decisions", [
    (5.14, ["passed"]), (5.188, ["continue", "passed"]), (5.25, ["continue", "failed"])])
def test_looks_stop_at_the_first_that_decides_and_resume_where_they_stood(
    loss, decisions, tmp_path, monkeypatch
):
    arms_of = {
        name: arm(ref, ["validation.target=5.2"])
        for name, ref in (("new", "short/11"), ("parent", "short/10"))
    }
    clock = FakeTime()
    monkeypatch.setattr(time, "gmtime", clock)
    plan = {"looks": [{"runs": 3, "alpha": 0.005}, {"runs": 6, "alpha": 0.005}]}
    manifest.create(tmp_path / "c", declaration(arms_of, plan=plan)).close()
    calls = []

    def run_plan(folder, until=None, data=None, fault=None):
        """Invented runs; every second call is killed when it has made one."""
        calls.append(until)
        book = manifest.resume(folder)
        advance(
            book, clock, min(until, until - 2) if len(calls) % 2 else until, {"new": loss, "parent": 5.27}
        )
        book.close()
        if len(calls) % 2:
            raise KeyboardInterrupt
        return book.claim

    monkeypatch.setattr(compare, "run_plan", run_plan)
    for _ in range(2 * len(decisions)):
        try:
            submit.carry_out(tmp_path / "c", None, None)
        except KeyboardInterrupt:
            pass
    claim = manifest.read(tmp_path / "c")
    assert [x["decision"] for x in claim.looks] == decisions
    assert len(claim.counted("new")) == (3 if len(decisions) == 1 else 6)
    monkeypatch.undo()
    results = verify.verify(tmp_path / "c")
    assert results["problems"] == [] and (results["verdict"] == "shown") == (decisions[-1] == "passed")


def test_a_diverged_run_ends_the_looks_at_once(tmp_path, monkeypatch):
    arms_of = {
        name: arm(ref, ["validation.target=5.2"])
        for name, ref in (("new", "short/11"), ("parent", "short/10"))
    }
    plan = {"looks": [{"runs": 3, "alpha": 0.005}, {"runs": 6, "alpha": 0.005}]}
    build(tmp_path / "c", monkeypatch, declaration(arms_of, plan=plan), status={3: "diverged"}, look=3)
    assert submit.decide(manifest.read(tmp_path / "c"), plan["looks"][0], last=False) == "failed"


# ----- refused before anything is run -----------------------------------------------------------------------

def parse(*args):
    import argparse
    p = argparse.ArgumentParser()
    submit.arguments(p)
    return p.parse_args(args)


GOOD = ["--title", "t", "--people", "@x", "--claim", "ml", "--scale", "micro", "--runs", "4"]


@pytest.mark.parametrize(
    "delta, args, message",
    [
        ('"optim.muon.lr" = 0.05', ["Bad-Name", *GOOD], "small letters, digits and _ only"),
        ('"optim.muon.lr" = 0.05', ["unet_double_lr", *GOOD], "the name unet_double_lr is taken by short/11"),
        (
            '"optim.muon.lr" = 0.04', ["x", *GOOD, "--parent", "short/11"],
            "changes nothing: short/11 has it already"
        ),
        ("", ["x", *GOOD], "a delta that changes nothing"),
        ('subsumed = "faster code"', ["x", *GOOD], "a delta that changes nothing"),
        (
            '"optim.muon.lrr" = 0.05', ["x", *GOOD, "--parent", "short/11"],
            "unknown setting 'optim.muon.lrr' (did you mean optim.muon.lr"
        ),
        ('"optim.muon.lr" = "high"', ["x", *GOOD, "--parent", "short/11"], "expected a number"),
        ("lr = 0.05", ["x", *GOOD], "write the whole path in quotes"),
        ('"optim.muon.lr = 0.05', ["x", *GOOD], "delta.toml: "),
        ('title = "t"\n[delta]\n"optim.muon.lr" = 0.05', ["x", *GOOD], "title next to [delta]"),
        ('"optim.muon.lr" = 0.05', ["x", *GOOD[:2], *GOOD[4:]], "credit whose idea it is"),
        ('"optim.muon.lr" = 0.05', ["x", *GOOD[:2], "--people", " ", *GOOD[4:]], "credit whose idea it is"),
        ('"optim.muon.lr" = 0.05', ["x", *GOOD[2:]], "a new idea needs --title"),
        ('"optim.muon.lr" = 0.05', ["x", *GOOD, "--parent", "short/111"], "unknown record 'short/111'"),
        ('"optim.muon.lr" = 0.05', ["x", *GOOD[:-2]], "say before the first run how many there will be"),
        ('"optim.muon.lr" = 0.05', ["x", *GOOD, "--looks", "4,8"], "one of the two"),
        ('"optim.muon.lr" = 0.05', ["x", *GOOD[:-1], "1"], "one run has no spread"),
        ('"optim.muon.lr" = 0.05', ["x", *GOOD[:6], "--runs", "4"], "--scale is missing"),
        (
            '"optim.muon.lr" = 0.05', ["x", *GOOD, "--scale", "full", "--set", "schedule.steps=9"],
            "at scale full a record runs as it is"
        ),
        ('"optim.muon.lr" = 0.05', ["x", *GOOD, "--fault", "killed=x"], "it goes with --resume"),
        (None, ["x", *GOOD], "name the record with --record"),
        (None, ["other_name", "--record", "short/11", *GOOD[4:]], "short/11 is named unet_double_lr"),
        (
            None, ["unet_double_lr", "--record", "short/11", *GOOD],
            "--title, --people and --notes go with --delta"
        ),
        (
            None, ["llmc_baseline", "--record", "short/1", *GOOD[4:]],
            "short/1 has no parent to be faster than"
        ),
        (None, ["unet_double_lr", "--resume"], "no plan of the name unet_double_lr was declared"),
        ('"optim.muon.lr" = 0.05', ["x", *GOOD, "--parent", "attempts/y"], "unknown attempt 'attempts/y'"),
        ('"model.attn.num_heads" = 7', ["x", *GOOD], "not divisible"),
        (None, ["x", "--resume", "/no/such/folder"], "/no/such/folder"),
    ],
)
def test_bad_input_is_one_clear_line_and_leaves_no_trace(delta, args, message, tmp_path):
    before = sorted(deltas.RECORDS.glob("*/*"))
    if delta is not None:
        (tmp_path / "delta.toml").write_text(delta + "\n")
        args = [*args, "--delta", str(tmp_path / "delta.toml")]
    with pytest.raises(UserError) as error:
        submit.run(parse(*args))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert sorted(deltas.RECORDS.glob("*/*")) == before


@pytest.mark.parametrize(
    "new, parent, claim, message",
    [
        (("short/11", []), ("short/11", []), "ml", "the delta changes nothing here"),
        (
            ("short/11", []), ("short/10", []), "systems",
            "changes what is computed (model.residual.unet_skips"
        ),
        (("short/11", []), ("short/10", []), "ml", "scale micro has no target: an ml claim needs one"),
        (
            ("short/11", [*SETS[:-1], "validation.tokens=8192"]), ("short/10", SETS), "ml",
            "changes how it is measured"
        ),
    ],
)
def test_arms_that_cannot_carry_the_claim_are_refused(new, parent, claim, message):
    options = parse("x", "--claim", claim, "--scale", "micro")
    with pytest.raises(UserError) as error:
        submit.check_arms(options, deltas.find_record("short/11"), {"new": arm(*new), "parent": arm(*parent)})
    assert message in str(error.value)


def test_looks_share_alpha():
    assert [x["runs"] for x in submit.looks_of([4, 8])] == [4, 8]
    assert sum(x["alpha"] for x in submit.looks_of([4, 8, 16])) == pytest.approx(0.01)
    for counts in ([8, 4], [], [1]):
        with pytest.raises(UserError):
            submit.looks_of(counts)


# ----- refused before anything is committed -----------------------------------------------------------------

def no_torch(folder):
    """A folder for PYTHONPATH in which importing torch fails."""
    folder.mkdir()
    (folder / "torch.py").write_text("raise ImportError('no torch here')\n")
    return folder


@pytest.mark.parametrize("fault, args, message", [
    ("", ["--scale", "micro"], "scale micro has no target"),
    ("", ["--scale", "full"], "needs a GPU|no data folder"),
    ("", ["--data", "/no/such/folder"], "no data folder /no/such/folder"),
    ("", ["--parent", "no-such-branch:short/11"], "unknown git ref 'no-such-branch'"),
    ("", ["--set", "system.device=cuda"], "needs a GPU|no GPU|finds no GPU"),
    ("edited", [], "uncommitted changes in README.md"),
    ("merging", [], "in the middle of a merge"),
    ("nobody", [], "git does not know who commits"),
    ("unsigned", [], "git commit"),
    ("torchless", [], "no torch here")])
def test_nothing_is_committed_before_everything_was_checked(
    checkout, tmp_path, monkeypatch, fault, args, message
):
    (tmp_path / "my.toml").write_text('"optim.muon.lr" = 0.0512\n')
    head, readme = git("rev-parse", "HEAD", cwd=checkout), (checkout / "README.md").read_text()
    given = [
        "fault", "--delta", str(tmp_path / "my.toml"), "--title", "t", "--people", "@me", "--claim", "ml",
        "--runs", "2", "--commit"
    ]
    target = [] if "--scale" in args else ["--scale", "micro", "--set", "validation.target=7.2"]
    parent = [] if "--parent" in args else ["--parent", "short/11"]
    try:
        if fault == "edited":
            (checkout / "README.md").write_text(readme + "more\n")
        elif fault == "merging":
            (checkout / ".git/MERGE_HEAD").write_text(head)
        elif fault == "nobody":
            git("config", "user.useConfigOnly", "true", cwd=checkout)
            git("config", "--unset", "user.email", cwd=checkout)
            monkeypatch.setenv("HOME", str(tmp_path))
            for name in [x for x in os.environ if x.startswith(("GIT_", "EMAIL", "XDG_"))]:
                monkeypatch.delenv(name)
        elif fault == "unsigned":
            git("config", "commit.gpgsign", "true", cwd=checkout)
            git("config", "gpg.program", "false", cwd=checkout)
        elif fault == "torchless":
            monkeypatch.setenv("PYTHONPATH", str(no_torch(tmp_path / "path")))
        code, out, err = finished(checkout, *given, *target, *parent, *args)
    finally:
        (checkout / "README.md").write_text(readme)
        (checkout / ".git/MERGE_HEAD").unlink(missing_ok=True)
        git("config", "user.email", "t@t", cwd=checkout)
        for name in ("user.useConfigOnly", "commit.gpgsign"):
            subprocess.run(["git", "config", "--unset", name], cwd=checkout)
    assert code == 2 and err.count("\n") == 1 and re.search(message, err), err
    assert git("rev-parse", "HEAD", cwd=checkout) == head and not (checkout / "attempts/fault").exists()
    assert git("diff", "--cached", "--name-only", cwd=checkout) == ""


def test_the_submit_example_of_the_docs_is_accepted_as_typed(checkout, tmp_path):
    """All but --commit, without which everything is checked and nothing is run."""
    block = (ROOT / "docs/compare-and-submit.md").read_text().split("$ cat my.toml\n")[1].split("\n\n")[0]
    delta, command = block.split("$ python -m records ")[0:2]
    (checkout / "my.toml").write_text(delta)
    words = shlex.split(command.replace("\\\n", " "))
    assert words[0] == "submit" and words[-1] == "--commit"
    try:
        code, out, err = finished(checkout, *words[1:-1])
        assert code == 0 and err == "" and "or add --commit" in out, err
    finally:
        (checkout / "my.toml").unlink()
        shutil.rmtree(checkout / "attempts" / words[1], ignore_errors=True)
