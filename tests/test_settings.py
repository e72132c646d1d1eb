"""Laws of the settings: deltas, chain, --with, --without, --revert, --set, scales, hashes, commands."""

import dataclasses
import functools
import json
import math
import re
import subprocess
import sys
import types
import typing
from pathlib import Path

import pytest

import schedule
from settings import Settings, deltas, model as model_settings, scales, schema
from settings.data import tokens_per_step
from settings.declare import AS_IS, BEFORE, PRECISION, PRODUCTS, REFUSE, lookup, opt, walk
from settings.scales import SCALES
from system.dry_run import print_plan
from common.errors import UserError
from records.__main__ import main

ROOT = Path(__file__).parent.parent
RECORDS = deltas.load_records()


def make_chain(*tables):
    """Records of an invented lineage, each a dict of delta lines."""
    return [
        deltas.Record(
            f"test/{i}", "", f"test/{i - 1}" if i > 1 else None, "", [], "ml", "log", "spec", "", i, table,
            {}, "", "", Path("test")
        )
        for i, table in enumerate(tables, 1)
    ]


def test_the_defaults_are_record_1():
    assert deltas.resolve("short/1").settings == Settings() and not RECORDS["short/1"].delta


@pytest.mark.parametrize("ref", list(RECORDS))
@pytest.mark.parametrize("scale", list(SCALES))
def test_every_record_resolves_at_every_scale(ref, scale):
    s = deltas.resolve(ref, scale=scale).settings
    assert schema.from_plain(schema.plain(s)) == s
    assert len(schedule.plan(s)) == s.schedule.steps


@pytest.mark.parametrize("ref", [ref for ref, record in RECORDS.items() if record.parent])
def test_every_delta_line_changes_its_parent(ref):
    """A line that repeats its parent's value would be noise."""
    record = RECORDS[ref]
    parent = deltas.resolve(record.parent).settings if record.parent else Settings()
    for path, value in record.delta.items():
        assert deltas.lookup(deltas.resolve(ref).settings, path) != lookup(parent, path), path


def test_names_of_records():
    assert {deltas.find_record(f"short/{name}").ref for name in ("9", "009", "shortcuts_tweaks")} == {
        "short/9"
    }
    assert deltas.find_record("short/head").ref == [ref for ref in RECORDS if ref.startswith("short/")][-1]
    with pytest.raises(UserError, match="did you mean short/muon"):
        deltas.find_record("short/muonn")


def test_without_restores_the_value_before_the_record_that_set_it():
    r = deltas.resolve("short/11", without=["optim.muon.scale"])
    assert r.settings.optim.muon.scale == "sqrt_max"
    assert r.report == ('without optim.muon.scale: "sqrt_ratio" -> "sqrt_max" (value before short/8, which '
                        'also set model.head.untied, '
                        'model.embed.norm, optim.embed.lr, optim.lm_head.lr, optim.muon.lr)',)


@pytest.mark.parametrize("path, why", [
    ("optim.matrix.lr", "no effect while optim.muon is there"), ("model.attn.window.end", "no effect while"),
    ("model.head.softcap.form", "no sensible off")])
def test_without_refuses_what_would_change_nothing_or_half_of_a_pair(path, why):
    with pytest.raises(UserError, match=why):
        deltas.resolve("short/33", without=[path])


def test_switching_the_skips_sigmoid_off_gives_record_31_s_skips():
    off = deltas.resolve("short/33", without=["model.residual.unet_skips.sigmoid"]).settings.model.residual
    assert off == deltas.resolve("short/31").settings.model.residual


@pytest.mark.parametrize(
    "change, why",
    [
        ("optim.muon.momentum_warmup.steps=0", "at least 1"), ("optim.adam.beta1=1.0", "0 <= x < 1"),
        ("model.head.softcap.scale=0", "greater than 0"),
        ("model.attn.window.stages=[7,3,7]", "none smaller than the one before"),
        ("model.attn.window.final=9", "at least the last stage"),
        ("model.attn.window.final_last_layer=0", "at least one block"),
        ("model.attn.window.long_layers=[0,4]", "long window in layer 11"),
        ("model.pad_vocab_to=1", "multiples of 16"),
        ("model.attn.rope.yarn.beta=1.0", "greater than model.attn.rope.yarn.alpha"),
        ("system.warmup_steps=-5", "at least -1")
    ],
)
def test_values_outside_their_bounds_are_refused(change, why):
    with pytest.raises(UserError, match=why):
        deltas.resolve("short/33", sets=[change])


def test_an_unknown_line_in_a_record_is_named(tmp_path):
    text = (deltas.RECORDS / "short/021r_rule_tweak/record.toml").read_text()
    path = tmp_path / "x" / "record.toml"
    path.parent.mkdir()
    path.write_text(text.replace("[delta]", "[deltas]"))
    with pytest.raises(UserError, match="unknown line 'deltas' .did you mean delta"):
        deltas.read_record(path, "short")


