"""Laws about features: each has a test that `--feature` runs, and those that no other file guards are neutral
when they are.

Neutrality laws are in float64 with every parameter random and non-zero, so that no term hides behind a zero.
"""

import math
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import features
from common.errors import UserError
from model import GPT
from settings import declare, deltas, schema

FEATURES = [f.path for f in schema.fields().values() if f.is_feature]


def build(ref, *sets, without=(), scramble=True):
    """A small float64 model of a record."""
    s = deltas.resolve(ref, scale="micro", without=without, sets=["system.precision=float64", *sets]).settings
    model = GPT(s)
    model.initialise(0)
    for name, p in sorted(model.named_parameters()) if scramble else ():
        noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)), dtype=p.dtype)
        p.data += 0.3 * noise
    return model


def tokens(seed=1):
    """Ids (2, 24)."""
    return torch.randint(1257, (2, 24), generator=torch.Generator().manual_seed(seed))


def added(on, off):
    """Parameters that a feature brings: those of one model whose names the other has not."""
    known = dict(off.named_parameters())
    return [p for name, p in on.named_parameters() if name not in known]


def same(a, b):
    """Equal up to float64 rounding."""
    return torch.allclose(a, b, rtol=0, atol=1e-12)


# ----- switching off

KEPT = {  # features of records 89 and 92 that stay, with the reason that is given
    "model.attn.value_embed.learned": "it has no effect while model.attn.value_embed.mix = sum is there",
    "model.residual.unet_skips.pairs": "model.residual.unet_skips needs an even model.num_layers",
    "model.residual.unet_skips.gate": "it has no effect while model.token_gates is there",
    "data.max_doc_len": "data.loader=packed needs data.max_doc_len"
}


@pytest.mark.parametrize("ref, least", [("short/89", 150), ("short/92", 170)])
def test_every_feature_of_the_last_records_goes_off_with_what_needs_it(ref, least):
    """Those that do not say why; what goes along is named."""
    whole, kept, off = deltas.resolve(ref), {}, 0
    there = {path for path, *_ in declare.walk(whole.settings)}
    for path in (path for path in FEATURES if path in there):
        try:
            found = deltas.resolve(ref, without=[path])
        except UserError as error:
            if "it is already" not in str(error):
                kept[path] = str(error)
            continue
        changed = {row[0] for row in schema.difference(whole.settings, found.settings)}
        named = [line.split()[1].rstrip(":") for line in found.report if line.startswith("without ")]
        # a section's own fields go with it
        assert changed and all(any(one == name or one.startswith(f"{name}.") for name in named)
                               for one in changed), path
        off += 1
    assert off >= least
    assert {path: reason in kept.get(path, "") for path, reason in KEPT.items()} == dict.fromkeys(kept, True)


# ----- selection

def test_every_feature_has_a_test_of_its_own():
    from test_optimizer import LABELLED  # one law for every setting of every label
    labels = {path for path, *_ in LABELLED} | {path.rpartition(".")[0] for path, *_ in LABELLED}
    missing = [path for path in FEATURES if path not in features.marked() | labels]
    assert not missing, f"give the test that guards it the mark `feature`, or write one: {missing}"


def test_every_marked_path_is_a_setting():
    for path in features.marked():
        schema.find_field(path)


@pytest.mark.parametrize("path, wanted", [
    ("model.attn.gate", "model.attn.gate"), ("model.attn.gate.channels", "model.attn.gate"),
    ("model.attn", "model.attn"), ("optim.adam.beta2", "optim.adam")])
def test_a_setting_is_guarded_by_its_own_tests_or_by_those_of_its_section(path, wanted):
    assert features.guarded(path) == wanted


@pytest.mark.parametrize("path, message", [
    ("model.attn.gat", "did you mean model.attn.gate"), ("gate", "did you mean"),
    ("validation.seq_len", "no test is marked with it")])
