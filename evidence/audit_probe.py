"""What `records audit` runs inside the audited checkout's process: it is the auditor's, all the rest that it
imports is not.

    python -I -B audit_probe.py SPEC.json ...  # only evidence/audit.py calls this

result.json appears next to each SPEC. Python's isolated mode keeps the auditor's folders off sys.path. Each
job gets a process of its own, forked from one that has imported torch and nothing of the checkout. The job's
process first shuts itself in (no network, no writing outside its own folder, limited time and memory), then
the audited checkout becomes the front of sys.path.

Jobs: `facts` (what the checkout resolves), `script` (train_gpt.py as a user runs it), `clock` (a training on
a clock of ours), `model` (the experiments of audit_model.py).
"""

import atexit
import contextlib
import ctypes
import importlib.util
import json
import os
# imported here so that it keeps the true clock when ours replaces it, like subprocess and threading
import queue  # noqa: F401
import random
import resource
import runpy
import signal
import struct
import subprocess  # noqa: F401
import sys
import tempfile
import threading  # noqa: F401
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NoReturn

GIB = 2 ** 30
HERE = Path(__file__).resolve().parent
# Powers of ten of the seconds that a batch, a training step and a validation cost on our clock: a clock that
# is wrong for short or for long times is wrong for some of them.
BATCH_POWERS, STEP_POWERS, VALIDATION_POWERS = (-3, 1), (-3, 5), (-3, 5)
at_exit = atexit._run_exitfuncs
# events of Python's audit hooks that change a file system, and which of their arguments are paths
WRITES = {"os.mkdir": (0,), "os.rename": (0, 1), "os.remove": (0,), "os.rmdir": (0,), "os.link": (1,),
          "os.symlink": (1,), "os.truncate": (0,)}
OPENED = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


class Unknown(Exception):
    """The checkout does something that this auditor cannot accept or does not know how to test."""


# ----- confinement ------------------------------------------------------------------------------------------

def confine(folder: Path, seconds: int) -> dict[str, str]:
    """Limit this process and its children for good. Returns what could be done: {"writes", "network"} in
    words."""
    for limit, value in (
        (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, 32 * GIB), (resource.RLIMIT_FSIZE, 4 * GIB),
        (resource.RLIMIT_CORE, 0)
    ):
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        with contextlib.suppress(ValueError, OSError):  # macOS refuses a limit of the address space
            resource.setrlimit(limit, (value, value))
    return {"network": cut_network(), "writes": limit_writes(folder)}


def cut_network() -> str:
    """A network namespace of our own, without any interface (Linux, where users may make namespaces)."""
    user, group = os.getuid(), os.getgid()
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(0x10000000 | 0x40000000):  # CLONE_NEWUSER | CLONE_NEWNET
            return f"not cut off ({os.strerror(ctypes.get_errno())})"
    except (AttributeError, OSError):
        return "not cut off (needs Linux namespaces)"
    # keep our own ids; without the map we would be nobody, which works too
    with contextlib.suppress(OSError):
        Path("/proc/self/setgroups").write_text("deny", encoding="utf-8")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1", encoding="utf-8")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1", encoding="utf-8")
    return "cut off"


def limit_writes(folder: Path) -> str:
    """Landlock (Linux 5.13): nothing outside `folder` can be written, made, renamed or removed by this
    process."""
    create_ruleset, add_rule, restrict_self = 444, 445, 446
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        version = libc.syscall(create_ruleset, None, 0, 1)
    except AttributeError:
        version = -1
    if sys.platform != "linux" or version < 1:
        return "not limited (needs Linux with Landlock)"
    # write file, remove and make of every kind; from version 2 also link and rename, from version 3 truncate
    rights = (
        1 << 1 | sum(1 << i for i in range(4, 13)) | (1 << 13 if version > 1 else 0)
        | (1 << 14 if version > 2 else 0)
    )
    attributes = struct.pack("Q", rights)
    ruleset = libc.syscall(create_ruleset, attributes, len(attributes), 0)
    of_files = rights & (1 << 1 | 1 << 14)
    for path, allowed in ((folder, rights), ("/dev/null", of_files)):
        descriptor = os.open(path, os.O_PATH)
        if libc.syscall(add_rule, ruleset, 1, struct.pack("=Qi", allowed, descriptor), 0):
            return f"not limited ({os.strerror(ctypes.get_errno())})"
        os.close(descriptor)
    if libc.prctl(38, 1, 0, 0, 0) or libc.syscall(restrict_self, ruleset, 0):  # 38: PR_SET_NO_NEW_PRIVS
        return f"not limited ({os.strerror(ctypes.get_errno())})"
    os.close(ruleset)
    return "limited to the audit's folder"


