"""Sweeps (sweep.py): what is run, the queue that workers share, and what is concluded."""
