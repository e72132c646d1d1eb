"""Laws of the walls around a stranger's command, each for every kind of walls that this machine can build.

A law whose wall is absent is skipped with the machine's reason.
"""

import os
import socket
import sys
import threading
import time

import pytest

from common import sandbox
from common.errors import UserError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the sandbox needs a Unix system")


def available() -> list[str]:
    """Kinds of walls that can be built here."""
    found = [sandbox.probe()["kind"]] if os.name == "posix" else []
    return list(dict.fromkeys([*found, "plain"]))


@pytest.fixture(params=available())
def walled(request, monkeypatch, tmp_path):
    """A function that runs Python code behind walls of one kind, in a folder that it may not write."""
    monkeypatch.setattr(sandbox, "kinds", lambda: [request.param])
    (tmp_path / "out").mkdir()

    def run(code, wall=None, **options):
        usual = {"cwd": tmp_path, "writable": [tmp_path / "out"], "seconds": 30, "memory_mib": 256}
        options = usual | options
        done = sandbox.run([sys.executable, "-I", "-S", "-c", code], **options)
        if wall is not None and not done.walls.get(wall):
            pytest.skip(f"{request.param}: {sandbox.WALLS[wall]} does not hold here: {done.walls['refused']}")
        return done

    return run


def test_output_and_exit_code_come_back_printable(walled):
    done = walled("import sys; print('a\\x1b[31mb\\u202e\\nc'); sys.stderr.write('\\x07'); sys.exit(5)")
    assert (done.returncode, done.stdout, done.stderr) == (5, "a\\x1b[31mb\\u202e\nc\n", "\\x07")
    assert not done.timed_out and not done.out_of_memory


def test_endless_output_is_cut_in_the_middle(walled):
    done = walled("print('begin' + 'x' * 5_000_000 + 'end')")
    assert len(done.stdout) < sandbox.OUTPUT + 100
    assert done.stdout.startswith("begin") and done.stdout.endswith("end\n")
    assert "bytes left out" in done.stdout


def test_nothing_of_the_environment_is_passed_on(walled, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "1")
    done = walled("import os; print(sorted(os.environ), os.environ['HERE'])", env={"HERE": "yes"})
    assert "SECRET" not in done.stdout and "yes" in done.stdout


def test_writes_reach_the_listed_folder_only(walled, tmp_path):
    code = "open('out/there', 'w').write('1')\ntry: open('elsewhere', 'w')\nexcept OSError: print('refused')"
    done = walled(code, wall="writes")
    assert done.stdout == "refused\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert (tmp_path / "out" / "there").read_text() == "1"
    assert (tmp_path / "out" / "there").stat().st_uid == os.getuid()
    (tmp_path / "out" / "there").write_text("the caller's again")


def test_files_that_are_not_listed_are_not_seen(walled, tmp_path_factory):
    secret = tmp_path_factory.mktemp("secret")
    (secret / "key").write_text("key")
    code = f"import os; print(os.path.exists({str(secret / 'key')!r}))"
    assert walled(code, wall="view").stdout == "False\n"
    assert walled(code, readable=[secret / "key"]).stdout == "True\n"


def test_no_socket_reaches_out(walled):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = (f"import socket\ntry: socket.create_connection(('127.0.0.1', {port}), 5); print('reached')\n"
                "except OSError: print('refused')")
        assert walled(code, wall="network").stdout == "refused\n"


def test_its_own_processes_can_talk_to_each_other(walled):
    code = ("import socket, threading\ns = socket.create_server(('127.0.0.1', 0))\n"
            "threading.Thread(target=lambda: s.accept()[0].send(b'heard')).start()\n"
            "print(socket.create_connection(s.getsockname(), 5).recv(9).decode())")
    assert walled(code).stdout == "heard\n"


def test_other_processes_are_not_seen(walled):
    code = (f"import os; print(os.path.exists('/proc/{os.getpid()}'), "
            "len([x for x in os.listdir('/proc') if x.isdigit()]))")
    seen, count = walled(code, wall="processes").stdout.split()
    assert seen == "False" and int(count) <= 3


def test_there_are_no_rights_and_none_to_gain(walled):
    code = ("import os\nstatus = open('/proc/self/status').read().splitlines()\n"
            "lines = dict(x.split(':\\t') for x in status)\n"
            "print(os.getuid(), int(lines['CapEff'], 16), int(lines['CapBnd'], 16), lines['NoNewPrivs'])")
    uid, effective, bounding, sealed = walled(code, wall="user").stdout.split()
    assert uid != "0" and effective == "0" and sealed == "1"
    assert bounding == "0" or os.getuid()


def test_a_survivor_is_ended(walled, tmp_path):
    """A child that leaves its session and its parent is gone when run returns."""
    code = ("import os, time\nif not os.fork():\n os.setsid()\n if not os.fork():\n  time.sleep(0.6)\n"
            "  open('out/survived', 'w')\n os._exit(0)\ntime.sleep(0.1)")
    assert walled(code).returncode == 0
    time.sleep(0.8)
    assert not (tmp_path / "out" / "survived").exists()


def test_a_sleeper_is_ended_at_its_time(walled):
    for seconds in (1, 4, 16, 64):  # the first is enough, but for a machine that starts no Python within it
        done = walled("import time; print('begun', flush=True); time.sleep(1000)", seconds=seconds)
        assert done.timed_out and done.returncode < 0
        if done.stdout:
            break
    assert done.stdout == "begun\n"


@pytest.mark.parametrize("code", [
    "x = b'1' * (400 << 20)",
    "import mmap\nx = [mmap.mmap(-1, 64 << 20) for _ in range(6)]\nfor m in x: m.write(b'1' * (64 << 20))\n"
    "print('had it')",
    "import os, time\nfor _ in range(4): os.fork() or (b'1' * (120 << 20), time.sleep(500), os._exit(0))\n"
    "for _ in range(4): os.wait()\nprint('had it')",
], ids=["private", "shared", "of many processes"])
def test_memory_is_bounded(walled, code):
    done = walled(code, wall="memory", seconds=400)  # far longer than a busy machine needs to fill it
    assert done.returncode != 0 and "had it" not in done.stdout
    assert done.out_of_memory or "MemoryError" in done.stderr


def test_two_run_side_by_side(walled):
    done = []
    threads = [threading.Thread(target=lambda: done.append(walled("print(1)").stdout)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == ["1\n", "1\n"]


def test_the_line_says_every_wall():
    line = sandbox.walls()
    assert "\n" not in line and all(wall in line for wall in [*sandbox.WALLS.values(), "bounded time"])


def test_absent_walls_are_said_plainly(monkeypatch):
    held = {"kind": "plain", "user": "user 7", "refused": ["namespaces: unshare: Operation not permitted"]}
    monkeypatch.setattr(sandbox, "probe", lambda: held)
    assert "NOT HELD: no network, " in sandbox.walls() and "Operation not permitted" in sandbox.walls()


def test_what_cannot_start_says_so(walled, tmp_path):
    with pytest.raises(UserError, match="no such program"):
        sandbox.run(["no-such-program"], cwd=tmp_path, seconds=1, memory_mib=64)
    with pytest.raises(UserError, match="no such file or folder"):
        walled("", readable=[tmp_path / "missing"])
