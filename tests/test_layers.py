"""Laws of the parts in layers/: specifications by layer, residual terms, weighted targets, and what imports what."""

import ast
import dataclasses
from pathlib import Path

import pytest
import torch

import deltas
import schedule
from layers.specs import AttnSpec, LayerSpec, layer_specs
from model import GPT

ROOT = Path(__file__).parent.parent
BOS = 1256


def built(ref, *sets, specs=None, **options):
    """A float64 model at scale micro whose parameters are all random, so that no term hides behind a zero."""
    s = deltas.resolve(ref, scale="micro", sets=["system.precision=float64", *sets], **options).settings
    return filled(GPT(s, specs))


def filled(model):
    model.initialise(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model


def text(rows=2, tokens=64):
    ids = torch.randint(BOS, (rows, tokens), generator=torch.Generator().manual_seed(2))
    ids[:, ::20] = BOS
    return ids


def losses_of(model, x, **more):
    return model(x, x.roll(-1, 1), model.context(x, BOS, schedule.windows(model.settings, 0)), **more)


# ----- specifications

def test_the_specifications_say_what_the_lists_of_the_settings_say():
    s = deltas.resolve("short/33").settings
    specs, a = layer_specs(s), s.model.attn
    assert [i for i, spec in enumerate(specs) if spec.attn is None] == list(a.drop_layers)
    assert [i for i, spec in enumerate(specs) if spec.mlp is None] == list(s.model.mlp.drop_layers)
    assert {i for i, spec in enumerate(specs) if spec.attn and spec.attn.window == "long"} == {*a.window.long_layers} - {7}
    assert specs[1].attn == AttnSpec(heads=6, qk=128, v=128, rotary=128, window="short", gate=12, value_table=1)
    routed = layer_specs(deltas.resolve("variants/4").settings)
    assert routed[0] == LayerSpec(routed[0].attn, 3072, False) and routed[1] == LayerSpec(routed[0].attn, None, True)


@pytest.mark.parametrize("ref", ["short/11", "short/33"])
def test_layers_may_have_different_numbers_of_heads(ref):
    """Forward and backward with 6 heads of 8 channels and 3 heads of 16, in turn; each width has its rotary tables."""
    plain = built(ref)
    narrow = plain.specs
    wide = [spec.attn and dataclasses.replace(spec.attn, heads=3, qk=16, v=16, rotary=16) for spec in narrow]
    mixed = tuple(dataclasses.replace(spec, attn=attn) if i % 2 else spec for i, (spec, attn) in enumerate(zip(narrow, wide)))
    model, x = built(ref, specs=mixed), text()
    assert sorted(rotary.width for rotary in model.rotaries) == [8, 16]
    losses = losses_of(model, x)
    losses.mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert not torch.allclose(losses, losses_of(plain, x))
    assert torch.equal(losses_of(built(ref, specs=narrow), x), losses_of(plain, x))


# ----- what imports what

def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_parts_import_nothing_above_them_and_specifications_no_torch():
    above = ("model", "optim", "train_gpt", "system", "sample", "records", "evidence", "sweeps", "page")
    for path in (ROOT / "layers").glob("*.py"):
        assert not [name for name in imports(path) if name.split(".")[0] in above], path
    assert {name.split(".")[0] for name in imports(ROOT / "layers/specs.py")} == {"dataclasses", "typing", "settings"}