REASONS = ("has no sensible off; ", "it came with ", "it is already ", "has no effect while ")
# of each setting whose removal leaves a contradiction at record 57: what depends on it
DEPENDANTS = {
    "model.residual.unet_skips.pairs": "model.residual.unet_skips needs an even model.num_layers, got 11",
    "schedule.stages": "model.head.mtp.start has 3 lists and schedule.stages has 1"
}


def on_at_57():
    """Every setting that is on in record 57, and that record 33 does not have so."""
    late, early = (deltas.resolve(ref).settings for ref in ("short/57", "short/33"))

    def before(path):
        try:
            return lookup(early, path)
        except AttributeError:  # a section of another kind
            return None

    return [path for path, _, value in walk(late) if value not in (None, False, before(path))]


def test_without_any_setting_of_record_57_the_rest_holds_or_the_refusal_names_its_reason_and_remedy():
    done, refused, base = 0, 0, deltas.resolve("short/57").settings
    for path in on_at_57():
        try:
            s = deltas.resolve("short/57", without=[path]).settings
        except UserError as error:
            refused += 1
            own = str(error).startswith(f"--without {path}: ") and any(r in str(error) for r in REASONS)
            assert own or DEPENDANTS[path] in str(error), (path, error)
        else:
            done += 1
            assert s != base, path
    assert done > 90 and refused > 40


@pytest.mark.feature("optim.gate.adamw", "optim.smear_gate.adamw", "optim.ve_gate.adamw",
                     "optim.skip_gate.adamw", "numerics.matrix_mantissa")
def test_without_adamw_a_gate_is_muon_s_again_and_without_muon_nothing_of_it_is_left():
    rates = {"gate": "0.008", "smear_gate": "8e-05", "ve_gate": "0.008", "skip_gate": "0.0004"}
    for name, rate in rates.items():
        r = deltas.resolve("short/57", without=[f"optim.{name}.adamw"])
        group = r.settings.optim.group("matrix", name)
        assert (group.rule, group.lr, group.every, group.beta1) == ("muon", 0.023, 1, 0.65)
        assert f"without optim.{name}.lr: {rate} came with optim.{name}.adamw" in r.report
        later = deltas.resolve("short/57", without=[f"optim.{name}.adamw"], sets=[f"optim.{name}.lr=0.01"])
        assert later.settings.optim.group("matrix", name).lr == 0.01
    r = deltas.resolve("short/57", without=["optim.muon"])
    assert "without numerics.matrix_mantissa: it needs numerics.matrix=bfloat16 and optim.muon" in r.report
    assert r.settings.optim.group("matrix", "gate").lr == 0.008  # AdamW's as before


def test_without_takes_along_what_needs_it():
    r = deltas.resolve("short/11", without=["data.loader"])
    assert not r.settings.data.first_batch_twice
    assert "without data.first_batch_twice: it needs data.loader=per_rank" in r.report


def test_with_brings_a_feature_back_as_it_was():
    a = deltas.resolve("short/8", with_=["model.residual.unet_skips@short/11"]).settings
    assert a.model.residual.unet_skips == deltas.resolve("short/11").settings.model.residual.unet_skips
    assert (
        deltas.resolve("short/8", with_=["model.head.softcap={cap=15}"]).settings.model.head.softcap.cap
        == 15.0
    )


def test_without_then_set_below_is_an_error_that_names_the_feature():
    with pytest.raises(UserError, match="model.head.softcap is off"):
        deltas.resolve("short/11", without=["model.head.softcap"], sets=["model.head.softcap.cap=15"])


def test_revert_keeps_later_values_and_drops_lines_below_what_is_gone():
    links = make_chain(
        {}, {"optim.muon": {"lr": 0.1}, "schedule.steps": 50, "optim.embed.lr": 0.5, "model.bias": False},
        {"optim.muon.momentum": 0.9, "optim.embed.lr": 0.7}
    )
    s, report = deltas.replay(links, {"test/2"})
    assert s.optim.muon is None and s.optim.embed.lr == 0.7 and s.model.bias
    assert s.schedule.steps == 50  # step counts stay
    assert [line.split()[:2] for line in report] == [
        ["dropped", "optim.muon.momentum"], ["kept", "optim.embed.lr"], ["reverted", "optim.muon:"],
        ["reverted", "model.bias:"]
    ]


def test_revert_refuses_a_change_of_the_number_of_layers():
    with pytest.raises(UserError, match="number of layers"):
        deltas.replay(make_chain({}, {"model.num_layers": 11}), {"test/2"})


def test_reverting_record_9_from_record_11():
    r = deltas.resolve("short/11", revert=["short/9"])
    assert r.settings.model.attn.value_residual is None and r.settings.optim.scalar.lr == 0.04
    assert any(line.startswith("kept     optim.scalar.lr") for line in r.report)
    assert "dropped  (nothing)" in r.report


def test_a_revert_that_takes_nothing_back_says_so():
    assert "reverted (nothing): the delta of short/7 is empty" in deltas.resolve(
        "short/11", revert=["short/7"]).report
    assert not any("(nothing):" in line for line in deltas.resolve("short/11", revert=["short/9"]).report)