def watch_writes(folder: Path) -> list[str]:
    """A list of the places outside of a folder that this process tries to write to from now on, whether it
    may or not: where it may, the next run would find what it left."""
    outside = []

    def hook(event, args):
        if event == "open":
            paths = args[:1] if isinstance(args[2], int) and args[2] & OPENED else ()
        else:
            paths = [args[i] for i in WRITES.get(event, ())]
        for path in paths:
            if isinstance(path, (str, bytes, os.PathLike)):
                place = os.path.realpath(os.path.join(os.getcwd(), os.fsdecode(path)))
                if place != "/dev/null" and not f"{place}/".startswith(f"{folder}/") and place not in outside:
                    outside.append(place)

    sys.addaudithook(hook)
    return outside


def require_origin(checkout: Path, auditor: Path) -> None:
    """Every module of the project that is loaded must lie in the audited checkout, and none in the
    auditor's."""
    names = {p.stem for p in checkout.glob("*.py")} | {p.parent.name for p in checkout.glob("*/__init__.py")}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        if name.split(".")[0] in names:
            if not Path(file).resolve().is_relative_to(checkout):
                raise Unknown(
                    f"{name} was imported from {file or 'no file'}, which is not in the audited checkout"
                )
        elif file and not file.startswith((sys.prefix, sys.base_prefix)):  # not a library
            path = Path(file).resolve()
            if path.is_relative_to(auditor) and path not in (
                HERE / "audit_probe.py",
                HERE / "audit_model.py",
            ):
                raise Unknown(f"{name} was imported from the auditor's checkout ({path})")


# ----- jobs -------------------------------------------------------------------------------------------------

def facts(spec: dict) -> dict:
    """What the checkout resolves for the record: sizes the audit needs, at the scale and (targets) at full
    scale."""
    from settings import deltas
    from settings.model import padded_vocab
    resolved = deltas.resolve_name(spec["record"], scale=spec["scale"])
    s, full = resolved.settings, deltas.resolve(resolved.record.ref).settings
    size = s.data.tokens_per_rank
    sets = []
    if getattr(s.model.mlp, "moe", None):
        # blocks of one size: a row's bits then do not depend on how many rows of other tokens its expert has
        sets.append("system.experts=padded")
    if getattr(s.validation, "canonical_mask", False):
        sets.append("validation.canonical_mask=false")  # no tokenizer wrote the audit's text
    return {
        "record": resolved.preset or resolved.record.ref,
        "vocab_size": s.model.vocab_size,
        "padded_vocab": padded_vocab(s),
        "tokens_per_rank": max(size) if isinstance(size, (list, tuple)) else size,
        "validation_tokens": s.validation.tokens,
        "validation_seq_len": s.validation.seq_len,
        "full_validation_tokens": full.validation.tokens,
        "sets": sets,
        # candidates are drawn for the targets of the whole batch, among which the changed ones are not
        "without": ["model.head.candidates"] if getattr(s.model.head, "candidates", None) else [],
    }


def script(spec: dict) -> dict:
    """train_gpt.py with a command line, as its own program. Returns its exit code."""
    sys.argv = ["train_gpt.py", *spec["argv"]]
    return {
        "exit": exit_code(runpy.run_path, str(Path(spec["checkout"]) / "train_gpt.py"), run_name="__main__")
    }


def exit_code(program: Callable[..., object], *args, **kwargs) -> int | str:
    """The exit code of a program that is called as a function."""
    try:
        program(*args, **kwargs)
    except SystemExit as end:
        return end.code or 0
    return 0


class OurTime:
    """Every clock of the `time` module, standing still but for what we add: a slow loader costs no waiting,
    and readings are exact."""

    def __init__(self):
        self.added = 0.0
        for name in ("perf_counter", "monotonic", "time", "process_time", "thread_time"):
            setattr(time, name, lambda stood=getattr(time, name)(): stood + self.added)
            setattr(
                time, name + "_ns", lambda stood=getattr(time, name + "_ns")(): stood + int(self.added * 1e9)
            )
        read = time.clock_gettime
        time.clock_gettime = lambda clock: read(clock) + self.added

    def before(
        self, owner: object, name: str, note: Callable[[str, float], None],
        draw: Callable[[], float] | None = None
    ) -> None:
        """Call note(name, seconds) at the start of each call of owner.name, which then costs draw() seconds
        more."""
        call = getattr(owner, name)

        def slow(*args, **kwargs):
            seconds = draw() if draw else 0.0
            self.added += seconds
            note(name, seconds)
            return call(*args, **kwargs)

        setattr(owner, name, slow)


