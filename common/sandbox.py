"""A command of a stranger, run behind walls: no network, a view of the listed paths only, read-only but for
the listed folders, no rights, bounded time, memory and output, and nothing of it left when it ends.

    done = sandbox.run([sys.executable, "job.py"], cwd=folder, writable=[out], seconds=60, memory_mib=2048)
    print(sandbox.walls())          # which walls hold on this machine, in one line

common/jail.py builds the walls, in a process of its own. As root it makes namespaces and leaves them as
another user; as a user it takes bubblewrap (`bwrap`) where it is installed, otherwise namespaces where the
kernel grants them. Where neither is possible, resource limits, a user without rights, Landlock and the end of
every descendant are left, and `walls` says so. No torch here, and no Windows.
"""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from common.errors import UserError
from common.printable import printable

JAIL = Path(__file__).with_name("jail.py")
# A user that owns nothing: above the ids of people and services, below those of containers.
NOBODY = 64_999
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc", "/sys", "/opt")
OUTPUT = 2 ** 20  # bytes kept of stdout, and of stderr: its beginning and its end
GRACE_S = 10.0  # after which the keeper itself is taken for stuck
FILE_MIB = 4096
SLACK_MIB = 96  # above the limit, for the keeper: it ends the command before the kernel has to
WALLS = {
    "network": "no network", "view": "only the listed files are seen", "writes": "read-only tree",
    "processes": "no other process is seen", "user": "unprivileged user", "memory": "bounded memory",
}


@dataclasses.dataclass(frozen=True)
class Result:
    """How a command ended.

    returncode: its exit code, or minus the signal that ended it. stdout, stderr: printable text, at most
    OUTPUT bytes each. timed_out: it was ended at its time limit; out_of_memory: at its memory limit.
    walls: {wall: what holds}, "" where one is missing.
    """

    returncode: int
    stdout: str
    stderr: str
    timed_out: bool
    out_of_memory: bool
    walls: dict[str, str]


def run(command: Sequence[str], *, cwd: Path, readable: Sequence[Path] = (), writable: Sequence[Path] = (),
        seconds: float, memory_mib: int, env: Mapping[str, str] | None = None) -> Result:
    """Run a command behind the walls that this machine has and wait for its end.

    Args:
        cwd: its folder; readable unless it lies in `writable`
        readable: files and folders that it sees next to the system's and Python's own
        writable: folders that it may write in; nothing outside changes
        seconds, memory_mib: wall time and memory of all its processes together
        env: added to PATH, HOME, TMPDIR and LANG; nothing of the caller's environment is passed on

    Raises UserError where no process can be started this way.
    """
    if os.name != "posix":
        raise UserError("the sandbox needs a Unix system")
    program = shutil.which(command[0])
    if program is None:
        raise UserError(f"{command[0]}: no such program")
    with tempfile.TemporaryDirectory(prefix="sandbox-") as root, control_group(memory_mib) as groups:
        spec = {
            "command": [program, *map(str, command[1:])], "cwd": str(Path(cwd).resolve()), "root": root,
            "readable": seen([*pythons(), Path(program), cwd, *readable]), "writable": seen(writable),
            "seconds": seconds, "memory_mib": memory_mib, "file_mib": FILE_MIB,
            "user": NOBODY, "system": SYSTEM,
            "cgroup": groups, "kinds": kinds(),
            "env": {"PATH": os.defpath, "HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8",
                    "PYTHONDONTWRITEBYTECODE": "1", **(env or {})},
        }
        if spec["cwd"] in spec["writable"]:
            spec["readable"].remove(spec["cwd"])
        return finished(spec, seconds)


def walls() -> str:
    """One line: which walls hold on this machine, and which do not."""
    held = probe()
    there = [said for wall, said in WALLS.items() if held.get(wall)]
    absent = [said for wall, said in WALLS.items() if not held.get(wall)]
    line = f"sandbox ({held['kind']}): {', '.join([*there, 'bounded time'])}"
    if absent:
        why = f" ({'; '.join(held['refused'])})" if held.get("refused") else ""
        line += f"; NOT HELD: {', '.join(absent)}{why}"
    return printable(line)