def test_a_path_without_quotes_in_a_delta_is_refused_and_resets_nothing(tmp_path):
    """TOML reads model.num_layers = 3 as a table of tables, whose other fields would be record 1's."""
    for text in ('model.num_layers = 3', '[delta.model]\nnum_layers = 3', 'model = {num_layers = 3}'):
        path = tmp_path / "x" / "record.toml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'parent = "short/11"\n[delta]\n{text}\n')
        with pytest.raises(UserError, match=r'x/record.toml: .* in quotes, like "model.num_layers" = 3'):
            deltas.read_record(path, "attempts")


@pytest.mark.parametrize("change, message", [
    (dict(sets=["model.smaer=true"]), "unknown setting 'model.smaer'"),
    (dict(sets=["optim.muon={lrr=1}"]), "has no field 'lrr' \\(did you mean lr"),
    (dict(sets=["schedule.steps=1.5"]), "expected a whole number"),
    (dict(sets=["schedule.steps=0"]), "must be at least 1"),
    (dict(sets=["model.bias=1"]), "expected true or false"),
    (dict(sets=["optim.embed.lr=nan"]), "expected a number"),
    (dict(sets=["schedule.steps"]), "expected path=value"),
    (dict(without=["model.attn"]), "no sensible off; `python -m records features model.attn.` shows"),
    (dict(sets=["optim.scalar=3"]), "expected a table like {field = value}, or true"),
    (dict(with_=["model.residual.unet_skips"]), "already on in short/11: leave this out, or give"),
    (dict(with_=["model.embed.norm"]), "already on in short/11: leave this out$"),
    (dict(without=["optim.adam.beta2"]), "no record of the chain has set it"),
    (dict(without=["optim.muon.momentum_warmup.start"]), "it came with optim.muon.momentum_warmup"),
    (dict(with_=["optim.muon.lr"]), "a value, not a switch"),
    (dict(scale="tinny"), "did you mean tiny"),
    (dict(without=["schedule.lr"], sets=["schedule.cooldown_steps=10"]), "needs schedule.lr=trapezoid"),
])
def test_bad_changes_name_culprit_and_remedy(change, message):
    with pytest.raises(UserError, match=message):
        deltas.resolve("short/11", **change)


def test_an_empty_delta_must_be_explained(tmp_path):
    (tmp_path / "1_x").mkdir()
    (tmp_path / "1_x/record.toml").write_text(
        'id = "1"\ntitle = "t"\ndate = 2025-01-01\npeople = []\nkind = "ml"\nsource = "log"\n'
    )
    with pytest.raises(UserError, match="subsumed"):
        deltas.read_record(tmp_path / "1_x/record.toml", "short")


# ----- identity

@pytest.mark.feature("validation.target")
def test_system_settings_and_target_do_not_touch_the_ml_hash_and_precision_does():
    base = deltas.resolve("short/11").settings
    for path in ("system.compile=off", "system.comm=replicated", "validation.target=3.0"):
        assert schema.ml_hash(deltas.resolve("short/11", sets=[path]).settings) == schema.ml_hash(base)
    assert schema.system_hash(
        deltas.resolve("short/11", sets=["system.compile=off"]).settings
    ) != schema.system_hash(base)
    assert schema.ml_hash(
        deltas.resolve("short/11", sets=["system.precision=float32"]).settings
    ) != schema.ml_hash(base)


def test_hashes_tell_records_apart_and_equal_settings_share_one():
    def computes(record):  # more than another way to run its parent
        return record.parent is None or any(not path.startswith("system.") for path in record.delta)

    hashes = {ref: schema.ml_hash(deltas.resolve(ref).settings) for ref in RECORDS}
    distinct = [hashes[ref] for ref, record in RECORDS.items() if computes(record)]
    assert len(set(distinct)) == len(distinct)
    assert all(
        hashes[ref] == hashes[record.parent] for ref, record in RECORDS.items() if not computes(record)
    )
    a = deltas.resolve("short/11", without=["model.head.softcap"]).settings
    assert schema.ml_hash(a) == schema.ml_hash(
        deltas.resolve("short/11", sets=["model.head.softcap=false"]).settings
    )


def test_a_feature_that_is_on_with_defaults_differs_from_off():
    on = deltas.resolve("short/1", with_=["model.attn.qk_norm"]).settings
    assert schema.ml_hash(on) != schema.ml_hash(Settings())


def test_presets_are_frozen():
    for name in deltas.preset_names():
        assert deltas.resolve_name(name).preset == name
        assert deltas.resolve_name(name, sets=["schedule.steps=3"]).preset == ""


# ----- scales

@pytest.mark.parametrize("ref", list(RECORDS))
def test_scales_give_every_record_the_same_token_budget(ref):
    for name, scale in SCALES.items():
        s = deltas.resolve(ref, scale=name).settings
        if scale.budget_tokens:
            assert abs(s.schedule.steps * tokens_per_step(s) - scale.budget_tokens) <= tokens_per_step(s)


