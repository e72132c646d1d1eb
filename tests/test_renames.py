"""A rename changes no hash and no initial value; what was written under former names is still read."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sample
from common.errors import UserError
from model import GPT
from settings import deltas, renames, schema

ROOT = Path(__file__).parent.parent


def former(path):
    """The path with every name of it as it was at first."""
    parts = path.split(".")
    return ".".join(renames.FIRST.get(".".join(parts[:i + 1]), part).rpartition(".")[2]
                    for i, part in enumerate(parts))


@pytest.mark.parametrize("old, new", renames.SETTINGS.items())
def test_a_setting_is_renamed_inside_its_section_and_its_former_name_is_free(old, new):
    assert new in schema.fields() and old not in schema.fields()
    assert schema.above(renames.present_path(old)) == schema.above(new) and former(new) == old
    assert renames.present_path(old) == new and renames.present_path(new) == new
    assert renames.present_path(f"{old}.lr") == f"{new}.lr"


def test_a_former_name_on_the_command_line_is_refused_with_the_present_one():
    told = r"model\.attn\.documents is now called model\.attn\.document_mask: write that"
    for given in (dict(sets=["model.attn.documents=false"]), dict(without=["model.attn.documents"])):
        with pytest.raises(UserError, match=told):
            deltas.resolve("short/33", **given)
    with pytest.raises(UserError, match=r"latent\.kv is now called model\.attn\.latent\.kv_lora_rank"):
        deltas.resolve("variants/5", sets=["model.attn.latent={kv = 64}"])
    told = r"fp8_mlp\.down\.weight is now called numerics\.fp8_mlp\.c_proj\.weight"
    with pytest.raises(UserError, match=told):
        deltas.resolve("short/33", sets=["numerics.fp8_mlp.down.weight=1.2"])
    with pytest.raises(UserError, match="unknown setting"):  # a wrong field of a renamed section
        deltas.resolve("short/33", sets=["numerics.fp8_mlp.down.nothing=1"])


@pytest.mark.parametrize("delta", [
    '"optim.muon.averaged" = false\n"data.max_document" = 1024\n"system.recompute" = "on"',
    '"model.attn.rope.half" = false\n"model.head.train_loss" = "mean"'])
def test_an_attempt_with_former_names_is_the_one_with_present_names(tmp_path, delta):
    found = []
    for text in (delta, "\n".join(
            f'"{renames.present_path(line.split(chr(34))[1])}" {line.split(chr(34), 2)[2]}'
            for line in delta.splitlines())):
        toml = deltas.tomllib.loads(f'parent = "short/33"\n[delta]\n{text}\n')
        record = deltas.parse_record(toml, tmp_path / "mine/record.toml", "attempts")
        found.append((record.delta, deltas.resolve(record).settings))
    assert found[0] == found[1] and found[0][1] != deltas.resolve("short/33").settings


def test_a_delta_or_a_log_may_not_give_one_setting_under_both_names(tmp_path):
    toml = {"parent": "short/33", "delta": {"data.max_document": 1024, "data.max_doc_len": 2048}}
    with pytest.raises(UserError, match="sets data.max_doc_len twice"):
        deltas.parse_record(toml, tmp_path / "mine/record.toml", "attempts")
    plain = schema.plain(deltas.resolve("short/33").settings)
    plain["data"]["max_document"] = 7
    with pytest.raises(UserError, match="given twice, under its former and its present name"):
        schema.from_plain(plain)


@pytest.mark.parametrize("ref, file", [
    ("short/29", "tests/golden/start_short_29.json"),  # of a run that was made anew since
    ("variants/4", "records/variants/004_moe32k4v3/tiny/run.jsonl"),
    ("variants/7", "records/variants/007_mla12q/tiny/run.jsonl"),
])
def test_a_log_of_former_names_reads_as_its_record_and_keeps_both_hashes(ref, file, monkeypatch):
    start = json.loads((ROOT / file).read_text(encoding="utf-8").splitlines()[0])
    text = json.dumps(start["settings"])
    assert any(name in text for name in ('"max_document"', '"gate_scale"', '"still"'))
    s = schema.from_plain(start["settings"])
    monkeypatch.setattr(schema, "NUMERICS_VERSION", start["numerics_version"])
    assert schema.ml_hash(s) == start["ml_hash"] and schema.system_hash(s) == start["system_hash"]
    assert s.model.num_layers == deltas.resolve(ref, scale="tiny").settings.model.num_layers


def test_changes_of_logs_get_present_paths():
    assert renames.present_change("--set data.max_document=1024") == "--set data.max_doc_len=1024"
    assert renames.present_change("--without model.attn.documents") == "--without model.attn.document_mask"
    assert renames.present_change("--with optim.mlp_up@short/33") == "--with optim.c_fc@short/33"
    assert renames.present_change("--revert short/12") == "--revert short/12"


def micro(ref, *sets):
    return GPT(deltas.resolve(ref, scale="micro", sets=list(sets)).settings)


@pytest.mark.parametrize("ref", ["short/1", "short/9", "short/33", "variants/4", "variants/7"])
def test_a_checkpoint_under_former_names_loads(ref, tmp_path):
    model = micro(ref)
    model.initialise(3)
    named = model.full_state_dict()
    old = {renames.first_parameter(name): value for name, value in named.items()}
    assert set(old) != set(named) and renames.present_parameters(old).keys() == named.keys()
    torch.save({"model": old, "settings": renames.first_settings(schema.plain(model.settings)),
                "tokenizer": "sample"}, tmp_path / "checkpoint.pt")
    loaded, _ = sample.load(tmp_path)
    assert all(torch.equal(value, named[name]) for name, value in loaded.state_dict().items())


BEFORE = {  # sums of the absolute initial values, as they were drawn before the parameters were renamed
    "variants/4": {
        "embed.weight": 48798.5637, "blocks.1.mlp.c_fc": 3542.3909, "blocks.1.mlp.c_proj": 4345.5465,
        "blocks.1.mlp.shared.c_fc": 219.1843, "blocks.1.mlp.shared.c_proj": 194.2693,
        "lm_head.weight": 4453.7011},
    "variants/5": {"blocks.0.attn.k_rope": 7.2279, "blocks.0.mlp.c_fc": 664.0291},
}


@pytest.mark.parametrize("ref", BEFORE)
def test_initial_values_are_those_of_the_first_names(ref):
    model = micro(ref, "numerics.init_grid=float32", "model.init.zero_proj=false",
                  "model.head.untied.init=linear")
    model.initialise(0)
    parameters = dict(model.named_parameters())
    assert BEFORE[ref] == {
        name: round(parameters[name].double().abs().sum().item(), 4) for name in BEFORE[ref]}


@pytest.mark.parametrize("flag", ["--save", "--save-checkpoint"])
def test_the_former_flag_of_checkpoints_still_works_and_is_not_advertised(flag):
    code = ("from system import command_line as c\n"
            f"print(c.parser().parse_args(['short/11', {flag!r}]).save_checkpoint)\n"
            "print(c.parser().format_help())")
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout.startswith("True\n") and "--save-checkpoint" in said.stdout
    assert "--save " not in said.stdout and "--save\n" not in said.stdout
