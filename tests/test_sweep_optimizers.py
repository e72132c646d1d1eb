"""Laws of `sweep.py optimizers`: tuned learning rates, seeds of their own, steps to the baseline's loss."""

import json

import pytest

import runlog
from fake_sweep import call, fake
from sweeps import optimizers, queue

RULES = """
factors = [0.5, 1.0, 2.0]
baseline = "Muon"
[[rules]]
name = "AdamW"
record = "short/2"
rate = "optim.matrix.lr"
[[rules]]
name = "Muon"
record = "short/3"
rate = "optim.muon.lr"
"""


@pytest.fixture
def rules(tmp_path):
    path = tmp_path / "rules.toml"
    path.write_text(RULES)
    return path


def change_of(arm):
    return [change for change in arm["changes"] if "lr" in change]


def test_every_rule_gets_its_best_learning_rate_on_a_seed_that_does_not_judge(
        tmp_path, fake, rules):
    assert call("optimizers", "--rules", rules, "--seeds", 2, "--dir", tmp_path / "q") == 0
    tune = queue.load_plan(tmp_path / "q/tune")
    arms = {arm["label"]: arm for arm in tune["arms"]}
    assert [arm["label"] for arm in tune["arms"]] == [
        "Muon x0.5", "Muon x1", "Muon x2", "AdamW x0.5", "AdamW x1", "AdamW x2"]
    done = queue.settled(tmp_path / "q/tune")[0]
    assert {run["seed"] for run in done.values()} == {0} and len(done) == 6
    best = {rule: min((done[queue.name_of(arm, 0)]["val_loss"], arm["factor"]) for arm in tune["arms"]
                      if arm["rule"] == rule)[1] for rule in ("Muon", "AdamW")}
    comparison = queue.load_plan(tmp_path / "q/comparison")
    assert {arm["rule"]: arm["factor"] for arm in comparison["arms"]} == best
    for arm in comparison["arms"]:
        assert change_of(arm) == arms[f"{arm['rule']} x{best[arm['rule']]:g}"]["changes"]
    judged = queue.settled(tmp_path / "q/comparison")[0]
    assert sorted(run["seed"] for run in judged.values()) == [1, 1, 2, 2]


def test_the_report_tells_steps_to_the_baselines_loss_time_and_memory(tmp_path, fake, rules):
    assert call("optimizers", "--rules", rules, "--seeds", 2, "--dir", tmp_path / "q") == 0
    found = json.loads(next((tmp_path / "q/comparison").glob("optimizers_*.json")).read_text())
    rows = {row["rule"]: row for row in found["rules"]}
    losses = [run["val_loss"] for run in found["control"]["runs"]]
    target = sum(losses) / 2
    expected = sorted(3 * (7 - target) / (7 - loss) for loss in losses if loss <= target)
    assert rows["Muon"]["steps"] == pytest.approx(expected)
    assert rows["Muon"]["ms_per_step"] == pytest.approx(10 / 3) and rows["Muon"]["runs"] == 2
    # short/2 has two moments for every parameter, short/3 one for the block matrices
    assert rows["AdamW"]["state_bytes"] > rows["Muon"]["state_bytes"] > 0
    text = next((tmp_path / "q/comparison").glob("optimizers_*.md")).read_text()
    assert "steps to its loss" in text and "| AdamW | short/2 |" in text


@pytest.mark.parametrize("points, target, step", [
    ([(0, 5.0), (10, 4.0), (20, 3.0)], 3.5, 15.0), ([(0, 5.0), (10, 4.0)], 4.0, 10.0),
    ([(0, 5.0), (10, 4.0)], 3.9, None), ([(0, 3.0), (10, 2.0)], 3.5, 0.0)])
def test_a_loss_is_reached_on_a_line_between_two_validations(points, target, step):
    assert runlog.crossing(points, target) == step


@pytest.mark.parametrize("edit, said", [
    (("baseline = \"Muon\"", "baseline = \"Lion\""), "not a table of rules"),
    (("factors = [0.5, 1.0, 2.0]", "factors = [0.5, 0.0]"), "factors be positive"),
    (("factors = [0.5, 1.0, 2.0]", "factors = []"), "at least one of them"),
    (("rate = \"optim.muon.lr\"", "rate = \"optim.muon.nothing\""), "optim.muon.nothing"),
    (("rate = \"optim.muon.lr\"", "rate = \"optim.muon.ns_steps\""), "no learning rate at"),
    (("record = \"short/2\"", "record = \"short/999\""), "short/999"),
])
def test_a_wrong_table_of_rules_is_refused_before_anything_runs(tmp_path, fake, rules, capsys, edit, said):
    rules.write_text(rules.read_text().replace(*edit))
    assert call("optimizers", "--rules", rules, "--dir", tmp_path / "q") == 2
    assert said in capsys.readouterr().err and not fake.read_text()