def test_scaling_keeps_ratios_of_steps_and_counts_of_layers_and_heads():
    """Of the optimizer it changes steps and three learning rates, by the width or the batch."""
    full, tiny = deltas.resolve("short/11").settings, deltas.resolve("short/11", scale="tiny").settings
    assert (
        abs(
            tiny.schedule.cooldown_steps / tiny.schedule.steps
            - full.schedule.cooldown_steps / full.schedule.steps
        )
        < 0.01
    )
    assert (
        tiny.model.num_layers == full.model.num_layers
        and tiny.model.attn.num_heads == full.model.attn.num_heads
    )
    width = full.model.model_dim / tiny.model.model_dim
    batch = full.data.tokens_per_rank / tiny.data.tokens_per_rank
    rates = {"lm_head": width ** 0.5, "matrix": width ** 0.5, "scalar": 1 / math.sqrt(batch)}
    groups = {name: getattr(full.optim, name) for name in rates}
    rated = {name: dataclasses.replace(group, lr=group.lr * rates[name]) for name, group in groups.items()}
    assert tiny.optim == dataclasses.replace(full.optim, **rated, muon=dataclasses.replace(
        full.optim.muon, momentum_warmup=tiny.optim.muon.momentum_warmup))
    assert (
        deltas.resolve(
            "short/11", scale="tiny", sets=["schedule.cooldown_steps=7"]
        ).settings.schedule.cooldown_steps
        == 7
    )


def test_what_a_scale_lifts_is_said_in_one_line():
    lines = deltas.resolve("short/33", scale="tiny").report
    assert lines == (
        "numerics lifted to float32: matmul, eval_matmul, residual, head, gate, table, rope, rope_math, "
        "newton_schulz, newton_schulz_norm, adam_state; without fp8_head",
    )
    for scale in ("full", "small"):
        assert deltas.resolve("short/33", scale=scale).report == ()


def test_a_whole_part_that_is_set_says_what_it_loses():
    assert deltas.resolve("short/11", sets=["optim.muon={lr=0.1}"]).report == (
        '--set optim.muon replaces the whole part, which loses momentum_warmup, scale="sqrt_ratio", '
        "split_qkv=true: to keep them, set one value at a time, like optim.muon.lr=...",
    )
    assert deltas.resolve("short/11", sets=["optim.muon.lr=0.1"]).report == ()


@pytest.mark.parametrize(
    "ref, change, lifted_to",
    [
        ("variants/4", "numerics.fp8_experts=true", False), ("short/33", "numerics.fp8_mlp=true", None),
        ("short/33", "numerics.fp8_head.x=3.0", None), ("short/11", "numerics.residual=bfloat16", "float32"),
        ("short/11", "numerics.loss=float64", "float32"),
        ("short/33", "numerics.adam_state=bfloat16", "parameter")
    ],
)
@pytest.mark.parametrize("scale", ["tiny", "micro"])
def test_set_is_literal_where_a_scale_lifts(scale, ref, change, lifted_to):
    """Also where the record has that value itself; and the run gets an identity of its own."""
    path, value = schema.parse_assignment(change, "--set")
    r, plain = deltas.resolve(ref, scale=scale, sets=[change]), deltas.resolve(ref, scale=scale)
    name = path.split(".")[1]
    assert lookup(plain.settings, f"numerics.{name}") == lifted_to
    found = lookup(r.settings, path)
    assert found == value or dataclasses.is_dataclass(found) and value is True
    assert schema.ml_hash(r.settings) != schema.ml_hash(plain.settings)
    assert name not in r.report[-1].replace(":", ",").replace(";", ",").replace(" ", ",").split(",")
    others = dataclasses.replace(r.settings.numerics, **{name: lookup(plain.settings, f"numerics.{name}")})
    assert others == plain.settings.numerics


def test_set_is_literal_for_the_whole_plan_and_under_a_precision_that_was_set():
    r = deltas.resolve("short/11", scale="tiny", sets=['numerics={residual = "bfloat16"}'])
    assert r.settings.numerics.residual == "bfloat16" and not any("lifted" in line for line in r.report)
    s = deltas.resolve("short/11", sets=["numerics.residual=bfloat16", "system.precision=float64"]).settings
    assert (s.numerics.residual, s.numerics.matmul) == ("bfloat16", "float64")


@pytest.mark.parametrize(
    "ref, flag, change",
    [
        ("short/33", "without", "numerics.fp8_head"), ("short/33", "with_", "numerics.fp8_mlp"),
        ("short/11", "with_", "validation.target=3.5"), ("short/11", "with_", "validation.every=7"),
        ("short/11", "without", "numerics.residual"), ("short/1", "without", "data.wrap"),
        ("variants/4", "with_", "numerics.fp8_experts")
    ],
)
def test_a_change_that_a_scale_overrules_is_named(ref, flag, change):
    r = deltas.resolve(ref, scale="micro", **{flag: [change]})
    assert r.settings == deltas.resolve(ref, scale="micro").settings
    name = "--" + flag.rstrip("_")
    assert r.report[-1] == (
        f"{name} {change} changes nothing at scale micro, which decides that itself: only --set overrules it"
    )
    assert not any("changes nothing" in line for line in deltas.resolve(ref, **{flag: [change]}).report)