@functools.cache
def probe() -> dict[str, str]:
    """{wall: what holds} of this machine, found by running a command that does nothing."""
    with tempfile.TemporaryDirectory() as folder:
        return run(["true"], cwd=Path(folder), seconds=30, memory_mib=256).walls


def kinds() -> list[str]:
    """Kinds of walls to try, the strongest first."""
    if sys.platform != "linux":
        return ["plain"]
    if os.getuid() and shutil.which("bwrap"):
        return ["bubblewrap", "namespaces", "plain"]
    return ["namespaces", "plain"]


def pythons() -> list[Path]:
    """What this Python consists of: its environment, its installation, and where its executable really
    lies."""
    real = Path(sys.executable).resolve()
    found = [Path(sys.prefix), Path(sys.base_prefix), real.parent.parent]
    return [path for path in found if path not in (Path("/"), Path("/usr"))]


def seen(paths: Sequence[Path]) -> list[str]:
    """Absolute paths, as they are named and as they really are, without repetition and without the
    system's."""
    named = [form for path in paths for form in (os.path.abspath(path), os.path.realpath(path))]
    outside = [path for path in named if not path.startswith(("/usr/", "/bin/", "/lib", "/etc/", "/proc/"))]
    for path in outside:
        if not os.path.exists(path):
            raise UserError(f"{path}: no such file or folder for the sandbox")
    return list(dict.fromkeys(outside))


# ----- the keeper's process ---------------------------------------------------------------------------------

def finished(spec: dict, seconds: float) -> Result:
    """Run the jail behind the first kind of walls that can be built."""
    refused = []
    if spec["kinds"][0] == "bubblewrap":
        started = jailed(spec | {"kinds": ["bubblewrap"]}, seconds, bubblewrap(spec))
        if isinstance(started, Result):
            return started
        refused = [f"bubblewrap: {started}"]
        spec = spec | {"kinds": spec["kinds"][1:]}
    started = jailed(spec, seconds)
    if not isinstance(started, Result):
        raise UserError(f"the sandbox cannot start a process: {printable('; '.join([*refused, started]))}")
    return dataclasses.replace(started, walls=started.walls | {"refused": refused + started.walls["refused"]})


def bubblewrap(spec: dict) -> list[str]:
    """The beginning of a command line that runs the jail inside bubblewrap's walls."""
    words = [shutil.which("bwrap"), "--unshare-all", "--die-with-parent", "--new-session",
             "--cap-drop", "ALL", "--hostname", "sandbox", "--proc", "/proc", "--dev", "/dev",
             "--tmpfs", "/tmp"]
    for path in SYSTEM:
        if os.path.islink(path):
            words += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            words += ["--ro-bind", path, path]
    for path in sorted(Path("/dev").glob("nvidia*")):
        words += ["--dev-bind", str(path), str(path)]
    listed = [(path, False) for path in [*spec["readable"], str(JAIL)]]
    listed += [(path, True) for path in spec["writable"]]
    for path, writable in sorted(listed, key=lambda x: (x[0].count("/"), x[1])):
        words += ["--bind" if writable else "--ro-bind", path, path]
    return words


