"""What run.sh and test.sh install, resolved by pip from the public index, whatever this machine's pip is set
to.

    python tests/install_check.py  # a line for each target; exit code 1 if one of them cannot be installed

Nothing is installed (`pip install --dry-run`). The running Python is asked as it is. For the other targets
pip chooses files by --python-version and --platform, but it evaluates markers (`sys_platform == ...`) for the
machine that it runs on, so the target's values are put in their place. What run.sh installs is part of what
test.sh installs, so where the whole resolves the part does; it is resolved by itself for the running Python.
pip's own settings are cleared but for certificates, proxy and time-out. A recent pip in a temporary
environment reads the metadata of packages by range requests: 25 MB for a Linux target, where the wheels have
2.8 GB.
"""

import concurrent.futures
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from common import environment
from installation import install

PIP = "pip==26.3"  # its module for markers is known to be where MARKERS looks for it
KEPT = ("PIP_CERT", "PIP_CLIENT_CERT", "PIP_TRUSTED_HOST", "PIP_PROXY", "PIP_DEFAULT_TIMEOUT")
PYTHONS = ("3.11", "3.12", "3.13")
assert set(install.EXTRAS["run"]) <= set(install.EXTRAS["test"])
UNREACHABLE = re.compile(
    "Retrying|connection broken|NewConnectionError|NameResolution|ConnectTimeout|ReadTimeout|ProxyError"
)
MARKERS = """
import json, sys
from pip._vendor.packaging import markers
target, own = json.loads(sys.argv.pop(1)), markers.default_environment
markers.default_environment = lambda: {**own(), **target}
from pip._internal.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def manylinux(machine):
    """Platform tags of a Linux with glibc 2.28, newest first."""
    return [*(f"manylinux_2_{minor}_{machine}" for minor in range(28, 4, -1)), f"manylinux2014_{machine}",
            f"manylinux2010_{machine}", f"manylinux1_{machine}", f"linux_{machine}"]


# name -> (platform tags, values of the markers)
PLATFORMS = {
    "Linux x86-64": (
        manylinux("x86_64"),
        {
            "sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64",
            "os_name": "posix"
        },
    ),
    "Linux aarch64": (
        manylinux("aarch64"),
        {
            "sys_platform": "linux", "platform_system": "Linux", "platform_machine": "aarch64",
            "os_name": "posix"
        },
    ),
    "macOS arm64": (
        [f"macosx_{n}_0_{kind}" for n in range(15, 10, -1) for kind in ("arm64", "universal2")],
        {
            "sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64",
            "os_name": "posix"
        },
    ),
    "Windows x86-64": (
        ["win_amd64"],
        {"sys_platform": "win32", "platform_system": "Windows", "platform_machine": "AMD64", "os_name": "nt"},
    ),
}


def clean():
    """The environment of a pip that follows no setting of this machine but how to reach the network."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PIP_") or k in KEPT}
    return kept | {"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}


def resolve(python, folder, kind, target):
    """(packages {name: version}, None) or (None, reason) of what install.py gives pip for `kind`, run or
    test.

    python: of the environment with the recent pip. target: (Python version, platform) or None for the running
    Python.
    """
    report = folder / f"{kind}-{'-'.join(target) if target else 'here'}.json".replace(" ", "-")
    command = [python, "-m", "pip"]
    place = []
    if target:
        version, name = target
        tags, markers = PLATFORMS[name]
        markers = {**markers, "python_version": version, "python_full_version": f"{version}.0"}
        command = [python, "-c", MARKERS, json.dumps(markers)]
        place = ["--python-version", version, "--only-binary=:all:", "--target", folder / "nothing",
                 *(part for tag in tags for part in ("--platform", tag))]
    done = subprocess.run(
        [
            *command, "install", "--dry-run", "--ignore-installed", "--quiet", "--use-feature=fast-deps",
            "--retries", "2", "--report", report, *place, *install.requirements(install.EXTRAS[kind])
        ],
        env=clean(),
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode:
        errors = [
            line for line in done.stderr.splitlines() if line.startswith("ERROR: ")
        ] or done.stderr.splitlines()[-1:]
        what = "skipped: no network" if UNREACHABLE.search(done.stderr) else "FAILED"
        return None, f"{what} ({' '.join(errors)[:500]})"
    found = json.loads(report.read_text())["install"]
    return {p["metadata"]["name"].lower(): p["metadata"]["version"] for p in found}, None


def check(python, folder, target):
    """(line for a person, whether the target can be installed or was skipped)."""
    name = (
        f"{target[1]}, Python {target[0]}" if target
        else f"this machine, Python {sys.version_info[0]}.{sys.version_info[1]}"
    )
    said, began = [], time.monotonic()
    for kind in ("test",) if target else ("run", "test"):
        packages, reason = resolve(python, folder, kind, target)
        if reason:
            return f"{name}: {kind}.sh {reason}", reason.startswith("skipped")
        said.append(f"{kind}.sh {len(packages)} packages")
    said.append(f"torch {packages['torch']}, "
                f"{'triton ' + packages['triton'] if 'triton' in packages else 'no triton'}")
    return f"{name}: {', '.join(said)} ({time.monotonic() - began:.0f} s)", True


def main():
    with tempfile.TemporaryDirectory() as folder:
        python = environment.venv_python(os.path.join(folder, "venv"))
        subprocess.run([sys.executable, "-m", "venv", os.path.join(folder, "venv")], check=True)
        got = subprocess.run(
            [python, "-m", "pip", "install", "--quiet", "--retries", "2", PIP], capture_output=True, text=True
        )
        if got.returncode:
            print(f"skipped: pip cannot fetch {PIP} "
                  f"({(got.stderr.strip().splitlines() or ['no reason given'])[-1]})")
            return 0
        targets = [None, *((version, name) for name in PLATFORMS for version in PYTHONS)]
        # they wait for the network more than for a core
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            results = pool.map(lambda target: check(python, Path(folder), target), targets)
            fine = True
            for line, passed in results:
                print(line, flush=True)
                fine = fine and passed
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
