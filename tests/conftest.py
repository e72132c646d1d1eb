"""Ctrl-C must reach the programs under test: a shell that starts the tests in the background has it ignored by all children."""

import signal

from common import environment

environment.require(*environment.TRAINING)

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
