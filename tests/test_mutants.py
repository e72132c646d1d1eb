"""The list of tests/mutants.py holds: texts and tests are there, and every mutant has been killed."""

import collections
from xml.etree import ElementTree

import mutants
import pytest


def test_every_mutant_can_be_made_and_its_test_exists():
    listed = mutants.mutants()
    assert not [fault for mutant in listed for fault in mutants.faults(mutant)]
    counts = collections.Counter(mutant.range for mutant in listed)
    assert counts.keys() == set(mutants.RANGES) and min(counts.values()) >= 30
    changes = {(mutant.file, mutant.text, mutant.change) for mutant in listed}
    assert len(changes) == len(listed)


def test_the_table_has_the_row_of_every_mutant_and_no_other():
    assert list(mutants.known_rows())[1:] == [mutants.row(mutant) for mutant in mutants.mutants()]


def test_a_text_that_is_not_there_once_and_a_test_that_is_gone_are_faults():
    mutant = mutants.mutants()[0]
    for changed, fault in ((mutant._replace(text="no such text"), "occurs 0 times"),
                           (mutant._replace(text=" ", change=""), "and must occur once"),
                           (mutant._replace(change=mutant.text), "changes nothing"),
                           (mutant._replace(test="tests/test_mutants.py::test_gone[1]"), "there is no test"),
                           (mutant._replace(test="tests/test_gone.py -k x"), "there is no test")):
        assert any(fault in found for found in mutants.faults(changed)), fault


FAILURE, ERROR, SKIPPED, NAME = (
    '<failure message="assert 1 == 2"/>', '<error message="failed on setup"/>', "<skipped/>",
    '<failure message="NameError: name x"/>'
)


@pytest.mark.parametrize("code, children, kind", [
    (0, ["", ""], "passed"), (0, [SKIPPED, ""], "passed"), (0, [SKIPPED], "never ran"), (5, [], "never ran"),
    (1, ["", FAILURE], "failed"), (1, [ERROR], "never ran"), (1, [NAME], "never ran"),
    (2, [ERROR], "never ran"), (4, [], "never ran")])
def test_only_a_failure_inside_a_test_is_a_kill(code, children, kind):
    cases = [ElementTree.fromstring(f"<testcase>{child}</testcase>") for child in children]
    assert mutants.outcome(code, cases, "ERROR not found").kind == kind


def test_a_mutant_is_another_source_for_python_and_leaves_the_copy_as_it_was(tmp_path):
    """Its file has a time of its own, by which Python tells that the compiled one is out of date."""
    path = tmp_path / "a.py"
    path.write_text("x = 1\n")
    before, seen = path.stat().st_mtime, []
    mutant = mutants.Mutant("a", "34-57", "a.py", "1", "2", "", "")
    for number in (1, 2):
        with mutants.applied(mutant, tmp_path, number):
            seen.append((path.read_text(), path.stat().st_mtime))
    assert [text for text, _ in seen] == 2 * ["x = 2\n"] and len({*(time for _, time in seen), before}) == 3
    assert path.read_text() == "x = 1\n" and int(path.stat().st_mtime) == int(before)