def clock(spec: dict) -> dict:
    """A training whose batches, steps and validations last as long as we say, from milliseconds to days.

    Returns {"exit", "events": [[name of the call, seconds]] in order}.
    """
    ours, events = OurTime(), []  # before anything of the checkout can take a clock by name
    import train_gpt
    from data.stream import Stream
    from system.run import Clock

    def seconds(name, powers):
        # each has its own generator: a thread that reads ahead would shift the draws of the others
        generator = random.Random(f"{name} {spec['draw']}")
        return lambda: 10 ** generator.uniform(*powers)

    def note(name, cost):
        events.append([name, cost])

    ours.before(Stream, "next", note, seconds("next", BATCH_POWERS))
    ours.before(train_gpt, "train_step", note, seconds("train_step", STEP_POWERS))
    ours.before(train_gpt, "validate", note, seconds("validate", VALIDATION_POWERS))
    ours.before(Clock, "start", note)
    return {"exit": exit_code(train_gpt.main, *command_line(spec["argv"])), "events": events}


def command_line(argv: list[str]) -> tuple:
    """(options, settings) of the checkout's trainer."""
    try:
        from system.command_line import command_line
    except ImportError:  # a commit from before that was a file of its own
        from settings.deltas import command_line
    return command_line(argv)


def experiments() -> ModuleType:
    """The module audit_model.py, of the auditor."""
    found = importlib.util.spec_from_file_location("audit_model", HERE / "audit_model.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def do(path: Path, model: ModuleType | None) -> None:
    """Do the job that the file `path` describes and write result.json next to it.

    model: the module audit_model, or None where no job needs it.
    """
    spec = json.loads(path.read_text(encoding="utf-8"))
    confined = confine(path.parent, spec["seconds"])
    die_with_parent()  # the new namespace has taken it back
    checkout = Path(spec["checkout"]).resolve()
    jobs = {"facts": facts, "script": script, "clock": clock, "model": model and model.checks}
    outside = watch_writes(path.parent)
    sys.path.insert(0, str(checkout))
    try:
        result = jobs[spec["job"]](spec)
        require_origin(checkout, Path(spec["auditor"]))
    except Exception as error:
        if type(error).__name__ not in ("UserError", "Unknown"):
            raise
        result = {"refused": str(error)}
    torch = sys.modules.get("torch")
    result |= {"confined": confined, "torch": torch.__version__ if torch else None, "outside": outside[:9]}
    (path.parent / "result.json").write_text(json.dumps(result), encoding="utf-8")


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent ends (Linux)."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)


def child(path: Path, model: ModuleType | None) -> NoReturn:
    """The forked process of a job: its own session, output, folder and random numbers."""
    os.setsid()
    die_with_parent()
    folder = path.parent
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.chdir(folder)
    cache = json.loads(path.read_text(encoding="utf-8"))["cache"]
    os.environ.update(dict.fromkeys(("HOME", "TMPDIR", "SPEEDRUN_CACHE"), cache))
    tempfile.tempdir = None
    random.seed()  # a fork has its parent's generators: code without a seed must not look repeatable
    if model is not None:
        model.reseed()
    code = 1
    try:
        code = exit_code(do, path, model)
        at_exit()  # what a program does at its end belongs to it
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def wait(process: int, seconds: float) -> int | None:
    """Exit code of a child, or None if it was ended after so many seconds. All that it started ends too."""
    end, code = time.monotonic() + seconds, None
    while time.monotonic() < end:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            break
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)
    if code is None:
        os.waitpid(process, 0)
    return code


def main(paths: list[Path]) -> None:
    """Do the jobs of these spec files one after the other, each in a fork of this process.

    Prints a line for each: [spec file, exit code or null after a timeout].
    """
    specs = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    # before a checkout can put a torch or a numpy of its own in front of the installed ones
    model = experiments() if any(spec["job"] != "facts" for spec in specs) else None
    for path, spec in zip(paths, specs):
        process = os.fork()
        if process == 0:
            child(path, model)
        print(json.dumps([str(path), wait(process, spec["seconds"])]), flush=True)


if __name__ == "__main__":
    main([Path(word).resolve() for word in sys.argv[1:]])