def test_changes_that_do_something_at_a_scale_are_not_named():
    for ref, changes in (
        ("short/11", dict(without=["model.head.softcap"])),
        ("short/11", dict(revert=["short/9"])),
        ("short/33", dict(with_=["numerics.fp8_mlp"], sets=["system.precision=record"])),
        ("short/8", dict(with_=["model.mlp.moe@variants/4", "optim.router@variants/4"])),
        # a revert that changes nothing anywhere says that of itself
        ("short/11", dict(revert=["short/7"])),
    ):
        assert not any(
            "changes nothing" in line for line in deltas.resolve(ref, scale="micro", **changes).report
        )


def test_every_field_is_described():
    for f in schema.fields().values():
        assert f.metadata["doc"] and len(f.metadata["doc"]) > 10, f.path
        if (
            "step" in f.path.split(".")[-1] and f.type is int and not f.path.startswith("system")
            and "ns_" not in f.path
        ):
            assert f.metadata["unit"] == "step" and f.metadata["shrink"] == "steps", f.path


# ----- schedules against published check values

def test_llmc_learning_rate_check_values():
    s = Settings()
    assert [round(6e-4 * schedule.lr_factor(s.schedule, i), 6) for i in (699, 700, 10000)] == [
        6e-4, 6e-4, 3.06e-4
    ]
    assert schedule.lr_factor(s.schedule, s.schedule.steps - 1) < 1e-7


def test_trapezoid_never_reaches_zero_on_a_used_step():
    s = deltas.resolve("short/4").settings
    assert schedule.lr_factor(s.schedule, s.schedule.steps - 1) == 1 / 1800


# ----- commands

def run(*args, **kwargs):
    return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, **kwargs)


def test_listing_records_imports_neither_torch_nor_numpy():
    done = run("-X", "importtime", "-m", "records", "list")
    assert done.returncode == 0 and "short/11" in done.stdout
    assert "torch" not in done.stderr and "numpy" not in done.stderr


@pytest.mark.parametrize(
    "args, text",
    [
        (["list"], "7.2"), (["show", "short/9"], "model.attn.value_residual"),
        (["show", "short/10", "--scale", "tiny"], "[inert]"),
        (["show", "short/11", "--params"], "162,201,642 parameters"),
        (["diff", "short/5", "short/9"], "(short/9)"), (["features", "muon"], "since short/3"),
        (["list"], "tiny-v3    preset: short/11 at scale tiny"),
        (["show", "tiny-v3"], "validation.target = 4.03\n\nshort/11  U-net skips"),
        (["show", "tiny-v3"], "ml_hash 351edf705648eda3"),
        (["diff", "short/11", "tiny-v3"], "off -> 4.03  (tiny-v3)")
    ],
)
def test_records_commands(args, text):
    done = run("-m", "records", *args)
    assert done.returncode == 0 and text in done.stdout, done.stderr


def test_a_record_next_to_a_preset_is_shown_at_the_presets_scale():
    """Otherwise every line would be a difference of scale."""
    lines = run("-m", "records", "diff", "tiny-v3", "short/10").stdout.splitlines()
    theirs = schema.difference(
        *(deltas.resolve(*name, scale="tiny").settings for name in (["short/11"], ["short/10"]))
    )
    assert lines[0] == "tiny-v3 at scale tiny, short/10 at scale tiny"
    assert sorted(line.split()[0] for line in lines[1:]) == sorted(
        ["validation.target", *(path for path, *_ in theirs)]
    )
    done = run("-m", "records", "show", "tiny-v3", "--scale", "micro")
    assert done.returncode == 2 and "tiny-v3 is frozen at --scale tiny" in done.stderr


@pytest.mark.parametrize(
    "typed, meant",
    [
        ("11", ["short/11", "medium/11", "optimizer/11"]),
        ("unet", ["short/unet_double_lr", "short/unet_value_embeds"]),
        ("Short/11", ["short/11"]),
        ("short011", ["short/11"]),
        ("#11", ["short/11", "medium/11", "optimizer/11"]),
        ("record 11", ["short/11", "medium/11", "optimizer/11"]),
        ("SHORT/UNET_DOUBLE_LR", ["short/unet_double_lr"]),
        ("21R", ["short/21r"]),
        ("4", ["short/4", "medium/4", "optimizer/4"]),
        ("variant/4", ["variants/4"]),
        ("011_unet_double_lr", ["short/11"]),
        ("records/short/011_unet_double_lr/", ["short/11"]),
        ("short", ["short/head"]),
        ("mla12q", ["variants/mla12q"]),
        ("muonn", ["short/muon", "optimizer/pmuon", "optimizer/muown"]),
        ("tiny", ["tiny-v3"]),
        ("Tiny_v3", ["tiny-v3"]),
        ("tiny-v8", ["tiny-v3"]),
        ("99", []),
        ("", []),
    ],
)
def test_short_forms_and_near_misses_of_a_name_are_answered_with_what_they_may_mean(typed, meant):
    assert deltas.nearest_records(typed) == meant
    with pytest.raises(UserError) as refused:
        deltas.resolve_name(typed)
    assert (f"did you mean {' or '.join(meant)}?" in str(refused.value)) == bool(meant)
    assert all(deltas.resolve_name(name) for name in meant)


