"""Laws of `records verify`, second part: claims bent in what belongs to the track, in time off the clock,
sources, facts of the machine, numbers that no honest run has, and the ledger of attempts.

As in test_bent_claims.py everything else is sealed again, and each is refused for its own reason.
"""

import random
import re

import pytest

import runlog
import test_bent_claims
from claim_builder import RECORD, Forgery, arm, built, claim, good
from evidence import arms as program
from evidence import ledger, verify
from settings import deltas, schema

MUTATIONS = []


def refused(reason, also="$^"):
    """Register a mutation of the claim: one problem matches the reason, and any other one the reason or
    `also`."""
    def add(function):
        MUTATIONS.append(pytest.param(function, reason, also, id=function.__name__))
        return function
    return add


@pytest.mark.parametrize("bend, reason, also", MUTATIONS)
def test_a_bent_claim_is_refused_for_its_own_reason(bend, reason, also, claim):
    bend(claim)
    results = verify.verify(claim.folder)
    problems = results["problems"]
    assert results["verdict"] == "refused" and any(re.search(reason, p) for p in problems), problems
    assert [p for p in problems if not re.search(f"{reason}|{also}", p)] == [], problems


def test_more_than_a_hundred_bent_claims_are_refused():
    assert len(MUTATIONS) + len(test_bent_claims.MUTATIONS) > 170


def runs_of(c, arm):
    """Numbers of all runs of an arm, the discarded one too."""
    return [e["run"] for e in c.of("register") if e["arm"] == arm]


def tell(c, arm, **facts):
    """Other facts in the first event of all runs of an arm."""
    for run in runs_of(c, arm):
        c.events(run, "start")[0].update(facts)


def tell_all(c, **facts):
    for arm in ("new", "parent"):
        tell(c, arm, **facts)


def set_everywhere(c, arm, path, value):
    """A setting of an arm in manifest and logs, with the hashes that it gives."""
    plain = c.lines[0]["arms"][arm]["settings"]
    *sections, last = path.split(".")
    node = plain
    for name in sections:
        node = node[name]
    node[last] = value
    s = schema.from_plain(plain)
    hashes = {"ml_hash": schema.ml_hash(s), "system_hash": schema.system_hash(s)}
    c.lines[0]["arms"][arm] |= hashes
    tell(c, arm, settings=plain, **hashes)


# ----- what belongs to the track ----------------------------------------------------------------------------

RESOLVES = r"arm new: short/11 .* resolves to other settings here: validation\."


@refused(r"arm new has validation\.target 5\.5, arm parent 5\.2: it belongs to the track", RESOLVES)
def a_lower_bar_for_the_new_arm(c):
    set_everywhere(c, "new", "validation.target", 5.5)
    for run in runs_of(c, "new"):
        c.events(run, "end")[0] |= {"target": 5.5, "reached": True}
    c.seal()


@refused(r"target 5\.5, the settings of arm parent say 5\.2",
         RESOLVES + r"|arm new has validation\.target 5\.5, arm parent 5\.2")
def a_lower_bar_declared_and_run(c):
    c.lines[0]["target"] = 5.5
    a_lower_bar_for_the_new_arm(c)


@refused(r"arm new has validation\.tokens 4096, arm parent 8192: it belongs to the track",
         RESOLVES + "|val_digest")
def fewer_validation_tokens_for_the_new_arm(c):
    set_everywhere(c, "new", "validation.tokens", 4096)
    c.seal()


@refused(r"arm new has validation\.seq_len 32, arm parent 64: it belongs to the track", RESOLVES)
def another_context_for_the_new_arm(c):
    set_everywhere(c, "new", "validation.seq_len", 32)
    c.seal()


# ----- time off the clock -----------------------------------------------------------------------------------

def rest_longer(c, runs, ms):
    """Each validation takes so many milliseconds more of wall time."""
    for run in runs:
        events, passed = c.logs[c.name(run)], 0.0
        for event in events:
            passed += ms if event["kind"] == "validation" else 0.0
            event["wall_ms"] += passed
        c.later(c.lines.index(c.of("finish", run)[0]), passed / 1000 + 1)


@refused(r"time taken off the clock: 19\.\d s at each validation, training on as many tokens takes")
def validations_slower_than_training_in_both_arms(c):
    """Neither run nor arm stands out."""
    rest_longer(c, range(9), 19_500)
    c.seal()


