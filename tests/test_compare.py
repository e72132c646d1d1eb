"""Laws of comparisons: manifest, arms, text logs, order, resuming, verdicts, replay. Only code against code
is trained."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import runlog
from data.corpus import sample_corpus
from records import __main__ as command
from evidence import arms, compare, manifest, replay, textlog
from common.errors import UserError

ROOT = Path(__file__).parent.parent
TINY = "--set schedule.steps=3 --set validation.tokens=4096 --set system.warmup_steps=0"

STUB = """
import os, pathlib, random, sys, time
inf = float("inf")
name, seed = sys.argv[1], int(sys.argv[2])
here = pathlib.Path(__file__).parent
with open(here / "started.txt", "a") as file:
    print(name, seed, file=file)
loss, noise, pause = json_of_arms[name]
r = random.Random(f"{name} {seed}")
print("threads", os.environ.get("OMP_NUM_THREADS"))
for step in range(0, 41, 8):
    time.sleep(pause)
    value = loss + 3 * 0.9 ** step + noise * r.gauss(0, 1)
    print(f"step:{step}/40 val_loss:{value:.4f} train_time:{step * 10 + r.random():.0f}ms step_avg:10.00ms",
          flush=True)
"""


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A repository with the present code committed on `main`, and a harmless edit of it on `refactor`."""
    folder = tmp_path_factory.mktemp("repository") / "clone"

    def git(*args):
        subprocess.run(
            ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *args], cwd=folder, check=True,
            capture_output=True
        )
    subprocess.run(["git", "init", "-q", "-b", "main", str(folder)], check=True)
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=ROOT, check=True,
        capture_output=True, text=True
    ).stdout.split("\0")
    for name in names:
        if name and (ROOT / name).is_file() and not name.startswith("tests/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    git("add", "--all")
    git("commit", "-qm", "as it is")
    git("checkout", "-qb", "refactor")
    source = (folder / "schedule.py").read_text()
    (folder / "schedule.py").write_text(source + "\n# nothing below\n")
    git("commit", "-qam", "a comment")
    git("checkout", "-q", "main")
    cache = folder.parent / "cache"
    cache.mkdir()
    shutil.copytree(sample_corpus().folder, cache / "sample-v1")
    return folder


@pytest.fixture
def here(clone, monkeypatch):
    """The clone as the repository of this process."""
    monkeypatch.setattr(arms, "ROOT", clone)
    monkeypatch.setenv("SPEEDRUN_CACHE", str(clone.parent / "cache"))
    return clone


def records(*argv):
    """Exit code of a `records` command in this process."""
    with pytest.raises(SystemExit) as end:
        command.main([*map(str, argv)])
    return end.value.code


def refusal(capsys, *argv):
    """The one line with which a command refuses."""
    capsys.readouterr()
    code, err = records(*argv), capsys.readouterr().err
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def stub(tmp_path, **losses):
    """Text of one script arm per name; name -> (loss, sd, pause in seconds between validations)."""
    table = {k: v if isinstance(v, tuple) else (v, 0.0, 0.0) for k, v in losses.items()}
    (tmp_path / "stub.py").write_text(STUB.replace("json_of_arms", repr(table)))
    return [f"script:{tmp_path / 'stub.py'} {name} {{seed}}" for name in losses]


def begin(*argv):
    """A comparison in a process of its own, which ignores Ctrl-C as all that `&` starts in a script."""
    return subprocess.Popen(
        [sys.executable, "-m", "records", "compare", *map(str, argv)], cwd=ROOT, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)
    )


def wait_for(condition):
    deadline = time.time() + 60
    while not condition():
        assert time.time() < deadline
        time.sleep(0.02)


def started(tmp_path):
    return [tuple(line.split()) for line in (tmp_path / "started.txt").read_text().splitlines()]


# ----- code against code ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def comparison(clone):
    """Two refs that differ in a comment, compared as a user would."""
    out = clone.parent / "claim"
    done = subprocess.run(
        [
            sys.executable, "-m", "records", "compare", f"main:short/11 {TINY}", f"refactor:short/11 {TINY}",
            "--runs", "2", "--scale", "micro", "--out", str(out), "--order-seed", "3"
        ],
        cwd=clone,
        capture_output=True,
        text=True,
        timeout=280,
        env={
            **os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
            "SPEEDRUN_CACHE": str(clone.parent / "cache")
        },
    )
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_two_refs_whose_only_difference_is_code(comparison, clone):
    out, said = comparison
    claim = manifest.read(out)
    a, b = claim.declaration["arms"].values()
    assert a["ml_hash"] == b["ml_hash"] and a["commit"] != b["commit"] and a["tree"] != b["tree"]
    diff = (out / "code.diff").read_text()
    assert "+# nothing below" in diff and claim.declaration["code_diff"] == arms.hash_of(diff)
    results = json.loads((out / "results.json").read_text())
    assert results["comparisons"][0]["loss"]["estimate"] == 0 and results["complete"]
    assert "the losses of B and A are equal in all 2 pairs" in said and "not told apart" in said
    starts = [runlog.read_chain(out / "runs" / r.finish["folder"] / "run.jsonl")[0] for r in claim.runs]
    assert {start["code"] for start in starts} == {a["commit"], b["commit"]}  # each its own code, and clean
    assert [start["registered"] for start in starts] == [r.hash for r in claim.runs]