def test_a_path_without_tests_is_refused_with_what_may_be_meant(path, message):
    with pytest.raises(UserError) as caught:
        features.guarded(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_case_guards_what_its_marks_and_parameters_name():
    named = [SimpleNamespace(args=("model.attn.gate",), kwargs={})]
    by_path = [SimpleNamespace(args=(), kwargs={"path": "feature"})]
    by_record = [SimpleNamespace(args=(), kwargs={"record": "ref"})]
    for marks, parameters in (
        (named, {}), (by_path, {"feature": "model.attn.gate"}), (by_record, {"ref": 28})
    ):
        assert features.case_guards(marks, parameters, "model.attn.gate")
        # a section: those in words
        assert features.case_guards(marks, parameters, "model.attn") == (marks == named)
        assert not features.case_guards(marks, parameters, "model.attn.rope")
    assert not features.case_guards([], {"ref": "short/28"}, "model.attn.gate")


def test_the_command_runs_them_and_imports_no_other_file():
    def collected(path):
        done = subprocess.run(
            [
                sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "--feature",
                path
            ],
            cwd=features.TESTS.parent,
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout + done.stderr
    code, text = collected("data.first_batch_twice")
    assert code == 0 and "test_data.py::test_first_batch_twice" in text, text
    assert "test_without_any_feature_a_model_trains[data.first_batch_twice-" in text
    assert "test_rope_sees_only_distances" not in text and "test_sweep" not in text
    code, text = collected("data.first_batch_twise")
    assert code == 4 and text.startswith("ERROR: unknown setting 'data.first_batch_twise'"), text


@pytest.mark.parametrize("ref, least", [
    ("short/89", 130), ("short/92", 140), ("medium/16", 39), ("medium/18", 80)])
def test_every_feature_of_a_record_goes_off_or_names_what_needs_it(ref, least):
    """Without a feature the settings are whole, or one line names another setting that stands against it."""
    s, off = deltas.resolve(ref).settings, 0
    for path in (path for path in FEATURES if features.is_on(s, path)):
        try:
            assert not features.is_on(deltas.resolve(ref, without=[path]).settings, path), path
            off += 1
        except UserError as error:
            named = {name for name in re.findall(r"[a-z_0-9]+(?:\.[a-z_0-9]+)+", str(error)) if name != path}
            assert any(features.is_on(s, name) for name in named & schema.fields().keys()), str(error)
            assert "\n" not in str(error)
    assert off >= least


# ----- laws of features that no other file guards

@pytest.mark.feature("model.bias")
def test_biases_of_zero_are_off():
    on, off, x = build("short/1"), build("short/1", "model.bias=false"), tokens()
    assert not same(on(x), off(x))
    for p in added(on, off):
        p.data.zero_()
    assert same(on(x), off(x))


@pytest.mark.feature("model.embed.learned_positions")
def test_positions_of_zero_are_off():
    on, off, x = build("short/1"), build("short/1", "model.embed.learned_positions=false"), tokens()
    assert not same(on(x), off(x))
    positions, = added(on, off)
    positions.data.zero_()
    assert same(on(x), off(x))


@pytest.mark.feature("model.embed.norm")
def test_normed_embeddings_are_those_of_a_normed_table():
    on, off, x = build("short/8"), build("short/8", without=["model.embed.norm"]), tokens()
    assert not same(on(x), off(x))
    table = next(p for p in off.parameters() if p.role == "embed")
    table.data = F.rms_norm(table.data, table.shape[1:], eps=off.settings.numerics.norm_eps)
    assert same(on(x), off(x))


@pytest.mark.feature("model.attn.depth_scale")
def test_the_depth_scale_is_a_factor_of_the_attention_s_projections():
    on, off, x = build("short/2"), build("short/2", without=["model.attn.depth_scale"]), tokens()
    assert not same(on(x), off(x))
    for block in off.blocks:
        block.attn.qkvo.data[3] /= math.sqrt(2 * off.settings.model.num_layers)
    assert same(on(x), off(x))


@pytest.mark.feature("model.attn.qk_norm")
def test_normed_queries_and_keys_have_no_length():
    x = tokens()
    for without, blind in (([], True), (["model.attn.qk_norm"], False)):
        model = build("short/11", "numerics.norm_eps=1e-18", without=without)
        before = model(x)
        for block in model.blocks:
            block.attn.qkvo.data[:2] *= 3
        assert same(model(x), before) == blind


@pytest.mark.feature("model.attn.scale")
def test_the_usual_softmax_scale_may_be_written_out():
    off, x = build("short/11"), tokens()
    # heads are 8 wide
    on, other = (build("short/11", f"model.attn.scale={scale}") for scale in (1 / math.sqrt(8), 0.5))
    assert same(on(x), off(x)) and not same(other(x), off(x))


@pytest.mark.feature("model.attn.value_residual.learned", "model.residual.x0_mix.learned",
                     "model.residual.unet_skips.learned")
def test_a_constant_coefficient_is_no_parameter():
    for path in ("model.attn.value_residual", "model.residual.x0_mix", "model.residual.unet_skips"):
        learned, fixed = (
            build("short/11", scramble=False),
            build("short/11", f"{path}.learned=false", scramble=False),
        )
        assert added(learned, fixed) and not added(fixed, learned), path
        assert same(learned(tokens()), fixed(tokens())), path


@pytest.mark.feature("model.attn.value_embed.learned")
def test_constant_weights_of_value_embeddings_are_the_initial_ones():
    learned, fixed = (
        build("short/14", *sets, without=["model.attn.document_mask", "model.attn.window"], scramble=False)
        for sets in ((), ("model.attn.value_embed.learned=false",))
    )
    assert added(learned, fixed) and not added(fixed, learned)
    for model in (learned, fixed):  # projections and heads start at zero, which would hide the values
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.data += torch.randn(
                    p.shape, generator=torch.Generator().manual_seed(len(name)), dtype=p.dtype
                )
    assert same(learned(tokens()), fixed(tokens()))


@pytest.mark.feature("model.head.untied")
def test_an_untied_head_that_holds_the_table_is_the_tied_one():
    on, off, x = build("short/8"), build("short/8", without=["model.head.untied"]), tokens()
    assert not same(on(x), off(x))
    head, = added(on, off)
    table = next(p for p in on.parameters() if p.role == "embed")
    shared = next(p for p in off.parameters() if p.shape == table.shape)
    head.data.copy_(table.data)
    shared.data.copy_(table.data)
    assert same(on(x), off(x))


@pytest.mark.feature("model.init.zero_proj")
def test_with_projections_of_zero_a_token_s_logits_depend_on_no_other():
    x, order = tokens(), torch.randperm(24, generator=torch.Generator().manual_seed(0))
    on, off = (
        build("short/5", scramble=False),
        build("short/5", without=["model.init.zero_proj"], scramble=False),
    )
    assert torch.equal(on(x)[:, order], on(x[:, order])) and not same(off(x)[:, order], off(x[:, order]))
