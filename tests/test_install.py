"""Laws of the installation: what is pinned, what a Python that lacks something is told, how .venv is made,
how run.sh reads its arguments.

No network: pip is a stand-in, and so are other Pythons.
"""

import ast
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from common import environment
from installation import install
from installation import run

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROGRAMS = [
    "train_gpt.py", "sample.py", "sweep.py", "installation/run.py", "installation/install.py",
    "records/__main__.py", "data/fineweb.py", "data/tokenize.py", "data/build_sample_vocab.py"
]


# ----- pins -------------------------------------------------------------------------------------------------

def test_triton_is_the_version_that_the_pinned_torch_names():
    """From the metadata in the lock file, because a CPU wheel of torch names none."""
    lock = tomllib.loads((ROOT / "uv.lock").read_text())
    packages = {p["name"]: p for p in lock["package"]}
    assert any(d["name"] == "triton" for d in packages["torch"]["dependencies"])
    pin, = (r for r in PROJECT["project"]["optional-dependencies"]["dev"] if r.startswith("triton"))
    assert pin == f"triton=={packages['triton']['version']}; sys_platform == 'linux'"
    assert f"torch=={packages['torch']['version']}" in PROJECT["project"]["dependencies"]


def test_the_lock_file_locks_what_is_pinned_and_names_only_the_public_index():
    lock = (ROOT / "uv.lock").read_text()
    project = next(p for p in tomllib.loads(lock)["package"] if p["name"] == "speedrun")
    locked = {(d["name"].replace(".", "-"), d["specifier"]) for d in project["metadata"]["requires-dist"]}
    pinned = install.requirements(PROJECT["project"]["optional-dependencies"])
    assert locked == {
        (re.split("[=;]", r)[0].replace(".", "-"), "==" + re.split("==|;", r)[1]) for r in pinned
    }
    assert {url.split("/")[2].rpartition(".")[2] for url in re.findall(r'https?://[^"]+', lock)} == {"org"}


def test_every_module_and_package_is_declared_and_every_command_starts_a_program():
    declared = PROJECT["tool"]["setuptools"]
    assert sorted(declared["py-modules"]) == sorted(
        p.stem for p in ROOT.glob("*.py") if p.stem != "build_backend"
    )
    found = {str(p.parent.relative_to(ROOT)).replace("/", ".") for p in ROOT.rglob("__init__.py")
             if not {".venv", "cache", "tests"} & {*p.relative_to(ROOT).parts}}
    assert set(declared["packages"]) == found
    for target in PROJECT["project"]["scripts"].values():
        module, name = target.split(":")
        code = f"import sys; sys.argv = ['x', '--help']; import {module}; {module}.{name}()"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.startswith("usage: "), (target, done.stderr)


def test_an_installation_that_is_not_editable_is_refused_in_a_line():
    import importlib.util
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not here")
    from installation import build_backend
    assert callable(build_backend.build_editable)
    for hook in (
        build_backend.build_wheel, build_backend.build_sdist, build_backend.prepare_metadata_for_build_wheel
    ):
        with pytest.raises(SystemExit, match="pip install -e"):
            hook("somewhere", config_settings=None)


# ----- a Python that lacks something ------------------------------------------------------------------------

@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """bare(*command, folder, **modules): a finished process of a Python without packages, but for modules
    {name: text} in a folder."""
    venv = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)

    def call(*command, folder, **modules):
        for name, text in modules.items():
            (folder / f"{name}.py").write_text(text)
        return subprocess.run(
            [environment.venv_python(str(venv)), *command], cwd=ROOT, capture_output=True, text=True,
            timeout=60,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
        )
    return call