@refused(r"start and warm-up take 1080\d s, more than the 7200 s that any reason may explain")
def three_hours_before_the_clock_with_a_reason(c):
    c.lines[0]["long_start"] = "kernels are tuned"
    for run in range(9):
        c.events(run, "reset")[0]["start_ms"] += 10_800_000
        c.stretch(run, "probe", 10_800_000)
    c.seal()


# ----- sources ----------------------------------------------------------------------------------------------

def rewrite_sources(c, edit, arms=("new", "parent")):
    """The archive of all runs of some arms, edited and hashed again."""
    path = next(c.folder.glob("runs/sources-*.txt"))
    text = edit(path.read_text())
    digest = runlog.source_hash(text)
    (path.parent / f"sources-{digest}.txt").write_text(text)
    for name in arms:
        tell(c, name, sources=digest)
    if len(arms) > 1:
        path.unlink()
    c.seal()


def without_file(text, name):
    start = text.index(f"# ----- {name}\n")
    return text[:start] + text[text.index("# ----- ", start + 1):]


@refused(r"sources-\w+\.txt: leaves out updates/muon\.py, which it runs through")
def an_update_rule_left_out_of_the_sources(c):
    rewrite_sources(c, lambda text: without_file(text, "updates/muon.py"))


@refused(r"sources-\w+\.txt: leaves out optim\.py, which it runs through")
def the_optimizer_left_out_of_the_sources(c):
    rewrite_sources(c, lambda text: without_file(text, "optim.py"))


@refused(r"sources-\w+\.txt: leaves out runlog\.py, or its list of sources")
def the_log_writer_left_out_of_the_sources(c):
    rewrite_sources(c, lambda text: without_file(text, "runlog.py"))


@refused(r"sources-\w+\.txt: adds sitecustomize\.py, which its runlog\.py does not list")
def a_file_added_to_the_sources(c):
    rewrite_sources(c, lambda text: text + "# ----- sitecustomize.py\nimport os\n\n")


@refused(r"sources-\w+\.txt: holds model\.py twice")
def a_second_model_in_the_sources(c):
    rewrite_sources(c, lambda text: text + "# ----- model.py\n\n")


@refused(r"the arms declare one tree, and their runs have different sources")
def the_parent_ran_another_program(c):
    rewrite_sources(c, lambda text: text.replace("def train_step(", "def train_step_(", 1), ["parent"])


@refused(r"code\.diff: the arms run two trees, and no difference is declared")
def two_trees_and_no_difference(c):
    c.lines[0]["arms"]["parent"]["tree"] = "3" * 40
    c.seal()


@refused(r"code\.diff: is not the difference of the trees \w+ and \w+, which this repository has")
def a_difference_of_other_trees(c):
    if not program.is_checkout():
        pytest.skip("no git checkout")
    for name, folder in (("new", "data"), ("parent", "layers")):
        c.lines[0]["arms"][name]["tree"] = program.line("rev-parse", f"HEAD:{folder}")
    (c.folder / "code.diff").write_text("diff --git a/x b/x\n")
    c.lines[0]["code_diff"] = program.hash_of("diff --git a/x b/x\n")
    c.seal()


# ----- facts that move time or loss -------------------------------------------------------------------------

def tell_facts(name, reason, runs, also="$^", kind="start", declared=(), **facts):
    """Register a mutation: other facts in an event of some runs.

    runs: a run's number, an arm, or "all". declared: (field, {...}) that the manifest's first line then adds.
    """
    def bend(c):
        for run in [runs] if isinstance(runs, int) else [
            run for arm in ("new", "parent") if runs in (arm, "all") for run in runs_of(c, arm)
        ]:
            c.events(run, kind)[0].update(facts)
        for field, more in declared:
            c.lines[0][field] |= more
        c.seal()

    bend.__name__ = name
    refused(reason, also)(bend)


OTHERS = " differs from that of the other runs"
PYTHON_DECLARED = r"python '3\.12\.1', declared '3\.11\.7'"
EIGHT_THREADS = "CPU, 1 process, 8 threads"
SLOW = "nothing is compiled: system.compile is off"
tell_facts("one_run_with_another_python", r"python 3\.12\.1" + OTHERS, 3, PYTHON_DECLARED, python="3.12.1")
tell_facts("the_parent_with_another_python", rf"python 3\.12\.1{OTHERS}|python 3\.11\.7 differs", "parent",
           r"declared '3\.11\.7'", python="3.12.1")
