"""Makes .venv with the pinned dependencies, once, and starts something in it.
run.sh and test.sh are its two callers.

    python installation/install.py run [ARGUMENTS]   # ./run.sh: for training, plots; then installation/run.py
    python installation/install.py test [ARGUMENTS]  # ./test.sh: the rest too; then pytest
    python installation/install.py python            # prints the path of a Python that can train and plot

$SPEEDRUN_PYTHON, a Python that has the packages already, is used as it is. Standard library only.
"""

import os
import sys

if __name__ == "__main__":  # started as a file: modules are found from the checkout, not from this folder
    sys.path[0] = os.path.dirname(sys.path[0])
from common import environment  # noqa: E402  refuses a Python that is too old

import contextlib
import json
import platform
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

from common import files

if __name__ == "__main__":
    from installation import run

ROOT, VENV = Path(environment.ROOT), Path(environment.VENV)
PYTHON = Path(environment.venv_python())
INSTALLED = VENV / "installed"  # JSON list of the requirements that are there, all of them whole
# host and process that is installing; left behind by a killed one, whose .venv is not believed
LOCK = ROOT / ".venv-unfinished"
EXTRAS = {"run": ["tools"], "test": ["tools", "slurm", "dev"], "python": ["tools"]}
# Megabytes to download for `run`, summed over the files that the lock file names (Python 3.11 to 3.14 differ
# by 1 MB; `test` adds 4 MB). On Linux most of it is CUDA.
DOWNLOAD = {("Linux", "x86_64"): 2829, ("Linux", "aarch64"): 2953, ("Darwin", "arm64"): 175,
            ("Windows", "AMD64"): 211}
# pip settings of the user that would put packages elsewhere or install only half of them;
# indexes and proxies stay
MISPLACING = ("USER", "TARGET", "PREFIX", "ROOT", "PYTHON", "DRY_RUN", "NO_DEPS", "REQUIREMENT", "EDITABLE",
              "PLATFORM", "PYTHON_VERSION", "IMPLEMENTATION", "ABI", "REQUIRE_VIRTUALENV", "IGNORE_INSTALLED",
              "REPORT", "LOG")


class Failed(Exception):
    """The installation did not succeed; the text is one line for a person."""


def requirements(extras: Iterable[str]) -> list[str]:
    """Pinned requirements of the project with these extras, as pip takes them."""
    import tomllib
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [
        *project["dependencies"], *(r for extra in extras for r in project["optional-dependencies"][extra])
    ]


# ----- what is there ----------------------------------------------------------------------------------------

def starts(python: Path) -> bool:
    """True if a Python can be started at all: that of a venv cannot when the Python that made it is gone."""
    try:
        return subprocess.run([python, "-I", "-c", "import sys; sys.exit(sys.version_info < (3, 11))"],
                              capture_output=True).returncode == 0
    except OSError:
        return False