@pytest.mark.parametrize(
    "typed, meant",
    [
        ("muon.lr", ["optim.muon.lr"]),
        ("softcap", ["model.head.softcap", "numerics.softcap"]),
        ("Model.Attn.Rope", ["model.attn.rope"]),
        ("lr", ["optim.embed.lr", "optim.lm_head.lr", "optim.matrix.lr"]),
        ("model/attn/rope", ["model.attn.rope"]),
        (
            "steps",
            ["optim.muon.momentum_warmup.steps", "optim.muon.momentum_cooldown.steps",
             "optim.muon.dyn.steps"],
        ),
        ("optim-muon-lr", ["optim.muon.lr"]),
        ("unet_skips", ["model.residual.unet_skips"]),
        ("qqqqqqqq", []),
    ],
)
def test_short_forms_of_a_setting_are_answered_with_whole_paths(typed, meant):
    assert schema.nearest_settings(typed) == meant
    with pytest.raises(UserError, match=f"unknown setting '{typed}'"):
        deltas.resolve("short/11", sets=[f"{typed}=1"])


def test_a_preset_where_only_a_record_can_stand_is_told_its_record():
    with pytest.raises(UserError, match="tiny-v3 is a preset, short/11 at scale tiny: name that record here"):
        deltas.resolve("short/11", revert=["tiny-v3"])


def test_a_dry_run_begins_with_what_differs_from_the_parent(capsys):
    def differences(resolved):
        print_plan(resolved)
        out = capsys.readouterr().out
        told = out.split("\ndifferences from ")[1].split("\n\n")[0].splitlines()
        assert out.index("differences from") < out.index("ml_hash") < out.index("settings that differ")
        return told[0], [line.strip() for line in told[1:]]

    head, lines = differences(deltas.resolve_name("tiny-v3"))
    assert (
        head == "the parent, short/10, at scale tiny:"
        and "validation.target: off -> 4.03  (tiny-v3)" in lines
    )
    assert "model.residual.unet_skips.init: off -> 1.0" in lines
    head, lines = differences(deltas.resolve("short/8", scale="micro", sets=["optim.muon.lr=0.5"]))
    assert [line for line in lines if "by this command" in line] == [
        "optim.muon.lr: 0.00144 -> 0.5  (by this command)"
    ]
    assert differences(deltas.resolve("short/1"))[0].startswith("the defaults of settings/ (no parent)")
    assert differences(deltas.resolve("short/7"))[1][0].startswith("none")


@pytest.mark.parametrize("flag", ["--dry-run", "--plan"])
def test_plan_prints_steps_shapes_and_parameters(flag):
    done = run("train_gpt.py", "short/11", flag)
    assert done.returncode == 0
    for text in (
        "3000 steps x 524,288 tokens", "162,201,642 parameters", "6 heads of 128, 50304 classes", "ml_hash"
    ):
        assert text in done.stdout


def test_commands_refuse_nonsense_in_one_line():
    for args in (
        ["show", "short/777"], ["diff", "short/1", "shrt/2"], ["features", "qqqq"], ["plot", "tests"]
    ):
        done = run("-m", "records", *args)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, (
            done.stderr
        )


@pytest.mark.parametrize(
    "ref, change, message",
    [
        (
            "short/12", "model.attn.window.end=5",
            "it has no effect while model.attn.window.growth = constant is there; change that"
        ),
        (
            "short/12", "model.attn.window.grain=5",
            "it has no effect while model.attn.window.growth = constant is there"
        ),
        (
            "short/33", "model.attn.window.start=5",
            "it has no effect while model.attn.window.growth = stages is there"
        ),
        ("short/11", "optim.matrix.lr=0.1", "it has no effect while optim.muon is there"),
        ("short/57", "optim.matrix.lr=0.1", "it has no effect while optim.muon is there"),
        ("short/92", "optim.bigram.beta1=0.5", "it has no effect while optim.bigram.row_moment is there"),
        (
            "short/12", "model.attn.window.stages=[1,2]",
            "model.attn.window.stages needs model.attn.window.growth=stages: set it too"
        ),
        ("short/33", "data.loader=bos_aligned", "or switch it off: --without data.max_doc_len"),
    ],
)
def test_a_value_that_would_do_nothing_is_refused(ref, change, message):
    """It would give the run another identity and compute the same."""
    with pytest.raises(UserError, match=re.escape(message)):
        deltas.resolve(ref, sets=[change])


def test_a_value_that_only_the_matrices_of_adamw_read_is_taken():
    """Record 57's gates have AdamW next to Muon, with every constant of their own but the freeze."""
    s = deltas.resolve("short/57", sets=["optim.matrix.freeze_steps=3"]).settings
    assert [s.optim.group("matrix", label).freeze_steps for label in ("gate", "qkvo")] == [3, 0]


