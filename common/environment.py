"""What a program of this project needs of its Python: one line where it lacks something, instead of a
traceback.

Every program imports this first. The import refuses a Python that is too old, `require` one that lacks a
package. Neither this file nor a program's lines before the import may use what Python 3.8 cannot read.
"""

import sys

BEFORE = sys.excepthook


def end_in_one_line(kind: type, error: BaseException, trace: object) -> None:
    """sys.excepthook: no traceback of a Ctrl-C that comes while a program's modules are being imported. The
    exit code stays Python's own, which a shell shows as 130."""
    if not issubclass(kind, KeyboardInterrupt):
        BEFORE(kind, error, trace)
    elif sys.stderr is not None:
        sys.stderr.write("error: interrupted\n")


sys.excepthook = end_in_one_line  # before the imports below, which take most of this file's time

import functools
import importlib
import importlib.util
import os
import re
import shlex
import subprocess
from typing import NoReturn

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
OLDEST_PYTHON, OLDEST_TORCH = (3, 11), (2, 11)
TRAINING = ("numpy", "torch", "tiktoken")  # packages that a training imports


def stop(message: str) -> NoReturn:
    """Print one line and end the program with exit code 2."""
    if sys.stderr is not None:
        try:
            sys.stderr.write("error: " + message + "\n")
            sys.stderr.flush()
        except (OSError, ValueError):  # a stderr that is closed: the exit code still tells
            pass
    sys.exit(2)


def venv_python(venv: str = VENV) -> str:
    """Path of the Python of a virtual environment."""
    return os.path.join(venv, *(("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")))


def remedy() -> str:
    """How to get a Python that has everything (a clause for the end of an error message)."""
    if os.path.realpath(sys.prefix) == os.path.realpath(VENV):
        return "remove the folder {} and start ./run.sh, which makes it anew".format(shlex.quote(VENV))
    if os.path.exists(os.path.join(VENV, "installed")):
        return "start the program with {}".format(shlex.quote(venv_python()))
    return ("./run.sh makes .venv, which has everything; `python -m pip install -e {}` adds it to a Python "
            "of your own"
            .format(shlex.quote(ROOT)))


def lacking(name: str) -> bool:
    """True if a package is not installed. A folder without code, as a broken removal leaves it, does not
    count."""
    if name in sys.modules:
        return sys.modules[name] is None
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return True
    return spec is None or spec.origin is None


def require(*names: str) -> None:
    """End the program in one line, exit code 2, unless this Python can import these packages. It imports
    them.

    The order of the names is the order of the imports.
    """
    missing = [name for name in names if lacking(name)]
    if missing:
        stop("{} lacks {}: {}".format(sys.executable, ", ".join(missing), remedy()))
    if "torch" in names:
        check_threads()
    for name in names:
        try:
            module = importlib.import_module(name)
        except (ImportError, OSError) as error:  # OSError: a shared library of the package is missing
            stop("{} cannot import {} ({}): {}".format(sys.executable, name, first_line(error), remedy()))
        except Exception as error:  # torch's own, of a variable like TORCH_LOGS that it cannot read
            wrong = sorted(key for key in os.environ if key.startswith((name.upper(), "PY" + name.upper())))
            stop("{} cannot import {} ({}): {}".format(
                sys.executable, name, first_line(error),
                "mend or unset " + ", ".join(wrong) if wrong else remedy()))
        if name == "torch" and numbers(getattr(module, "__version__", "0")) < OLDEST_TORCH:
            stop("{} has torch {}, and torch {}.{} is the oldest that works: {}".format(
                sys.executable, getattr(module, "__version__", "without a version"), *OLDEST_TORCH, remedy()))


def check_threads() -> None:
    """Refuse an OMP_NUM_THREADS that OpenMP cannot read: it would take all cores, with a line of its own.
    An empty one is as good as none."""
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    if not threads.strip():
        del os.environ["OMP_NUM_THREADS"]
    elif not all(re.fullmatch(r" *0*[1-9][0-9]{0,8} *", level) for level in threads.split(",")):
        stop("OMP_NUM_THREADS={!r:.60}: expected a number of threads, at least 1; set it to one, or unset it"
             .format(threads))


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its kind if it says nothing."""
    return ([line for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[0].strip()


def without(error: ImportError) -> str:
    """The line for an ImportError that a program met later, when it first needed something."""
    if error.name and lacking(error.name):
        return "{} lacks {}: {}".format(sys.executable, error.name, remedy())
    return "{} cannot import {} ({}): {}".format(sys.executable, error.name or "a package", error, remedy())


def numbers(version: str) -> "tuple[int, ...]":
    """The first two numbers of a version: '2.13.0+cpu' -> (2, 13)."""
    parts = []
    for part in str(version).split(".")[:2]:
        digits = "".join(c for c in part if c.isdigit())
        parts.append(int(digits or 0))
    return tuple(parts)


@functools.lru_cache(None)
def check_training() -> None:
    """UserError if this Python cannot run a training. Called before a plan is declared, so that no declared
    run is lost.

    Asked in a process of its own, because torch takes seconds and memory that the caller does not need.
    """
    from common.errors import UserError
    code = "from common import environment; environment.require(*environment.TRAINING)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it ended with code {}".format(done.returncode)]
        said = said[-1][len("error: "):] if said[-1].startswith("error: ") else said[-1]
        raise UserError("nothing was started, because no training can run here: " + said)


if sys.version_info < OLDEST_PYTHON:
    stop("{} is Python {}.{}, and {}.{} is the oldest that works: start the program with a newer one "
         "(./run.sh finds it, and makes .venv)".format(
             sys.executable, *(sys.version_info[:2] + OLDEST_PYTHON)))