def jailed(spec: dict, seconds: float, before: Sequence[str] = ()) -> Result | str:
    """Run the jail with a spec and gather what it says; why not, where it could not start the command."""
    told, tell = os.pipe()
    command = [*before, sys.executable, "-I", "-S", "-B", str(JAIL), str(tell)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               pass_fds=[tell], start_new_session=True, env={"LANG": "C.UTF-8"}, cwd="/")
    os.close(tell)
    outputs = [Output(process.stdout), Output(process.stderr)]
    lines: list[dict] = []
    reader = threading.Thread(target=read_status, args=(told, lines), daemon=True)
    reader.start()
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(spec).encode())
            process.stdin.close()
        stuck = False
        try:
            process.wait(seconds + GRACE_S)
        except subprocess.TimeoutExpired:
            stuck = True
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    reader.join(GRACE_S)
    stdout, stderr = (output.text() for output in outputs)
    facts = {key: value for line in lines for key, value in line.items()}
    if "walls" not in facts:
        return facts.get("failed") or stderr.strip()[-300:] or "it ended before it began"
    why = "time" if stuck else facts.get("why", "")
    code = os.waitstatus_to_exitcode(facts["status"]) if "status" in facts else -signal.SIGKILL
    # the kernel ended it at the limit of the control group, or the keeper with it
    killed = not stuck and code == -signal.SIGKILL and not why and bool(spec["cgroup"])
    return Result(code, stdout, stderr, why == "time", why == "memory" or killed, facts["walls"])


def read_status(told: int, lines: list[dict]) -> None:
    """Gather the jail's own lines."""
    with os.fdopen(told, encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))


class Output:
    """What comes out of a pipe, read to its end so that the writer never waits; the middle is dropped."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.head, self.tail, self.dropped = stream, b"", b"", 0
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()

    def read(self) -> None:
        """Take everything; runs in a thread."""
        while block := self.stream.read1(65536):
            space = OUTPUT // 2 - len(self.head)
            self.head += block[:max(0, space)]
            tail = self.tail + block[max(0, space):]
            self.dropped += max(0, len(tail) - OUTPUT // 2)
            self.tail = tail[-(OUTPUT // 2):]

    def text(self) -> str:
        """The printable text: what came, or its beginning and end."""
        self.thread.join(GRACE_S)
        gap = f"\n[{self.dropped} bytes left out]\n" if self.dropped else ""
        parts = (part.decode("utf-8", "replace") for part in (self.head, self.tail))
        return printable(next(parts) + gap + next(parts), lines=True)


# control groups of version 1 and 2: {folder: {file: its text; the first one must be accepted}}
GROUPS = {
    "/sys/fs/cgroup/memory": {"memory.limit_in_bytes": "{bytes}", "memory.memsw.limit_in_bytes": "{bytes}"},
    "/sys/fs/cgroup/pids": {"pids.max": "512"},
    "/sys/fs/cgroup": {"memory.max": "{bytes}", "memory.swap.max": "0", "pids.max": "512"},
}


@contextlib.contextmanager
def control_group(memory_mib: int) -> Iterator[list[str]]:
    """Folders of control groups that bound memory and processes, where this process may make them."""
    made = []
    name = f"speedrun-{os.getpid()}-{time.monotonic_ns()}"
    for base, limits in GROUPS.items() if hasattr(os, "getuid") and os.getuid() == 0 else ():
        folder = Path(base, name)
        with contextlib.suppress(OSError):
            if not Path(base, "cgroup.procs").exists():
                continue
            folder.mkdir()
            accepted = [set_limit(folder / file, text.format(bytes=(memory_mib + SLACK_MIB) * 2 ** 20))
                        for file, text in limits.items()]
            if accepted[0]:
                made.append(str(folder))
            else:
                folder.rmdir()
    try:
        yield made
    finally:
        for folder in made:
            remove_group(folder)


def set_limit(path: Path, text: str) -> bool:
    """Write a limit of a control group. Returns whether the kernel takes it."""
    try:
        path.write_text(text, encoding="ascii")
    except OSError:
        return False
    return True


def remove_group(folder: str) -> None:
    """Remove a control group, and end what the keeper has left in it, if the keeper itself was ended."""
    for _ in range(100):
        try:
            return os.rmdir(folder)
        except OSError:
            time.sleep(0.02)
        with contextlib.suppress(OSError, ValueError):
            for pid in Path(folder, "cgroup.procs").read_text(encoding="ascii").split():
                os.kill(int(pid), signal.SIGKILL)
    return None
