"""What a run says about the load of its machine."""

import time

from system import load


def meter(wall, own, machine):
    m = load.Meter()
    m.wall_s, m.own_s, m.machine_s = wall, own, machine
    return m


def test_a_meter_counts_only_between_start_and_stop(monkeypatch):
    readings = iter([100.0, 103.0, 200.0, 205.0])
    monkeypatch.setattr(load, "busy_seconds", lambda: next(readings))
    m = load.Meter()
    for _ in range(2):
        m.start()
        end = time.process_time() + 0.02
        while time.process_time() < end:
            pass
        m.stop()
        time.sleep(0.05)
    assert m.machine_s == 8.0 and 0.04 <= m.own_s <= m.wall_s + 0.01


def test_other_programs_are_what_this_run_did_not_use():
    found = load.account(meter(10.0, 9.0, 19.5), 9.5, cores=2)
    assert (found["own_cores"], found["other_cores"], found["alone"]) == (0.95, 1.0, False)
    said, = load.remark({**found, "load_end": 5.1}, 2)
    assert (
        said == "the machine was busy: other programs used 1.0 of 2 cores, load 5.1; times are not comparable"
    )
    alone = load.account(meter(10.0, 9.0, 10.0), 9.5, cores=2)
    assert alone["alone"] is True and load.remark(alone, 2) == []
    # clocks of different grain
    assert load.account(meter(10.0, 9.0, 8.0), 9.5, cores=2)["other_cores"] == 0.0


def test_without_proc_the_load_average_stands_in_once_it_is_of_this_run(monkeypatch):
    monkeypatch.setattr(load, "load_average", lambda: 3.0)
    assert load.account(meter(10.0, 10.0, None), 10.0, cores=4)["alone"] is None
    found = load.account(meter(90.0, 90.0, None), 90.0, cores=4)
    assert found["other_cores"] == 2.0 and found["alone"] is False
    monkeypatch.setattr(load, "load_average", lambda: None)
    found = load.account(meter(90.0, 90.0, None), 90.0, cores=4)
    assert found["alone"] is None and load.remark(found, 4) == []


def test_a_run_whose_clock_never_went_says_nothing():
    assert load.account(load.Meter(), 0.0, cores=2)["alone"] is None


def test_a_system_that_tells_nothing_is_no_failure(monkeypatch, tmp_path):
    monkeypatch.setattr(load, "STAT", tmp_path / "none")
    assert load.busy_seconds() is None
    (tmp_path / "stat").write_text("cpu strange\n")
    monkeypatch.setattr(load, "STAT", tmp_path / "stat")
    assert load.busy_seconds() is None
