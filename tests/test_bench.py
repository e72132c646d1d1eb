"""Laws of the benches: what fails is a row, and costs no other one; what stands in a folder of results is of
this run."""

import argparse
import importlib.util
import json
import lzma
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.shards import open_corpus, write_shard
from kernels.attention import Window, visible
from common.errors import UserError

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "bench"))  # behind the repository, whose `kernels` is another one

import aot
import correct
import measure
import reference
import report
import shards
import start
import steps
import versus


def bench(name):
    """A bench whose name is taken by a package."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / f"bench/{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


# ----- failures ---------------------------------------------------------------------------------------------

BENCH = """
import argparse, os, sys
sys.path.append({bench!r})
import measure, report

def calm():
    for i in range(3):
        yield {{"case": f"calm {{i}}"}}, lambda: {{"ms": i}}

def loud():
    yield {{"case": "first"}}, lambda: {{"ms": 1}}
    yield {{"case": "raises"}}, lambda: 1 / 0
    yield {{"case": "kills"}}, lambda: os._exit(9)
    yield {{"case": "dead"}}, lose
    yield {{"case": "last"}}, lambda: {{"ms": 2}}

def lose():
    report.alive = lambda: False
    raise RuntimeError("CUDA error: an illegal memory access was encountered\\nmore lines")

def broken():
    raise ValueError("no such shape")
    yield

