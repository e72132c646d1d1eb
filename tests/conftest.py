"""What holds for all tests: the packages are there, Ctrl-C reaches programs under test, programs start warm
(warm_python.py), and --feature PATH selects laws."""

import gc
import signal
import subprocess

import pytest

# Collecting makes millions of objects that stay (rewritten asserts, torch): the garbage collector would walk
# through them again and again, for a third of the time. The tests run with its usual thresholds.
USUAL_THRESHOLDS = gc.get_threshold()
gc.set_threshold(50_000, 50, 1_000)

from common import environment

environment.require(*environment.TRAINING)

import features  # noqa: E402  after the packages are known to be there
import warm_python  # noqa: E402
from common.errors import UserError  # noqa: E402

# A shell that starts the tests in the background ignores SIGINT, and nohup SIGHUP; the programs under test
# inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


subprocess.Popen = warm_python.Popen


def pytest_addoption(parser: pytest.Parser) -> None:
    """--feature PATH: run only the tests that guard a setting (features.py says how they are found)."""
    parser.addoption(
        "--feature", metavar="PATH", help="run the tests that guard this setting, like model.attn.gate"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the mark, and refuse a path that is no setting or that no test names."""
    config.addinivalue_line("markers", "slow: takes minutes; tests/long.sh runs it")
    config.addinivalue_line(
        "markers", "feature(*paths, path=, record=): settings that the test guards (features.py)"
    )
    path = config.getoption("--feature")
    try:
        config.guarded = features.guarded(path) if path else None
    except UserError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_ignore_collect(collection_path, config: pytest.Config) -> bool | None:
    """With --feature, do not even import the files that hold no law on it."""
    name = collection_path.name
    if config.guarded and name.startswith("test_") and not features.may_guard(name, config.guarded):
        return True
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list) -> None:
    """With --feature, keep the cases that guard the setting."""
    if not config.guarded:
        return
    kept, left = [], []
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        marks = list(item.iter_markers("feature"))
        (kept if features.case_guards(marks, parameters, config.guarded) else left).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Give the garbage collector its usual thresholds back."""
    gc.set_threshold(*USUAL_THRESHOLDS)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """End the process that programs were forked from."""
    warm_python.SERVER.end()