tell_facts("all_runs_with_another_python_than_declared", PYTHON_DECLARED, "all", python="3.12.1")
tell_facts("all_runs_with_another_torch_than_declared",
           r"torch '2\.14\.0', declared '2\.13\.0\+cpu'", "all",
           declared=[("machine", {"torch": "2.13.0+cpu"})], torch="2.14.0")
tell_facts("the_parent_with_another_torch", r"torch 2\.\d+\.\S+" + OTHERS, "parent", torch="2.9.0")
tell_facts("the_parent_on_another_platform", r"platform \w+" + OTHERS, "parent", "declared 'test'",
           platform="slow")
tell_facts("one_run_with_more_threads", "device " + EIGHT_THREADS + OTHERS, 3, device=EIGHT_THREADS)
tell_facts("the_new_arm_with_more_threads", r"device CPU, 1 process, \d threads" + OTHERS, "new",
           device=EIGHT_THREADS)
tell_facts("the_parent_in_another_environment", r"environment \{.*\}" + OTHERS, "parent",
           environment={"OMP_WAIT_POLICY": "passive"})
tell_facts("all_runs_in_another_environment_than_declared",
           r"environment: OMP_NUM_THREADS is '8', declared '1'", "all",
           declared=[("environment", {"OMP_NUM_THREADS": "1"})], environment={"OMP_NUM_THREADS": "8"})
tell_facts("a_kernel_passed_over_in_one_run", r"fallbacks \(arm \w+\) \['banded.*\]" + OTHERS, 3,
           "runs slower than it could be", fallbacks=["banded attention: no kernel"])
tell_facts("a_parent_that_fell_back",
           "arm parent runs slower than it could be, and arm new does not: nothing is compiled", "parent",
           fallbacks=[SLOW])
tell_facts("one_run_that_compiled_inside_the_clock", "graphs compiled while the clock ran 2" + OTHERS, 3,
           kind="end", graphs_in_clock=2)
tell_facts("a_parent_that_compiled_inside_the_clock", r"graphs compiled while the clock ran \d" + OTHERS,
           "parent", kind="end", graphs_in_clock=12)
tell_facts("the_parent_on_another_machine", r"machine \w+" + OTHERS, "parent",
           "machine 'ffffffffffff', declared", machine="ffffffffffff")


# ----- what logs suffice to see -----------------------------------------------------------------------------

@refused(r"stream digest dddddddddddd, the settings read \w+ from the corpus 'sample': other tokens")
def other_tokens_in_all_runs(c):
    for run in range(9):
        c.events(run, "stream")[0]["digest"] = "d" * 64
    c.seal()


@refused(r"parameters 9999, the model of its settings has \d+")
def another_number_of_parameters_in_all_runs(c):
    tell_all(c, parameters=9999)
    c.seal()


@refused(r"active_parameters 9999, the model of its settings has \d+")
def another_number_of_active_parameters(c):
    tell_all(c, active_parameters=9999)
    c.seal()


@refused(r"flops_per_token 9999, the model of its settings has \d+")
def another_number_of_flops(c):
    tell_all(c, flops_per_token=9999)
    c.seal()


@refused(r"probe of 'blocks\.99\.mlp\.c_fc', which is no parameter of its settings' model")
def a_probe_of_a_parameter_that_does_not_exist(c):
    for run in range(9):
        c.events(run, "probe")[0]["gradients"]["blocks.99.mlp.c_fc"] = [0.1, 0.05]
    c.seal()


@refused(r"probe without the parameter \S+ of its settings' model")
def a_probe_of_one_parameter_alone(c):
    for run in range(9):
        gradients = c.events(run, "probe")[0]["gradients"]
        c.events(run, "probe")[0]["gradients"] = {"lm_head.weight": gradients["lm_head.weight"]}
    c.seal()


