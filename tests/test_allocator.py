"""Law of common/allocator.py."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAM = """
import resource, sys
from common.allocator import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit("cannot")
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for mib in (48, 96, 1):
        block = bytearray(mib << 20)
        del block
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def test_memory_that_a_step_freed_is_there_for_the_next_one_without_page_faults():
    if not sys.platform.startswith("linux"):
        pytest.skip("mallopt is glibc's")
    kept, usual = (
        subprocess.run([sys.executable, "-c", PROGRAM, how], cwd=ROOT, capture_output=True, text=True)
        for how in ("keep", "leave")
    )
    if kept.stderr.strip() == "cannot":
        pytest.skip("this C library has no mallopt")
    assert int(kept.stdout) < 100 < 10_000 < int(usual.stdout)
