"""Settings of records 58 to 92 and of the optimizer track that contradict each other, reach beyond the model
or would have no effect: each is refused in one line that names the culprit."""

import itertools

import pytest

from common.errors import UserError
from data.candidates import STRIDE, Sweep
from model import without_values
from optim import Optimizer
from settings import deltas, schema
from system.hooks import hooks_of

HOSTS = "short/92", "short/89", "short/76", "medium/16", "optimizer/46", "variants/4"
LISTS = ".layers", "_layers", ".snapshots", ".mudd.tables"  # ends of the paths of lists of layers
SPANS = ("start", "end"), ("start", "stop"), ("ramp_start", "ramp_end"), ("release_start", "release_end")


def refusal(ref, *, scale="micro", **changes):
    with pytest.raises(UserError) as refused:
        deltas.resolve(ref, scale=scale, **changes)
    message = str(refused.value)
    assert "\n" not in message
    return message


def host(path):
    """(record, its layers) of a record in which the section of a setting is on."""
    for ref in HOSTS:
        s = deltas.find_record(ref).settings
        if deltas.lookup(s, schema.above(path)) is not None:
            return ref, s.model.num_layers
    raise AssertionError(f"no record of HOSTS has {path}")


def layer_settings():
    """(path, whether it lists layers) of the settings that name layers."""
    for path, f in schema.fields().items():
        # where the pairs of a smaller model would begin, no pair begins
        if path in ("model.num_layers", "model.init.signed_gains.pairs_from"):
            continue
        if f.metadata["unit"] == "layer":
            yield path, False
        elif path.endswith(LISTS):
            yield path, True


@pytest.mark.parametrize("path, several", list(layer_settings()))
def test_a_layer_beyond_the_model_is_refused(path, several):
    ref, layers = host(path)
    beyond = layers + 3
    message = refusal(ref, sets=[f"{path}={[beyond] if several else beyond}"])
    assert message == f"{path} names layer {beyond}: the model has layers 0 to {layers - 1}"


@pytest.mark.parametrize("path", [
    "model.residual.x0_mix.layers", "model.embed.bigram.layers", "model.attn.gate.layers",
    "model.attn.xsa.layers"])
def test_a_feature_that_acts_in_no_layer_is_refused(path):
    assert refusal("short/92", sets=[f"{path}=[]"]).startswith(f"{path} is empty: name at least one layer")


def spans():
    """(section, first field, last field) of the spans of steps in the optimizer's settings."""
    known = schema.fields()
    for path, f in known.items():
        for first, last in SPANS if f.is_section and path.startswith("optim.") else ():
            ends = [known.get(f"{path}.{name}") for name in (first, last)]
            if None not in ends and all(end.metadata["unit"] == "step" for end in ends):
                yield path, first, last


@pytest.mark.parametrize("path, first, last", list(spans()))
def test_a_span_that_ends_before_it_begins_is_refused(path, first, last):
    s = deltas.find_record("optimizer/36").settings
    above = [p for p in schema.prefixes(path) if deltas.lookup(s, p) is None]
    message = refusal("optimizer/36", with_=above, sets=[f"{path}={{{first} = 9, {last} = 8}}"])
    assert path in message and "9" in message and "8" in message


@pytest.mark.parametrize("one, other", list(itertools.combinations(
    ("polar_express=true", "polar_express_long=true", "anvil_maps=true", "convergent=true",
     "coefficients=[[3.0, -3.0, 1.0]]"), 2)))
def test_newton_schulz_has_one_set_of_polynomials(one, other):
    """A second set would be passed over, or be used with the norm of the first."""
    message = refusal("short/3", sets=[f"optim.muon.{one}", f"optim.muon.{other}", "optim.muon.ns_steps=6"])
    assert all(f"optim.muon.{x.partition('=')[0]}" in message for x in (one, other))


@pytest.mark.parametrize("ref, changes, parts", [
    ("short/92", ["model.embed.bigram.rows=2"], ["model.embed.bigram.rows = 2", "at least 4"]),
    ("short/92", ["model.bias=true"], ["model.attn.narrow", "model.bias=false"]),
    ("short/92", ["model.attn.narrow.qk_layers=[]", "model.attn.narrow.v_layers=[]"], ["are empty"]),
    ("short/92", ["model.residual.mudd.tables=[1, 1]"], ["names a layer twice"]),
    ("short/92", ["model.attn.paired_layers=[]", "model.attn.num_heads=3"], ["mudd", "an even number"]),
    ("short/92", ["model.attn.value_embed.tables=[-1, 0, 1, -1, 4, -1, -1, -1, 2, -1, 3]"],
     ["table 4 is of layer 4 alone", "model.attn.drop_layers"]),
    ("short/92", ["model.attn.saved_input=10"], ["no attention after it", "choose an earlier layer"]),
    ("short/92", ["model.pad_vocab_to=1"], ["validation.canonical_mask", "1257", "model.pad_vocab_to"]),
    ("short/90", ["model.attn.qk_dim=5"], ["5 channels of a head: change model.attn.qk_dim"]),
    ("short/90", ["model.attn.qk_dim=6"], ["got 6: change model.attn.qk_dim"]),
    ("optimizer/36", ["model.embed.bigram={}", "optim.bigram={row_moment = true, weight_decay = 0.1}"],
     ["optim.bigram.row_moment", "set optim.bigram.weight_decay=0"]),
    ("optimizer/36", ["model.token_gates={}"], ["has no coefficient to give", "model.attn.gate"]),
    ("optimizer/44", ["optim.muon.soap.trust={least = 0.9, most = 0.5}"], ["is beyond", "most = 0.5"])])
def test_what_cannot_be_computed_or_has_no_effect_is_refused_with_its_remedy(ref, changes, parts):
    message = refusal(ref, sets=changes)
    assert all(part in message for part in parts), message


def test_a_sweep_that_misses_classes_is_refused():
    with pytest.raises(UserError, match="model.pad_vocab_to"):
        Sweep(2 * STRIDE, 0)


@pytest.mark.parametrize("ref, change, name", [
    ("short/57", {"without": ["optim.value_embed"]}, "value_embed"),
    ("medium/18", {"sets": ["model.embed.bigram={}"]}, "bigram")])
def test_a_table_in_the_group_of_one_that_parts_from_the_head_is_refused_before_the_first_step(
    ref, change, name
):
    model = without_values(deltas.resolve(ref, scale="micro", **change).settings)
    with pytest.raises(UserError, match=f"{name} shares its group: add --with optim.{name}$"):
        hooks_of(model, Optimizer(model, model.settings))
