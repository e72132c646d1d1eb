"""`--rescue rewind`: go back to the last good checkpoint, and on with other batches.

    step = rewind.back(run, tripped, step)      # in the loop, when a guard or the detector has tripped

As in PaLM (section 5.1), which restarted from a checkpoint of about 100 steps before each spike and left out
the batches seen during the spike. What trips: a loss or gradient that is not finite, processes with different
parameters (system.guards), a rise of the loss that stays (system.spikes). The run takes the newest checkpoint
of its ring from before the step that may have caused it. The schedule begins again there; the token stream
does not: the batches that were read since the checkpoint are skipped. The clock goes on too, so discarded
steps and the way back count. All processes decide alike, where guards agree anyway.

A run with it is no record.
"""

import runlog
from system import checkpoint
from system.command_line import REWIND
from system.guards import Tripped
from system.run import Run
from system.spikes import SPIKE, Spikes

MOST = 10  # rewinds of a run; PaLM 540B had about 20 spikes


def back(run: Run, tripped: Tripped, step: int) -> int:
    """The step with which the run goes on. Collective.

    Raises `tripped` again where the run cannot go back: then it ends, but for a spike, which it may survive.
    step: before which `tripped` was raised.
    """
    if not isinstance(run.rescue, Spikes):
        raise tripped
    run.begins("going back to a checkpoint")
    run.progress.clear()
    if run.clock.began is None:
        run.clock.start()
    saver, what, found = run.checkpoints, tripped.fields, None
    saver.report(wait=True)
    if len(run.rewinds) < MOST:
        found = saver.before(what.get("since", what.get("step", step)))
    if found is None and what["what"] != SPIKE:
        raise tripped
    if found is None:
        why = f"after {MOST} rewinds" if len(run.rewinds) == MOST else "without a checkpoint from before it"
        run.rescue.load({})
        run.guards.finding = None
        saver.begin_at(step)
        tell(run, what, f"{what['message']}: {why} the run goes on")
        return step
    to, position = found.about["step"], run.position(step)
    run.batches.drain()
    digests = {str(rank): x for rank, x in run.stream.rank_digests(position).items()}
    rewinds = [*run.rewinds, (position, to)]
    checkpoint.restore(run, found)
    run.rewinds = rewinds
    run.open_stream(to, digests)
    run.rescue.load(run.kept_rescue or {})
    run.guards.begin_again(run.kept_norms)
    tokens = sum(plan.tokens for plan in run.plans[to:step])
    tell(
        run, what,
        f"{what['message']}: back from step {step} to step {to}, and on without the {step - to} batches in "
        f"between; {MOST - len(rewinds)} rewinds are left",
        what=REWIND, to=to, checkpoint=found.path.name, batches=step - to, tokens=tokens
    )
    saver.went_back(to)
    return to


def tell(run: Run, found: dict, message: str, **fields) -> None:
    """Log and say what was done. found: fields of the guard's event; fields: further ones, or others."""
    event = run.log.event("guard", **{"step": run.steps_done, **found, "message": message, **fields})
    run.world.say(*runlog.render(event))
