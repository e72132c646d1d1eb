"""Start Python programs from a process that has imported torch already, which saves two CPU seconds a start.

conftest.py puts Popen of this file in the place of subprocess.Popen, so tests and the code under test start
programs as ever. `python SCRIPT ...`, `python -m MODULE ...` and `python -c CODE ...` are forked from a
server; what `fits` excludes is started by the real Popen. A forked program is a process of its own, with its
arguments, environment, folder, session, files, signals and exit code. Only torch and numpy are there before
it begins; every module of the project it imports itself. The programs that it starts are forked likewise.

All programs of one server have the same hash seed; a test that compares processes gives PYTHONHASHSEED.
"""

import array
import contextlib
import inspect
import io
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import types

# Variables that Python, torch or a shared library reads when it is loaded: a program that has others than the
# server is started cold. Those of CUDA, Triton and torch's compiler are read when they are first used.
READ_AT_START = ("PYTHON", "TORCH_", "PYTORCH", "OMP_", "KMP_", "MKL_", "OPENBLAS", "MALLOC", "LD_", "LC_",
                 "LANG")
FOLLOWED = ("PYTHONPATH", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE")  # by `become` and `program`
PRELOADED = ("numpy", "torch")
MESSAGE_BYTES = 200_000  # of one request; a longer one is started cold


# ----- in the tests -----------------------------------------------------------------------------------------

class Popen(subprocess.Popen):
    """subprocess.Popen, with Python programs forked from the server where that makes no difference."""

    told = None  # the read end of a pipe: the pid when the program begins, its wait status when it has ended

    def _execute_child(self, *args, **kwargs):
        asked = inspect.signature(super()._execute_child).bind(*args, **kwargs).arguments
        if not fits(asked):
            return super()._execute_child(*args, **kwargs)
        ours = [asked[name] if asked[name] != -1 else fd
                for fd, name in enumerate(("p2cread", "c2pwrite", "errwrite"))]
        self.told = SERVER.start(asked, ours)
        self.pid = int(self.told.readline())
        self._child_created = True
        self._close_pipe_fds(*(asked[name] for name in (
            "p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")))

    def _internal_poll(self, _deadstate=None, **kwargs):
        if self.told is None:
            return super()._internal_poll(_deadstate, **kwargs)
        if self.returncode is None and self._waitpid_lock.acquire(False):
            try:
                pid, status = self._try_wait(os.WNOHANG)
                if pid and self.returncode is None:
                    self._handle_exitstatus(status)
            finally:
                self._waitpid_lock.release()
        return self.returncode

    def _try_wait(self, wait_flags):
        if self.told is None:
            return super()._try_wait(wait_flags)
        if wait_flags == os.WNOHANG and not select.select([self.told], [], [], 0)[0]:
            return 0, 0
        line = self.told.readline()
        self.told.close()
        return self.pid, int(line or signal.SIGKILL)  # nothing comes if the server was killed


def fits(asked: dict) -> bool:
    """Whether a program that the real Popen was asked for may come from the server."""
    args = asked["args"]
    if isinstance(args, (str, bytes, os.PathLike)) or asked["shell"] or sys.platform != "linux":
        return False
    words = [os.fspath(word) for word in args]
    unusual = [name for name in ("executable", "preexec_fn", "pass_fds", "gid", "gids", "uid") if asked[name]]
    if SERVER.inside and os.getpgid(0) != os.getpgid(os.getppid()):
        return False  # what a program of another process group starts belongs to that group
    if len(words) < 2 or words[0] != sys.executable or unusual or asked["umask"] >= 0:
        return False
    env = os.environ if asked["env"] is None else asked["env"]
    size = sum(map(len, [*words, *env, *env.values()]))
    if size > MESSAGE_BYTES // 4 or not os.path.isdir(asked["cwd"] or "."):
        return False
    flags, words = parted(words[1:])
    if replaced(env.get("PYTHONPATH", "")) or not SERVER.same_start(env, isolated="-I" in flags):
        return False
    if words[0] in ("-c", "-m"):
        # what a program imports at its start is a matter of cold starts
        known = len(words) > 1 and "sys.modules" not in words[1]
    else:
        known = not words[0].startswith("-") and os.path.isfile(os.path.join(asked["cwd"] or ".", words[0]))
    return known and SERVER.runs()


def replaced(path: str) -> bool:
    """Whether a PYTHONPATH has a package of its own in the place of a preloaded one."""
    return any(
        os.path.exists(os.path.join(folder, name + end)) for folder in path.split(os.pathsep) if folder
        for name in PRELOADED for end in ("", ".py")
    )


def parted(words: list[str]) -> tuple[set[str], list[str]]:
    """(flags, the rest) of the arguments of Python, where only -I and -B are known flags."""
    count = next((i for i, word in enumerate(words) if word not in ("-I", "-B")), len(words))
    return set(words[:count]), words[count:] or ["-"]


class Server:
    """The process that has torch, started when the first program is asked for."""

    def __init__(self):
        self.lock, self.environment = threading.Lock(), dict(os.environ)
        self.socket = None  # where programs are asked for
        self.process: subprocess.Popen | None = None  # the server, in the tests
        self.inside = False  # this process is a forked program

    def runs(self) -> bool:
        """Start the server if it does not run yet; whether it runs."""
        with self.lock:
            if self.socket is None:
                self.begin()
        return self.inside or self.process.poll() is None

    def same_start(self, env: dict, isolated: bool) -> bool:
        """Whether a program with this environment would begin as the server did.

        isolated: Python reads none of its variables (-I).
        """
        def read(one):
            found = {name: value for name, value in one.items()
                     if name.startswith(READ_AT_START) and name not in FOLLOWED}
            if isolated:
                found = {name: value for name, value in found.items() if not name.startswith("PYTHON")}
            if found.get("MKL_NUM_THREADS") == found.get("OMP_NUM_THREADS"):
                found.pop("MKL_NUM_THREADS", None)  # its default
            # Python turns an unset locale into C.UTF-8
            return {name: value for name, value in found.items() if (name, value) != ("LANG", "C.UTF-8")}

        return read(env) == read(self.environment)

    def start(self, asked: dict, files: list[int]):
        """Ask for a program; returns the pipe in which the server tells what becomes of it."""
        reads, writes = os.pipe()
        request = {
            "args": [os.fspath(word) for word in asked["args"]], "cwd": os.path.abspath(asked["cwd"] or "."),
            "env": dict(os.environ if asked["env"] is None else asked["env"]),
            "session": asked["start_new_session"], "group": asked.get("process_group", -1),
            "base": self.environment,
        }
        with self.lock:
            rights = array.array("i", [*files, self.socket.fileno(), writes])
            self.socket.sendmsg([json.dumps(request).encode()],
                                [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        os.close(writes)
        return os.fdopen(reads, "rb", buffering=0)

    def begin(self):
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * MESSAGE_BYTES)
        with theirs:
            self.process = COLD([sys.executable, __file__, str(theirs.fileno())], env=self.environment,
                                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)

    def end(self):
        if self.process is not None:
            with contextlib.suppress(OSError):  # it was killed
                self.socket.send(b"end")
            self.process.wait()


COLD = subprocess.Popen
SERVER = Server()


# ----- the server -------------------------------------------------------------------------------------------

def serve(asks: socket.socket) -> dict:
    """Fork a process for each request until the tests close the socket.

    Returns in forked processes only: the request of the process.
    """
    running = {}  # pid: write end of the pipe for its status
    signal.signal(signal.SIGCHLD, lambda *_: None)
    ended, wake = socket.socketpair()
    ended.setblocking(False)
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    while True:
        ready = select.select([asks, ended], [], [])[0]
        if ended in ready:
            ended.recv(4096)
            reap(running)
        if asks in ready:
            data, rights, *_ = asks.recvmsg(MESSAGE_BYTES, socket.CMSG_SPACE(5 * 4))
            if data in (b"", b"end"):  # nobody can ask any more, or the tests are over
                os._exit(0)
            files = array.array("i", rights[0][2]).tolist()
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                for one in (asks, ended, wake):
                    one.close()
                for pipe in running.values():
                    os.close(pipe)
                return {**json.loads(data), "files": files}
            running[pid] = files.pop()
            for fd in files:
                os.close(fd)


def reap(running: dict[int, int]) -> None:
    """Tell the wait status of each process that has ended."""
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        pipe = running.pop(pid)
        with contextlib.suppress(OSError):
            os.write(pipe, b"%d\n" % status)
        os.close(pipe)


def become(request: dict) -> types.CodeType:
    """Make this forked process the program that was asked for; returns the code to run in __main__."""
    *files, asks, told = request["files"]
    for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for fd, source in enumerate(files):
        os.dup2(source, fd)
    for fd in files:
        os.close(fd)
    os.environ.clear()
    os.environ.update(request["env"])
    flags, words = parted(request["args"][1:])
    isolated = "-I" in flags
    SERVER.socket, SERVER.environment, SERVER.inside = socket.socket(fileno=asks), request["base"], True
    subprocess.Popen = Popen
    open_files(unbuffered=not isolated and bool(os.environ.get("PYTHONUNBUFFERED")))
    bytecode = isolated or not os.environ.get("PYTHONDONTWRITEBYTECODE")
    sys.dont_write_bytecode = "-B" in flags or not bytecode
    os.chdir(request["cwd"])
    if request["session"]:
        os.setsid()
    elif request["group"] != -1:
        os.setpgid(0, request["group"])
    os.write(told, b"%d\n" % os.getpid())
    os.close(told)
    sys.orig_argv = request["args"]
    return program(words, isolated)


def open_files(unbuffered: bool) -> None:
    """Open stdin, stdout and stderr as Python does at its start."""
    sys.stdin = open(0, closefd=False)
    out, err = (open(fd, "wb", 0 if unbuffered else -1, closefd=False) for fd in (1, 2))
    how = {"write_through": unbuffered}
    sys.stdout = io.TextIOWrapper(out, line_buffering=out.isatty(), **how)
    sys.stderr = io.TextIOWrapper(err, errors="backslashreplace", line_buffering=True, **how)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr


def program(words: list[str], isolated: bool) -> types.CodeType:
    """The code of SCRIPT, -m MODULE or -c CODE; sets sys.argv, sys.path and __main__ for it."""
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = sys.modules["__mp_main__"] = main
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [os.path.abspath(path) for path in given if path]
    first = {"-c": "", "-m": os.getcwd()}.get(words[0], os.path.dirname(os.path.realpath(words[0])))
    sys.path[:] = BASE_PATH if isolated else [first, *paths, *BASE_PATH]
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        return compile(words[1], "<string>", "exec")
    if words[0] == "-m":
        sys.argv = words[1:]
        start = f"import runpy\nrunpy.run_module({words[1]!r}, run_name='__main__', alter_sys=True)"
        return compile(start, "<module>", "exec")
    sys.argv = list(words)
    main.__file__ = words[0]
    with open(words[0], "rb") as source:
        return compile(source.read(), words[0], "exec")


if __name__ == "__main__":
    import gc
    import importlib

    for package in PRELOADED:
        importlib.import_module(package)
    given = [os.path.abspath(x) for x in os.environ.get("PYTHONPATH", "").split(os.pathsep) if x]
    BASE_PATH = [path for path in sys.path[1:] if path not in given]
    for ignored in (signal.SIGINT, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)  # they are for the programs
    gc.freeze()
    code = become(serve(socket.socket(fileno=int(sys.argv[1]))))
    exec(code, sys.modules["__main__"].__dict__)  # Python then ends this process as it ends a script
