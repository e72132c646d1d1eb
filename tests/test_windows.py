"""Laws of the windows of records 12 to 33: at every step they are the originals' formulas, and so is what a
query sees."""

import pytest
import torch

import schedule
from golden_records import build
from kernels.attention import attend
from layers.specs import layer_specs
from model import GPT
from settings import deltas

RECORDS = [*range(12, 22), "21r", "21t", *range(22, 34)]
LONG = (0, 4, 7, 11)  # layers with the long window from record 20 on


def number(record):
    return int(str(record).rstrip("rt"))


def layers(record):
    """Layers with attention: record 17 took it from layer 7."""
    return [i for i in range(12) if i != 7 or number(record) < 17]


def definition(record, steps, step, final):
    """{layer: (rule, size)} as the record's formula has it, in exact arithmetic. Sizes in tokens, or in
    blocks of 128.

    final: in the validation after training. Rules: see `limits`.
    """
    n = number(record)
    if n == 12:
        return dict.fromkeys(layers(record), ("tokens", 1024))
    if n <= 15:  # 64 floor((64 + 1728 s/N) / 64)
        w = 64 * ((64 * steps + 1728 * step) // (64 * steps))
        return dict.fromkeys(layers(record), ("tokens" if n < 15 else "both", w))
    if n <= 18:  # floor((128 + 1728 s/N) / 128)
        return dict.fromkeys(layers(record), ("blocks", (128 * steps + 1728 * step) // (128 * steps)))
    if n <= 28:  # max(1, ceil(13.5 s/N)); short: half of it, at least 1
        long = max(1, -(-27 * step // (2 * steps)))
        return {i: ("blocks", long if n == 19 or i in LONG else max(1, long // 2)) for i in layers(record)}
    blocks = 13 if final and n >= 31 else (3, 7, 11)[3 * step // (1 + steps)]
    sizes = {i: blocks if i in LONG else blocks // 2 for i in layers(record)}
    if final and n == 33:
        sizes[11] = 20
    return {i: ("back", 128 * size) for i, size in sizes.items()}


def limits(rule, size):
    """The Span of a window: (q - k < tokens, q // 128 - k // 128 < blocks)."""
    return {"tokens": (size, None), "both": (size, -(-size // 128)), "blocks": (None, size),
            "back": (size + 1, None)}[rule]


def sees(rule, size, q, k, block):
    """Whether q sees k, documents and order aside, where a block has `block` tokens, not 128, and all else in
    proportion."""
    size = size if rule == "blocks" else size * block // 128
    if rule == "tokens":
        return q - k < size
    if rule == "both":
        return (q - k < size) & (q // block - k // block < -(-size // block))
    return q // block - k // block < size if rule == "blocks" else k >= q - size


@pytest.mark.feature(record="record")
@pytest.mark.parametrize("record", RECORDS)
def test_windows_of_every_step_and_layer_are_the_records_formula(record):
    s = deltas.resolve(f"short/{record}").settings
    steps, plans = s.schedule.steps, schedule.plan(s)
    for step in range(steps + 1):
        for final, windows in ((False, schedule.windows(s, step)),
                               (step == steps, schedule.validation_windows(s, step))):
            spans, expected = (
                schedule.layer_spans(layer_specs(s), windows),
                definition(record, steps, step, final),
            )
            assert {i: tuple(spans[i]) for i in expected} == {i: limits(*w) for i, w in expected.items()}, (
                step,
                final,
            )
            assert windows.long_blocks == sizes_so_far(record, steps, step, final), (step, final)
        assert step == steps or plans[step].shape.windows == schedule.windows(s, step)


def sizes_so_far(record, steps, step, final):
    """Blocks of the long window in every stage that was reached; none before record 29."""
    if number(record) < 29:
        return ()
    reached = tuple(b for i, b in enumerate((3, 7, 11)) if i * (1 + steps) <= 3 * step)
    return reached + ((13,) if final and number(record) >= 31 else ())


@pytest.mark.feature("model.attn.window.growth")
@pytest.mark.parametrize(
    "record, steps",
    [
        (18, [103, 206, 309, 412, 515, 618, 721, 824, 927, 1030, 1133, 1236, 1339]),
        *(
            (r, [132, 263, 394, 525, 656, 787, 918, 1049, 1181, 1312, 1443, 1574, 1705])
            for r in (21, "21r", "21t")
        ),
    ],
)
def test_steps_at_which_the_block_window_grows(record, steps):
    s = deltas.resolve(f"short/{record}").settings
    blocks = [schedule.windows(s, i).long.blocks for i in range(s.schedule.steps + 1)]
    assert blocks[0] == 1 and blocks[-1] == 14
    assert [i for i in range(1, len(blocks)) if blocks[i] != blocks[i - 1]] == steps


def random_text(s, tokens=180):
    """Rows (3, T) of ids in which documents begin: hardly any, one in about 50 tokens, one in about 8. And
    BOS."""
    g = torch.Generator().manual_seed(5)
    starts = torch.rand(3, tokens, generator=g) < torch.tensor([[1 / tokens], [1 / 50], [1 / 8]])
    bos = s.model.vocab_size - 1
    return torch.where(starts, bos, torch.randint(bos, (3, tokens), generator=g)), bos


def visible_sets(context, tokens):
    """Per layer (R, T, T): with equal logits and one-hot values a head's output shows which keys were
    averaged."""
    rows, length = tokens.shape
    zero, values = torch.zeros(rows, length, 1, 8), torch.eye(length).expand(rows, length, length)[:, :, None]
    views = [meta and meta.view for meta in context.layers]
    sets = {id(view): attend(zero, zero, values, view)[:, :, 0] > 0 for view in views if view is not None}
    return [sets.get(id(view)) for view in views]


@pytest.mark.feature(record="record")
@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("backend", ["dense", "banded", "documents"])
def test_every_query_sees_what_the_records_formula_lets_it_see(record, backend):
    """Through the model's own views at the micro scale, where lengths are a sixteenth: blocks have 8
    tokens."""
    s = deltas.resolve(f"short/{record}", scale="micro", sets=[f"system.attention={backend}"]).settings
    model, (tokens, bos) = GPT(s).eval(), random_text(s)
    model.initialise(0)
    documents, q, k = (
        (tokens == bos).cumsum(1), torch.arange(tokens.size(1))[:, None], torch.arange(tokens.size(1))
    )
    allowed = (k <= q) & (documents[:, :, None] == documents[:, None, :])
    steps, before = s.schedule.steps, None
    for step in range(steps + 1):
        expected = definition(record, steps, step, step == steps)
        if expected != before:
            windows = schedule.validation_windows(s, step)
            model.update_yarn(windows)
            seen = visible_sets(model.context(tokens, bos, windows), tokens)
            for i, (rule, size) in expected.items():
                assert torch.equal(seen[i], allowed & sees(rule, size, q, k, 8)), (step, i)
        before = expected


@pytest.mark.feature("model.attn.scale", "model.attn.rope.yarn")
@pytest.mark.parametrize("record", range(29, 34))
def test_the_softmax_scale_of_every_window_is_the_records_and_the_last_is_of_13_blocks(record):
    s, model = build(
        f"short/{record}", model__model_dim=24, model__vocab_size=32, data__max_doc_len=16, data__seq_len=16,
        data__tokens_per_rank=16, validation__seq_len=16, validation__tokens=128
    )
    scales, before = [], None
    for step in range(s.schedule.steps + 1):
        windows = schedule.validation_windows(s, step)
        if windows != before:
            model.update_yarn(windows)
            scales.append(
                round(model.context(torch.zeros(1, 16, dtype=torch.long), 31, windows).layers[0].scale, 6)
            )
        before = windows
    assert scales == ([0.12] * 3 if record < 31 else [0.1, 0.116946, 0.127518, 0.131778])
    model.update_yarn(schedule.windows(s, 0))
    assert model.rotary_tables.scales[0] == s.model.attn.scale  # and back