def follow(c, run, other, change):
    """The losses of a run become a function of those of another; change(loss, share of the steps done)."""
    steps = 72
    for mine, theirs in zip(c.events(run, "validation"), c.events(other, "validation")):
        if mine["step"]:
            mine["val_loss"] = change(theirs["val_loss"], mine["step"] / steps)
        begun = mine["step"] - len(mine["train_loss"])
        mine["train_loss"] = [
            round(change(x, (begun + i) / steps), 6) for i, x in enumerate(theirs["train_loss"])
        ]
    last, end = c.events(run, "validation")[-1]["val_loss"], c.events(run, "end")[0]
    target = end["target"]
    end |= {"val_loss": last, "reached": last <= target, "verdict": [f"final validation loss {last:.4f}"]}


COPY = r"seed \d follows the curve of seed \d in runs/\S+ within \S+ nats, two seeds never do: a copy"


@refused(COPY)
def a_seed_with_a_little_noise_on_another_s_curve(c):
    draw = random.Random(5)
    follow(c, c.counted()[1], c.counted()[0], lambda x, at: x + 2e-4 * draw.gauss(0, 1))
    c.seal()


@refused(COPY)
def a_seed_that_is_another_s_curve_shifted(c):
    follow(c, c.counted()[1], c.counted()[0], lambda x, at: x - 0.002)
    c.seal()


@refused(COPY)
def a_seed_that_is_another_s_curve_scaled(c):
    follow(c, c.counted()[1], c.counted()[0], lambda x, at: 0.9995 * x)
    c.seal()


SHIFTED = r"follows the curve of runs/\S+ within \S+ nats, \S+ apart: a shifted copy of a run of arm parent"


@refused(SHIFTED)
def a_run_of_the_parent_shifted_down(c):
    follow(c, c.counted()[0], c.counted("parent")[0], lambda x, at: x - 0.13)
    c.seal()


@refused(SHIFTED)
def a_run_of_the_parent_that_drifts_down(c):
    follow(c, c.counted()[0], c.counted("parent")[0], lambda x, at: x - 0.13 * at * at)
    c.seal()


@refused(SHIFTED)
def a_run_of_the_parent_shrunk(c):
    follow(c, c.counted()[0], c.counted("parent")[0], lambda x, at: 0.975 * x)
    c.seal()


@refused(r"validation of step 0: loss 6\.900000, a head that starts at zero gives ln\(1280\) = 7\.154615")
def a_loss_before_training_that_no_zero_head_has(c):
    for run in range(9):
        c.events(run, "validation")[0]["val_loss"] = 6.90000003
    c.seal()


@refused(r"validation of step 72 jumps: its loss lies 0\.1\d+ nats below where the two drops before it lead")
def a_last_validation_that_jumps(c):
    for run in c.counted():
        last, end = c.events(run, "validation")[-1], c.events(run, "end")[0]
        last["val_loss"] -= 0.1
        end |= {"val_loss": last["val_loss"], "reached": True,
                "verdict": [f"final validation loss {last['val_loss']:.4f}"]}
    c.seal()


@refused(r"manifest\.jsonl: line 1 \(declare\) is dated \S+, in the future", "ledger.* in the future")
def a_claim_of_the_future(c):
    c.later(0, 20 * 365 * 86_400)
    for event in c.book:
        event["utc"] = c.lines[0]["utc"]
    c.seal()


@refused(r"line 1 \(declare\) is dated \S+, before the parent short/10 of 2024-\d\d-\d\d")
def a_claim_older_than_its_parent(c):
    c.later(0, -10 * 365 * 86_400)
    for event in c.book:
        event["utc"] = c.lines[0]["utc"]
    c.seal()


@refused(r"run\.jsonl: cpu is empty", "cpu ''?, declared 'test processor'")
def a_processor_without_a_name(c):
    tell_all(c, cpu=" ")
    c.lines[0]["machine"]["cpu"] = " "
    c.seal()


@refused(r"run\.jsonl: machine is empty")
def a_machine_without_a_name(c):
    tell_all(c, machine="")
    c.lines[0]["machine"]["machine"] = ""
    c.seal()


# ----- the ledger of attempts -------------------------------------------------------------------------------

@refused(r"ledger\.jsonl: missing: the manifest names leg 1")
def the_ledger_left_out(c):
    (c.folder / ledger.NAME).unlink()


@refused(r"ledger\.jsonl: the manifest names no leg of it")
def a_manifest_that_forgets_its_ledger(c):
    del c.lines[0]["ledger"]
    c.seal()