def test_a_run_is_replayed_to_the_last_bit(comparison, here, tmp_path, monkeypatch, capsys):
    out, _ = comparison
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # the log knows that it was 1
    folder = out / "runs" / manifest.read(out).runs[1].finish["folder"]
    assert records("replay", folder, "--out", tmp_path / "again") == 0
    said = capsys.readouterr().out
    assert "with the code of " in said and "every validation loss is equal to the last bit" in said
    assert "already holds runs" in refusal(capsys, "replay", folder, "--out", tmp_path / "again")
    text = replay.read_log(folder / "log.txt")
    chain = replay.read_log(folder)
    assert all(str(text["start"][k]) == str(chain["start"][k]) for k in replay.NEEDED)


def test_replay_says_where_losses_differ(capsys):
    start = {"sources": "s", "cpu": "c", "torch": "t", "processes": 1, "device": "CPU, 1 process, 1 threads"}
    log = {
        "start": start, "curve": [[0, 4.0], [3, 3.5]], "train_loss": [3.9, 3.8], "stream": "x", "digits": None
    }
    again = {**log, "curve": [[0, 4.0], [3, 3.501]], "train_loss": [3.9, 3.7]}
    assert replay.same_bits(start, start) and not replay.same_bits(start, {**start, "cpu": "other"})
    assert replay.report(log, log, True, 0.01) == 0
    assert replay.report(log, again, True, 0.01) == 3  # bits were promised
    assert replay.report(log, again, False, 0.01) == 0 and "tolerance 0.01" in capsys.readouterr().out
    assert replay.report(log, again, False, 0.0001) == 3
    assert replay.report(log, {**log, "stream": "y"}, False, 1) == 3
    assert (
        replay.report(
            {**log, "curve": [[0, float("nan")]]}, {**log, "curve": [[0, float("nan")]]}, True, 0.01
        )
        == 0
    )
    assert replay.report({**log, "curve": [[0, float("nan")]]}, log, False, 1.0) == 3


@pytest.mark.parametrize("precision, seeds, rounding", [("float32", 1e-3, 3e-7), ("bfloat16", 1e-3, 2e-5)])
def test_replay_tells_another_seed_by_its_first_training_losses(precision, seeds, rounding, capsys):
    """Where the tolerance of the last validation loss would pass any seed: two of them differ by 0.0018 at
    full scale."""
    start = {"sources": "s", "cpu": "c", "torch": "t", "processes": 8, "device": "8 x NVIDIA H100",
             "settings": {"numerics": {"matmul": precision}}}
    log = {
        "start": start, "curve": [[0, 10.82], [9, 3.278]], "train_loss": [10.8, 9.9, 9.1], "stream": "x",
        "digits": None
    }
    for share, code in ((rounding, 0), (seeds, 3)):
        again = {**log, "curve": [[0, 10.82], [9, 3.2791]], "train_loss": [10.8, 9.9, 9.1 * (1 + share)]}
        assert replay.report(log, again, False, replay.GPU_TOLERANCE) == code
    assert "NOT replayed: the first training losses differ by up to 1.0e-03" in capsys.readouterr().out
    late = {**log, "train_loss": [*log["train_loss"], 1.0, 1.0, 1.0], "curve": [[0, 10.82], [9, 3.278]]}
    # bits were promised
    assert replay.report(late, {**late, "train_loss": [*late["train_loss"][:-1], 1.1]}, True, 1.0) == 3
    assert "yet the training losses differ" in capsys.readouterr().out
    assert replay.report({**log, "train_loss": []}, log, False, replay.GPU_TOLERANCE) == 0
    replay.report(
        {**log, "train_loss": [], "curve": [[0, 10.82], [9, 3.2781]]}, log, False, replay.GPU_TOLERANCE
    )
    assert "do not tell seeds apart" in capsys.readouterr().out


def test_ctrl_c_in_any_command_is_one_line_and_130(monkeypatch, capsys):
    def stopped(options):
        raise KeyboardInterrupt

    for argv, module, name in (
        (["list"], "records.__main__", "list_records"),
        (["replay", "x"], "evidence.replay", "run"),
    ):
        monkeypatch.setattr(sys.modules[module], name, stopped)
        with pytest.raises(SystemExit) as end:
            command.main(argv)
        assert end.value.code == 130 and capsys.readouterr().err == "error: interrupted\n"


