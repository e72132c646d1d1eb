"""`train_gpt.py RECORD --plan`: what a run would do. Only the parameter count imports torch."""

import signal

import deltas
import schedule
from settings import head_dim, padded_vocab, tokens_per_step


def print_plan(resolved):
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--plan | head` ends quietly
    s, record = resolved.settings, resolved.record
    print(f"{record.ref}  {record.title}  (scale {resolved.scale})")
    for line in [*resolved.changes, *resolved.report]:
        print("  " + line)
    print(f"\nml_hash {deltas.ml_hash(s)}  system_hash {deltas.system_hash(s)}")
    print("\nsettings that differ from the defaults (record 1):")
    default = deltas.flat(type(s)())
    for path, value in deltas.flat(s).items():
        if value != default.get(path, ...):
            print(f"  {path} = {deltas.show(value)}")
    print("\nschedule (step: learning-rate factor, Muon momentum):")
    plans = schedule.plan(s)
    for i in sorted({*range(0, len(plans), max(1, len(plans) // 8)), len(plans) - 1}):
        print(f"  {i:6d}: {plans[i].lr_factor:.4f}  {plans[i].momentum:.4f}")
    validations = sum(schedule.validates(s, i) for i in range(len(plans) + 1))
    rows = s.data.tokens_per_rank // s.data.seq_len
    print(f"\n{len(plans)} steps x {tokens_per_step(s):,} tokens = {len(plans) * tokens_per_step(s):,} tokens; "
          f"{validations} validations of {s.validation.tokens:,} tokens")
    print(f"shapes compiled: training (rows, {s.data.seq_len}) with {rows} rows per logical rank; validation "
          f"(rows, {s.validation.seq_len}); {s.model.attn.num_heads} heads of {head_dim(s)}, {padded_vocab(s)} classes")
    print(f"{parameters(s):,} parameters")


def parameters(s):
    from model import count_parameters
    return count_parameters(s)