COMMANDS = [
    ["train_gpt.py", "tiny-v3"],
    ["train_gpt.py", "short/11", "--plan"],
    ["sample.py", "x.pt"],
    ["installation/run.py"],
    ["sweep.py", "ablate", "short/11", "--scale", "micro", "--dir", "{tmp}/q"],
    ["sweep.py", "status", "x"],
    ["-m", "records", "judge"],
    ["-m", "records", "audit", "HEAD"],
    ["-m", "records", "leaderboard", "--check"],
    [
        "-m", "records", "compare", "short/1", "short/2", "--runs", "2", "--scale", "micro", "--allow-dirty",
        "--out", "{tmp}/c"
    ],
    ["-m", "data.fineweb", "1"],
    ["-m", "data.tokenize", "x", "--out", "{tmp}/t"],
    ["-m", "data.build_sample_vocab"],
    ["bench/steps.py"],
    ["bench/correct.py"],
    ["tests/matrix.py"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_program_without_its_packages_is_one_line_with_a_remedy_and_declares_nothing(
    command, tmp_path, bare
):
    done = bare(*(part.format(tmp=tmp_path) for part in command), folder=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and " lacks " in done.stderr, done.stderr
    assert ".venv" in done.stderr and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "torch, said",
    [
        (
            "raise ImportError('libcudart.so.13: cannot open')",
            "cannot import torch (libcudart.so.13: cannot open)",
        ),
        ("raise OSError('libgomp.so.1: no such file')", "cannot import torch (libgomp.so.1: no such file)"),
        ("raise ValueError('\\n--- bad setting\\nmore')", "cannot import torch (--- bad setting)"),
        ("__version__ = '2.4.1+cu121'", "has torch 2.4.1+cu121, and torch 2.11 is the oldest that works"),
    ],
)
def test_a_torch_that_cannot_serve_is_one_line_and_burns_no_run(torch, said, tmp_path, bare):
    modules = {"torch": torch, "numpy": "", "tiktoken": ""}
    done = bare("train_gpt.py", "tiny-v3", folder=tmp_path, **modules)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and said in done.stderr
    folder = tmp_path / "declared"
    done = bare(
        "-m", "records", "compare", "short/1", "short/2", "--runs", "2", "--scale", "micro", "--allow-dirty",
        "--out", str(folder), folder=tmp_path
    )
    assert done.returncode == 2 and said in done.stderr and not folder.exists()


@pytest.mark.parametrize("value, left", [
    ("2", "2"), (" 4,3 ", " 4,3 "), ("", None), (None, None), ("abc", "refused"), ("0", "refused"),
    ("-4", "refused"), ("2,", "refused")])
def test_a_number_of_threads_that_openmp_cannot_read_is_refused_and_an_empty_one_is_none(
    value, left, monkeypatch, capsys
):
    monkeypatch.setenv("OMP_NUM_THREADS", value or "")
    if value is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    if left == "refused":
        with pytest.raises(SystemExit, match="2"):
            environment.check_threads()
        said = capsys.readouterr().err
        assert said.startswith(f"error: OMP_NUM_THREADS={value!r}: expected") and said.count("\n") == 1
    else:
        environment.check_threads()
        assert os.environ.get("OMP_NUM_THREADS") == left


def test_ctrl_c_while_modules_are_imported_is_one_line():
    done = subprocess.run([sys.executable, "-c", "from common import environment; raise KeyboardInterrupt"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "error: interrupted\n" and done.returncode in (130, -signal.SIGINT)


def test_an_old_python_is_told_so_before_it_meets_what_it_cannot_read():
    """All that a program's old Python reads: itself, in the grammar of 3.8, and environment.py, which is its
    first import."""
    for name in [*PROGRAMS, *(str(p.relative_to(ROOT)) for p in (ROOT / "bench").glob("*.py"))]:
        tree = ast.parse((ROOT / name).read_text(), feature_version=(3, 8))
        imports = [
            n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom)) and n.col_offset == 0
        ]
        first = [alias.name for node in imports for alias in node.names if alias.name not in ("os", "sys")]
        if name in PROGRAMS:
            assert first[0] == "environment", name
        elif name != "bench/measure.py":
            ours = [
                n for n in first
                if n in ("measure", "report", "steps", "torch", "numpy", "deltas", "environment")
            ]
            assert not ours or ours[0] in ("measure", "report", "steps", "environment"), name
    ast.parse((ROOT / "common/environment.py").read_text(), feature_version=(3, 6))
    code = (
        "import sys; sys.version_info = (3, 8, 18, 'final', 0); import runpy; runpy.run_path(sys.argv[1], "
        "run_name='__main__')"
    )
    for name in ("train_gpt.py", "sweep.py", "sample.py", "installation/run.py", "bench/steps.py"):
        done = subprocess.run([sys.executable, "-c", code, name], cwd=ROOT, capture_output=True, text=True,
                              env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'bench'}"})
        assert (
            done.returncode == 2 and done.stderr.count("\n") == 1 and "is Python 3.8, and 3.11" in done.stderr
        ), done.stderr


# ----- making .venv -----------------------------------------------------------------------------------------

PIP = """#!{python}
import importlib.metadata, json, os, pathlib, sys, time
here = pathlib.Path(__file__).resolve().parent
with open(here / "calls", "a") as file:
    print(json.dumps(sys.argv[1:]), file=file)
if sys.argv[1].endswith("install.py"):
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
elif "-c" in sys.argv:
    done = set((here / "have").read_text().split("\\n")) if (here / "have").exists() else set()
    print(*[r for r in sys.argv[sys.argv.index("-c") + 2:] if r not in done], sep="\\n")
elif "pip" in sys.argv:
    kind = os.environ.get("FAKE_PIP", "")
    if kind == "full" and "--editable" not in sys.argv:
        sys.exit("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device")
    if kind == "slow":
        print("downloading", flush=True)
        (here / "slow").touch()
        time.sleep(60)
    if "--editable" not in sys.argv:
        with open(here / "have", "a") as file:
            have = [a for a in sys.argv if "==" in a and not (kind == "lies" and a.startswith("torch"))]
            print(*have, sep="\\n", file=file)
else:
    sys.exit("started " + " ".join(sys.argv[1:]))
"""


@pytest.fixture
def checkout(tmp_path):
    """A checkout in a path with spaces whose `python -m venv` makes a stand-in for Python and pip that writes
    down its calls."""
    place = tmp_path / "a b" / "it's $odd [x]"
    place.mkdir(parents=True)
    for name in ("runlog.py", "run.sh", "test.sh", "pyproject.toml"):
        shutil.copy(ROOT / name, place)
    for name in ("common", "installation", "settings", "system"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "records" / "presets", place / "records" / "presets")
    shutil.copytree(
        ROOT / "records" / "short", place / "records" / "short", ignore=shutil.ignore_patterns("tiny", "runs")
    )
    fake = tmp_path / "fake" / "venv.py"
    fake.parent.mkdir()
    (fake.parent / "pip.txt").write_text(PIP.format(python=sys.executable))
    fake.write_text(f"""
import os, pathlib, shutil, sys
if os.environ.get("FAKE_VENV") == "missing":
    sys.exit("The virtual environment was not created successfully because ensurepip is not available.")
folder = pathlib.Path(sys.argv[-1])
shutil.rmtree(folder, ignore_errors=True)
(folder / "bin").mkdir(parents=True)
shutil.copy({str(fake.parent / "pip.txt")!r}, folder / "bin" / "python")
(folder / "bin" / "python").chmod(0o755)
""")
    base = fake.parent / "python3"
    base.write_text(f'#!/bin/sh\ncase "$*" in *ensurepip*|*version_info*) exec {sys.executable} "$@";; esac\n'
                    f'PYTHONPATH={fake.parent} exec {sys.executable} "$@"\n')
    base.chmod(0o755)
    return place


def start(checkout, *command, cwd=None, **env):
    path = f"{checkout.parent.parent / 'fake'}{os.pathsep}/usr/bin{os.pathsep}/bin"
    return subprocess.Popen(
        [str(part) for part in command], cwd=cwd or checkout, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env={"PATH": path, **env}
    )


def ended(process):
    out, err = process.communicate(timeout=60)
    return process.returncode, err.splitlines()


def calls(checkout):
    return [json.loads(line) for line in (checkout / ".venv/bin/calls").read_text().splitlines()]


def test_run_installs_what_it_needs_and_test_adds_the_rest_to_the_same_venv(checkout, tmp_path):
    """Without HOME, TMPDIR and terminal, by a link, from another folder, with CDPATH set."""
    link = tmp_path / "link.sh"
    link.symlink_to(os.path.relpath(checkout / "run.sh", tmp_path))
    (tmp_path / "a b" / "elsewhere").mkdir()
    code, said = ended(
        start(checkout, link, "--seed", "3", cwd=tmp_path / "a b" / "elsewhere", CDPATH="/usr")
    )
    assert code == 1 and said[-1] == f"started {checkout / 'installation/run.py'} --seed 3", said
    assert len(said) == 2 and " are downloaded, about " in said[0]
    given = [a for call in calls(checkout) if "pip" in call for a in call if "==" in a]
    assert given == install.requirements(["tools"]) and not any(
        r.startswith(("pytest", "triton", "submitit")) for r in given
    )
    code, said = ended(start(checkout, checkout / "test.sh", "-k", "x"))
    assert (
        said[0].startswith("adding to .venv: submitit==")
        and said[-1] == "started -m pytest -q -n 2 --dist worksteal -k x"
    ), said
    code, said = ended(start(checkout, checkout / "test.sh", "--feature", "optim.muon"))
    assert said == ["started -m pytest -q -n 0 --feature optim.muon"]  # a few tests: one process
    code, said = ended(start(checkout, checkout / "run.sh"))
    assert said == [f"started {checkout / 'installation/run.py'} "[:-1]]  # nothing to do any more
    shutil.rmtree(checkout / ".venv" / "bin")  # the Python that made it is gone
    code, said = ended(start(checkout, checkout / "run.sh"))
    assert "made anew" in said[0] and said[-1].startswith("started "), said


@pytest.mark.parametrize("env, message", [
    ({"FAKE_PIP": "full"}, "No space left on device"), ({"FAKE_PIP": "lies"}, ".venv lacks torch=="),
    ({"FAKE_VENV": "missing"}, "apt install python3-venv")])
def test_a_failed_installation_is_one_line_and_leaves_no_venv_that_is_believed(env, message, checkout):
    code, said = ended(start(checkout, checkout / "run.sh", **env))
    assert code == 2 and len(said) == 2 and said[1].startswith("error: ") and message in said[1], said
    assert not (checkout / ".venv").exists() and not (checkout / ".venv-unfinished").exists()
    assert ended(start(checkout, checkout / "run.sh"))[1][-1].startswith("started ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_an_interrupted_installation_starts_anew(number, checkout):
    process = start(checkout, checkout / "run.sh", FAKE_PIP="slow")
    while not (checkout / ".venv/bin/slow").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    if number != signal.SIGKILL:
        second = start(checkout, checkout / "run.sh")  # waits for the first
        assert second.stderr.readline().endswith("is installing .venv: waiting for it\n")
    process.send_signal(number)
    code, said = process.wait(), process.stderr.read().splitlines()
    if number == signal.SIGKILL:
        assert (checkout / ".venv").exists()
        second = start(checkout, checkout / "run.sh")
    else:
        assert code == 130 and said[1:] == [
            "interrupted: the installation is not complete and starts anew next time"
        ]
    code, said = ended(second)
    assert said[-1].startswith("started "), said
    assert ("half made" in said[0]) == (number == signal.SIGKILL)


def test_a_venv_of_somebody_else_is_used_if_it_has_everything_and_never_changed(checkout):
    ended(start(checkout, checkout / "run.sh"))
    (checkout / ".venv/installed").unlink()  # as uv makes it
    before = calls(checkout)
    assert ended(start(checkout, checkout / "run.sh"))[1][-1].startswith("started ")
    (checkout / ".venv/bin/have").write_text("numpy==2.4.6\n")
    code, said = ended(start(checkout, checkout / "run.sh"))
    assert code == 2 and len(said) == 1 and "lacks torch==" in said[0] and "uv sync" in said[0]
    assert [c for c in calls(checkout) if "pip" in c] == [c for c in before if "pip" in c]


def test_a_mistake_and_a_cry_for_help_need_no_installation(checkout):
    code, said = ended(start(checkout, checkout / "run.sh", "tiny-v99"))
    assert code == 2 and len(said) == 1 and "tiny-v" in said[0]
    process = start(checkout, checkout / "run.sh", "--help")
    out, err = process.communicate()
    assert process.returncode == 0 and not err and "What ./run.sh does" in out and "--without" in out
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize(
    "python, message",
    [
        ("exit 127", "here is none"), ("echo 3.9", "python3 is 3.9"), ("echo 3.15", "python3 is 3.15"),
        ("case $* in *ensurepip*) exit 1;; esac; echo 3.12", "lacks the venv module")
    ],
)
def test_a_machine_without_a_fitting_python_is_one_line(python, message, checkout, tmp_path):
    folder = tmp_path / "path"
    folder.mkdir()
    for name in ("bash", "dirname", "readlink", "env"):
        (folder / name).symlink_to(shutil.which(name))
    (folder / "python3").write_text(f"#!/bin/sh\n{python}\n".replace("#!/bin/sh", f"#!{shutil.which('sh')}"))
    (folder / "python3").chmod(0o755)
    done = subprocess.run(
        [shutil.which("bash"), str(checkout / "run.sh")], capture_output=True, text=True,
        env={"PATH": str(folder)}
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr, done.stderr


@pytest.mark.parametrize("python", ["/no/such/python", "true", "cat"])
def test_a_speedrun_python_that_is_none_is_one_line(python, checkout):
    done = subprocess.run([checkout / "run.sh", "--dry-run"], capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, env={**os.environ, "SPEEDRUN_PYTHON": python})
    assert (done.returncode, done.stdout) == (2, "")
    said = f"error: SPEEDRUN_PYTHON={python} is no Python that can be started: name one, or unset it\n"
    assert done.stderr == said


# ----- run.sh's arguments -----------------------------------------------------------------------------------

@pytest.mark.parametrize("typed, gpus, made", [
    ([], 0, ["tiny-v3", "--save-checkpoint"]), ([], 2, ["short/head", "--save-checkpoint"]),
    (["--scale", "micro"], 0, ["short/head", "--scale", "micro", "--save-checkpoint"]),
    (["short/9", "--seed", "3"], 0, ["short/9", "--seed", "3", "--scale", "tiny", "--save-checkpoint"]),
    (["short/9"], 8, ["short/9", "--save-checkpoint"]),
    (["tiny-v3", "--save-checkpoint"], 0, ["tiny-v3", "--save-checkpoint"]),
    (["tiny-v3", "--save"], 0, ["tiny-v3", "--save"]),
    (["--compile-cache", "short/9"], 0, ["tiny-v3", "--compile-cache", "short/9", "--save-checkpoint"]),
    (["--registered=x", "--profile", "1:2"], 0,
     ["tiny-v3", "--registered=x", "--profile", "1:2", "--save-checkpoint"]),
    (["--seed", "3", "short/2", "--plan"], 0, ["--seed", "3", "short/2", "--plan", "--scale", "tiny"])])
def test_arguments_are_read_by_the_trainers_parser(typed, gpus, made, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert run.complete(typed, run.read(typed), gpus) == made


def test_paths_are_read_from_the_callers_folder_and_runs_go_to_the_checkout_by_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run.complete([], run.read([]), 0) == ["tiny-v3", "--out", str(ROOT / "runs"), "--save-checkpoint"]
    typed = ["--out", "here", "--data=there"]
    assert run.complete(typed, run.read(typed), 0) == ["tiny-v3", *typed, "--save-checkpoint"]


def test_torch_here_is_one_of_those_that_the_code_runs_on():
    assert environment.numbers(importlib.metadata.version("torch")) >= environment.OLDEST_TORCH
    assert [environment.numbers(v) for v in ("2.13.0+cpu", "2.11.0a0+git1", "3")] == [(2, 13), (2, 11), (3,)]