@refused(r"ledger\.jsonl: line 1 \(open\) breaks the hash chain")
def a_rule_edited_afterwards(c):
    path = c.folder / ledger.NAME
    path.write_text(path.read_text().replace('"legs": 1', '"legs": 3', 1))


@refused(r"no leg of it has the hash that the manifest names")
def a_ledger_written_anew(c):
    mark = c.lines[0]["ledger"]["hash"]
    c.book[0]["idea"] = "another"
    c.seal()
    c.lines[0]["ledger"]["hash"] = mark
    c.book = []
    c.seal()


@refused(r"leg 1 was booked with another machine than the manifest declares")
def a_leg_of_another_machine(c):
    c.book[1]["machine"]["machine"] = "ffffffffffff"
    c.seal(agree=False)


@refused(r"leg 1 was booked with another plan than the manifest declares")
def a_leg_with_another_plan(c):
    c.book[1]["plan"] = {"runs": 40}
    c.seal(agree=False)


@refused(r"leg 1 was booked with another order_seed than the manifest declares")
def a_leg_with_another_order(c):
    c.book[1]["order_seed"] = 8
    c.seal(agree=False)


@refused(r"the decision rule is about target 4\.0, the manifest declares 5\.2")
def a_rule_about_another_target(c):
    c.book[0]["rule"]["target"] = 4.0
    c.seal(agree=False)


@refused(r"leg 1 uses alpha 0\.01, its share of the rule's 0\.01 over 3 legs is 0\.00333")
def a_leg_that_uses_all_of_alpha(c):
    c.book[0]["rule"]["legs"] = 3
    c.seal(agree=False)


@refused(r"the decision rule uses alpha 0\.03: a record needs 0\.01 or less for all its legs")
def three_legs_at_the_whole_alpha_each(c):
    c.book[0]["rule"]["legs"] = 3
    c.seal()


def later_by(c, n, seconds):
    c.book[n]["utc"] = re.sub(
        r"T\d\d", lambda m: f"T{int(m.group()[1:]) + seconds // 3600:02d}", c.book[n]["utc"]
    )


@refused(r"line 2 is dated '\S+', before the line above")
def a_rule_written_after_the_leg(c):
    later_by(c, 0, 3600)
    c.seal()


@refused(r"leg 1 was booked at \S+, after its manifest was declared")
def a_leg_booked_after_the_fact(c):
    later_by(c, 0, 3600)
    later_by(c, 1, 3600)
    c.seal()


def fate(c, leg, verdict="not shown", **more):
    return {
        "kind": "fate", "utc": c.book[-1]["utc"], "leg": leg, "verdict": verdict, "runs": 9, "excluded": 0,
        "manifest": "a" * 64, "why": "", **more
    }


@refused(r"the fate of leg 1 is of a manifest that ends with aaaaaaaaaaaa")
def a_fate_of_another_manifest(c):
    c.book.append(fate(c, 1))
    c.seal()


@refused(r"line 4 \(fate\): leg 1 has its fate already: it can only be withdrawn")
def a_fate_that_is_told_twice(c):
    c.book += [fate(c, 1), fate(c, 1, "shown")]
    c.seal()


def second_leg(c, **fields):
    """The claim becomes leg 2 of its idea; its first leg is one more line."""
    c.book[0]["rule"]["legs"] = 2
    first = dict(c.book[1])
    c.book.append({**first, "leg": 2, "name": "second", **fields})
    c.lines[0]["ledger"]["leg"] = c.book[-1]["leg"]
    c.lines[0]["alpha"] = 0.005
    c.lines[0]["confidence"] = 0.95


@refused(r"line 3 \(leg\): nothing says what became of leg 1")
def a_second_leg_while_the_first_is_open(c):
    second_leg(c)
    c.seal()


@refused(r"line 4 \(leg\): a leg before it was shown: that decides")
def a_second_leg_after_a_shown_one(c):
    second_leg(c)
    c.book.insert(2, fate(c, 1, "shown"))
    c.seal()


@refused(r"line 4 \(leg\): legs are numbered in order: expected 2")
def a_leg_that_is_not_told(c):
    second_leg(c, leg=3)
    c.book.insert(2, fate(c, 1))
    c.seal()


