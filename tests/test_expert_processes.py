"""Experts shared out over processes give the gradients and the training of one process."""

import json

import pytest
import torch

from system import command_line
import process_group
import train_gpt
from model import GPT
from optim import Optimizer
from system.comm import communication
from system.world import World
from runlog import read_chain
from small_experts import REF, SMALL, build, close, settings, tokens

PARALLEL = "system.expert_parallel=true"
WILD = "model.mlp.moe.balance.rate=1"  # so fast that experts lie idle in some steps


def share_of_gradients(path, sets, precision, flooded):
    """Write losses, gradients and clip factor of one batch; for several processes a target of
    `process_group.call`, for one called by the test."""
    s = settings(SMALL, "optim.grad_clip=0.01", "system.device=cpu", *sets, precision=precision)
    world = World(s)
    model, whole = GPT(s), build(precision=precision)
    model.initialise(0)
    parts = whole.state_dict()
    for i, m in model.mixtures():
        for kind in ("c_fc", "c_proj"):
            parts[f"blocks.{i}.mlp.{kind}"] = parts[f"blocks.{i}.mlp.{kind}"].chunk(m.world)[m.rank]
    model.load_state_dict(parts)
    for router in model.routers():
        router.bias[list(flooded)] += 100.0
    mine = slice(8 // world.size * world.rank, 8 // world.size * (world.rank + 1))
    optimizer = Optimizer(model, s, communication(s, world.rank, world.size))
    optimizer.expect(last=False)
    losses = model(tokens(8)[mine], tokens(8, seed=2)[mine])
    (losses.sum() / (8 * 24)).backward()
    local = {name: p.grad.clone() for name, p in model.named_parameters()}
    for bank in optimizer.banks:
        if bank.comm.reduces:
            optimizer.launch(bank)
    factor = optimizer.clip_factor(optimizer.banks, [optimizer.reduced(bank)[1] for bank in optimizer.banks])
    stacks = model.tokens_per_expert() if model.mixtures()[0][1].world > 1 else {}
    gradients = {name: world.gather(g) if name in stacks else world.total(g) for name, g in local.items()}
    if world.main:
        torch.save({"losses": world.gather(losses.detach()), "factor": factor, "gradients": gradients}, path)
    else:
        world.gather(losses.detach())


@pytest.mark.parametrize(
    "precision, backend, flooded, tolerance",
    [("float64", "padded", (), 1e-12), ("float32", "grouped", (0, 1), 1e-5)],
    ids=["padded", "grouped_flooded"]
)
@pytest.mark.parametrize("world, comm", [(2, "sharded"), (4, "replicated")])
def test_shared_out_experts_give_the_gradients_of_one_process(
    world, comm, precision, backend, flooded, tolerance, tmp_path
):
    """Losses, all gradients, and the norm that clips; also where all rows go to the first process and none to
    others."""
    sets = [f"system.experts={backend}"]
    share_of_gradients(tmp_path / "1.pt", sets, precision, flooded)
    process_group.call(
        world, share_of_gradients, tmp_path / "n.pt", [*sets, PARALLEL, f"system.comm={comm}"], precision,
        flooded
    )
    one, several = torch.load(tmp_path / "1.pt"), torch.load(tmp_path / "n.pt")
    assert close(several["losses"], one["losses"], tolerance) and close(
        several["factor"], one["factor"], tolerance
    )
    for name, g in one["gradients"].items():
        assert g.any() and close(several["gradients"][name], g, tolerance), name
    norm = torch.stack([g.double().norm() for g in one["gradients"].values()]).norm()
    assert close(one["factor"], 0.01 / norm, 1e-6)


def training(args):
    train_gpt.main(*command_line.command_line(args))


def trained(folder, world, *args):
    """(curve, parameters and biases, loads of the experts, checksums of gradients) of a training by `world`
    processes."""
    sets = [
        "system.device=cpu", "system.precision=float64", "schedule.steps=3", "validation.tokens=4096", SMALL,
        WILD
    ]
    changes = [word for change in (*sets, *args) for word in ("--set", change)]
    argv = [REF, "--scale", "micro", *changes, "--save-checkpoint", "--out", str(folder)]
    process_group.call(world, training, argv)
    run = next(folder.glob("*/summary.json")).parent
    events = read_chain(run / "run.jsonl")
    told = [e for e in events if e["kind"] == "experts" and "load" in e][-1]
    load = [told[name] for name in ("load", "val_load", "max_vio_steps", "max_vio_val")]
    gradients = next(e["gradients"] for e in events if e["kind"] == "probe")
    return (
        json.loads((run / "summary.json").read_text())["curve"], torch.load(run / "checkpoint.pt")["model"],
        load, gradients
    )


@pytest.mark.parametrize("clip, runs", [
    ((), [(4, (PARALLEL,))]),
    (("optim.grad_clip=0.01",), [(2, (PARALLEL,)), (2, ()), (2, (PARALLEL, "system.comm=replicated"))])],
                         ids=["unclipped", "clipped"])
def test_trainings_by_2_and_4_processes_equal_those_by_one(clip, runs, tmp_path):
    """Losses, parameters, biases and loads after three steps of the trainer; experts shared out, or all on
    each process."""
    one = trained(tmp_path / "one", 1, *clip)
    assert any(0 in loads for loads in one[2][0])
    for i, (world, sets) in enumerate(runs):
        curve, state, load, gradients = trained(tmp_path / str(i), world, *clip, *sets)
        assert load == one[2] and all(abs(a - b) < 1e-9 for (_, a), (_, b) in zip(curve, one[0]))
        assert set(state) == set(one[1]) and all(
            (state[name] - one[1][name]).abs().max() < 1e-9 for name in state
        )
        assert gradients.keys() == one[3].keys()
        assert all(
            gradients[name] == pytest.approx(marks, rel=1e-6, abs=1e-9) for name, marks in one[3].items()
        )
