"""Laws of the queue of a sweep and its workers: claims, resumes, failures, GPUs."""

import json
import os
import signal
import subprocess
import threading
import time

import pytest

import runlog
from sweeps import queue, worker, report as sweep_report
from fake_sweep import CAP, LAM, NORM, TWO, call, command, fake, made, planned, starts, wait_for


# ----- claims -----------------------------------------------------------------------------------------------

def foreign_claim(root, target, age_s):
    """A claim of a machine elsewhere, its last heartbeat so long ago."""
    number = queue.last_claim(root, target) + 1
    path = queue.claim_path(root, target, number)
    path.write_text(json.dumps({"host": "elsewhere", "place": "another boot", "pid": 1, "born": 1}))
    os.utime(path, (queue.server_time(root) - age_s,) * 2)
    return number


def test_a_claim_excludes_others_until_it_is_given_back(tmp_path):
    made(tmp_path, "ablate", "short/11", *TWO)
    number, _ = queue.claim(tmp_path, "t")
    assert queue.claim(tmp_path, "t") is None and queue.beat(tmp_path, "t", number)
    queue.release(tmp_path, "t", number)
    assert queue.claim(tmp_path, "t")[0] == number + 1


def test_a_stale_claim_is_taken_over_and_its_owner_learns_it(tmp_path, monkeypatch):
    made(tmp_path, "ablate", "short/11", *TWO)
    number = foreign_claim(tmp_path, "t", queue.STALE_S - 20)
    monkeypatch.setattr(time, "time", lambda: 4e9)  # a clock that is wrong: only the disk's counts
    assert queue.claim(tmp_path, "t") is None
    os.utime(queue.claim_path(tmp_path, "t", number), (queue.server_time(tmp_path) - queue.STALE_S - 1,) * 2)
    assert queue.claim(tmp_path, "t")[0] == number + 1
    assert not queue.beat(tmp_path, "t", number) and queue.beat(tmp_path, "t", number + 1)


def test_a_claim_of_a_dead_process_of_this_machine_is_stale_at_once(tmp_path):
    made(tmp_path, "ablate", "short/11", *TWO)
    child = subprocess.Popen(["sleep", "30"])
    text = json.dumps(queue.identity() | {"pid": child.pid, "born": queue.born(child.pid)})
    queue.write_once(queue.claim_path(tmp_path, "t", 1), text)
    assert queue.claim(tmp_path, "t") is None
    child.kill()
    child.wait()
    assert queue.claim(tmp_path, "t")[0] == 2


def test_a_foreign_claim_from_the_future_is_no_sign_of_life(tmp_path):
    made(tmp_path, "ablate", "short/11", *TWO)
    foreign_claim(tmp_path, "near", -queue.STALE_S + 20)
    foreign_claim(tmp_path, "far", -1e8)
    assert queue.claim(tmp_path, "near") is None and queue.claim(tmp_path, "far")[0] == 2


@pytest.mark.parametrize("text", ["null", "{}", "[]", "[" * 5000, ""])
def test_a_queue_file_that_holds_nonsense_is_one_line_and_no_spinning(text, tmp_path, fake, capsys):
    """Claims: alive until their heartbeat ages. Results, failures, survivors, seal and plan: refused."""
    plan = made(tmp_path / "q", "ablate", "short/11", *TWO, "--seeds", 1)
    target = queue.targets(plan)[0][0]
    queue.claim_path(tmp_path / "q", "t", 1).write_text(text)
    assert queue.claim(tmp_path / "q", "t") is None
    os.utime(queue.claim_path(tmp_path / "q", "t", 1), (0, 0))
    assert queue.claim(tmp_path / "q", "t")[0] == 2
    settled = [f"done/{target}.json", f"failed/{target}.json"]
    for name in (*settled, "survivors.json", "sealed.json", "plan.json"):
        path = tmp_path / "q" / name
        before = path.read_text() if path.exists() else None
        path.write_text(text)
        for command in ("work", "status"):
            assert call(command, tmp_path / "q") == 2, (name, command)
            err = capsys.readouterr().err
            assert err.startswith("error: ") and err.count("\n") == 1 and name.split("/")[-1] in err
        path.unlink() if before is None else path.write_text(before)
    assert not starts(fake)