@refused(r"line 4 \(leg\): the rule, written before leg 1, allows 1 legs")
def one_leg_more_than_the_rule(c):
    second_leg(c)
    c.book[0]["rule"]["legs"] = 1
    c.book.insert(2, fate(c, 1))
    c.seal()


@refused(r"line 2 \(fate\): leg 1 is not the last one")
def a_ledger_that_begins_with_a_fate(c):
    c.book.insert(1, fate(c, 1))
    c.seal()


@refused(r"line 1 \(leg\): a ledger begins with its one decision rule")
def a_ledger_without_a_rule(c):
    del c.book[0]
    c.seal(agree=False)


@refused(r"against: no list of attempts under a known record")
def a_stack_of_nothing(c):
    c.lines[0]["against"] = []
    c.seal()


@refused(r"against: attempts/other builds on short/9, short/11 on short/10: a stack has one parent")
def a_stack_on_another_record(c):
    c.lines[0]["against"] = [
        {"attempt": "attempts/other", "parent": "short/9", "delta": {"optim.muon.momentum": 0.5}}
    ]
    c.seal()


@refused(r"against: attempts/other and short/11 both set optim\.muon\.lr: their order would decide")
def a_stack_that_sets_what_the_record_sets(c):
    c.lines[0]["against"] = [
        {"attempt": "attempts/other", "parent": "short/10", "delta": {"optim.muon.lr": 0.5}}
    ]
    c.seal()


@refused(r"against: arm \w+ runs without --set optim\.muon\.momentum=0\.9 of the stack")
def a_stack_that_the_arms_do_not_run_on(c):
    c.lines[0]["against"] = [{"attempt": "attempts/other", "parent": "short/10",
                              "delta": {"optim.muon.momentum": 0.9}}]
    c.seal()


# ----- bent, and rightly so ---------------------------------------------------------------------------------

def test_a_second_leg_that_keeps_the_rule_is_shown_with_the_first_one_next_to_it(claim):
    second_leg(claim)
    claim.book.insert(2, fate(claim, 1, why="target 5.2: mean 5.21"))
    claim.seal()
    results = verify.verify(claim.folder)
    assert results["verdict"] == "shown", results
    legs = results["attempts"]["legs"]
    assert [(x["leg"], x["fate"]) for x in legs] == [(1, "not shown"), (2, "open")]
    text = "\n".join(ledger.lines(results["attempts"]))
    assert "leg 1 of 2: good, machine 0123456789ab, 4 runs an arm, 9 runs made: not shown (target 5.2" in text
    assert "leg 2 of 2 (this one): second" in text


@pytest.mark.parametrize("before, after, reason", [
    ('title = "t"', 'title = " "', "record.toml: title is empty"),
    ('["@x"]', '["@x", "@"]', "people holds an empty name"),
    ("2026-01-01", "2046-01-01", "date 2046-01-01 lies in the future"),
    ("2026-01-01", "2016-01-01", "date 2016-01-01 is before that of its parent short/5"),
])
def test_a_record_names_itself_its_people_and_its_day(before, after, reason, tmp_path):
    s = deltas.resolve("short/5", scale="micro", sets=["system.ranks_per_microbatch=1"]).settings
    arms = {"new": arm("short/901", [], s=s), "parent": arm("short/5", [])}
    (tmp_path / "c").mkdir()
    (tmp_path / "c/record.toml").write_text(RECORD.replace(before, after))
    results = built(tmp_path / "c", arms, claim="systems", record="short/901", target=None)
    assert [reason in p for p in results["problems"]] == [True], results["problems"]


def test_what_rests_take_more_than_the_parent_s_is_charged(tmp_path):
    """A gain of 1.4 s a run, taken back by 0.8 s at each of nine validations: less than any law of one log
    sees."""
    built(tmp_path / "c", step_ms={"new": 2380.0, "parent": 2400.0})
    claim = Forgery(tmp_path / "c")
    assert verify.verify(claim.folder)["verdict"] == "shown"
    rest_longer(claim, runs_of(claim, "new"), 800)
    claim.seal()
    results = verify.verify(claim.folder)
    assert results["problems"] == [] and results["verdict"] == "not shown"
    assert results["reasons"][0].startswith("time with the excess of its rests: 1.03")
    assert 7 < results["statistics"]["off_clock"]["excess_s"] < 8