def test_replay_refuses_what_it_cannot_re_create(tmp_path, comparison, capsys):
    (tmp_path / "upstream.txt").write_text(
        "import torch\nstep:4/4 val_loss:3.27 train_time:9ms step_avg:2.25ms\n"
    )
    assert "a log of another program" in refusal(capsys, "replay", tmp_path / "upstream.txt")
    assert "no such file" in refusal(capsys, "replay", tmp_path)
    line, _ = runlog.chain_line(runlog.GENESIS, {"n": 0, "kind": "start", "seed": 1})
    (tmp_path / "run.jsonl").write_text(line + "\n")
    assert "does not say its record" in refusal(capsys, "replay", tmp_path)


def test_uncommitted_code_is_refused_or_declared(here, tmp_path, capsys):
    source = (here / "schedule.py").read_text()
    new = here / "records/short/990_mine/record.toml"
    try:
        (here / "schedule.py").write_text(source + "# edited\n")
        said = refusal(capsys, "compare", "short/10", "short/11", "--runs", 2, "--scale", "micro")
        assert "uncommitted changes in schedule.py" in said and "--allow-dirty" in said
        new.parent.mkdir()
        record = (here / "records/short/011_unet_double_lr/record.toml").read_text()
        new.write_text(record.replace('id = "11"', 'id = "990"'))
        arm, patch = arms.prepare("short/990", "micro", allow_dirty=True)
        arms.patch_path(tmp_path, arm).write_bytes(patch)
        # editing goes on: the arm keeps the code it was declared with
        (here / "schedule.py").write_text(source)
        place = arms.place_of(arm, tmp_path)
        assert (
            "# edited" in (place / "schedule.py").read_text()
            and (place / "records/short/990_mine/record.toml").exists()
        )
        assert (
            arm["dirty"] == arms.hash_of(patch)
            and arm["tree"] != arms.prepare("short/11", "micro")[0]["tree"]
        )
        said = refusal(capsys, "compare", "short/10", "short/990", "--runs", 2)
        assert "short/990_mine/record.toml is not committed" in said
        arms.patch_path(tmp_path, arm).write_bytes(patch + b" ")
        with pytest.raises(UserError, match="missing or changed"):
            arms.place_of(arm, tmp_path)
    finally:
        (here / "schedule.py").write_text(source)
        shutil.rmtree(new.parent, ignore_errors=True)


def test_worktrees_that_no_run_asked_for_in_a_week_are_removed(here):
    place = arms.place_of(arms.prepare("main:short/11", "micro")[0], None)
    old = place.parent / (place.name[:9] + "0" * 16)
    arms.git("worktree", "add", "--force", "--detach", str(old), "HEAD")
    fresh = place.parent / (place.name[:9] + "1" * 16)
    arms.git("worktree", "add", "--force", "--detach", str(fresh), "HEAD")
    os.utime(old, (0, 0))
    assert arms.place_of(arms.prepare("main:short/11", "micro")[0], None) == place
    assert place.exists() and fresh.exists() and not old.exists()
    assert old.name not in arms.git("worktree", "list").decode()
    arms.git("worktree", "remove", "--force", str(fresh))


def test_a_worktree_that_was_edited_is_made_anew(here):
    arm, _ = arms.prepare("main:short/11", "micro")
    place = arms.place_of(arm, None)
    (place / "model.py").write_text("raise SystemExit")
    (place / "torch.py").write_text("an untracked file that would be imported")
    assert arms.place_of(arm, None) == place
    assert "class GPT" in (place / "model.py").read_text() and not (place / "torch.py").exists()