def test_a_plan_is_sealed_when_its_first_run_starts(tmp_path, fake, capsys):
    root = tmp_path / "q"
    made(root, "ablate", "short/11", *TWO, "--seeds", 1)
    text = (root / "plan.json").read_text()
    assert not (root / queue.SEAL).exists() and queue.load_plan(root)
    assert call("work", root) == 0 and (root / queue.SEAL).exists()
    (root / "plan.json").write_text(text.replace('"confidence": 0.95', '"confidence": 0.5'))
    capsys.readouterr()
    for command in ("work", "status", "report"):
        assert call(command, root) == 2
        err = capsys.readouterr().err
        assert "changed after the first run" in err and err.count("\n") == 1
    (root / "plan.json").write_text(text)
    assert call("status", root) == 0


def test_results_are_those_of_the_runs_logs(tmp_path, fake, capsys):
    root = tmp_path / "q"
    made(root, "ablate", "short/11", *TWO, "--seeds", 1)
    assert call("work", root) == 0
    path = sorted((root / "done").glob("*.json"))[0]
    text = path.read_text()
    for key, value in (("val_loss", 1.0), ("seed", 3), ("status", "diverged"), ("folder", "../done"),
                       ("torch", "9"), ("ml_hash", "0" * 16), ("wall_ms", 1)):
        path.write_text(json.dumps(json.loads(text) | {key: value}))
        capsys.readouterr()
        for command in ("status", "report"):
            assert call(command, root) == 2, key
            err = capsys.readouterr().err
            assert err.startswith("error: ") and err.count("\n") == 1
    path.write_text(text)
    os.rename(path, path.with_name("0" * 16 + "_s0.json"))
    assert call("report", root) == 2 and "no arm of the plan" in capsys.readouterr().err


def test_a_seed_whose_run_is_a_copy_of_another_s_is_refused(tmp_path, fake, monkeypatch, capsys):
    root = tmp_path / "q"
    made(root, "ablate", "short/11", *TWO, "--seeds", 2)
    monkeypatch.setenv("SAME_NOISE", "1")
    call("work", root)
    capsys.readouterr()
    assert call("report", root) == 2 and "to the last bit" in capsys.readouterr().err


def test_runs_of_another_torch_or_tree_are_refused_and_not_ranked(tmp_path, fake, monkeypatch, capsys):
    root = tmp_path / "q"
    made(root, "ablate", "short/11", *TWO, "--seeds", 1)
    monkeypatch.setattr(worker, "FAILURES_IN_A_ROW", 1)
    w = worker.Worker(root, [{}], say=lambda line: None)
    assert w.begin(w.look())
    wait_for(lambda: w.running[0].process.poll() is not None)
    w.attend(w.running[0])
    monkeypatch.setenv("FAKE_TORCH", "9")
    assert call("work", root) == 1
    failure, = queue.settled(root)[1].values()
    assert "torch is '9'" in failure["reason"] and "mixes no programs" in failure["reason"]
    sealed = json.loads((root / queue.SEAL).read_text())
    assert sealed["sources"] == runlog.sources()[1] and sealed["torch"] and sealed["cpu"]
    (root / queue.SEAL).write_text(json.dumps(sealed | {"cpu": "another"}))
    capsys.readouterr()
    assert call("work", root) == 2 and "other processors" in capsys.readouterr().err