p = argparse.ArgumentParser()
groups = {{"calm": calm, "broken": broken, "loud": loud, "end": calm}}
report.add_arguments(p, groups)
sys.exit(report.run(p.parse_args(), groups, "Title", show=str, scale="full"))
"""


def test_a_gpu_that_cannot_draw_a_random_number_is_dead(monkeypatch):
    """So it is after a failed capture of a CUDA graph, although everything else goes on."""
    draws = []

    def rand(n, device):
        draws.append(device)
        if len(draws) == 2:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        return torch.zeros(n)

    for name in ("is_available", "synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: True)
    monkeypatch.setattr(torch, "rand", rand)
    assert [report.alive(), report.alive()] == [True, False] and draws == ["cuda", "cuda"]


def test_a_case_that_raises_kills_the_process_or_its_gpu_costs_its_own_row_only(tmp_path):
    program, out = tmp_path / "bench.py", tmp_path / "deep/rows.json"
    program.write_text(BENCH.format(bench=str(ROOT / "bench")))
    done = subprocess.run(
        [sys.executable, str(program), "--out", str(out)], capture_output=True, text=True, timeout=200
    )
    found = json.loads(out.read_text())
    assert done.returncode == 1 and found["complete"] and found["scale"] == "full", done.stderr[-2000:]
    assert [(r["group"], r["case"]) for r in found["rows"]] == [
        *(("calm", f"calm {i}") for i in range(3)), ("loud", "first"), ("loud", "last"),
        *(("end", f"calm {i}") for i in range(3))]
    assert [(r["case"], r["failed"]) for r in found["failed"]] == [
        ("preparing the next case", "ValueError: no such shape"),
        ("raises", "ZeroDivisionError: division by zero"), ("number 3 of loud", "the process ended with 9"),
        ("dead", "RuntimeError: CUDA error: an illegal memory access was encountered")
    ]
    page = out.with_suffix(".md").read_text()
    assert "not complete" not in page and "| loud | raises | ZeroDivisionError: division by zero |" in page


def test_the_largest_error_is_nan_where_one_is():
    """A gradient of NaN after one that is right must not pass."""
    assert np.isnan(correct.worst([1e-3, np.nan, 2e-3])) and correct.worst(iter([1e-3, 2e-3])) == 2e-3


@pytest.mark.parametrize("error,failed", [(0.9, False), (1.1, True), (float("nan"), True),
                                          (RuntimeError("no kernel\nimage"), True)])
def test_a_check_fails_if_its_error_is_above_the_bound_or_no_number_or_it_raises(tmp_path, error, failed):
    def checks():
        def find():
            if isinstance(error, Exception):
                raise error
            return error
        yield "sum", torch.float32, find, 1.0
        yield "other", torch.float32, lambda: "needs CUDA"

    r = report.Report(tmp_path / "c.json", "Title", done=[])
    assert report.child(r, {"a": lambda: correct.judged(checks)}, ["a"], correct.show) == 0
    assert r.finish() == failed == len(r.failed)
    assert r.rows[-1] == {"group": "a", "check": "other", "dtype": "float32", "not_run": "needs CUDA"}
    if isinstance(error, Exception):
        assert r.failed[0]["failed"] == "RuntimeError: no kernel"


def test_a_start_that_fails_keeps_the_others_and_the_next_record(tmp_path, monkeypatch):
    def train(ref, o, data, caches, out, more=(), validations=2):
        if (ref, out.parent.name) == ("short/11", "warm"):
            raise UserError("the training ended with 2: error: no room")
        return {"reset": {"start_ms": 1000, "warmup_ms": 2000, "imports_ms": 500, "graphs": 3}}, []

    monkeypatch.setattr(steps, "train", train)
    o = argparse.Namespace(
        records=["short/11", "short/33"], scale="micro", steps=4, nproc=1, data=None, caches=None, set=[],
        resume=False,
        out=str(tmp_path / "start.json")
    )
    assert steps.run(o, "Start", start.cases) == 1
    found = json.loads((tmp_path / "start.json").read_text())
    assert [(r["record"], r["kind"]) for r in found["rows"]] == [
        ("short/11", "cold"), ("short/33", "cold"), ("short/33", "warm")]
    assert [(r["record"], r["kind"], r["failed"]) for r in found["failed"]] == [
        ("short/11", "warm", "the training ended with 2: error: no room"),
        *((ref, "file", "the cold training saved no compiled code") for ref in ("short/11", "short/33"))]


@pytest.mark.parametrize("reason,trainings", [
    (None, 1), ("step 3 waits for the device: aten::nonzero", 2), ("out of memory", 1)])
def test_a_step_that_waits_for_the_gpu_is_a_failure_and_still_timed(tmp_path, monkeypatch, reason, trainings):
    asked = []

    def train(ref, o, data, caches, out, more=(), validations=2):
        asked.append(more)
        if reason and more:
            raise UserError(f"the training ended with 2: error: {reason}")
        summary = {
            "reset": {"start_ms": 1000, "warmup_ms": 2000, "graphs": 3}, "graphs_in_clock": 0,
            "attention": "x", "device": "y"
        }
        points = [(0, 0), (8, 1000), (16, 5000)]  # the batch grows
        return summary, [
            {"kind": "validation", "step": i, "train_time_ms": 10.0 * i, "tokens": n} for i, n in points
        ]

    monkeypatch.setattr(steps, "train", train)
    o = argparse.Namespace(
        records=["short/11"], scale="micro", steps=16, nproc=1, data=None, caches=None, set=[], resume=False,
        check_sync=True, out=str(tmp_path / "steps.json")
    )
    assert steps.run(o, "Steps", steps.cases) == bool(reason)
    found = json.loads((tmp_path / "steps.json").read_text())
    assert asked == [["--check-sync"], []][:trainings]
    assert [r["warm"]["ms_per_step"] for r in found["rows"]] == ([] if reason == "out of memory" else [10.0])
    assert all(r["tokens_per_second"] == 50_000 for r in found["rows"])
    assert [reason in r["failed"] for r in found["failed"]] == ([True] if reason else [])


def test_a_training_that_is_stopped_leaves_a_row_of_how_far_it_came_and_no_files(tmp_path):
    out, scratch = tmp_path / "train.json", tmp_path / "scratch"
    scratch.mkdir()
    command = [
        sys.executable, "bench/train.py", "short/11", "--scale", "micro", "--steps", "400", "--out", str(out)
    ]
    bench = subprocess.Popen(
        [*command, "--set", "system.device=cpu"], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "TMPDIR": str(scratch)}
    )
    for _ in range(3000):  # a bound for a busy machine; a run reaches its first validation long before
        lines = [
            line for log in scratch.glob("*/runs/*/*/run.jsonl") for line in log.read_text().split("\n")[:-1]
        ]
        if any(json.loads(line)["kind"] == "validation" for line in lines):
            break
        time.sleep(0.1)
    bench.terminate()
    said = bench.communicate(timeout=60)[0]
    failed = json.loads(out.read_text())["failed"]
    assert bench.returncode == 143 and failed[0]["record"] == "short/11" and failed[0]["failed"] in said
    assert re.match(
        r"stopped: no time is left, after step \d+ of 400 with loss [67]\.\d+ in \d+ ms", failed[0]["failed"]
    )
    assert not list(scratch.iterdir())


def test_a_bench_in_processes_that_is_stopped_leaves_a_row_of_what_was_under_way(tmp_path):
    """`timeout` signals both: the parent must not kill the child before that has written it."""
    out = tmp_path / "x.json"
    (tmp_path / "slow.py").write_text(f"""
