import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from data.stream import Prefetch
from common import interrupt
from common.interrupt import Interrupt, hold

ROOT = Path(__file__).parent.parent


def test_ctrl_c_is_noted_first_and_raises_where_it_is_asked_for(capfd):
    for number in interrupt.SIGNALS:
        with Interrupt(main=True) as asked:
            asked.check()
            os.kill(os.getpid(), number)
            assert asked.asked
            with pytest.raises(KeyboardInterrupt):
                asked.check()
    assert "Ctrl-C again stops at once" in capfd.readouterr().err


def test_a_second_ctrl_c_raises_at_once_and_python_has_its_handler_back(monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Interrupt(main=False):
        os.kill(os.getpid(), signal.SIGINT)
        # `timeout` and launchers send two: within a second they are one request
        os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.setattr(interrupt, "AGAIN_S", 0.0)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")
    assert signal.getsignal(signal.SIGINT) is before


def test_what_a_script_starts_in_the_background_goes_on_ignoring_ctrl_c():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupt(main=True) as asked:
            os.kill(os.getpid(), signal.SIGINT)
            asked.check()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_that_ends_the_reader_of_our_errors_too_is_noted_all_the_same(monkeypatch):
    def gone(*_):
        raise BrokenPipeError
    monkeypatch.setattr(os, "write", gone)
    with Interrupt(main=True) as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked.asked


@pytest.mark.parametrize("context", [lambda: Interrupt(main=False, patient=False), interrupt.like_ctrl_c])
@pytest.mark.parametrize("number", interrupt.SIGNALS)
def test_where_nothing_is_half_done_the_first_signal_raises_but_never_within_hold(number, context):
    done = []
    with pytest.raises(KeyboardInterrupt), context():
        with hold():
            with hold():
                os.kill(os.getpid(), number)
                done.append("inner")
            done.append("outer")
        done.append("after")
    assert done == ["inner", "outer"]


def test_the_first_process_is_told_and_the_others_wait_for_it():
    """A signal to one process of a run reaches the first one, which writes the log; that one alone decides
    when to stop."""
    told = subprocess.Popen(
        [
            sys.executable, "-c", "import os, signal, time; from common.interrupt import Interrupt\n"
            "with Interrupt(main=True) as asked:\n"
            "    asked.join([os.getpid(), os.getppid()], os.getpid()); print('ready', flush=True)\n"
            "    while not asked.asked: time.sleep(0.01)\n"
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert told.stdout.readline() == "ready\n"
    with Interrupt(main=False) as asked:
        asked.join([told.pid, os.getpid()], told.pid)
        os.kill(os.getpid(), signal.SIGTERM)
        asked.check()  # trains on
        assert asked.asked and told.wait(30) == 0


def test_a_batch_whose_thread_could_not_start_can_still_be_closed(monkeypatch):
    """Ctrl-C may come while a thread is being started: closing must not then complain of a thread that never
    ran."""
    class Stream:
        def next(self):
            return np.zeros(1)

    def interrupted(thread):
        raise KeyboardInterrupt

    ahead = Prefetch(Stream(), 3)
    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ahead.next()
    ahead.drain()
    monkeypatch.undo()
    ahead.close()