def test_of_many_that_take_over_a_stale_claim_one_succeeds(tmp_path):
    made(tmp_path, "ablate", "short/11", *TWO)
    for k in range(20):
        foreign_claim(tmp_path, f"t{k}", 1e6)
    won, gate = [], threading.Barrier(8)

    def contend():
        gate.wait()
        won.extend(k for k in range(20) if queue.claim(tmp_path, f"t{k}"))

    threads = [threading.Thread(target=contend) for _ in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert sorted(won) == list(range(20))


def test_a_result_is_written_once(tmp_path):
    assert queue.write_once(tmp_path / "a.json", "1") and not queue.write_once(tmp_path / "a.json", "2")
    assert (tmp_path / "a.json").read_text() == "1" and len(list(tmp_path.iterdir())) == 1


def test_a_worker_that_slept_gives_up_what_another_took(tmp_path, fake, monkeypatch):
    monkeypatch.setenv("SECONDS", "30")
    made(tmp_path / "q", "ablate", "short/11", *TWO)
    said = []
    w = worker.Worker(tmp_path / "q", [{}], say=said.append)
    assert w.begin(w.look())
    run = w.running[0]
    wait_for(lambda: starts(fake))
    foreign_claim(tmp_path / "q", run.target, 0)
    run.beaten = 0
    w.attend(run)
    assert (
        not w.running and w.free == [{}] and run.process.poll() is not None
        and "another one took it" in said[0]
    )


# ----- running ----------------------------------------------------------------------------------------------

def test_a_killed_sweep_resumes_without_repeating_finished_runs(tmp_path, fake, monkeypatch):
    """SIGKILL of the whole sweep in the middle of its third run: the run dies with it, and only that one is
    lost."""
    monkeypatch.setenv("SECONDS", "0.4")
    args = command("ablate", "short/11", *TWO, "--seeds", 1, "--controls", 3, "--dir", tmp_path / "q")
    process = subprocess.Popen(args, stdout=subprocess.DEVNULL, cwd=tmp_path)
    wait_for(lambda: len(starts(fake)) == 3)
    process.kill()
    process.wait()
    child = int(fake.read_text().splitlines()[2].split()[1])
    wait_for(lambda: queue.born(child) is None, 2)
    assert len(list((tmp_path / "q/done").glob("*.json"))) == 2
    monkeypatch.setenv("SECONDS", "0")
    done = subprocess.run(args, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "going on with the queue" in done.stdout and "2 done" in done.stdout
    todo = [name for name, _, _ in queue.targets(queue.load_plan(tmp_path / "q"))]
    assert sorted(starts(fake)) == sorted([*todo, starts(fake)[2]]) and len(todo) == 5
    assert "[5/5]" in done.stdout and done.stdout.count("  seed ") == 3
    again = subprocess.run(args, capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 0 and len(starts(fake)) == 6


def test_two_workers_never_run_the_same_target(tmp_path, fake, monkeypatch):
    monkeypatch.setenv("SECONDS", "0.05")
    plan = made(tmp_path / "q", "ablate", "short/11", *TWO, "--seeds", 2, "--controls", 4)
    both = [
        subprocess.Popen(command("work", tmp_path / "q"), stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    out = [p.communicate(timeout=240)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0]
    assert (
        sorted(starts(fake)) == sorted(name for name, _, _ in queue.targets(plan)) and len(starts(fake)) == 8
    )
    assert all(text.count("  seed ") > 1 for text in out)  # both took part


def test_a_target_that_another_worker_settled_a_moment_ago_is_not_run(tmp_path, fake):
    made(tmp_path / "q", "ablate", "short/11", *TWO)
    w = worker.Worker(tmp_path / "q", [{}], say=lambda line: None)
    open_ = w.look()
    queue.write_once(tmp_path / "q/done" / f"{open_[0][0]}.json", "{}")
    assert w.begin(open_) and not w.running and queue.is_stale(tmp_path / "q", open_[0][0], 1)


def test_interrupting_gives_the_claims_back_and_stops_the_runs(tmp_path, fake, monkeypatch):
    monkeypatch.setenv("SECONDS", "30")
    process = subprocess.Popen(command("ablate", "short/11", *TWO, "--workers", 2, "--dir", tmp_path / "q"),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(starts(fake)) == 2)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130 and "goes on" in err and "Traceback" not in err
    children = [int(line.split()[1]) for line in fake.read_text().splitlines()]
    assert not any(queue.born(pid) for pid in children)
    for target in starts(fake):
        assert queue.is_stale(tmp_path / "q", target, 1)


def test_failures_are_kept_with_their_reason_and_run_again_only_with_retry(
    tmp_path, fake, monkeypatch, capsys
):
    monkeypatch.setenv("FAIL", f"--without {CAP}")
    args = ["ablate", "short/11", *TWO, "--seeds", 2, "--controls", 2, "--dir", tmp_path / "q"]
    assert call(*args) == 1
    _, failed = queue.settled(tmp_path / "q")
    assert len(failed) == 2 and {f["reason"] for f in failed.values()} == {
        "exit 1: error: the disk of the fake is full"
    }
    assert all("is full" in (tmp_path / "q/output" / f["output"]).read_text() for f in failed.values())
    out, err = capsys.readouterr()
    assert "FAILED: exit 1" in out and err.count("failed: ") == 2
    row = next(r for r in sweep_report.report(tmp_path / "q")[0]["rows"] if CAP in r["arm"])
    assert row["n"] == 0 and "2 failed (exit 1: error: the disk" in row["note"] and not row["resolved"]
    monkeypatch.delenv("FAIL")
    assert call(*args) == 1 and len(starts(fake)) == 6  # kept
    assert call(*args, "--retry") == 0 and len(starts(fake)) == 8
    assert len(list((tmp_path / "q/failed/old").iterdir())) == 2 and not list(
        (tmp_path / "q/output").iterdir()
    )


def test_a_killed_run_is_a_failure_that_says_so(tmp_path, fake, monkeypatch):
    monkeypatch.setenv("SECONDS", "30")
    made(tmp_path / "q", "ablate", "short/11", *TWO)
    w = worker.Worker(tmp_path / "q", [{}], say=lambda line: None)
    assert w.begin(w.look())
    run = w.running[0]
    run.process.kill()
    run.process.wait()
    w.attend(run)
    assert (
        "killed by SIGKILL; out of memory, or somebody"
        in queue.settled(tmp_path / "q")[1][run.target]["reason"]
    )


def test_a_machine_on_which_everything_fails_stops(tmp_path, fake, monkeypatch, capsys):
    monkeypatch.setenv("FAIL", "all")
    made(tmp_path / "q", "ablate", "short/11", *TWO, LAM, "--seeds", 3)
    assert call("work", tmp_path / "q") == 1
    assert "3 runs in a row failed" in capsys.readouterr().out and len(starts(fake)) == 3


def test_a_worker_stops_when_the_code_changes_under_it(tmp_path, fake, monkeypatch, capsys):
    made(tmp_path / "q", "ablate", "short/11", *TWO, "--seeds", 1, "--controls", 1)
    old = runlog.sources()
    edited = ("", "e" * 16)
    # edited while the first run is under way
    monkeypatch.setattr(runlog, "sources", lambda: edited if starts(fake) else old)
    assert call("work", tmp_path / "q") == 1
    assert "the trainer's code changed" in capsys.readouterr().out and len(starts(fake)) == 1
    assert call("work", tmp_path / "q") == 2 and len(starts(fake)) == 1
    err = capsys.readouterr().err
    assert "other sources of the trainer" in err and err.count("\n") == 1
    monkeypatch.setattr(runlog, "sources", lambda: old)
    assert call("work", tmp_path / "q") == 0 and len(starts(fake)) == 3


def test_a_diverged_run_is_a_result_that_is_not_averaged(tmp_path, fake, monkeypatch, capsys):
    monkeypatch.setenv("DIVERGE", "1")
    assert call("ablate", "short/11", "--features", NORM, "--seeds", 1, "--dir", tmp_path / "q") == 0
    found, _ = sweep_report.report(tmp_path / "q")
    assert (
        found["rows"][0]["note"] == "1 of 1 diverged and are not in the mean"
        and found["rows"][0]["mean"] is None
    )
    assert "diverged" in capsys.readouterr().out and len(starts(fake)) == 2


def test_one_run_per_gpu_and_none_on_a_busy_one(tmp_path, fake, monkeypatch, capsys):
    tool = tmp_path / "bin/nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\ncase $1 in *query-gpu*) printf '0, GPU-a\\n1, GPU-b\\n2, GPU-c\\n';; *) echo "
                    "$BUSY;; esac\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("BUSY", "GPU-b")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("SECONDS", "0.3")
    assert call("ablate", "short/11", *TWO, "--seeds", 1, "--controls", 2, "--dir", tmp_path / "q") == 0
    assert {line.split()[2] for line in fake.read_text().splitlines()} == {"0", "2"}
    assert call("ablate", "short/11", "--workers", 3, "--runs", tmp_path) == 2
    monkeypatch.setenv("BUSY", "GPU-a\nGPU-b\nGPU-c")
    tool.write_text(tool.read_text().replace("echo $BUSY", 'echo "$BUSY"'))
    assert call("ablate", "short/11", "--runs", tmp_path) == 2
    err = capsys.readouterr().err
    assert "2 GPUs are free" in err and "no free GPU: something runs on each of 0, 1, 2" in err


def test_threads_are_divided_and_runs_have_low_priority(tmp_path, fake, monkeypatch):
    plan = planned("ablate", "short/11", *TWO)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [s["OMP_NUM_THREADS"] for s in worker.slots(plan, 3)] == ["2"] * 3
    made(tmp_path / "q", "ablate", "short/11", *TWO)
    w = worker.Worker(tmp_path / "q", worker.slots(plan), niceness=max(15, os.nice(0)), say=lambda line: None)
    assert w.begin(w.look())
    assert w.running[0].process.wait() == 0, w.running[0].output.read_text()
    assert fake.read_text().split()[3] == str(max(15, os.nice(0)))


def test_jobs_of_submitit_work_on_the_queue(tmp_path, fake):
    done = subprocess.run(
        command(
            "ablate", "short/11", *TWO, "--seeds", 1, "--controls", 2, "--dir", tmp_path / "q", "--launcher",
            "local-submitit", "--workers", 2
        ),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "2 jobs submitted" in done.stdout and "report: " in done.stdout
    assert sorted(starts(fake)) == sorted(
        name for name, _, _ in queue.targets(queue.load_plan(tmp_path / "q"))
    )
