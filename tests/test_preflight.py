"""Laws of the preflight: what is known to be wrong is told, what is fine is one line, and the code says
it."""

import itertools
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import process_group
from bench import preflight
from common.errors import UserError
from evidence import submit

GOOD = {"torch": "2.13.0+cu130", "cuda": "13.0", "driver": "580.82.07", "attention": "auto"}

ROOT = Path(__file__).parent.parent


def lines(monkeypatch, capsys, *argv):
    """(exit code, printed lines) of the program."""
    monkeypatch.setattr(sys, "argv", ["preflight", *argv])
    monkeypatch.setattr(preflight, "others", lambda cuda: iter(()))  # this machine may be busy
    with pytest.raises(SystemExit) as ended:
        preflight.main()
    return ended.value.code, capsys.readouterr().out.splitlines()


def test_every_known_fault_has_a_condition_a_remedy_and_a_source():
    conditions = {"driver_below", "torch", "torch_has", "torch_since", "cuda_since", "attention"}
    for fault in preflight.known_faults():
        assert (
            fault.keys() - conditions == {"what", "remedy", "severity", "source"}
            and fault.keys() & conditions
        )
        assert fault["severity"] in ("fault", "slow") and fault["source"]


@pytest.mark.parametrize("changed, told", [
    ({}, []), ({"driver": ""}, []),
    ({"driver": "570.124"}, ["35 %", "CUDA 13"]),
    ({"driver": "570.124", "torch": "2.11.0+cu126", "cuda": "12.6"}, ["35 %"]),
    ({"torch": "2.5.1+cu124", "attention": "dense"}, ["torch 2.5"]),
    ({"attention": "dense"}, ["mask"]), ({"attention": "dense", "torch": "2.10.0"}, []),
    ({"torch": "2.10.0a0+b558c986e8.nv25.11"}, ["65,536"]), ({"torch": "2.7.0.dev20250315"}, ["1 % slower"]),
])
def test_faults_of_versions_are_told(changed, told):
    found = [f["what"] for f in preflight.known_faults() if preflight.holds(f, GOOD | changed)]
    assert len(found) == len(told) and all(part in what for part, what in zip(told, found))


def test_a_gpu_with_an_old_driver_and_another_program_is_told(monkeypatch):
    rows = {"--query-gpu=driver_version": [["570.1"]], "--query-compute-apps=pid,process_name,used_memory":
            [["1", "python", "800"]]}
    monkeypatch.setattr(preflight, "smi", rows.get)
    resolved = SimpleNamespace(settings=SimpleNamespace(system=SimpleNamespace(attention="auto")))
    assert any("35 %" in line.text and line.status == preflight.WARN
               for line in preflight.versions(resolved, cuda=True))
    line, = preflight.others(cuda=True)
    assert line.status == preflight.WARN and "process 1 (python, 800 MiB)" in line.text
    monkeypatch.setattr(preflight, "smi", lambda query: None)
    assert [x.status for x in (*preflight.others(True), *preflight.versions(resolved, True))] == [
        preflight.UNKNOWN, preflight.UNKNOWN]


def test_a_machine_that_is_fit_is_one_line(monkeypatch, capsys):
    code, out = lines(monkeypatch, capsys, "tiny-v3", "--brief")
    assert code == 0 and out[-1].startswith("preflight: tiny-v3 can run here")
    assert not any(line.startswith("ok") for line in out)
    code, out = lines(monkeypatch, capsys, "tiny-v3")
    checked = {line.split("  ")[1].strip() or line[13:27].strip() for line in out[:-1]}
    assert code == 0 and len(checked) >= 6


def test_a_machine_that_is_not_fit_says_why_and_exits_2(monkeypatch, capsys, tmp_path):
    code, out = lines(monkeypatch, capsys, "short/1", "--data", str(tmp_path))
    assert code == 2 and out[-1] == "preflight: short/1 is not fit to run here"
    assert any("needs a GPU" in x for x in out) and any("no train shards" in x for x in out)
    code, _ = lines(monkeypatch, capsys, "short/none")
    assert code == 2


def test_a_clock_that_is_being_set_is_found(monkeypatch):
    assert [line.status for line in preflight.clock(False)] == [preflight.OK]
    plain, ahead = time.time, itertools.count()
    monkeypatch.setattr(time, "time", lambda: plain() + 0.05 * next(ahead))
    assert next(preflight.clock(False, lambda s: None)).status == preflight.FAIL


def test_two_processes_reduce_and_gather_and_write_their_speed(tmp_path):
    command = [sys.executable, "bench/preflight.py", "--as-rank", str(tmp_path / "speed")]
    done = process_group.run(command, 2, timeout=280, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "speed").read_text()) > 0


def test_processes_that_do_not_reduce_together_are_told(monkeypatch):
    monkeypatch.setattr(preflight, "launch", lambda *rest: 1)
    line, = preflight.peers(2, cuda=False)
    assert line.status == preflight.FAIL and "2 processes do not reduce" in line.text

    def answers(command, nproc, environment):
        with open(command[-1], "w") as file:
            json.dump(3.5, file)
        return 0

    monkeypatch.setattr(preflight, "launch", answers)
    assert [x.status for x in preflight.peers(2, cuda=False)] == [preflight.OK]


@pytest.mark.parametrize("code", [0, 2])
def test_submit_asks_before_a_full_scale_run(code, monkeypatch, capsys):
    asked = []

    def run(command, **options):
        asked.append(command)
        return SimpleNamespace(returncode=code, stdout="preflight: said\n", stderr="")

    monkeypatch.setattr(submit.subprocess, "run", run)
    if code:
        with pytest.raises(UserError, match="not fit for a full-scale run"):
            submit.check_machine("short/5", 8, None)
    else:
        submit.check_machine("short/5", 8, None)
    assert asked[0][1:] == ["-m", "bench.preflight", "short/5", "--nproc", "8", "--brief"]
    assert capsys.readouterr().out == "preflight: said\n"