def test_a_value_that_is_there_already_may_be_said_again_and_one_that_gets_its_effect_set():
    s = deltas.resolve("short/33").settings
    assert deltas.resolve("short/33", sets=[f"model.attn.window.end={s.model.attn.window.end}"]).settings == s
    assert (
        deltas.resolve(
            "short/11", without=["optim.muon"], sets=["optim.matrix.lr=0.1"]
        ).settings.optim.matrix.lr
        == 0.1
    )


@pytest.mark.parametrize(
    "ref, starts, validated, updates, shape",
    [
        (
            "short/21", [132, 263, 394, 525, 656, 787, 918, 1049, 1181, 1312, 1443, 1574, 1705], 14, 6,
            "1 row of 49152"
        ),
        ("short/33", [554, 1108], 4, 7, "1 row of 49152"),
        ("short/11", [], 1, 6, "64 rows of 1024"),
    ],
)
def test_the_plan_shows_every_window_with_its_first_step_and_every_graph(
    ref, starts, validated, updates, shape, capsys
):
    print_plan(deltas.resolve(ref))
    out = capsys.readouterr().out
    steps = [line.split()[0] for line in out.split("\nschedule:\n")[1].splitlines() if line.strip()]
    assert {str(step) for step in starts} <= set(steps)
    assert f"at most {len(starts) + 1 + validated + updates} graphs" in out
    assert sum(line.startswith("  update: ") for line in out.splitlines()) == updates
    each = f", for each of {len(starts) + 1} windows" if starts else ""
    assert f"\n  training: {shape} tokens{each}\n" in out


def test_each_line_of_the_lineage_is_applied_once_however_many_records_stand_on_it(monkeypatch):
    monkeypatch.setattr(deltas, "load_records", functools.lru_cache(deltas.load_records.__wrapped__))
    applied = []
    assign = schema.assign
    monkeypatch.setattr(
        deltas, "assign", lambda s, path, *rest: applied.append(path) or assign(s, path, *rest)
    )
    for ref in deltas.load_records():
        deltas.resolve(ref)
    assert len(applied) == sum(len(record.delta) for record in deltas.load_records().values())


# ----- types of values --------------------------------------------------------------------------------------

@pytest.mark.parametrize("hint, given, value", [
    (float | tuple[float, ...], 1, 1.0), (float | tuple[float, ...], [1, 0.5], (1.0, 0.5)),
    (int | tuple[int, ...], [16384, 32768], (16384, 32768)), (tuple[float, ...], [], ()),
    (tuple[tuple[int, int], ...], [[3, 6], [2, 7]], ((3, 6), (2, 7))),
    (tuple[tuple[float, ...], ...], [[1, 0.5, 0.25], [1]], ((1.0, 0.5, 0.25), (1.0,)))])
def test_a_value_may_be_one_per_stage_a_pair_or_a_list_of_lists(hint, given, value):
    field = schema.Field("x", hint, False, None, {})
    found = schema.typed(field, given, "--set")
    assert found == value and repr(found) == repr(value)  # 1.0, not 1: hashes are taken over what is stored
    assert schema.tupled(json.loads(json.dumps(found))) == value


@pytest.mark.parametrize(
    "hint, given, message",
    [
        (
            float | tuple[float, ...], "x",
            "expected a number that is finite or a list of finite numbers like [0.5, 0.5]"
        ),
        (float | tuple[float, ...], [0.5, "x"], "or a list of finite numbers"),
        (int | tuple[int, ...], [1, 0.5], "or a list of whole numbers like [2, 2]"),
        (tuple[float, ...], float("nan"), "expected a list of finite numbers"),
        (tuple[float, ...], [float("nan")], "expected a list"),
        (
            tuple[tuple[int, int], ...], [[3, 6, 9]],
            "expected a list of lists of whole numbers like [[2, 2], [2, 2]]"
        ),
        (tuple[tuple[int, int], ...], [3, 6], "expected a list of lists"),
        (tuple[int, ...], [True], "expected a list of whole numbers"),
    ],
)
def test_a_value_of_another_type_is_refused_with_an_example(hint, given, message):
    with pytest.raises(UserError, match=re.escape(message)):
        schema.typed(schema.Field("x", hint, False, None, {}), given, "--set")


# ----- a setting is declared in one place -------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Probe:
    """Probe of the vocabulary (nobody, 2025).

    It computes nothing.
    """

    rates: float | tuple[float, ...] = opt(
        0.5, "rates of the probe: one, or one per stage", least=0, below=1, off=0.25, shrink="rsqrt_width"
    )
    count: int | tuple[int, ...] = opt(
        64, "counts of the probe, one or one per stage", unit="step", off=REFUSE, shrink="steps", least=1,
        most=500, why=", the size of the probe"
    )
    stored: str = opt("bfloat16", "stored dtype of the probe", exact=PRECISION)
    rough: bool = opt(False, "rough probe", off=False, exact=False, needs="model.head.untied")

    def check(self, s):
        if self.count == s.model.num_layers:
            yield "model.probe.count is the number of layers: change it"


