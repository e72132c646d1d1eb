"""Losses over a part of the classes, each against loops over tokens and classes: the sampled softmax with its
correction (record 92), and canonical masking (record 91)."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import schedule
from common.errors import UserError
from data import prefix, seams
from data.batch import Documents
from data.candidates import Sweep
from data.corpus import sample_corpus
from data.stream import validation_rows
from optim import Optimizer
from small_models import BOS, build, settings, tokens
from system import preflight
from system.hooks import hooks_of
from system.sampler import Sampler
from system.seams import Seams
from system.world import World
from train_gpt import train_step, validation_loss

CLASSES = 1280  # rows of the head: the embedded corpus has 1257 tokens
SIZE = 512  # candidates of a rank


def context_of(model, x):
    windows = schedule.windows(model.settings, 0)
    model.update_yarn(windows)
    return model.context(x, BOS, windows)


def class_logits(model, x):
    """Logits (R, T, V) over all classes."""
    with torch.no_grad():
        return model(x, context=context_of(model, x))


# ----- sampled softmax

def drawn(share, x):
    """(candidates, corrections) of a step in which each logical rank has one row of x (8, T + 1)."""
    s = settings("short/92", f"model.head.candidates.log_q={share}")
    rows = x.numpy()
    return Sampler(s, World(s)).draw(SIZE, [Documents(1, x.size(1) - 1, row[1:]) for row in rows])


def test_candidates_without_room_for_the_first_batch_are_refused_before_the_model_is_made():
    """A rank's first batch at micro has 32 targets, not one token 32 times."""
    corpus, ranks = sample_corpus(), range(8)
    s = settings("short/92", "model.head.candidates.sizes=[[1], [2], [2, 2, 2], []]")
    with pytest.raises(UserError, match="model.head.candidates.sizes: rank 0 has [0-9]+ distinct targets"):
        preflight.check_candidates(s, corpus, ranks, schedule.plan(s))
    for enough in (settings("short/92"), settings("short/33")):
        preflight.check_candidates(enough, corpus, ranks, schedule.plan(enough))


@pytest.mark.feature("model.head.candidates.log_q", "model.head.candidates")
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_sampled_softmax_with_log_q_token_by_token(share):
    """A logit loses `log_q` times the log of the chance of its class, which is 1 for a target."""
    x = tokens(8, 25)
    model = build("short/92", f"model.head.candidates.log_q={share}")
    logits = class_logits(model, x[:, :-1])
    candidates, corrections = drawn(share, x)
    assert (corrections is None) == (share == 0)
    with torch.no_grad():
        found = model(x[:, :-1], x[:, 1:], context_of(model, x[:, :-1]), candidates=candidates,
                      corrections=corrections)
    for r in range(len(x)):
        of_rank = set(candidates[r].tolist())
        targets = set(x[r, 1:].tolist())
        assert targets <= of_rank and len(of_rank) == SIZE
        chance = (SIZE - len(targets)) / (CLASSES - len(targets))
        for t in range(0, 24, 5):
            total = sum(
                math.exp(logits[r, t, c] - (0.0 if c in targets else share * math.log(chance)))
                for c in of_rank
            )
            assert abs(found[r, t] - (math.log(total) - logits[r, t, x[r, t + 1]])) < 1e-10


@pytest.mark.feature("model.head.candidates.log_q")
def test_with_all_of_log_q_the_normaliser_is_that_of_all_classes_on_average():
    """A sweep visits each class equally often: each non-target class is drawn with the same chance."""
    x = tokens(8, 25)
    weights = torch.rand(CLASSES, generator=torch.Generator().manual_seed(2), dtype=torch.float64).exp()
    s = settings("short/92", "model.head.candidates.log_q=1")
    sampler, targets = Sampler(s, World(s)), x[0, 1:].numpy()
    sampler.sweeps, sampler.world.ranks = [Sweep(CLASSES, 0)], [0]
    with_log_q, without = [], []
    for _ in range(400):
        candidates, corrections = sampler.draw(SIZE, [Documents(1, 24, targets)])
        with_log_q.append((weights[candidates[0]] * corrections[0].exp()).sum())
        without.append(weights[candidates[0]].sum())
    assert float(np.mean(with_log_q)) == pytest.approx(float(weights.sum()), rel=5e-3)
    assert float(np.mean(without)) < 0.5 * float(weights.sum())