ARMS = [
    (["short/11"], "a comparison needs two"),
    (["short/99", "short/11"], "unknown record 'short/99'"),
    (["short/11 --wihout model.attn.rope", "short/11"], "did you mean --without"),
    (["short/11 --without model.attn.roppe", "short/11"], "did you mean model.attn.rope"),
    (["short/11 --seed 3", "short/11"], "--seed0"),
    (["short/11 --set", "short/11"], "expected one argument"),
    (["short/11 --set 'a=b", "short/11"], "No closing quotation"),
    (["mian:short/11", "short/10"], "unknown git ref 'mian' (did you mean main"),
    (["main:", "short/10"], "expected GITREF:RECORD"),
    (["", "short/10"], "an arm is empty"),
    (["script:", "short/10"], "names no file"),
    (["script:/no/such/file.py", "short/10"], "cannot be read"),
    (["script:README.md", "short/10"], "neither a Python file"),
    (["short/11", "short/11 --set validation.target=3.0"], "there is nothing to compare; add --aa"),
    (["short/11", "refactor:short/11", "--aa"], "differ: leave it out"),
    (["short/11", "short/11 --set validation.tokens=4096"], "validated on different tokens"),
    (["short/11", "tiny-v3"], "frozen at --scale tiny"),
    (["short/11", "short/10", "--without", "model.attn.rope"], "put each arm and its changes in quotes"),
    (["short/11", "short/10", "--nproc", "3"], "must be 1, 2, 4 or 8"),
    (["short/11", "short/10", "--confidence", "95"], "above 0 and below 1"),
    (["short/11", "short/10", "--data", "/no/such/folder"], "no data folder"),
    (["short/11", "short/10", "--scale", "full"], "needs a GPU"),
    (["short/11", "short/10", "--runs", "1"], "at least 2"),
    (["--resume", "/no/such/folder", "--seed0", "1"], "fixes seed0"),
    (["--resume", "/no/such/folder"], "there is nothing to continue"),
]


def test_a_comparison_writes_into_no_folder_that_holds_something_else(tmp_path, capsys):
    (tmp_path / "mine").touch()
    said = refusal(capsys, "compare", "short/11", "short/10", "--runs", "2", "--scale", "micro", "--out",
                   str(tmp_path))
    assert f"--out {tmp_path} is not empty: choose a new folder" in said
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("argv, message", ARMS, ids=[" ".join(a) or "nothing" for a, _ in ARMS])
def test_a_comparison_that_cannot_be_made_is_one_clear_line(
    argv, message, here, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(ROOT)
    if "--resume" not in argv:
        argv = ["--runs", "2", "--scale", "micro", "--out", str(tmp_path / "out"), *argv]
    assert message in refusal(capsys, "compare", *argv)
    assert not (tmp_path / "out").exists()  # refused before anything is declared


# ----- script arms ------------------------------------------------------------------------------------------

def test_runs_follow_the_declared_interleaved_order(tmp_path, capsys):
    a, b, c = stub(tmp_path, a=4.0, b=3.9, c=4.1)
    assert (
        records("compare", a, b, c, "--runs", 3, "--out", tmp_path / "out", "--order-seed", 5, "--seed0", 10)
        == 0
    )
    claim = manifest.read(tmp_path / "out")
    order = claim.declaration["order"]
    assert order == compare.make_order("ABC", 3, "seed", 10, 5) and order[0]["discard"] and claim.complete
    assert [{"arm": r.arm, "seed": r.seed, "discard": r.discard} for r in claim.runs] == order
    assert started(tmp_path) == [("abc"["ABC".index(x["arm"])], str(x["seed"])) for x in order]
    for block in range(3):  # every arm once in each block, all with its seed
        rows = order[1 + 3 * block:4 + 3 * block]
        assert sorted(x["arm"] for x in rows) == list("ABC") and {x["seed"] for x in rows} == {10 + block}
    assert order[0]["seed"] not in {x["seed"] for x in order[1:]}
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert [round(x["loss"]["estimate"], 6) for x in results["comparisons"]] == [-0.1, 0.1]
    # of two losses and two times
    assert results["comparisons"][0]["confidence"] == pytest.approx(1 - 0.05 / 4)
    assert [r["n"] for r in results["arms"].values()] == [
        3, 3, 3
    ] and "taken on trust" in capsys.readouterr().out


def test_orders_without_pairing_give_every_run_a_seed_of_its_own():
    order = compare.make_order("AB", 4, "none", 0, 1)
    assert len({x["seed"] for x in order}) == 9
    assert compare.make_order("AB", 4, "seed", 0, 1) != compare.make_order("AB", 4, "seed", 0, 2)


@pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere the run under way goes on, holds the manifest, and counts"
)
def test_a_killed_comparison_resumes_without_repeating_runs(tmp_path, capsys):
    a, b = stub(tmp_path, a=(4.0, 0.0, 0.15), b=(3.9, 0.0, 0.15))
    out = tmp_path / "out"
    process = begin(a, b, "--runs", "2", "--out", out)
    wait_for(lambda: (tmp_path / "started.txt").exists() and len(started(tmp_path)) == 3)
    process.kill()
    process.wait()
    assert manifest.read(out).open_run.run == 2
    with open(out / manifest.NAME, "a") as file:
        file.write('{"kind": "regis')  # and a line was cut short

    def free():
        try:
            manifest.resume(out).close()
        except UserError:
            return False
        return True
    wait_for(free)  # the run under way does not outlive the comparison, however that ends
    assert records("compare", "--resume", out) == 0
    claim = manifest.read(out)
    assert len(started(tmp_path)) == 6 and len(set(started(tmp_path))) == 5 and claim.complete
    assert [r.status for r in claim.runs] == ["finished"] * 2 + ["failed"] + ["finished"] * 3
    assert claim.runs[2].fault["cause"] == "killed" and claim.runs[3].seed == claim.runs[2].seed
    # complete: only told again
    assert records("compare", "--resume", out) == 0 and len(started(tmp_path)) == 6


