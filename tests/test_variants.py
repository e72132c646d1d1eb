"""Laws of the variants' figures: FLOPs with attention at full width, the README's table, what notes say."""

from pathlib import Path

import pytest
import torch

import schedule
from kernels.attention import CAUSAL, Window, keys_seen, visible
from layers.specs import layer_specs
from model import without_values
from settings import deltas
from system import dry_run as plan
from page import variant_table
from records.__main__ import main
from common.errors import UserError

ROOT = Path(__file__).parent.parent


# ----- FLOPs

@pytest.mark.parametrize(
    "window",
    [
        CAUSAL, Window(1), Window(7), Window(100), Window(None, 3, 8), Window(None, 1, 5), Window(9, 2, 8),
        Window(50, 40, 8)
    ],
)
def test_the_keys_that_a_query_sees_are_counted(window):
    q, k = torch.arange(75)[:, None], torch.arange(75)[None]
    assert keys_seen(window, 75) == pytest.approx(visible(q, k, window).sum().item() / 75, rel=1e-12)


@pytest.mark.parametrize("ref", ["short/8", "short/17", "short/21", "short/33", "variants/6", "variants/7"])
def test_attention_s_flops_are_those_of_its_products(ref):
    """Three products of a forward and two backwards; 2 FLOPs for each channel of each key and value that a
    query sees."""
    s = deltas.resolve(ref, scale="micro").settings
    windows, length = schedule.windows(s, s.schedule.steps // 2), s.data.seq_len
    latent, heads = s.model.attn.latent, s.model.attn.num_heads
    query, value = (
        (latent.qk_nope_head_dim + latent.qk_rope_head_dim, latent.v_head_dim)
        if latent else 2 * [s.model.model_dim // heads]
    )
    q, k, pairs = torch.arange(length)[:, None], torch.arange(length)[None], 0
    for i, span in enumerate(schedule.layer_spans(layer_specs(s), windows)):
        if i not in s.model.attn.drop_layers:
            pairs += (
                visible(q, k, CAUSAL if span is None else Window(*span, s.model.attn.window.block)) .sum()
                .item()
            )
    expected = 3 * 2 * heads * (query + value) * pairs / length
    assert without_values(s).attention_flops_per_token(windows) == pytest.approx(expected, rel=1e-12)


RATIOS = {
    "variants/1": 1.001, "variants/2": 1.001, "variants/3": 0.807, "variants/4": 1.002, "variants/5": 0.945,
    "variants/6": 0.993, "variants/7": 0.967
}
LATER = {"variants/8": 1.0, "variants/9": 1.341, "variants/10": 1.0}  # over the parents of their own


@pytest.mark.parametrize("ref", RATIOS)
def test_flops_over_the_parent_s_at_full_width(ref):
    """By hand: 6 for each of a layer's weights, and 6 x 512.5 keys x channels of query and value."""
    d, layers, rows, context = 768, 12, 50304, 512.5
    dense, moe = 6 * (layers * 12 * d * d + rows * d), deltas.resolve(ref).settings.model.mlp.moe
    parent = dense + 6 * layers * context * 2 * d
    if moe:
        mlp = moe.num_experts * d + 2 * d * (moe.top_k * moe.hidden + moe.shared)
        mine = parent + 6 * 11 * (mlp - 8 * d * d)
    else:
        attn = deltas.resolve(ref).settings.model.attn
        latent, heads = attn.latent, attn.num_heads
        query = heads * (latent.qk_nope_head_dim + latent.qk_rope_head_dim)
        weights = d * query if latent.q_lora_rank is None else latent.q_lora_rank * (d + query)
        weights += (
            d * (latent.kv_lora_rank + latent.qk_rope_head_dim)
            + heads * (latent.qk_nope_head_dim + latent.v_head_dim) * latent.kv_lora_rank
            + heads * latent.v_head_dim * d
        )
        extra = weights - 4 * d * d + context * (query + heads * latent.v_head_dim - 2 * d)
        mine = parent + 6 * layers * extra
    cost, parent_cost = variant_table.counted(ref)[2], variant_table.counted("short/8")[2]
    assert parent_cost == pytest.approx(parent, rel=1e-12) and cost == pytest.approx(mine, rel=1e-12)
    assert round(cost / parent_cost, 3) == RATIOS[ref]


def test_flops_of_the_gated_mlp_the_mtp_module_and_the_narrow_router_over_their_parents():
    """By hand: three matrices of 2/3 of the width are two; a module has M, a block and the head again."""
    d, rows, keys = 768, 50304, keys_seen(Window(1024), 65536)
    parent = 6 * (12 * 12 * d * d + rows * d) + 6 * 12 * keys * 2 * d
    module = 6 * (14 * d * d + rows * d) + 6 * keys * 2 * d
    assert variant_table.counted("short/12")[2] == pytest.approx(parent, rel=1e-12)
    by_hand = {"variants/8": 1.0, "variants/9": (parent + module) / parent, "variants/10": 1.0}
    records = deltas.load_records()
    for ref, ratio in LATER.items():
        found = variant_table.counted(ref)[2] / variant_table.counted(records[ref].parent)[2]
        assert found == pytest.approx(by_hand[ref], rel=1e-12) and round(found, 3) == ratio


def test_the_weight_of_the_module_falls_after_ten_of_14_8_parts_of_the_run():
    plans = schedule.plan(deltas.resolve("variants/9").settings)
    assert [p.target_weights for p in plans] == 1267 * [(1.0, 0.3)] + 608 * [(1.0, 0.1)]
    assert 1267 == -(-1875 * 10 // 14.8)  # the first step that is not before 10 / 14.8 of all


def test_windows_that_grow_are_averaged_over_the_steps_and_the_plan_says_what_is_counted():
    s = deltas.resolve("short/33").settings
    model = without_values(s)
    _, attended = plan.flops(s, model)
    each = [model.attention_flops_per_token(p.shape.windows) for p in schedule.plan(s)[::554]]
    assert len(set(each)) == 3 and attended == pytest.approx(sum(each) / 3, rel=1e-3)
    assert plan.size(s).endswith(
        "(rows of 49,152 tokens, windows averaged over the steps, borders of documents not counted)"
    )
    assert "every earlier token of the row seen" in plan.size(deltas.resolve("short/8").settings)


# ----- the page of the variants

def test_the_page_of_the_variants_tells_what_the_command_prints(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["variants"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and out.strip() and out in (ROOT / "docs/variants.md").read_text()
    for ref, ratio in {**RATIOS, **LATER}.items():
        assert f"| {ref} |" in out and f"| {ratio:.3f} |" in out


def test_the_balance_of_a_committed_run_is_a_row_and_without_one_there_is_no_table():
    told = {
        "layers": [1, 2], "steps": [0.5, 0.7], "validation": [0.2, 0.3], "steps_mean": 0.6,
        "validation_mean": 0.25
    }
    lines = variant_table.balance_table({"variants/2": {"scale": "tiny", "steps": 176, "max_vio": told}})
    assert lines[-1] == "| variants/2 | tiny | 176 | 0.60 | 0.25 | 0.30 (layer 2) |"
    assert lines[-3].count("|") == lines[-2].count("|") == lines[-1].count("|")
    assert variant_table.balance_table({}) == []


def test_a_variant_without_measurements_says_so_and_a_lost_table_is_one_line(tmp_path):
    site = variant_table.gather()
    times = variant_table.read_times(variant_table.TIMES)
    text = variant_table.markdown({**site, "sweeps": []}, {**times, "rows": times["rows"][:1]})
    assert text.count("not measured") == 9 and "unresolved" not in text
    for content in (None, "{"):
        path = tmp_path / "times.json"
        if content:
            path.write_text(content)
        with pytest.raises(UserError, match="write it with bench/experts.py --out"):
            variant_table.read_times(path)


# ----- notes

def test_the_notes_of_deepseek_v3_s_form_name_what_differs_and_tell_the_settings():
    record, s = deltas.find_record("variants/4"), deltas.resolve("variants/4").settings
    moe = s.model.mlp.moe
    facts = {
        "activation": "relu^2", "dense layers": f"the first of {s.model.num_layers}",
        "shared width": f"{moe.shared}, twice",
        "sizes": f"{moe.num_experts} routed experts, {moe.top_k} of a token", "gains": "have none",
        "gate scale": f"{moe.route_scale:g}", "router init": "N(0, 1/sqrt(model_dim))",
        "balance": f"{moe.balance.rate:g} until the end"
    }
    lines = dict(
        line.removeprefix("- ").split(": ", 1) for line in record.notes.splitlines() if line.startswith("- ")
    )
    for name, words in facts.items():
        assert words in lines[name], name
    assert s.model.mlp.activation == "relu_sq" and moe.dense_layers == (0,) and moe.shared == 2 * moe.hidden
    assert s.model.norm == "rmsnorm" and not moe.balance.freeze_frac and s.model.init.zero_proj