@pytest.mark.feature("model.head.prefix", "model.head.candidates", "model.head.mtp")
@pytest.mark.parametrize("microbatch", [2, 8])
def test_the_gradient_of_a_step_of_record_92_is_that_of_its_terms_token_by_token(microbatch):
    """Each logical rank has its own candidates. The second target is the prefix of the next token, and counts
    if it is a candidate."""
    # the gradient of all micro-batches in p.grad: the rows of a table are kept apart until the reduction
    model = build("short/92", "system.table_gradients=dense", "system.table_parallel=false")
    s, plan = model.settings, schedule.plan(model.settings)[0]
    size, weights = plan.shape.candidates, plan.target_weights
    batch = tokens(8, s.data.tokens_per_rank[0] + 1)
    inputs, targets, table = batch[:, None, :-1], batch[:, None, 1:], prefix.of_tokenizer("sample", CLASSES)
    loss, counted = 0.0, 0
    for rank in range(8):
        x, y = inputs[rank], targets[rank, 0]
        kept = torch.from_numpy(Sweep(CLASSES, rank).candidates(y.numpy(), size))
        logits = model(x, context=context_of(model, x))[0]
        goals = [(weight, y[n:]) for n, weight in enumerate(weights)]  # of the first tokens of the row
        for weight, goal in [*goals, (plan.prefix_weight, torch.from_numpy(table)[y])]:
            place = kept == goal[:, None]
            held = place.any(1)
            terms = F.cross_entropy(logits[:len(goal), kept], place.int().argmax(1), reduction="none")
            loss = loss + weight * terms[held].sum()
        counted += held.sum().item()
    assert 0 < counted < batch.numel() - 8 and len(weights) == 3 and size == 256
    parameters = list(model.parameters())
    expected = torch.autograd.grad(loss / 8, parameters, materialize_grads=True)
    optimizer, found = Optimizer(model, s), []
    run = SimpleNamespace(
        s=s, model=model, compiled=model, hooks=hooks_of(model, optimizer), optimizer=optimizer, workers=None,
        guards=None, ranks_per_microbatch=microbatch, corpus=SimpleNamespace(bos=BOS), world=World(s),
        sampler=Sampler(s, World(s)), prefixes=lambda device: torch.from_numpy(table)
    )
    documents = [Documents(1, x.size(1), y[0].numpy()) for x, y in zip(inputs, targets)]
    train_step(run, plan, inputs, targets, documents,
               before_reduction=lambda: found.extend(p.grad.clone() for p in parameters))
    for a, b in zip(expected, found, strict=True):
        assert (a - b).abs().max() <= 1e-10 * max(a.abs().max(), 1e-3)


# ----- canonical masking

@pytest.mark.feature("validation.canonical_mask")
def test_a_token_that_cannot_follow_has_the_logit_of_minus_60():
    x = tokens(2, 25)
    bits = seams.of_tokenizer("sample", CLASSES)
    p, target = np.argwhere(np.unpackbits(bits, axis=1, bitorder="little"))[9_000].tolist()
    x[0, 6:8] = torch.tensor([p, target])  # a target that cannot follow
    model = build("short/91").eval()
    logits, context = class_logits(model, x[:, :-1]), context_of(model, x[:, :-1])
    context.impossible = torch.from_numpy(bits)
    with torch.no_grad():
        found = model(x[:, :-1], x[:, 1:], context)
    masked_targets = 0
    for r in range(2):
        for t in range(24):
            before, target = x[r, t].item(), x[r, t + 1].item()
            z = [-60.0 if bits[before, c // 8] >> (c % 8) & 1 else logits[r, t, c].item()
                 for c in range(CLASSES)]
            expected = math.log(sum(map(math.exp, z))) - z[target]
            assert abs(found[r, t].item() - expected) < 1e-10
            masked_targets += z[target] == -60.0
    assert masked_targets


@pytest.mark.feature("validation.canonical_mask")
def test_only_the_last_validation_of_a_run_masks():
    """A process of its own makes the table while the run trains."""
    found, corpus = {}, sample_corpus()
    for mask in ("true", "false"):
        model = build("short/91", f"validation.canonical_mask={mask}")
        s = model.settings
        world = World(s)
        run = SimpleNamespace(
            s=s, world=world, plans=schedule.plan(s), model=model, compiled=model, corpus=corpus,
            hooks=hooks_of(model), between_chunks=lambda: None,
            rows=validation_rows(corpus, 512, 64, range(8)), seams=Seams(s, corpus, world)
        )
        if mask == "true":
            run.seams.start()
            run.seams.collect()
            run.seams.close()
            assert np.array_equal(run.seams.table.numpy(), seams.of_tokenizer("sample", CLASSES))
        last = len(run.plans)
        found[mask] = [validation_loss(run, step) for step in (0, last - 1, last)]
    assert found["true"][:2] == found["false"][:2]
    assert found["true"][2] < found["false"][2]  # possible tokens share the chance of impossible ones