def test_an_interrupted_run_is_booked_and_its_place_run_again(tmp_path, capsys):
    a, b = stub(tmp_path, a=(4.0, 0.0, 0.3), b=(3.9, 0.0, 0.0))
    out = tmp_path / "out"
    process = begin(a, b, "--runs", "2", "--out", out)
    wait_for(lambda: (tmp_path / "started.txt").exists() and started(tmp_path)[-1][0] == "a")
    process.send_signal(signal.SIGTERM)
    assert "go on with --resume" in process.communicate(timeout=60)[1] and process.returncode == 130
    claim = manifest.read(out)
    lost = claim.runs[-1]
    assert lost.fault["cause"] == "interrupted" and not lost.counts and claim.next_place == lost.place
    stub(tmp_path, a=(4.0, 0.0, 0.0))
    assert "is not the file that was declared" in refusal(capsys, "compare", "--resume", out)
    stub(tmp_path, a=(4.0, 0.0, 0.3), b=(3.9, 0.0, 0.0))
    assert records("compare", "--resume", out) == 0
    claim = manifest.read(out)
    assert claim.runs[lost.run + 1].seed == lost.seed and claim.complete
    assert "excluded: run" in capsys.readouterr().out


def test_declared_variables_hold_for_every_run(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    found = {n: arms.prepare(t)[0] for n, t in zip("AB", stub(tmp_path, a=4.0, b=3.9))}
    declared = compare.declaration_of(found, {"runs": 2}, alpha=0.05, confidence=0.95, aa=False)
    compare.declare(tmp_path / "out", declared, say=lambda *a, **k: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    claim = compare.run_plan(tmp_path / "out", until=1, say=lambda *a, **k: None)
    # the discarded one and a block: enough for a first look
    assert len(claim.runs) == 3 and not claim.complete
    assert all("threads 1\n" in p.read_text() for p in (tmp_path / "out/runs").glob("*/log.txt"))


def verdict_of(tmp_path, capsys, *argv, **losses):
    out = tmp_path / "out"
    assert (
        records("compare", *stub(tmp_path, **losses), "--runs", 4, "--out", out, "--order-seed", 0, *argv)
        == 0
    )
    return json.loads((out / "results.json").read_text()), capsys.readouterr().out


def test_noise_is_called_unresolved_with_the_runs_that_would_resolve_it(tmp_path, capsys):
    results, said = verdict_of(tmp_path, capsys, "--pairing", "none", a=(4.0, 0.01, 0.0), b=(4.0, 0.01, 0.0))
    c = results["comparisons"][0]
    assert c["loss"]["low"] < 0 < c["loss"]["high"] and c["verdict"].startswith("unresolved: ")
    assert (
        f"about {c['runs_to_resolve']} runs per arm would resolve 0.002" in said and c["runs_to_resolve"] > 50
    )


def test_a_difference_is_told_with_interval_worth_and_machine(tmp_path, capsys):
    results, said = verdict_of(tmp_path, capsys, a=(4.0, 0.001, 0.0), b=(3.97, 0.001, 0.0))
    c = results["comparisons"][0]
    assert (
        c["loss"]["high"] < 0 and c["verdict"].startswith("B ends 0.0")
        and "below A (97.5 % interval 0.0" in said
    )
    assert (
        c["equivalent"]["steps"] < 0 and "from the slope) steps" in said and runlog.machine()["cpu"] in said
    )
    assert "correlation of B's losses with A's over seeds" in said


def test_an_a_a_test_says_that_it_measures_noise(tmp_path, capsys):
    arm = stub(tmp_path, a=(4.0, 0.01, 0.0))[0]
    assert (
        records("compare", arm, arm, "--aa", "--pairing", "none", "--runs", 2, "--out", tmp_path / "out") == 0
    )
    assert "A/A test, so what follows is noise" in capsys.readouterr().out


def test_a_diverged_run_counts_and_no_difference_is_claimed(tmp_path, capsys):
    results, said = verdict_of(tmp_path, capsys, a=4.0, b=float("inf"))
    assert results["comparisons"][0]["loss"] is None and "no difference is claimed: 4 of 4 runs of B" in said
    assert {r["status"] for r in results["arms"]["B"]["runs"]} == {"diverged"}
    with pytest.raises(UserError, match="a run that told its loss always counts"):
        book = manifest.resume(tmp_path / "out")
        book.append("fault", run=len(book.claim.runs) - 1, cause="machine", note="it was unlucky")


def test_a_log_changed_after_the_run_is_found(tmp_path, capsys):
    verdict_of(tmp_path, capsys, a=4.0, b=3.9)
    log = next((tmp_path / "out/runs").glob("run001*/log.txt"))
    log.write_text(log.read_text().replace("step:40/40 val_loss:", "step:40/40 val_loss:-"))
    assert "changed after the run" in refusal(capsys, "compare", "--resume", tmp_path / "out")


def test_a_script_without_validation_lines_is_refused_at_its_first_run(tmp_path, capsys):
    (tmp_path / "silent.py").write_text("print('hello')")
    arm = stub(tmp_path, a=4.0)[0]
    out = tmp_path / "out"
    silent = f"script:{tmp_path / 'silent.py'}"
    said = refusal(capsys, "compare", silent, silent + " again", "--runs", 2, "--out", out)
    assert "--scale and --data are for records" in refusal(
        capsys, "compare", arm, silent, "--runs", 2, "--scale", "micro"
    )
    assert (
        "its log.txt: no line like `step:N/M val_loss:L" in said
        and manifest.read(out).runs[0].status == "failed"
    )
    assert "takes no seed" in refusal(capsys, "compare", arm, silent, "--runs", 2, "--pairing", "seed")


def test_a_run_without_memory_is_excluded_and_run_again(tmp_path, capsys):
    (tmp_path / "once.py").write_text(
        "import pathlib, sys\nmark = pathlib.Path(__file__).with_name('mark')\n"
        "if not mark.exists():\n    mark.touch()\n    raise MemoryError('torch.OutOfMemoryError: CUDA out of "
        "memory')\nprint(f'step:1/1 val_loss:{4 + int(sys.argv[1]) / 100} train_time:1ms step_avg:1ms')\n")
    arm, out = f"script:{tmp_path / 'once.py'} {{seed}}", tmp_path / "out"
    assert "out of memory" in refusal(capsys, "compare", arm, arm + " x", "--runs", 2, "--out", out)
    assert manifest.read(out).runs[0].fault["cause"] == "out_of_memory"
    assert records("compare", "--resume", out) == 0 and manifest.read(out).complete


def test_what_a_run_leaves_running_is_killed_before_the_next_one_and_noted(tmp_path, capsys):
    """Also a child that has made a process group of its own."""
    (tmp_path / "litter.py").write_text(
        "import pathlib, subprocess, sys\n"
        "child = subprocess.Popen(['sleep', '300'], process_group=0 if int(sys.argv[1]) % 2 else None, "
        "stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
        "with open(pathlib.Path(__file__).with_name('pids'), 'a') as file:\n    print(child.pid, file=file)\n"
        "print(f'step:1/1 val_loss:{4 + int(sys.argv[1]) / 100} train_time:1ms step_avg:1ms')\n")
    arm, out = f"script:{tmp_path / 'litter.py'} {{seed}}", tmp_path / "out"
    assert records("compare", arm, arm + " x", "--runs", 2, "--out", out) == 0
    pids = [int(line) for line in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 5 and capsys.readouterr().out.count("left 1 process running") == 5
    assert not any(alive(pid) for pid in pids)
    assert all(r.finish["leftover"] == 1 for r in manifest.read(out).runs)


def alive(pid):
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        state = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def test_an_unexplained_failure_counts_until_a_fault_explains_it(tmp_path, capsys):
    (tmp_path / "bad.py").write_text("import sys\nsys.exit('something broke')")
    bad, out = f"script:{tmp_path / 'bad.py'}", tmp_path / "out"
    said = refusal(capsys, "compare", bad + " 1", bad + " 2", "--runs", 2, "--out", out)
    assert (
        "something broke" in said and "--fault CAUSE=NOTE" in said
        and manifest.read(out).runs[0].fault is None
    )
    assert "expected CAUSE=NOTE" in refusal(capsys, "compare", "--resume", out, "--fault", "bad luck")
    refusal(capsys, "compare", "--resume", out, "--fault", "machine=the fan stopped")
    claim = manifest.read(out)
    assert claim.runs[0].fault["note"] == "the fan stopped" and claim.runs[1].place == claim.runs[0].place


# ----- what may be compared ---------------------------------------------------------------------------------

START = {
    "machine": "m", "cpu": "c", "cores": 2, "torch": "2", "device": "CPU, 1 process, 1 threads",
    "val_digest": "v", "corpus_digest": "t"
}


@pytest.mark.parametrize(
    "key, value, why",
    [
        ("machine", "other", "different hardware: machine"),
        ("device", "1 x NVIDIA H100", "different hardware: device"),
        ("val_digest", "w", "validated on different tokens"), ("corpus_digest", "u", "different corpora")
    ],
)
def test_runs_of_different_hardware_or_data_are_not_compared(key, value, why):
    assert why in arms.incomparable(START, {**START, key: value})
    assert arms.incomparable(START, {**START, "device": "CPU, 1 process, 2 threads"}) == ""


def test_shares_of_one_corpus_are_one_corpus(tmp_path, monkeypatch):
    from data.shards import write_shard
    monkeypatch.setenv("SPEEDRUN_CACHE", str(tmp_path / "cache"))
    for name in ("fineweb_train_1.bin", "fineweb_train_2.bin", "fineweb_val_0.bin"):
        write_shard(tmp_path / name, [1, 2, 3 + len(name)])
    one, two = known = arms.corpus_prefixes(tmp_path)
    assert (
        one != two
        and arms.incomparable({**START, "corpus_digest": one}, {**START, "corpus_digest": two}, known) == ""
    )
    assert "different corpora" in arms.incomparable(
        {**START, "corpus_digest": one}, {**START, "corpus_digest": two}
    )


def test_busy_gpus_are_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(arms, "cuda_works", lambda: True)

    def cards(*rows):
        (tmp_path / "nvidia-smi").write_text("#!/bin/sh\ncat <<END\n" + "\n".join(rows) + "\nEND\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    cards("0, GPU-a, NVIDIA H100, 71234, 81559, 98", "1, GPU-b, NVIDIA H100, 4, 81559, 0",
          "2, GPU-c, NVIDIA H100, [N/A], [N/A], 0")
    assert [g["uuid"] for g in arms.free_gpus(2)] == ["GPU-b", "GPU-c"]
    with pytest.raises(UserError, match="no free GPU: 2 of 3 are free and 4 needed|this machine shows 3"):
        arms.free_gpus(4)
    cards("0, GPU-a, NVIDIA H100, 71234, 81559, 98")
    with pytest.raises(
        UserError, match=r"no free GPU: 0 of 1 are free and 1 needed; GPU 0 \(NVIDIA H100\) holds 69.6 GiB"
    ):
        arms.free_gpus(1)
    # a torch without CUDA runs on the CPU whatever the card does
    monkeypatch.setattr(arms, "cuda_works", lambda: False)
    assert arms.free_gpus(1) == []


# ----- the manifest -----------------------------------------------------------------------------------------

def declaration(**changes):
    plain = {
        "version": 1, "claim": "comparison", "record": None, "scale": "micro", "target": None, "alpha": 0.05,
        "arms": {"A": {"kind": "record"}, "B": {"kind": "record"}}, "plan": {"runs": 2}, "pairing": "seed",
        "margin": 0.002, "order": compare.make_order("AB", 2, "seed", 0, 0), "order_seed": 0, "processes": 1,
        "data": None, "machine": {}
    }
    return {**plain, **changes}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"version": 2}, "manifest version 2"), ({"claim": "best"}, "claim must be one of"),
        ({"margin": None}, "margin = None"),
        ({"confidence": 0.2}, "confidence 0.2 and alpha 0.05 of a comparison must add up"),
        ({"confidence": 1.5}, "confidence must lie between 0 and 1"),
        ({"plan": {"runs": 3}}, "2 runs of A, the plan says 3"), ({"plan": {}}, "runs or looks"),
        ({"alpha": True}, "wrong type"),
        ({"plan": {"looks": [{"runs": 2, "alpha": 0.01}]}}, "add up to alpha"),
        ({"order": compare.make_order("AB", 2, "none", 0, 0)}, "paired arms must have the same seeds"),
        ({"order": [{"arm": "C", "seed": 0, "discard": False}]}, "is no {arm, seed, discard}"),
        ({"order": [{"arm": x, "seed": 0, "discard": False} for x in "AABB"]}, "a seed of A occurs twice")
    ],
)
def test_a_declaration_that_contradicts_itself_is_refused(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        manifest.create(tmp_path, declaration(**changes))
    assert not (tmp_path / manifest.NAME).exists()


def test_a_manifest_takes_no_event_out_of_place(tmp_path):
    plan = {"looks": [{"runs": 1, "alpha": 0.02}, {"runs": 2, "alpha": 0.03}]}
    book = manifest.create(tmp_path, declaration(plan=plan))
    order = book.claim.declaration["order"]

    def refused(message, kind, **fields):
        with pytest.raises(UserError, match=message):
            book.append(kind, **fields)
    refused("the declared order has", "register", run=0, **{**order[0], "seed": 9})
    refused("numbered in order", "register", run=1, **order[0])
    refused("not under way", "finish", run=0, folder="f", last_hash="h", status="finished", exit=0)
    refused("unknown kind", "praise", run=0)
    for run, entry in enumerate(order[:3]):
        refused("not every arm has 1 runs", "look", runs=1, decision="continue")
        book.append("register", run=run, **entry)
        refused("still open", "register", run=run + 1, **entry)
        refused(
            "a finished run has a folder", "finish", run=run, folder=None, last_hash=None, status="finished",
            exit=0
        )
        refused(
            "must be a name under runs/", "finish", run=run, folder="../f", last_hash="h", status="finished",
            exit=0
        )
        book.append("finish", run=run, folder=f"f{run}", last_hash="h", status="finished", exit=0)
        refused("always counts", "fault", run=run, cause="machine", note="")
    refused("was not declared", "look", runs=2, decision="passed")
    book.append("look", runs=1, decision="passed")
    refused("the last look has ended the claim", "register", run=3, **order[3])
    with pytest.raises(UserError, match="is in use"):
        manifest.resume(tmp_path)
    book.close()
    with pytest.raises(UserError, match="already holds a plan"):
        manifest.create(tmp_path, declaration())
    assert len(manifest.read(tmp_path).runs) == 3


def test_a_manifest_changed_or_cut_anywhere_is_refused(tmp_path):
    book = manifest.create(tmp_path, declaration())
    book.append("register", run=0, **book.claim.declaration["order"][0])
    book.close()
    path = tmp_path / manifest.NAME
    whole = path.read_text()
    path.write_text(whole.replace('"margin": 0.002', '"margin": 0.02'))
    with pytest.raises(UserError, match="line 1 .* breaks the hash chain"):
        manifest.read(tmp_path)
    path.write_text(whole[:-20])
    with pytest.raises(UserError, match="line 2 is not a complete log line"):
        manifest.read(path)
    path.write_text("")
    with pytest.raises(UserError, match="empty"):
        manifest.read(path)
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(UserError, match="no such file"):
        manifest.read(tmp_path / "elsewhere")


# ----- text logs --------------------------------------------------------------------------------------------

def lines(*rows, steps=8):
    return "program\n" + "".join(
        f"step:{s}/{steps} val_loss:{x} train_time:{t}ms step_avg:1.00ms\n" for s, x, t in rows
    )


def test_text_logs_of_upstream_are_read():
    log = textlog.parse(
        "x = f'step:{step}/{n} val_loss:{loss}'\n" + lines((0, 10.9, 285), (8, 3.27, 24000)) + "peak: 1\n"
    )
    assert (log["val_loss"], log["train_time_ms"], log["steps"], log["complete"]) == (3.27, 24000, 8, True)
    assert log["curve"] == [[0, 10.9, 285], [8, 3.27, 24000]]
    track3 = ("step:0/8 val_loss:10.8 train_time:0.1s step_avg:nanms\n"
              "step:8/8 val_loss:3.3 val_ema_loss:3.2 train_time:9.50s step_avg:1ms")
    assert textlog.parse(track3)["train_time_ms"] == 9500 and textlog.parse(track3)["val_loss"] == 3.3
    llmc = textlog.parse("s:0 tel:10.98\ns:0 trl:10.9\ns:250 tel:6.3\n")
    assert (llmc["val_loss"], llmc["train_time_ms"], llmc["scheduled_steps"]) == (6.3, None, None)
    assert len(textlog.parse_all(lines((0, 9, 0), (8, 4, 5)) + lines((0, 9, 0), (8, 3, 5)))) == 2
    twice = lines((0, 9, 0), (8, 4, 5)).splitlines(keepends=True)
    assert textlog.parse("".join(x + x for x in twice))["curve"] == [[0, 9, 0], [8, 4, 5]]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "no line like"), ("step:8/8 val_lo", "no line like"), ("step:8/8 val_loss:3.2", "cut short"),
        (lines((0, 9, 0), (8, 4, 5), (0, 9, 0), (8, 4, 6)), "holds 2 runs"),
        (lines((0, 9, 0), (8, 4, -5)), "goes back"), (lines((8, 4, -5)), "a clock cannot show"),
        (lines((8, 4, "nan")), "a clock cannot show"),
        (lines((0, 9, 0)) + lines((8, 4, 5), steps=9), "number of steps changes"),
        (lines((8, 4, 5), (8, 3, 6)), "two validation losses"),
        (lines((9, 4, 5)), "more steps than the run has")
    ],
)
def test_broken_text_logs_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        textlog.parse(text)


def test_cut_and_diverged_text_logs_are_flagged():
    cut = textlog.parse(lines((0, 9, 0), (4, 5, 9)))
    assert not cut["complete"] and cut["steps"] == 4
    assert (
        textlog.parse(lines((0, 9, 0), (8, "nan", 9)))["diverged"]
        and textlog.parse(lines((8, "inf", 9)))["diverged"]
    )
