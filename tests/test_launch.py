"""Starting several processes: codes that say how a run ended, one voice, and places that cannot be."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.errors import UserError
from system.launch import launch, telling
from system.place import VARIABLES, Place

ROOT = Path(__file__).parent.parent
LAUNCHER = str(ROOT / "system" / "launch.py")
WHOLE = {
    "RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"
}
CLEAN = {k: v for k, v in os.environ.items() if k not in (*VARIABLES, "LOCAL_WORLD_SIZE")}
MICRO = ("short/11", "--scale", "micro", "--set", "system.warmup_steps=0")


# ----- the place --------------------------------------------------------------------------------------------

def test_a_whole_environment_is_a_place_and_an_empty_one_is_one_process():
    assert Place.read({}) == Place(0, 1, 0, 1, launched=False)
    assert Place.read(WHOLE) == Place(1, 4, 1, 4, launched=True)
    assert Place.read({**WHOLE, "LOCAL_WORLD_SIZE": "2"}) == Place(1, 4, 1, 2, launched=True)
    assert Place.read({"LOCAL_WORLD_SIZE": "?"}) == Place()  # nothing is read from it alone


@pytest.mark.parametrize("name", VARIABLES)
def test_each_variable_alone_empty_or_missing_is_refused_by_name(name):
    for environment in ({name: WHOLE[name]}, {name: ""}, {**WHOLE, name: ""}, {**WHOLE, name: " "},
                        {k: v for k, v in WHOLE.items() if k != name}):
        with pytest.raises(UserError, match=name) as refused:
            Place.read(environment)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "changed",
    [
        {"RANK": "x"}, {"RANK": "-1"}, {"RANK": "4"}, {"RANK": "1.0"}, {"RANK": "²"}, {"RANK": "9" * 5000},
        {"WORLD_SIZE": "0"}, {"WORLD_SIZE": "3"}, {"WORLD_SIZE": "16"}, {"WORLD_SIZE": "two"},
        {"LOCAL_RANK": "4"}, {"LOCAL_RANK": "1e0"}, {"LOCAL_WORLD_SIZE": "1"}, {"LOCAL_WORLD_SIZE": "8"},
        {"LOCAL_WORLD_SIZE": ""}, {"MASTER_PORT": "0"}, {"MASTER_PORT": "65536"}, {"MASTER_PORT": "http"},
        {"MASTER_ADDR": "no such host"}, {"MASTER_ADDR": "x" * 300}
    ],
)
def test_a_place_that_cannot_be_is_refused_in_a_short_line(changed):
    with pytest.raises(UserError) as refused:
        Place.read(WHOLE | changed)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300


@pytest.mark.parametrize("environment, says", [({"LOCAL_RANK": "3"}, "LOCAL_RANK is set without"),
                                               (WHOLE | {"MASTER_PORT": "http"}, "MASTER_PORT='http'"),
                                               (WHOLE | {"WORLD_SIZE": "3", "RANK": "0"}, "WORLD_SIZE=3")])
def test_the_trainer_refuses_a_stray_environment(environment, says):
    done = trainer(*MICRO, env=environment)
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_of_many_processes_that_meet_one_error_the_first_speaks():
    assert trainer("short/nonsense", env=WHOLE).stderr == ""
    assert trainer("short/nonsense", env=WHOLE | {"RANK": "0", "LOCAL_RANK": "0"}).stderr.count("\n") == 1
    assert trainer(*MICRO, "--nproc", "2", env=WHOLE | {"RANK": "0"}).stderr.count("leave --nproc out") == 1


def trainer(*args, env=None):
    return subprocess.run(
        [sys.executable, str(ROOT / "train_gpt.py"), *args], capture_output=True, text=True, cwd=ROOT,
        env=CLEAN | (env or {}), timeout=280
    )


# ----- the launcher -----------------------------------------------------------------------------------------

def started(tmp_path, text, processes=3):
    """A launch of processes that run this text, under way."""
    (tmp_path / "program.py").write_text(
        "import os, signal, sys, time\nrank = int(os.environ['RANK'])\n" + text
    )
    return subprocess.Popen(
        [sys.executable, LAUNCHER, str(processes), str(tmp_path / "program.py"), str(tmp_path)], env=CLEAN,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def ended(tmp_path, text, processes=3):
    """(exit code, stderr) of processes that run this text."""
    process = started(tmp_path, text, processes)
    err = process.communicate(timeout=60)[1]
    return process.returncode, err


def test_the_processes_know_their_places(tmp_path):
    code, _ = ended(tmp_path, "import json, pathlib\n"
                    "pathlib.Path(sys.argv[1], f'{rank}.json').write_text(json.dumps(dict(os.environ)))")
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert code == 0 and [(e["RANK"], e["LOCAL_RANK"]) for e in seen] == [(str(r), str(r)) for r in range(3)]
    assert {(e["WORLD_SIZE"], e["LOCAL_WORLD_SIZE"], e["MASTER_ADDR"]) for e in seen} == {
        ("3", "3", "127.0.0.1")
    }
    assert len({e["MASTER_PORT"] for e in seen}) == 1 and 0 < int(seen[0]["MASTER_PORT"]) < 65536


@pytest.mark.parametrize(
    "codes, expected",
    [
        ((0, 0, 0), 0), ((3, 3, 3), 3), ((4, 4, 4), 4), ((2, 2, 2), 2), ((130, 130, 130), 130),
        ((2, 1, 1), 2), ((1, 2, 0), 2), ((0, 7, 0), 7), ((1, 130, 1), 130), ((130, 3, 130), 3)
    ],
)
def test_one_code_for_many_processes_and_not_a_word(codes, expected, tmp_path):
    assert ended(tmp_path, f"sys.exit({codes}[rank])") == (expected, "")


def test_a_process_that_is_killed_is_one_line_and_the_others_end(tmp_path):
    code, err = ended(tmp_path, "os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else sys.exit(1)")
    assert code == 137 and err.count("\n") == 1 and "process 1 was ended by SIGKILL" in err


def test_what_waits_for_a_failed_process_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr("system.launch.ENDING_S", 0.2)
    monkeypatch.setattr("system.launch.GRACE_S", 0.2)
    (tmp_path / "x.py").write_text(
        "import os, signal, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "sys.exit(4) if os.environ['RANK'] == '0' else time.sleep(300)"
    )
    assert launch([sys.executable, str(tmp_path / "x.py")], 2) == 4


ENDS_IN_ORDER = (
    "def note(*_):\n    open(os.path.join(sys.argv[1], f'told{rank}'), 'a').write('x'); sys.exit(130)\n"
    "for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):\n    signal.signal(s, note)\n"
    "open(os.path.join(sys.argv[1], f'up{rank}'), 'w').close(); time.sleep(300)\n"
)


def up(tmp_path, processes):
    deadline = time.monotonic() + 60
    while not all((tmp_path / f"up{rank}").exists() for rank in range(processes)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_to_the_launcher_reaches_every_process(number, tmp_path):
    process = started(tmp_path, ENDS_IN_ORDER)
    up(tmp_path, 3)
    process.send_signal(getattr(signal, number))
    assert process.communicate(timeout=60)[1] == "" and process.returncode == 130
    assert all((tmp_path / f"told{rank}").exists() for rank in range(3))


def test_processes_do_not_outlive_a_killed_launcher(tmp_path):
    if sys.platform != "linux":
        pytest.skip("Linux tells children of their parent's death")
    process = started(tmp_path, ENDS_IN_ORDER, processes=2)
    up(tmp_path, 2)
    process.kill()
    deadline = time.monotonic() + 60
    while not all((tmp_path / f"told{rank}").exists() for rank in range(2)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_ignored_hangup_stays_ignored(tmp_path):
    (tmp_path / "program.py").write_text(
        "import signal, sys\nsys.exit(signal.getsignal(signal.SIGHUP) != signal.SIG_IGN)"
    )
    done = subprocess.run(
        [sys.executable, LAUNCHER, "2", str(tmp_path / "program.py")], env=CLEAN, timeout=60,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    )
    assert done.returncode == 0


def test_a_wrong_number_of_processes_is_one_line():
    for words in ([], ["0", "x.py"], ["-1", "x.py"], ["²", "x.py"], ["65", "x.py"], ["2"]):
        done = subprocess.run([sys.executable, LAUNCHER, *words], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_death_by_a_signal_says_most():
    assert telling([-9, 2, 1]) == 137 and telling([0]) == 0 and telling([1, 130, 4]) == 4


# ----- trainings --------------------------------------------------------------------------------------------

def launched(how, tmp_path, *args):
    """(process) of a training in two processes: by the trainer itself, or by torchrun where the project is
    installed."""
    # what `pip install -e .` leaves: torchrun finds our plugin by it
    site = tmp_path / "site" / "speedrun-0.1.0.dist-info"
    site.mkdir(parents=True)
    (site / "METADATA").write_text("Metadata-Version: 2.1\nName: speedrun\nVersion: 0.1.0\n")
    (site / "entry_points.txt").write_text("[torchrun.handlers]\nspeedrun = system.torchrun:rendezvous\n")
    env = CLEAN | {"PYTHONPATH": os.pathsep.join([str(site.parent), str(ROOT)])}
    if how == "torchrun":
        env.pop("OMP_NUM_THREADS", None)  # as a user's shell: torchrun prints five lines about it
    launcher = [] if how == "nproc" else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    more = ["--nproc", "2"] if how == "nproc" else []
    command = [
        sys.executable, *launcher, str(ROOT / "train_gpt.py"), *MICRO, *args, *more, "--out",
        str(tmp_path / "runs")
    ]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=ROOT
    )


STEPS = ("--set", "schedule.steps=2")
BURST = ("--set", "optim.scalar.lr=1e30", "--set", "optim.embed.lr=1e30")


@pytest.mark.parametrize(
    "how, args, code, status",
    [
        ("nproc", (*STEPS, "--set", "validation.target=1"), 3, "finished"),
        ("nproc", ("--set", "optim.muon.lrr=1"), 2, None), ("nproc", (*STEPS, "--data", "/nowhere"), 2, None),
        ("torchrun", (*STEPS, "--set", "validation.target=1"), 3, "finished"),
        ("torchrun", ("--set", "optim.muon.lrr=1"), 2, None), ("torchrun", (*STEPS, *BURST), 4, "diverged")
    ],
)
def test_two_processes_end_with_the_promised_code_and_few_words(how, args, code, status, tmp_path):
    process = launched(how, tmp_path, *args)
    err = process.communicate(timeout=280)[1]
    assert process.returncode == code and err.count("\n") <= 3 and "Traceback" not in err, err
    found = [json.loads(p.read_text())["status"] for p in (tmp_path / "runs").glob("*/summary.json")]
    assert found == ([status] if status else [])


def reached(tmp_path, text):
    deadline = time.monotonic() + 240
    while not any(text in p.read_text() for p in (tmp_path / "runs").glob("*/log.txt")):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children(pid):
    done = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return sorted(map(int, done.stdout.split()))


@pytest.mark.parametrize(
    "how, number, whom",
    [
        ("nproc", signal.SIGTERM, "launcher"), ("torchrun", signal.SIGINT, "launcher"),
        ("nproc", signal.SIGHUP, "second process")
    ],
)
def test_two_processes_are_interrupted_in_order(how, number, whom, tmp_path):
    process = launched(how, tmp_path, "--set", "schedule.steps=5000")
    reached(tmp_path, "step:0/")
    if whom == "launcher":
        process.send_signal(number)
    else:
        os.kill(children(process.pid)[1], number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and err.count("\n") <= 3 and "Traceback" not in err, err
    assert "interrupted after" in out
    assert [json.loads(p.read_text())["status"] for p in (tmp_path / "runs").glob("*/summary.json")] == [
        "interrupted"
    ]
