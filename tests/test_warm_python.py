"""Laws of warm_python.py: a program that is forked from the server is what a cold start would have made."""

import json
import os
import signal
import subprocess
import sys

import pytest

import warm_python

# What a program can tell of itself; no module of the project is among what it finds imported.
PROBE = """
import json, os, signal, sys
names = ("SIGINT", "SIGHUP", "SIGCHLD", "SIGPIPE")
handlers = {name: signal.getsignal(getattr(signal, name)) for name in names}
told = dict(
    argv=sys.argv, name=__name__, path=sys.path, cwd=os.getcwd(), environment=dict(os.environ),
    session=os.getsid(0) == os.getpid(), group=os.getpgid(0) == os.getpid(), isolated="-I" in sys.orig_argv,
    handlers={name: getattr(one, "__name__", str(one)) for name, one in handlers.items()},
    bytecode=sys.dont_write_bytecode, encoding=sys.stdout.encoding.lower(), read=sys.stdin.read(),
    buffered=[not one.write_through for one in (sys.stdout, sys.stderr)], orig=sys.orig_argv,
    files=sorted(map(int, os.listdir("/proc/self/fd")))[:3],
    ours=sorted({"deltas", "settings", "model", "train_gpt"} & set(getattr(sys, "modules"))),
)
print(json.dumps(told))
"""


@pytest.fixture
def starts(monkeypatch):
    """A list that gets an entry for each program that the server was asked for."""
    seen, start = [], warm_python.Server.start
    monkeypatch.setattr(warm_python.Server, "start", lambda *args: seen.append(args) or start(*args))
    return seen


def told(command, popen, **how):
    """What the probe says when it is started by a class of processes."""
    process = popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **how)
    out, _ = process.communicate("typed")
    assert process.returncode == 0
    return json.loads(out)


@pytest.mark.skipif(sys.platform != "linux", reason="programs start cold elsewhere")
@pytest.mark.parametrize(
    "words", [("probe.py", "a b"), ("-m", "probe", "-x"), ("-c", PROBE, "é"), ("-I", "-B", "probe.py")],
    ids=["script", "module", "code", "isolated"]
)
def test_a_forked_program_finds_what_a_cold_one_finds(words, tmp_path, starts):
    (tmp_path / "probe.py").write_text(PROBE)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'more'}{os.pathsep}even", "OWN": "1"}
    environment |= {"PYTHONUNBUFFERED": "1"} if "-m" in words else {"PYTHONDONTWRITEBYTECODE": "1"}
    how = {"cwd": tmp_path, "env": environment, "start_new_session": "-m" in words}
    warm = told([sys.executable, *words], warm_python.Popen, **how)
    cold = told([sys.executable, *words], warm_python.COLD, **how)
    assert len(starts) == 1 and warm == cold and cold["read"] == "typed" and not cold["ours"]


def test_a_forked_program_ends_as_it_would_end_alone(starts):
    def ended(code):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr.strip().splitlines()[-1:]

    assert ended("import sys; print('out'); sys.exit(5)") == (5, "out\n", [])
    assert ended("import sys; sys.exit('error: why')") == (1, "", ["error: why"])
    assert ended("1 / 0") == (1, "", ["ZeroDivisionError: division by zero"])
    assert ended("import os; os.kill(os.getpid(), 9)") == (-signal.SIGKILL, "", [])
    assert ended("raise KeyboardInterrupt") == (-signal.SIGINT, "", ["KeyboardInterrupt"])
    assert ended("import atexit; atexit.register(print, 'last')") == (0, "last\n", []) and len(starts) == 6


def test_a_forked_program_is_waited_for_and_told_like_any_process(starts):
    process = subprocess.Popen([sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"],
                               stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n" and process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    process.terminate()
    assert process.wait(30) == process.poll() == -signal.SIGTERM and len(starts) == 1
    with process.stdout:
        assert process.stdout.read() == ""


def test_what_a_forked_program_starts_is_forked_too_and_belongs_to_it():
    inner = "import json, os; print(json.dumps([os.getpid(), os.getppid(), os.getpgid(0), os.getsid(0)]))"
    outer = (f"import json, os, subprocess, sys; code = {inner!r}\n"
             "told = json.loads(subprocess.check_output([sys.executable, '-c', code]))\n"
             "print(json.dumps([told, [os.getpid(), os.getppid(), os.getpgid(0), os.getsid(0)]]))")
    for session in (False, True):
        done = subprocess.run(
            [sys.executable, "-c", outer], capture_output=True, text=True, start_new_session=session
        )
        (_, above, *inner_groups), (pid, server, *groups) = json.loads(done.stdout)
        # in a session of its own it starts what it starts itself, so that ending its group ends both
        assert inner_groups == groups and above == (pid if session else server)


def test_what_a_start_itself_is_about_starts_cold(starts, tmp_path):
    python, code = sys.executable, "print(1)"
    (tmp_path / "torch.py").write_text("raise ImportError('broken')")
    for command, how in [
        ([python, "-X", "importtime", "-c", code], {}),
        ([python, "-c", "import sys; print(len(sys.modules))"], {}),
        ([python, "-c", code], {"env": {**os.environ, "PYTHONHASHSEED": "1"}}),
        ([python, "-c", code], {"env": {**os.environ, "OMP_NUM_THREADS": "7"}}),
        ([python, "-c", code], {"preexec_fn": lambda: None}), (["echo", "1"], {}),
        (f"{python} -V", {"shell": True}),
        ([python, "-c", code], {"env": {**os.environ, "PYTHONPATH": str(tmp_path)}}),
        ([python, str(tmp_path / "missing.py")], {})
    ]:
        subprocess.run(command, capture_output=True, **how)
    assert not starts
