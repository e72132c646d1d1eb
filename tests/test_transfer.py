"""Every slot of Muon's chain, every direction, rule of head or tables and wrapper goes on any record by one
flag, or is refused with a reason that names a setting and what to do."""

import re
from types import SimpleNamespace

import pytest
import torch

import schedule
import small_models
from common.errors import UserError
from model import GPT
from optim import Optimizer
from settings import deltas
from system.dry_run import wrapper_remarks
from system.hooks import hooks_of, reading
from test_chain import SLOTS, TWELVE

RECORDS = ("short/33", "short/57", "short/92", "medium/18", "optimizer/36")
BALL = ("model.init.zero_proj=false",)
FLAGS = {f"optim.muon.{flag}": needs for flag, *needs in SLOTS.values()} | {
    "optim.muon.smoothing={}": (), "optim.muon.slow={start=1}": (), "optim.muon.convergent=true": (),
    "optim.muon.polar_express_long=true": (), "optim.muon.norm=schatten4": (),
    "optim.muon.scale=match_rms": (),
    "optim.muon.coefficients=[[3.0, -3.0, 1.0]]": (),
    "optim.muon.adam={}": (), "optim.muon.soap_h={}": (), "optim.muon.kl_soap={}": (),
    "optim.muon.shampoo={}": (), "optim.muon.psgd={}": (), "optim.muon.muown={}": (),
    "optim.lm_head.eigenbasis={start=1}": (), "optim.lm_head.kfac={start=0, apply=1, full=3}": (),
    "optim.embed.master=1": ("system.precision=record",),
    "optim.ema_nesterov={start=1}": (), "optim.outer={period=1}": (), "optim.outer={workers=8}": (),
    "optim.rre={start=1, points=3, every=1}": (), "optim.tail_ema={start=1}": (),
    "optim.trail_delta={start=1, every=1}": (), "optim.broad_delta={start=1, every=1}": (),
    "optim.phase_readout={first=1, second=2}": (), "optim.tail_velocity={start=1}": (),
    "optim.reference_readout={reference=1, start=2}": (), "optim.anchor={start=1, ramp_start=0}": ()
}
# a reason names a setting, by a path, and a way out
REASON = re.compile(r"(optim|model|schedule|system|numerics)\.\w[\w.]*.*"
                    r"(set |leave |keep |switch|give |choose|exclude|--without)", re.S)
ONES = [(flag, RECORDS[i % len(RECORDS)]) for i, flag in enumerate(FLAGS)]
PRODUCT = [(flag, ref) for flag in FLAGS for ref in RECORDS]


def resolved(flag, ref):
    """Settings of a record at micro with the flag, or a message that refuses it."""
    sets = ["system.precision=float64", *FLAGS[flag], flag]
    sets = sets[1:] if any(x.startswith("system.precision") for x in FLAGS[flag]) else sets
    try:
        return deltas.resolve(ref, scale="micro", sets=sets).settings, ""
    except UserError as error:
        return None, str(error)


def trained(s):
    """Loss (float) of what is read after two steps with these settings, by hooks and optimizer."""
    model, plans = GPT(s), schedule.plan(s)
    model.initialise(0)
    optimizer = Optimizer(model, s)
    hooks, x = hooks_of(model, optimizer), small_models.tokens(1, 25)
    for hook in hooks:
        hook.reset()
    for i in range(2):
        for hook in hooks:
            hook.before_forwards(plans[i])
        small_models.forward_all(optimizer, model, s, x, i)
        for hook in hooks:
            hook.before_update(plans[i], SimpleNamespace(total=lambda sums: sums))
        optimizer.step(plans[i])
        for hook in hooks:
            hook.after_update(plans[i])
    with torch.no_grad(), reading(hooks, 2):
        context = model.context(x[:, :-1], small_models.BOS, schedule.windows(s, 1))
        return model(x[:, :-1], x[:, 1:], context).mean().item()


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_plans_on_every_record_or_is_refused_with_a_reason(flag):
    taken = 0
    for ref in RECORDS:
        s, said = resolved(flag, ref)
        if s is None:
            assert REASON.search(said), (ref, said)
            continue
        taken += 1
        assert len(schedule.plan(s)) == s.schedule.steps and [*wrapper_remarks(s)] is not None
    assert taken, flag


def check(flag, ref):
    s, _ = resolved(flag, ref)
    if s is not None and (s.optim.outer is None or s.optim.outer.workers == 1):  # workers: test_wrappers
        loss = trained(s)
        assert 0 < loss < 20, loss  # and a number


@pytest.mark.parametrize("flag, ref", ONES)
def test_a_flag_trains_on_a_record(flag, ref):
    check(flag, ref)


@pytest.mark.slow
@pytest.mark.parametrize("flag, ref", PRODUCT)
def test_every_flag_trains_on_every_record(flag, ref):
    check(flag, ref)
