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
    plans = schedule.plan(s)
    print("\nschedule (step: learning-rate factor, Muon momentum" + (", window" + (" long / short" if split(s) else "") if plans[0].windows else "") + "):")
    for i in sorted({*range(0, len(plans), max(1, len(plans) // 8)), len(plans) - 1}):
        print(f"  {i:6d}: {plans[i].lr_factor:.4f}  {plans[i].momentum:.4f}" + windows_text(s, plans[i].windows))
    if plans[0].windows:
        final = schedule.validation_windows(s, len(plans))
        last = f", last layer {span_text(final.last)}" if final.last != final.long else ""
        print(f"  final validation:{windows_text(s, final)}{last}")
    validations = sum(schedule.validates(s, i) for i in range(len(plans) + 1))
    rows = s.data.tokens_per_rank // s.data.seq_len
    print(f"\n{len(plans)} steps x {tokens_per_step(s):,} tokens = {len(plans) * tokens_per_step(s):,} tokens; "
          f"{validations} validations of {s.validation.tokens:,} tokens")
    print(f"shapes: training {rows} row{'s' if rows > 1 else ''} of {s.data.seq_len} tokens per logical rank; validation rows of "
          f"{s.validation.seq_len}; {s.model.attn.num_heads} heads of {head_dim(s)}, {padded_vocab(s)} classes")
    trained = len({p.windows for p in plans})
    validated = len({schedule.validation_windows(s, i) for i in range(len(plans) + 1) if schedule.validates(s, i)})
    print(f"compiled before the clock: {trained} training and {validated} validation graphs"
          + (", one for each window (FlexAttention: one for all)" if plans[0].windows else ""))
    print(size(s))


def span_text(span):
    if span.blocks is None:
        return f"{span.tokens} tokens"
    blocks = f"{span.blocks} block" + ("s" if span.blocks > 1 else "")
    return blocks if span.tokens is None else f"{blocks} and {span.tokens} tokens"


def split(s):
    """Do some layers see a shorter window?"""
    return s.model.attn.window is not None and s.model.attn.window.long_layers is not None


def windows_text(s, windows):
    if windows is None:
        return ""
    return f"  {span_text(windows.long)}" + (f" / {span_text(windows.short)}" if split(s) else "")


def size(s):
    """Parameters, those that one token meets, and FLOPs, in one line."""
    from model import without_values
    model = without_values(s)
    active = model.num_active()
    return (f"{model.num_parameters():,} parameters" + (f", {active:,} active in a token" if s.model.mlp.moe else "")
            + f"; {model.flops_per_token() / 1e6:,.0f} MFLOP a token in training, without queries times keys")