import argparse, sys, time
sys.path.insert(0, {str(ROOT / "bench")!r})
import report

def cases():
    yield {{"check": "quick"}}, dict
    yield {{"check": "slow"}}, lambda: (open({str(tmp_path / "begun")!r}, "w").close(), time.sleep(1000))

p = argparse.ArgumentParser()
report.add_arguments(p, ["only"])
sys.exit(report.run(p.parse_args(), {{"only": cases}}, "Title", show=str))
""")
    bench = subprocess.Popen(
        [sys.executable, str(tmp_path / "slow.py"), "--out", str(out)], cwd=ROOT, start_new_session=True
    )
    while not (tmp_path / "begun").exists() and bench.poll() is None:
        time.sleep(0.02)
    os.killpg(bench.pid, signal.SIGTERM)
    assert bench.wait(200) == 143
    found = json.loads(out.read_text())
    assert [r["check"] for r in found["rows"]] == ["quick"] and [r["check"] for r in found["failed"]] == [
        "slow"
    ]


def test_a_real_training_that_is_refused_is_a_row_with_its_reason(tmp_path):
    out = tmp_path / "steps.json"
    done = subprocess.run(
        [
            sys.executable, "bench/steps.py", "short/11", "--scale", "micro", "--steps", "2", "--set",
            "model.nothing=1", "--out", str(out)
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    failed = json.loads(out.read_text())["failed"]
    assert done.returncode == 1 and len(failed) == 1 and "model.nothing" in failed[0]["failed"], done.stderr


# ----- what is written --------------------------------------------------------------------------------------

def test_an_old_result_is_gone_before_the_first_row_and_every_row_is_there_at_once(tmp_path):
    path = tmp_path / "x.json"
    for old in (path, path.with_suffix(".md")):
        old.write_text("of yesterday")
    r = report.Report(path, "Title", steps=3)
    assert not list(tmp_path.iterdir())
    r.add({"a": 1})
    found = json.loads(path.read_text())
    assert found["rows"] == [{"a": 1}] and found["steps"] == 3 and found["complete"] is False
    assert "not complete" in path.with_suffix(".md").read_text()
    r.add({"a": 2, "failed": "why"})
    assert json.loads(path.read_text())["failed"] == [{"a": 2, "failed": "why"}]
    assert (
        r.finish() == 1 and json.loads(path.read_text())["complete"] is True
        and len(list(tmp_path.iterdir())) == 2
    )


@pytest.mark.parametrize(
    "error,line",
    [
        (UserError("no such record"), "no such record"),
        (KeyError("x"), "KeyError: 'x'"),
        (AssertionError(), "AssertionError"),
        (
            RuntimeError("backend='inductor' raised:\n\nCompilationError: at 3:4\nmore"),
            "RuntimeError: backend='inductor' raised: CompilationError: at 3:4",
        ),
    ],
)
def test_a_failure_is_told_in_one_line_that_says_something(error, line):
    assert report.first_line(error) == line


def test_a_table_has_a_column_for_everything_a_row_says():
    lines = report.table([{"record": "a|b", "cold": {"start": 12.34567, "hits": 0}},
                          {"record": "c\nd", "ms": 1234567.0, "none": None}])
    assert lines == ["| record | cold start | cold hits | ms | none |", "| --- | --- | --- | --- | --- |",
                     "| a\\|b | 12.35 | 0 |  |  |", "| c d |  |  | 1,234,567 |  |"]


# ----- timing -----------------------------------------------------------------------------------------------

def test_on_a_gpu_the_clock_runs_over_the_call_alone_behind_a_pause_and_a_cold_cache(monkeypatch):
    log, clock = [], [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")
            self.at = clock[0]

        def elapsed_time(self, other):
            return other.at - self.at

    def step():
        log.append("step")
        clock[0] += len([x for x in log if x == "step"])  # call i takes i ms

    flush = SimpleNamespace(zero_=lambda: log.append("flush"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(
        torch.cuda, "_sleep", lambda cycles: log.append("pause") or (0 < cycles <= 2e8) or pytest.fail()
    )
    monkeypatch.setattr(measure, "wait", lambda: log.append("wait"))
    monkeypatch.setattr(torch, "empty", lambda *a, **k: flush)
    times = measure.queued(step, 7)
    assert times == pytest.approx([0.001 * i for i in range(2, 9)])
    call = ["flush", "event", "step", "event"]
    assert log == ["step", "wait", "pause", *5 * call, "wait", "pause", *2 * call, "wait"]


@pytest.mark.parametrize("window", [Window(), Window(tokens=5), Window(blocks=2, block=4),
                                    Window(tokens=6, blocks=2, block=4)])
@pytest.mark.parametrize("cut", [False, True])
def test_the_pairs_that_attention_is_billed_for_are_those_it_sees(window, cut):
    kernels = bench("kernels")
    ids = kernels.some_documents(2, 37, 9) if cut else None
    t = torch.arange(37)
    seen = visible(t[:, None], t, window).expand(2, 37, 37)
    if cut:
        documents = torch.from_numpy(ids)
        assert documents.max() > 3 and (documents.diff(dim=1) >= 0).all()
        seen = seen & (documents[:, :, None] == documents[:, None])
    assert kernels.pairs(ids, window, 2, 37) == int(seen.sum())


# ----- shards -----------------------------------------------------------------------------------------------

def test_shards_are_those_given_or_unpacked_or_random(tmp_path):
    given, packed = tmp_path / "given", tmp_path / "packed"
    given.mkdir(), packed.mkdir()
    for part, tokens in (("train_000001", 300), ("val_000000", 100)):
        write_shard(given / f"fineweb_{part}.bin", np.arange(tokens))
        (packed / f"fineweb_{part}.bin.xz").write_bytes(
            lzma.compress((given / f"fineweb_{part}.bin").read_bytes())
        )
    assert shards.prepare(tmp_path / "a", given) == given
    unpacked = open_corpus(shards.prepare(tmp_path / "b", packed))
    assert (unpacked.train_tokens, unpacked.val_tokens) == ((300,), 100)
    (packed / "fineweb_val_000000.bin.xz").write_bytes(b"nothing")
    for folder, said in ((packed, "cannot unpack"), (tmp_path / "nowhere", "no data folder")):
        with pytest.raises(UserError, match=said):
            shards.prepare(tmp_path / "c", folder)


def test_random_shards_say_that_they_are_random(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "TOKENS", (5000, 2000))
    corpus = open_corpus(shards.prepare(tmp_path / "r", None))
    assert (corpus.name, corpus.bos, corpus.train_tokens, corpus.val_tokens) == (
        "random tokens", 50256, (5000,), 2000
    )


# ----- the shell --------------------------------------------------------------------------------------------

GPU = """#!/usr/bin/env bash
echo "$*" >> "$LOG"
case "$1" in
    -c) case "$2" in *get_device_name*) echo some-card ;; *"6 * 7"*) echo 42 ;; esac ;;
    bench/shards.py) echo "$2" ;;
    bench/correct.py) sleep 60 ;;
    bench/kernels.py) exit 1 ;;
