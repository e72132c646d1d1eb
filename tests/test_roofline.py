"""Laws of the predicted times: work is what the settings say, divided among GPUs and kept by every card, and
the range agrees with estimates made by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from settings import deltas
from settings.model import padded_vocab
from system import dry_run, memory, roofline

ROOT = Path(__file__).parent.parent


def settings(ref, **how):
    return deltas.resolve(ref, **how).settings


# milliseconds of a step on one H200, eight logical ranks, estimated by hand before this program was written
BY_HAND = {"short/11": (870, 980), "short/21": (600, 680), "short/33": (540, 640)}


@pytest.mark.parametrize("ref", BY_HAND)
def test_the_range_of_an_h200_agrees_with_the_estimate_by_hand(ref):
    least, most = roofline.expected(roofline.milliseconds(settings(ref), roofline.card("h200")))
    low, high = BY_HAND[ref]
    assert least < (low + high) / 2 < most
    assert least < 1.05 * low and 0.95 * high < most
    assert most < 1.5 * least  # a range that says something


def test_products_are_those_of_the_matrices_and_of_newton_schulz():
    s, d = settings("short/11"), 768
    done = roofline.work(s)
    model = 6 * (12 * (4 * d * d + 2 * 4 * d * d) + padded_vocab(s) * d) * 8 * 65536
    squares = 48 * 5 * 6 * d**3
    wide = 24 * 5 * (4 * d * d * 4 * d + 2 * d**3)
    assert done.products == model + squares + wide and done.fp8 == done.communication == 0
    assert done.attention == pytest.approx(7 * 12 * 2 * d * 1025 / 2 * 8 * 65536)  # rows of 1,024, causal


def test_work_is_shared_by_the_gpus_and_what_is_sent_is_not_more_than_two_passes():
    s = settings("short/33")
    alone, shared = roofline.work(s), roofline.work(s, 8)
    assert shared.products == pytest.approx(alone.products / 8, rel=0.01)  # 11 matrices among 8: some wait
    assert shared.fp8 == alone.fp8 / 8
    assert shared.attention == pytest.approx(alone.attention / 8)
    assert alone.bytes / 8 < shared.bytes < alone.bytes / 4  # parameters and gradients are there eight times
    assert 0 == alone.communication < shared.communication < 2 * 4 * 272e6


def test_a_card_without_fp8_units_does_the_same_products_in_bfloat16():
    s, a100 = settings("short/33"), roofline.card("a100")
    found, done = roofline.milliseconds(s, a100), roofline.work(s)
    assert found["FP8 products"] == 0
    assert found["products"] == pytest.approx((done.products + done.fp8) / a100.bf16 / 1e9)


def test_fp8_in_the_mlps_moves_their_forward_products_only():
    plain = roofline.work(settings("short/33"))
    for features, products in (
        (["numerics.fp8_mlp"], 1),
        (["numerics.fp8_mlp", "numerics.fp8_mlp.c_proj"], 2),
    ):
        narrow = roofline.work(settings("short/33", with_=features))
        assert narrow.products + narrow.fp8 == pytest.approx(plain.products + plain.fp8)
        assert narrow.fp8 - plain.fp8 == pytest.approx(products * 11 * 2 * 768 * 3072 * 8 * 49152)


def test_rounded_products_run_at_the_rate_of_16_bits_and_the_rest_in_float32():
    """numerics.products: same FLOPs, fewer bytes than float32, more than where everything has 16 bits."""
    kinds = ("record", "bf16_matmul", "float32")
    half, mixed, whole = (settings("short/11", sets=[f"system.precision={kind}"]) for kind in kinds)
    work = {s: roofline.work(s) for s in (half, mixed, whole)}
    muon = roofline.work(half).products - work[mixed].products
    assert work[whole].products == work[half].fp32 == 0 and work[whole].fp32 == work[half].products
    assert work[mixed].fp32 == pytest.approx(muon) and 0 < muon < 0.1 * work[mixed].products
    assert work[half].bytes < work[mixed].bytes < work[whole].bytes
    of = roofline.card("h200")
    at_peak = roofline.milliseconds(mixed, of)
    assert at_peak["products"] == pytest.approx(work[mixed].products / of.bf16 / 1e9)
    assert at_peak["FP32 products"] == pytest.approx(work[mixed].fp32 / of.fp32 / 1e9)
    assert at_peak["attention"] == pytest.approx(work[mixed].attention / of.fp32 / 1e9)


def test_the_named_card_s_memory_is_judged():
    s = settings("short/33")
    small, large = ([*dry_run.held(s, name)][1:] for name in ("4090", "h200"))
    assert len(small) == len(large) == 1 and small != large
    assert small[0].startswith("  4090, 24 GiB: 1 logical rank a forward") and "blocks recomputed" in small[0]
    assert large[0].startswith("  H200, 141 GiB: 1 logical rank a forward; ")
    shared = [*dry_run.held(s, "h200", 8)][1]
    assert shared.startswith("  each of 8 x H200, 141 GiB: 1 logical rank a forward; ")
    fitted, of_eight = memory.fit(s, 1, 141 * 2**30, 8)
    assert dry_run.mib(of_eight.total) in shared


def test_a_measured_step_on_the_card_stands_next_to_the_estimate(tmp_path):
    row = {"record": "short/33", "warm": {"ms_per_step": 612.3, "device": "NVIDIA H200"}}
    table = {"scale": "full", "settings": [], "processes": 1, "rows": [row]}
    (tmp_path / "nvidia-h200").mkdir()
    (tmp_path / "nvidia-h200/steps.json").write_text(json.dumps(table))
    ask = lambda ref, name, gpus: [*roofline.measured(deltas.resolve(ref), name, gpus, tmp_path)]
    assert ask("short/33", "h200", 1) == [
        "  measured: 612.3 ms a step on NVIDIA H200 (bench/results/nvidia-h200/steps.json)"
    ]
    assert not ask("short/33", "h100", 1) and not ask("short/33", "h200", 8)
    assert not ask("short/32", "h200", 1)


def test_what_cannot_be_estimated_is_one_line():
    with pytest.raises(UserError, match="--card h300: choose from a100, h100"):
        roofline.card("h300")
    exact = settings("short/33", sets=["system.precision=float64"])
    with pytest.raises(UserError, match="no card has a published peak for float64 here"):
        roofline.milliseconds(exact, roofline.card("h200"))
    done = subprocess.run(
        [sys.executable, "train_gpt.py", "short/33", "--card", "h200"], cwd=ROOT, capture_output=True,
        text=True
    )
    assert done.returncode == 2
    assert done.stderr == "error: --card h200 is for estimates: add --dry-run, or leave it out\n"


def test_the_dry_run_prints_the_estimate_and_says_that_it_is_one():
    done = subprocess.run(
        [sys.executable, "train_gpt.py", "short/11", "--dry-run", "--card", "h200", "--nproc", "8"], cwd=ROOT,
        capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "estimate (not measured) of a step on 8 x H200, 1 of 8 logical ranks each:" in done.stdout
    assert "communication" in done.stdout and "assumes: compiled" in done.stdout
