"""What a person sees: a broken terminal, pipe or disk loses the output, never the run; nothing wraps;
failures are one line."""

import errno
import io
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common import console

ROOT = Path(__file__).parent.parent
FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a disk that is always full")


def shell(line, **more):
    return subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env=os.environ | {"PYTHON": sys.executable}, **more)


# ----- commands whose whole product is their output ---------------------------------------------------------

PRODUCTS = [
    "-m records list", "-m records show short/5", "-m records diff short/1 short/2", "-m records features lr"
]
OTHERS = [
    "-m records compare short/1", "train_gpt.py short/nonsense", "-m data.tokenize /nowhere --out /nowhere/x",
    "sweep.py work /nowhere"
]


@FULL
@pytest.mark.parametrize("command", PRODUCTS)
def test_output_that_is_lost_is_a_failure_in_one_line(command):
    for to in (">/dev/full", ">&-"):
        done = shell(f'"$PYTHON" {command} {to}')
        assert done.returncode == 1 and done.stderr.startswith("error: the output could not be written"), (
            done.stderr
        )
        assert done.stderr.count("\n") == 1


@FULL
def test_a_plan_that_is_lost_is_a_failure_in_one_line():
    done = shell('"$PYTHON" train_gpt.py short/1 --scale micro --dry-run > /dev/full')
    assert done.returncode == 1 and done.stderr.startswith("error: the output could not be written")
    assert done.stderr.count("\n") == 1


@FULL
@pytest.mark.parametrize("command", PRODUCTS)
def test_where_nobody_reads_the_errors_the_output_is_whole(command):
    whole = shell(f'"$PYTHON" {command}')
    assert whole.returncode == 0 and whole.stdout
    for to in ("2>&-", "2>/dev/full", "<&- 2>&-"):
        done = shell(f'"$PYTHON" {command} {to}')
        assert (done.returncode, done.stdout, done.stderr) == (0, whole.stdout, "")


@pytest.mark.parametrize("command", PRODUCTS[:1] + PRODUCTS[3:])
def test_a_reader_that_has_enough_ends_the_command_quietly(command):
    done = shell(f'PYTHONUNBUFFERED=1 "$PYTHON" {command} | head -1; exit ${{PIPESTATUS[0]}}')
    assert done.stdout.count("\n") == 1 and done.stderr == "" and done.returncode in (0, console.CLOSED_PIPE)


def test_a_closed_pipe_has_the_code_of_a_shell():
    done = shell('(sleep 1; "$PYTHON" -m records list) | true; exit ${PIPESTATUS[0]}')
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@FULL
@pytest.mark.parametrize("command", OTHERS)
def test_a_refusal_keeps_its_code_wherever_its_line_goes(command):
    assert shell(f'"$PYTHON" {command}').returncode == 2
    for to in ("2>&-", ">&- 2>&-", ">/dev/full 2>/dev/full"):
        done = shell(f'"$PYTHON" {command} {to}')
        assert (done.returncode, done.stderr) == (2, "")


# ----- the stream -------------------------------------------------------------------------------------------

class Broken(io.StringIO):
    def __init__(self, error):
        super().__init__()
        self.error, self.calls = error, 0

    def write(self, text):
        self.calls += 1
        raise self.error

    flush = isatty = write


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "gone"), BrokenPipeError(), OSError(errno.ENOSPC, "full"),
        ValueError("I/O operation on closed file")
    ],
)
def test_a_stream_that_fails_is_silenced_once_and_remembers_why(error):
    stream = Broken(error)
    guarded = console.Guarded(stream)
    for _ in range(3):
        print("x", file=guarded, flush=True)
    assert guarded.lost is error and stream.calls == 1 and guarded.isatty() is False


def test_a_programming_error_in_a_print_is_not_hidden():
    with pytest.raises(TypeError):
        console.Guarded(io.StringIO()).write(b"bytes")


def test_a_log_never_takes_the_number_of_a_closed_descriptor(tmp_path):
    script = (
        "import os, sys\nfrom common import console\nconsole.guard()\nfile = open(sys.argv[1], "
        "'w')\nprint('said')\nprint('cried', file=sys.stderr)\nos.write(1, b'x'); os.write(2, "
        "b'x')\nsys.exit(file.fileno() < 3)"
    )
    assert shell(f'"$PYTHON" -c "{script}" {tmp_path}/log >&- 2>&- <&-').returncode == 0
    assert (tmp_path / "log").read_text() == ""