def installed() -> list[str]:
    """The requirements that .venv holds, by its own list; [] if there is none."""
    try:
        return [str(x) for x in json.loads(INSTALLED.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return []


def absent(wanted: Iterable[str]) -> list[str]:
    """Those of the pinned requirements that .venv does not hold, by its packages' metadata.
    One with a marker is not asked for."""
    code = """
import importlib.metadata as m, sys
for pin in sys.argv[1:]:
    name, _, version = pin.partition("==")
    try:
        found = m.distribution(name)
        whole = found.version.partition("+")[0] == version and found.read_text("RECORD") is not None
    except m.PackageNotFoundError:
        whole = False
    if not whole:
        print(pin)
"""
    pins = [r for r in wanted if ";" not in r]
    return subprocess.run([PYTHON, "-I", "-c", code, *pins], capture_output=True, text=True).stdout.split()


# ----- installing -------------------------------------------------------------------------------------------

def say(text: str) -> None:
    """Print a line to stderr at once."""
    print(text, file=sys.stderr, flush=True)


def cost() -> str:
    """A clause: how much is downloaded and how long that takes."""
    size = DOWNLOAD.get((platform.system(), platform.machine()))
    if size is None:
        return "up to 3 GB are downloaded"
    amount = f"{size / 1000:.1f} GB" if size >= 1000 else f"{size} MB"
    minutes = max(1, round(size * 8 / 100 / 60))
    return (f"{amount} are downloaded, about {minutes} minute{'s' if minutes > 1 else ''} at 100 Mbit/s; "
            "what pip has in its cache, or finds in a folder of yours, is not")


def pip(*arguments: str) -> None:
    """Run the venv's pip. Its progress goes to the terminal, if stderr is one;
    otherwise only its error is told. Raises Failed."""
    env = {
        k: v for k, v in os.environ.items()
        if k.removeprefix("PIP_") not in MISPLACING or not k.startswith("PIP_")
    }
    command = [
        PYTHON, "-I", "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--no-user",
        *arguments
    ]
    if sys.stderr.isatty():
        done = subprocess.run(command, cwd=ROOT, env=env, stdout=sys.stderr)
        reason = "pip's message is above"
    else:
        done = subprocess.run([*command, "--quiet"], cwd=ROOT, env=env, stdout=subprocess.DEVNULL,
                              stderr=subprocess.PIPE, text=True, errors="replace")
        errors = [
            line for line in done.stderr.splitlines() if line.startswith("ERROR: ")
        ] or done.stderr.splitlines()
        reason = errors[-1].removeprefix("ERROR: ") if errors else f"exit code {done.returncode}"
    if done.returncode:
        raise Failed(f"pip could not install the dependencies ({reason.strip()})")


def make_venv() -> None:
    """An empty .venv of the running Python. Raises Failed."""
    done = subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], capture_output=True, text=True,
                          errors="replace")
    if done.returncode:
        said = " ".join((done.stderr.strip() or done.stdout.strip()
                         or f"exit code {done.returncode}").split())
        if "ensurepip" in said or "No module named" in said:
            raise Failed(f"{sys.executable} has no complete venv module: install it (Debian, Ubuntu: apt "
                         "install python3-venv) or set SPEEDRUN_PYTHON to a Python that has the dependencies")
        raise Failed(f"cannot make {VENV} with {sys.executable} -m venv: {said[-300:]}")


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """Hold LOCK; wait for another process that holds it. If that one was killed, its .venv is removed."""
    waited = False
    while True:
        try:
            handle = os.open(LOCK, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            break
        except FileExistsError:
            owner = holder()
            if owner is None:
                say(".venv is half made, as an installation was interrupted: making it anew")
                remove_venv()
                LOCK.unlink(missing_ok=True)
            elif not waited:
                say(f"{owner} is installing .venv: waiting for it")
                waited = True
            time.sleep(0.5)
        except OSError as error:
            raise Failed(
                f"cannot write to {ROOT} ({error.strerror}): set SPEEDRUN_PYTHON to a Python that has the "
                "dependencies"
            ) from None
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(files.json_text({"host": socket.gethostname(), "process": os.getpid()}))
        yield
    finally:
        LOCK.unlink(missing_ok=True)


def holder() -> str | None:
    """Who holds LOCK, in words; None if that process has ended.
    Raises Failed if it runs on another machine."""
    try:
        owner = json.loads(LOCK.read_text(encoding="utf-8"))
        host, process = str(owner["host"]), int(owner["process"])
    except FileNotFoundError:
        return "another ./run.sh or ./test.sh"
    # killed before it wrote its name, or about to write it
    except (OSError, ValueError, TypeError, KeyError):
        try:
            return "another ./run.sh or ./test.sh" if time.time() - LOCK.stat().st_mtime < 5 else None
        except OSError:
            return "another ./run.sh or ./test.sh"
    if host != socket.gethostname():
        raise Failed(
            f"{LOCK} says that {host} is installing .venv: wait for it, or remove that file and .venv"
        )
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except OSError:  # it belongs to somebody else
        pass
    return f"process {process}"


def remove_venv() -> None:
    """Remove the environment that a failed installation left. Failed if it is a link."""
    if VENV.is_symlink():
        raise Failed(f"{VENV} is a link: remove it, or set SPEEDRUN_PYTHON to the Python behind it")
    shutil.rmtree(VENV, ignore_errors=True)


def install(wanted: list[str]) -> None:
    """Bring .venv to hold all requirements. If that fails or is interrupted, nothing half-made stays.
    Raises Failed."""
    before, done = installed(), False
    if before and not starts(PYTHON):
        say(".venv is made anew, as its Python cannot be started any more")
        before = []
    try:
        if not before:
            say(f"installing the dependencies into .venv, once: {cost()}")
            make_venv()
        else:
            say("adding to .venv: " +
                ", ".join(r.partition(";")[0].strip() for r in wanted if r not in before))
            INSTALLED.unlink()
        pip(*wanted)
        lacking = absent(wanted)
        if lacking:
            raise Failed(f"pip ended well, but .venv lacks {', '.join(lacking)}: look at `pip config list`")
        add_commands()
        files.write(INSTALLED, files.json_text(sorted({*wanted, *before} if before else wanted)) + "\n")
        done = True
    finally:
        if not done:
            if before and not absent(before):
                # pip stopped before it changed anything
                files.write(INSTALLED, files.json_text(before) + "\n")
            else:
                remove_venv()


def add_commands() -> None:
    """The commands speedrun-train and so on. Setuptools is there, since torch needs it.
    Nothing depends on them."""
    try:
        pip("--no-deps", "--no-build-isolation", "--editable", ".")
    except Failed as error:
        say(f"note: the commands speedrun-train and so on are not installed: {error}")


# ----- the environment of a caller --------------------------------------------------------------------------

def believed(wanted: list[str]) -> bool:
    """True if .venv holds all of it. Raises Failed if .venv is somebody else's and does not."""
    if not VENV.exists():
        return False
    if INSTALLED.exists():
        return set(wanted) <= set(installed()) and starts(PYTHON)
    lacking = absent(wanted) if starts(PYTHON) else ["a Python that starts"]
    if lacking:
        extras = " ".join(f"--extra {extra}" for extra in EXTRAS["test"])
        raise Failed(f"{VENV} was not made by ./run.sh (by uv, perhaps) and lacks {', '.join(lacking)}: `uv "
                     f"sync {extras}` adds it; or remove that folder")
    return True


def ready(kind: str) -> str:
    """Path of a Python that has what `kind` (run, test, python) needs. Raises Failed."""
    if os.environ.get("SPEEDRUN_PYTHON"):
        return sys.executable
    wanted = requirements(EXTRAS[kind])
    if LOCK.exists() or not believed(wanted):
        with locked():
            if not believed(wanted):  # another process may just have done it
                install(wanted)
    return str(PYTHON)


def ended(number: int, frame: object) -> NoReturn:
    """Signal handler: SIGTERM and SIGHUP clean up as Ctrl-C does."""
    raise KeyboardInterrupt  # SIGTERM and SIGHUP clean up as Ctrl-C does


def main(argv: list[str]) -> None:
    """Install what `run` or `test` needs, then start it."""
    kind, arguments = argv[0], argv[1:]
    if kind == "run":
        run.read(arguments)  # --help and a mistyped setting need no installation
    handled = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {
        number: signal.signal(number, ended) for number in handled
        if signal.getsignal(number) == signal.SIG_DFL
    }
    try:
        python = ready(kind)
    except Failed as error:
        environment.stop(str(error))
    except KeyboardInterrupt:
        say("interrupted: the installation is not complete and starts anew next time")
        sys.exit(130)
    except OSError as error:
        environment.stop(f"cannot install: {error.filename or VENV}: {error.strerror}")
    for number, handler in before.items():
        signal.signal(number, handler)
    if kind == "python":
        print(python)
        return
    if kind == "test":
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread each, otherwise they wait for each other
        os.chdir(ROOT)
        # few tests: one process is faster
        alone = any(argument.partition("=")[0] == "--feature" for argument in arguments)
        # stealing: each process takes whole files as long as both have work, so that what the tests of a
        # file share is made once
        spread = ["-n", "0"] if alone else ["-n", "2", "--dist", "worksteal"]
        arguments = ["-m", "pytest", "-q", *spread, *arguments]
    else:
        arguments = [str(ROOT / "installation/run.py"), *arguments]
    sys.stdout.flush()
    os.execv(python, [python, *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
