import os
import signal
import threading

import numpy as np
import pytest

from data.stream import Prefetch
from system.interrupt import Interrupt


def test_ctrl_c_is_noted_first_and_raises_where_it_is_asked_for(capfd):
    with Interrupt(main=True) as interrupt:
        interrupt.check()
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.asked
        with pytest.raises(KeyboardInterrupt):
            interrupt.check()
    assert "Ctrl-C again stops at once" in capfd.readouterr().err


def test_a_second_ctrl_c_raises_at_once_and_python_has_its_handler_back():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Interrupt(main=False):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")
    assert signal.getsignal(signal.SIGINT) is before


def test_what_a_script_starts_in_the_background_goes_on_ignoring_ctrl_c():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupt(main=True) as interrupt:
            os.kill(os.getpid(), signal.SIGINT)
            interrupt.check()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_that_ends_the_reader_of_our_errors_too_is_noted_all_the_same(monkeypatch):
    def gone(*_):
        raise BrokenPipeError
    monkeypatch.setattr(os, "write", gone)
    with Interrupt(main=True) as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.asked


def test_a_batch_whose_thread_could_not_start_can_still_be_closed(monkeypatch):
    """Ctrl-C may come while a thread is being started: closing must not then complain of a thread that never ran."""
    class Stream:
        def next(self):
            return np.zeros(1)

    def interrupted(thread):
        raise KeyboardInterrupt

    ahead = Prefetch(Stream(), 3)
    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ahead.next()
    ahead.settle()
    monkeypatch.undo()
    ahead.close()