@dataclasses.dataclass(frozen=True)
class WiderModel(model_settings.Model):
    probe: Probe | None = opt(
        None, "probe of the vocabulary, for this test only", needs="model.mlp.activation=relu_sq"
    )


@dataclasses.dataclass(frozen=True)
class WiderSettings(Settings):
    model: WiderModel = opt(WiderModel, "the model")


@pytest.fixture
def wider(monkeypatch):
    """The vocabulary with a feature of the test's own; nothing but its declaration is added anywhere."""
    def forget():
        schema.fields.cache_clear()
        deltas.load_records.cache_clear()

    monkeypatch.setattr(schema, "Settings", WiderSettings)
    monkeypatch.setattr(deltas, "Settings", WiderSettings)
    forget()
    yield
    monkeypatch.undo()
    forget()


def test_a_feature_is_declared_in_one_place(wider, capsys):
    on = deltas.resolve("short/33", with_=["model.probe"])
    again = deltas.resolve("short/33", with_=["model.probe"], sets=["model.probe=false"])
    assert on.settings.model.probe == Probe() and again.settings == deltas.resolve("short/33").settings
    assert schema.ml_hash(on.settings) != schema.ml_hash(again.settings)
    off = deltas.resolve(
        "short/33", with_=["model.probe={rates = [0.5, 0.75], count = 5}"], without=["model.probe.rates"]
    )
    assert off.settings.model.probe == Probe(rates=0.25, count=5)  # --without: the value that `off` says
    assert (
        deltas.resolve(
            "short/33", with_=["model.probe"], without=["model.mlp.activation"]
        ).settings.model.probe
        is None
    )
    small = deltas.resolve(
        "short/33", with_=["model.probe={rates = [0.125, 0.25], count = [400, 100], rough = true}"],
        scale="tiny"
    ).settings
    share = small.schedule.steps / deltas.resolve("short/33").settings.schedule.steps
    assert small.model.probe == Probe(rates=tuple(x * 8 ** 0.5 for x in (0.125, 0.25)), stored="float32",
                                      count=(round(400 * share), round(100 * share)))
    with pytest.raises(SystemExit):
        main(["features", "model.probe"])
    printed = capsys.readouterr().out
    for text in (
        "model.probe *\n", "Probe of the vocabulary (nobody, 2025).\n  It computes nothing.",
        "unit step; default 64", "0 <= x < 1; default 0.5; --without: 0.25", "1 to 500",
        "needs model.mlp.activation=relu_sq"
    ):
        assert text in printed


@pytest.mark.parametrize(
    "change, message",
    [
        ("rates=[0.5,1.0]", "model.probe.rates = 1.0: each must lie in 0 <= x < 1"),
        ("count=0", "model.probe.count = 0: must be at least 1"),
        ("count=[1,501]", "model.probe.count = 501: each must be at most 500, the size of the probe"),
        ("count=12", "model.probe.count is the number of layers: change it")
    ],
)
def test_a_feature_brings_its_bounds_and_laws_along(wider, change, message):
    with pytest.raises(UserError) as refused:
        deltas.resolve("short/33", with_=["model.probe"], sets=[f"model.probe.{change}"])
    assert str(refused.value) == message


def test_every_number_is_bounded():
    """1e300 would be a run that diverges; from a log, nan and infinity may come."""
    for path, f in schema.fields().items():
        if f.type in (int, float):
            for value in (1e300, -1e300, float("nan"), float("inf")):
                assert f.metadata["bounds"].fault(value), path
    for change in (
        "optim.muon.lr=1e300", "optim.embed.lr=-1", "model.head.softcap.cap=1e39",
        "optim.embed.weight_decay=1e300"
    ):
        with pytest.raises(UserError, match="must be at"):
            deltas.resolve("short/33", sets=[change])


def test_what_a_field_names_exists():
    """Rules of scales, and paths and values of conditions."""
    known, scale = schema.fields(), scales.rules(SCALES["tiny"], 10, 0.1)
    for f in known.values():
        assert not f.metadata["shrink"] or f.metadata["shrink"] in scale, f.path
        conditions = [*re.split(" and | or ", f.metadata["needs"]), f.metadata["idle"]]
        assert all(f.path.rpartition(".")[0] + f".{name}" in known for name in f.metadata["along"]), f.path
        for condition in filter(None, conditions):
            path, _, values = condition.partition("=")
            assert path in known and all(
                v.isdigit() if known[path].type is int else v in typing.get_args(known[path].type)
                for v in values.split("|") if v
            ), f.path
        assert f.metadata["exact"] in (AS_IS, PRECISION, PRODUCTS) or f.default == f.metadata["exact"], f.path
        assert (
            f.metadata["off"] in (BEFORE, REFUSE) or f.optional or type(f.metadata["off"]) is f.type
            or isinstance(f.type, types.UnionType) and isinstance(f.metadata["off"], f.type)
            or f.default is None or isinstance(f.default, tuple)
        ), f.path
        assert not f.is_section or not f.type.__doc__.startswith(f.type.__name__ + "("), f.path