def test_a_character_that_the_terminal_lacks_is_replaced():
    done = shell("PYTHONIOENCODING=ascii PYTHONPATH=. \"$PYTHON\" -c \"import sys; from common import "
                 "console; console.guard()\nprint('a\\u00e9b'); print('\\u00e9', file=sys.stderr)\"")
    assert (done.stdout, done.stderr, done.returncode) == ("a?b\n", "\\xe9\n", 0)


# ----- signals ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_every_signal_ends_a_command_in_one_line_with_130(number):
    script = (
        "import time; from common import console\ndef main():\n    print('up', flush=True)\n    "
        "time.sleep(60)\nconsole.program(main)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    process.send_signal(getattr(signal, number))
    assert (process.communicate(timeout=60)[1], process.returncode) == ("error: interrupted\n", 130)


# ----- the live line ----------------------------------------------------------------------------------------

@pytest.mark.parametrize(
    "text, columns, kept",
    [
        ("abc", 5, "abc"), ("abcdef", 3, "abc"), ("a\tb\x1b[2Jc", 9, "a b [2Jc"), ("日本語", 5, "日本"),
        ("x", 0, "")
    ],
)
def test_a_text_is_cut_by_the_columns_it_takes(text, columns, kept):
    got, used = console.cut(text, columns)
    assert got == kept and used <= columns


@pytest.mark.parametrize("columns", [20, 80, 200])
def test_the_live_line_never_fills_the_terminal(columns):
    drawn = on_terminal(
        "line = console.LiveLine()\nfor n in (5, 400, 30, 1):\n    line.show('x' * n)\nline.clear()\n"
        "print('end', file=sys.stderr)", columns
    )
    *lines, last = drawn.split("\r\n")[0].split("\r")
    assert all(len(x) < columns for x in lines) and last == "end"
    assert any(set(x) == {"x"} and len(x) == min(400, columns - 1) for x in lines)
    shown = [""] * columns  # what a terminal shows in the end
    for part in [*lines, last]:
        shown[:len(part)] = part
    assert "".join(shown).strip() == "end"


def test_a_live_line_on_a_terminal_that_goes_away_ends_nothing():
    assert on_terminal("line = console.LiveLine()\nline.show('first')\ntime.sleep(1)\nfor n in range(9):\n"
                       "    line.show('x' * n)\nsys.exit(7)", 80, leave=True) == 7


def on_terminal(text, columns, leave=False):
    """What a program draws on a terminal of so many columns; leave: close it after the first bytes, and give
    the exit code."""
    import fcntl
    import struct
    import termios
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", f"import sys, time; from common import console\nconsole.guard()\n{text}"],
        cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=slave,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    )
    os.close(slave)
    drawn = b""
    while not drawn.endswith(b"\n") and not (leave and drawn):
        drawn += os.read(master, 4096)
    os.close(master)
    return process.wait(60) if leave else drawn.decode()


# ----- a training -------------------------------------------------------------------------------------------

@FULL
def test_a_training_ends_well_without_any_output_and_when_its_terminal_goes_away(tmp_path):
    command = [sys.executable, "train_gpt.py", "short/11", "--scale", "micro", "--set", "schedule.steps=3"]
    line = " ".join(f"'{x}'" for x in [*command, "--out", str(tmp_path / "a")])
    lost = subprocess.Popen(["bash", "-c", f"{line} >/dev/full 2>&-"], cwd=ROOT)
    master, slave = pty.openpty()
    gone = subprocess.Popen(
        [*command, "--out", str(tmp_path / "b")], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=slave,
        stderr=slave, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    )
    os.close(slave)
    seen, deadline = b"", time.monotonic() + 240
    while b"scale micro" not in seen:
        seen += os.read(master, 4096)
        assert time.monotonic() < deadline
    os.close(master)
    assert (lost.wait(240), gone.wait(240)) == (0, 0)
    for out in ("a", "b"):
        assert '"status": "finished"' in next((tmp_path / out).glob("*/summary.json")).read_text()