esac
"""


def shell(*command, cwd=ROOT, **environment):
    env = {k: v for k, v in os.environ.items() if k not in ("DATA", "OUT", "BUDGET", "SPEEDRUN_PYTHON")}
    return subprocess.run(
        command, cwd=cwd, env={**env, **environment}, capture_output=True, text=True, timeout=60
    )


def program(path, text):
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def test_a_part_that_hangs_is_stopped_and_one_that_fails_stops_nothing(tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    out.mkdir()
    for old in ("correct.json", "correct.md", "train.json", "steps.json"):
        (out / old).write_text("old")
    done = shell(
        "bench/gpu.sh", "correct", "kernels", "curve", SPEEDRUN_PYTHON=program(tmp_path / "python", GPU),
        LOG=str(log), OUT=str(out), BUDGET="5", SPEEDRUN_CACHE=str(tmp_path / "cache")
    )
    assert done.returncode == 1, done.stderr
    limits = dict(re.findall(r"== (\w+) \(at most (\d+) s\)", done.stdout))
    # 70 of 230 seconds
    assert list(limits) == ["correct", "kernels", "curve"] and int(limits["correct"]) == 1
    assert "stopped after 1 s: bench/correct.py" in done.stdout
    calls = [line.split()[0] for line in log.read_text().splitlines() if line.startswith("bench/")]
    assert calls == ["bench/shards.py", "bench/correct.py", "bench/kernels.py", "bench/train.py"]


def test_the_parts_together_take_less_than_560_seconds_and_the_header_says_what_the_script_does():
    text = (ROOT / "bench/gpu.sh").read_text()
    told = dict(re.findall(r"^#   (\w+) +(\d+) ", text, re.M))
    done = dict(re.findall(r"\[(\w+)\]=(\d+)", text))
    default = re.search(r"parts=\((\w+ .*)\)", text)[1].split()
    assert told == done and list(told)[:6] == default
    assert sum(int(done[part]) for part in default) <= int(re.search(r"BUDGET:-(\d+)", text)[1]) <= 560
    assert re.findall(r"--dtype (\w+)", text) == ["bfloat16"]


def test_a_later_call_leaves_whole_parts_alone_and_continues_the_others(tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    out.mkdir()
    for name, whole in (
        ("steps", "true"), ("train", "false"), ("kernels", "true"), ("steps-records", "true")
    ):
        (out / f"{name}.json").write_text(f'{{\n "about": {{}},\n "complete": {whole}\n}}\n')
    done = shell(
        "bench/gpu.sh", SPEEDRUN_PYTHON=program(tmp_path / "python", GPU.replace("sleep 60", "exit 0")),
        LOG=str(log), OUT=str(out), SPEEDRUN_CACHE=str(tmp_path / "cache")
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^(\w+): done before", done.stdout, re.M) == ["cold", "kernels", "records"]
    calls = [line for line in log.read_text().splitlines() if re.match("bench/(?!shards)", line)]
    assert [line.split()[0] for line in calls] == ["bench/train.py", "bench/correct.py", "bench/steps.py"]
    assert all("--resume" in line for line in calls)
    assert json.loads((out / "steps.json").read_text())["complete"]  # nothing of it was touched


def test_rows_are_continued_by_the_same_code_on_the_same_device_only(tmp_path):
    path = tmp_path / "x.json"
    for code, steps_, kept in ((None, 3, 1), (None, 4, 0), ("another", 3, 0)):
        r = report.Report(path, "Title", steps=3)
        r.about = {**measure.about(), **({"code": code} if code else {})}
        r.add({"record": "short/11", "ms": 1})
        r.add({"record": "short/21", "failed": "stopped"})
        again = report.Report(path, "Title", resume=True, checked=True, steps=steps_)
        assert len(again.rows) == len(again.failed) == kept


def test_a_bench_of_groups_goes_on_with_the_group_that_was_cut(tmp_path):
    program, out = tmp_path / "bench.py", tmp_path / "rows.json"
    program.write_text(BENCH.format(bench=str(ROOT / "bench")).replace("os._exit(9)", "3"))
    run = lambda *more: subprocess.run(
        [sys.executable, str(program), "--out", str(out), *more], capture_output=True, text=True, timeout=200
    )
    run("--only", "calm", "loud")
    first = json.loads(out.read_text())
    first["done"] = ["calm"]  # as if it had been stopped in `loud`
    first["rows"] = [{**row, "first": True} for row in first["rows"]]
    out.write_text(json.dumps(first))
    run("--only", "calm", "loud", "--resume")
    found = json.loads(out.read_text())
    assert [(r["group"], "first" in r) for r in found["rows"]] == [
        *3 * [("calm", True)], *2 * [("loud", False)]
    ]
    assert len(found["failed"]) == len(first["failed"]) and found["complete"]


@pytest.mark.slow
def test_a_rehearsal_runs_every_part_on_a_cpu_and_each_leaves_a_whole_result(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    out = tmp_path / "out"
    done = subprocess.run(
        ["bench/gpu.sh", "--rehearse"], cwd=ROOT, capture_output=True, text=True, timeout=900,
        env={**os.environ, "SPEEDRUN_PYTHON": sys.executable, "OUT": str(out), "RECORDS": "short/11"}
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    names = ["steps", "train", "correct", "kernels", "steps-records", "warm"]
    assert {p.name for p in out.iterdir()} == {f"{name}{end}" for name in names for end in (".json", ".md")}
    for name in names:
        found = json.loads((out / f"{name}.json").read_text())
        assert found["complete"] and found["rows"] and not found["failed"], name


@pytest.mark.parametrize("rows,checked", [
    ([{"warm": {"attention": "banded, dense"}}], {"banded"}), ([{"attention": "documents"}], {"documents"}),
    ([], {"documents", "banded"})])
def test_only_the_attention_that_ran_is_checked(tmp_path, monkeypatch, rows, checked):
    path = tmp_path / "steps.json"
    path.write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(correct, "compare_attention", lambda *how: 0.0)
    for dtype, found in (("float32", checked), ("bfloat16", set())):
        wanted = correct.selection(SimpleNamespace(as_in=str(path), dtype=dtype))
        made = [row["check"] for row, _ in correct.judged(correct.attention_checks, wanted)]
        backends = {name.split()[1].rstrip(",") for name in made if "flex" not in name}
        assert backends & {"documents", "banded"} == found
    assert correct.selection(SimpleNamespace(as_in=str(path), dtype=None))("fp8_linear y", torch.bfloat16)


# ----- kernels ahead of time --------------------------------------------------------------------------------

@pytest.mark.parametrize("registers,spilled,shared,said", [
    (255, 0, 90_000, None), (255, 8, 90_000, "spills 8 bytes a thread"),
    (200, 0, 120_000, "wants 120000 bytes of shared memory"), (256, 0, 90_000, None)])
def test_a_kernel_that_spills_or_has_no_room_is_a_failure(monkeypatch, registers, spilled, shared, said):
    built = aot.Built(shared, registers, spilled, "")
    monkeypatch.setattr(aot, "build", lambda *args, **kwargs: built)
    row = aot.resources(None, (), {"num_warps": 8}, 89, None)
    assert (said in row["failed"]) if said else "failed" not in row
    row = aot.resources(None, (), {"num_warps": 16}, 89, None)
    assert ("failed" in row) is (said is not None or registers > 128)


@pytest.mark.slow
def test_a_record_launches_every_kernel_that_it_can_have_and_all_compile(tmp_path):
    pytest.importorskip("triton")
    out = tmp_path / "aot.json"
    done = subprocess.run(
        [
            sys.executable, "bench/aot.py", "short/33", "short/33 numerics.fp8_mlp", "--arch", "80", "90",
            "--out", str(out)
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = json.loads(out.read_text())["rows"]
    built = [row for row in rows if "registers" in row]
    assert {row["kernel"] for row in built} == {
        "forward_kernel", "linear_kernel", "loss_kernel", "copy_kernel", "gradient_kernel", "symmetric_kernel"
    }
    assert [(r["arch"], r["not_run"]) for r in rows if "not_run" in r] == [
        ("sm_80", "needs compute capability 8.9")
    ]
    eight = [row for row in built if row["record"] == "short/33 numerics.fp8_mlp"]  # what only FP8 adds
    assert [row["kernel"] for row in eight] == ["linear_kernel"] and "FP8=True" in eight[0]["constants"]
    assert any("44x768x768" in row["operands"] for row in built)  # Muon's largest bank


@pytest.mark.parametrize("path", sorted((ROOT / "bench/results/aot").glob("*.json")), ids=lambda x: x.stem)
def test_the_committed_table_is_whole_and_nothing_in_it_spills(path):
    found = json.loads(path.read_text())
    assert found["complete"] and not found["failed"]
    assert {row["arch"] for row in found["rows"]} == {"sm_80", "sm_89", "sm_90", "sm_100", "sm_120"}
    assert {row["record"] for row in found["rows"]} <= set(aot.RECORDS)
    assert all(row["spilled_bytes"] == 0 for row in found["rows"] if "not_run" not in row)


# ----- against the CPU's losses -----------------------------------------------------------------------------

def losses_of(values):
    """Events of a log with these training losses."""
    return [{"kind": "validation", "train_loss": []}, {"kind": "validation", "train_loss": values}]


@pytest.mark.parametrize(
    "off,said",
    [
        (0.0, None), (0.03, None), (0.05, "leave the CPU's by 0.0500 nats, bound 0.04"),
        (float("nan"), "leave the CPU's")
    ],
)
def test_first_losses_are_compared_with_the_cpu_within_the_noise_of_the_precision(tmp_path, off, said):
    data = reference.shards(tmp_path / "shards", 12)
    exact = [10.8 - 0.1 * i for i in range(reference.COMPARED)]
    table = {
        "float32": exact, "own_precision": [exact[0] + 0.01, *exact[1:]], "tokens": reference.digest(data)
    }
    path = tmp_path / "reference.json"
    path.write_text(json.dumps(table))
    row = reference.compared(losses_of([*exact[:4], exact[4] + off, *exact[5:], 7.0]), data, path)
    assert row["bound"] == pytest.approx(0.04) and (said in row["failed"] if said else "failed" not in row)
    assert "fewer than 10" in reference.compared(losses_of(exact[:3]), data, path)["failed"]
    path.write_text(json.dumps({**table, "tokens": "of another numpy"}))
    assert "other tokens" in reference.compared(losses_of(exact), data, path)["failed"]


def test_the_committed_reference_is_of_these_settings_and_tokens(tmp_path):
    table = json.loads(reference.PATH.read_text())
    assert table["settings"] == reference.settings() and table["steps"] == reference.STEPS
    assert table["tokens"] == reference.digest(reference.shards(tmp_path / "shards"))
    assert table["bound"] == reference.bound(table) < 0.3
    curves = [table[name] for name in ("float32", "own_precision") if name in table]
    assert {len(curve) for curve in curves} == {reference.COMPARED}
    assert 10.7 < table["float32"][0] < 10.9 and table["float32"][-1] < table["float32"][0]


def test_repeating_tokens_repeat_one_in_four_and_follow_zipf(tmp_path):
    measure.repeating_shards(tmp_path, 200_000, 1000)
    tokens = np.fromfile(tmp_path / "bench_train_000001.bin", "<u2")[512:]
    again = (tokens[measure.LAG:] == tokens[:-measure.LAG]).mean()
    assert 0.24 < again < 0.28 and tokens.max() == measure.EOT
    counts = np.sort(np.bincount(tokens, minlength=measure.EOT))[::-1]
    assert 0.005 < counts[1] / len(tokens) < 0.02 and (counts > 0).sum() < 45_000


def test_without_a_gpu_the_scripts_say_what_they_would_do(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = shell("bench/gpu.sh", "tune", "kernels", SPEEDRUN_PYTHON=sys.executable)
    assert (
        done.returncode == 0
        and "would run, within 560 seconds:\n  tune, 353 s or more\n  kernels, 206 s" in done.stdout
    )
    assert shell("bench/gpu.sh", "nonsense").returncode == 2
    for name in ("kernels.py", "tune.py"):
        done = shell(sys.executable, f"bench/{name}")
        assert done.returncode == 0 and "no GPU here; on one this would t" in done.stdout


@pytest.mark.parametrize(
    "sees_gpu,complete,chosen", [(True, True, "python3"), (False, True, "venv"), (True, False, "venv")]
)
def test_the_python_that_is_here_is_taken_if_it_can_train_on_a_gpu(tmp_path, sees_gpu, complete, chosen):
    (tmp_path / "installation").mkdir()
    (tmp_path / "installation/setup_venv.sh").write_text("PYTHON=${SPEEDRUN_PYTHON:-venv}\n")
    here = tmp_path / "bin"
    here.mkdir()
    for name in ("python3", "python"):
        program(
            here / name,
            f"#!/bin/sh\ncase \"$2\" in *cuda*) {'exit 0' if sees_gpu else 'exit 1'} ;; esac\n"
            + ("exit 0\n" if complete else "echo 'No module named tiktoken' >&2\nexit 1\n"),
        )
    script = f". {ROOT / 'bench/python.sh'}; echo $PYTHON"
    path = f"{here}:{os.environ['PATH']}"
    done = shell("bash", "-c", script, cwd=tmp_path, PATH=path)
    assert done.stdout.strip() == chosen and (complete or "No module named tiktoken" in done.stderr)
    assert (
        shell("bash", "-c", script, cwd=tmp_path, PATH=path, SPEEDRUN_PYTHON="mine").stdout.strip() == "mine"
    )


# ----- update rules

def test_the_rows_of_the_update_rules_say_what_the_state_takes():
    """Two moments of a parameter's dtype, or the dtype that is asked for; torch's AdamW has the same."""
    optim = bench("optim")
    found = {name: optim.measured(optim.rule_case(kind, sets, 1, 4, "cpu"), 1)
             for name, (kind, sets) in optim.CASES.items() if kind == "table"}
    found["torch"] = optim.measured(optim.torch_case({"foreach": True}, 4, "cpu"), 1)
    assert {row["parameters"] for row in found.values()} == {4 * 768}
    state = {name: row["state_bytes_per_parameter"] for name, row in found.items()}
    assert state["AdamW"] == state["torch"] == state["AdamW, bfloat16, moments in float32"] == 8
    assert state["AdamW, bfloat16"] == 4


# ----- against nanoGPT

SMALL_GPT = dict(layers=1, width=32, heads=2, length=16, rows=8, vocabulary=64)
STUB = """
from dataclasses import dataclass
import torch
from torch import nn
import torch.nn.functional as F

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(nn.Module):
    def __init__(self, c):
        super().__init__()
        print("a line that is no answer")
        assert (c.dropout, c.bias) == (0.0, False)
        self.table = nn.Parameter(torch.randn(c.vocab_size + c.block_size, c.n_embd))
        self.rest = nn.Parameter(torch.ones((12 * c.n_embd + 2) * c.n_layer * c.n_embd + c.n_embd))

    def forward(self, x, y):
        logits = F.embedding(x, self.table) @ self.table.T
        return logits, F.cross_entropy(logits.flatten(0, 1), y.flatten()) + 0 * self.rest.sum()

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas)
"""


def case_of(path):
    return {"path": str(path), "threads": 1, "shape": SMALL_GPT, "mode": "eager", "precision": "float32"}


@pytest.mark.parametrize("text", [None, "", "class GPT: pass\nclass GPTConfig: pass\n", "class GPT(:\n"])
def test_a_path_that_holds_no_nanogpt_is_told_in_one_line(tmp_path, text):
    if text is not None:
        (tmp_path / "model.py").write_text(text)
    with pytest.raises(UserError, match="holds no nanoGPT, because .*model.py .*: give the folder") as told:
        versus.require_nanogpt(tmp_path)
    assert "\n" not in str(told.value)


def test_the_comparison_runs_any_checkout_by_its_path_in_a_process_of_its_own(tmp_path):
    (tmp_path / "model.py").write_text(STUB)
    versus.require_nanogpt(tmp_path)
    row = versus.compare(case_of(tmp_path), rounds=3)
    assert row["quartile_1"] <= row["ratio"] <= row["quartile_3"]
    assert min(row["ours_ms"], row["nanogpt_ms"], row["ratio"]) > 0 and row["rounds"] == 3
    assert row["parameters"] - row["nanogpt_parameters"] == 3 * 32  # the bias of each LayerNorm
    assert "nanogpt_model" not in sys.modules
    assert versus.commit_of(tmp_path) == "unknown"


class Recorded:
    """A side that notes its steps in `order`, with this many parameters."""
    order, parameters = [], {}

    def __init__(self, case, name):
        self.name = name

    def answer(self):
        return self.parameters[self.name]

    def seconds(self):
        self.order.append(self.name)
        return {"ours": 1.0, "nanogpt": float(len(self.order))}[self.name]

    def close(self):
        self.order.append(f"{self.name} closed")


def test_steps_of_the_two_sides_alternate_and_a_ratio_above_one_is_ours(monkeypatch, tmp_path):
    monkeypatch.setattr(versus, "Side", Recorded)
    monkeypatch.setattr(Recorded, "order", [])
    monkeypatch.setattr(Recorded, "parameters", {"ours": 1000, "nanogpt": 991})
    row = versus.compare(case_of(tmp_path), rounds=5)
    assert Recorded.order == ["ours", "nanogpt"] * 5 + ["ours closed", "nanogpt closed"]
    # their steps take 2, 4, 6, 8, 10 seconds, ours take one
    assert (row["quartile_1"], row["ratio"], row["quartile_3"]) == (4, 6, 8) and row["nanogpt_ms"] == 6000


def test_models_of_other_sizes_are_not_compared_and_both_processes_end(monkeypatch, tmp_path):
    monkeypatch.setattr(versus, "Side", Recorded)
    monkeypatch.setattr(Recorded, "order", [])
    monkeypatch.setattr(Recorded, "parameters", {"ours": 1000, "nanogpt": 980})
    with pytest.raises(RuntimeError, match="no equal work: 1,000 parameters here, 980 in nanoGPT"):
        versus.compare(case_of(tmp_path), rounds=5)
    assert Recorded.order == ["ours closed", "nanogpt closed"]


def test_the_comparison_has_a_row_for_every_shape_mode_and_precision():
    rows = [columns for columns, _ in versus.cases(quick=False)]
    assert len(rows) == len(versus.SHAPES) * 4 == len({tuple(row.values()) for row in rows}) == 8
    assert [tuple(row.values())[1:] for row, _ in versus.cases(quick=True)] == [
        ("eager", "float32"), ("eager", "bfloat16")
    ]
