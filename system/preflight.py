"""Checks before a run begins, with messages for what this machine cannot do."""

import dataclasses
import sys
from argparse import Namespace

import numpy as np
import torch

from common.errors import UserError
from data.candidates import require_room
from data.corpus import corpus_for, default_cache
from data.shards import Corpus
from data.stream import Stream, require_shards, stream_arguments
from kernels.device import FP8_SINCE, capability, refusal
from model import GPT
from schedule import StepPlan, plan, shapes
from settings import Settings
from settings.data import LOGICAL_RANKS
from settings.deltas import Resolved
from settings.model import padded_vocab
from settings.system import recomputable
from system import compiler
from system.launch import launch
from system.run import Run
from system.world import World, uses_gpus


def check_devices(resolved: Resolved, processes: int) -> None:
    """UserError if this machine cannot do the run with this number of processes."""
    s = resolved.settings
    cuda = uses_gpus(s, processes)
    if resolved.scale in ("full", "small") and not cuda and s.system.device == "auto":
        remedy = "add --scale tiny (CPU, about two minutes)"
        if resolved.preset:
            remedy = f"name {resolved.record.ref} with --scale tiny (the preset is frozen at its scale)"
        raise UserError(
            f"{resolved.preset or resolved.record.ref} at scale {resolved.scale} needs a GPU: {remedy}, "
            "or --set system.device=cpu to insist"
        )
    if s.system.reduction == "ordered" and cuda:
        raise UserError("system.reduction=ordered promises equal bits on CPU only: leave it out on a GPU")


def find_corpus(options: Namespace, resolved: Resolved) -> Corpus:
    """The shards of this run (data.corpus.corpus_for), if the model has a row for every token id."""
    found, rows = corpus_for(resolved.scale, options.data, resolved.settings), padded_vocab(resolved.settings)
    if found.vocab_size > rows:
        raise UserError(
            f"{found.folder} holds token ids up to {found.vocab_size - 1}, the model has {rows} rows: "
            f"--set model.vocab_size={found.vocab_size}, or choose another --data"
        )
    return found


def compiles(s: Settings, world: World) -> bool:
    """Whether the model is compiled on this device."""
    return s.system.compile == "on" or (s.system.compile == "auto" and world.cuda)


def check_kernels(s: Settings, device: torch.device) -> None:
    """UserError if a kernel is asked for that cannot run on the device."""
    if s.system.cuda_graphs and device.type != "cuda":
        raise UserError(f"system.cuda_graphs needs CUDA, and this is {device.type}: leave it off")
    for field in dataclasses.fields(s.system.kernels):
        used = s.numerics.newton_schulz if field.name == "muon" else s.numerics.matmul
        fp8 = field.name == "transpose" or (field.name == "mlp" and s.numerics.fp8_mlp)
        if getattr(s.system.kernels, field.name) == "triton":
            why = refusal(device, getattr(torch, used), FP8_SINCE if fp8 else 80)
            why = why or (wider_rotation(s) if field.name == "qk" else None)
            softcap = s.model.head.softcap if field.name == "loss" else None
            if softcap and softcap.form == "rsqrt":
                why = why or "has no soft cap of the form rsqrt"
            if why:
                raise UserError(f"system.kernels.{field.name}=triton {why}: leave it at auto")


def wider_rotation(s: Settings) -> str | None:
    """Why the fused rotation is less precise than the precision plan (the rest of a sentence), or None.

    It computes in float32. Where the plan asks for less, as in records 5 to 16, it is closer to exact
    arithmetic than the plan.
    """
    wide = next(
        (
            name for name in ("eval_matmul", "norm", "rope", "rope_math")
            if getattr(s.numerics, name) == "float64"
        ),
        None,
    )
    return f"computes in float32, and numerics.{wide} is float64" if wide else None


def check_profile(options: Namespace, plans: list[StepPlan]) -> None:
    """UserError if --profile asks for steps that the run does not have."""
    if options.profile and options.profile[1] > len(plans):
        raise UserError(
            f"--profile {options.profile[0]}:{options.profile[1]}: the run has {len(plans)} steps: give a "
            "range of them"
        )


def check_candidates(s: Settings, corpus: Corpus, ranks: range, plans: list[StepPlan]) -> None:
    """UserError if a sampled softmax has no room for the first batch, before anything is compiled.

    How many tokens differ depends on the text: later batches are looked at in their steps.
    """
    size = plans[0].shape.candidates
    if size is not None:
        batch = Stream(corpus, ranks=ranks, **stream_arguments(s)).next()
        for rank, row in zip(ranks, batch):
            require_room(rank, len(np.unique(row[1:])), size)


def check_strict(options: Namespace, slower: list[str]) -> None:
    """UserError if --strict forbids what the run does in a slower way (`fallbacks`)."""
    if options.strict and slower:
        raise UserError(f"{slower[0]}; leave out --strict to run it so")


def check_sync_here(s: Settings, compile_it: bool) -> None:
    """UserError if --check-sync would mean something else on a CPU."""
    if compile_it:
        raise UserError(
            "--check-sync looks at the operations of a CPU one by one: add --set system.compile=off"
        )
    if s.system.attention == "auto" and s.model.attn.document_mask:
        raise UserError(
            "--check-sync: attention by documents, which only a CPU has, reads their lengths: add --set "
            "system.attention=banded"
        )


def prepare_compiler(options: Namespace, world: World, compile_it: bool) -> compiler.CacheFile | None:
    """Caches, workers and --compile-cache, before the data are read. Returns its CacheFile or None."""
    if not compile_it:
        if options.compile_cache:
            raise UserError(
                "--compile-cache: nothing is compiled here: leave it out, or --set system.compile=on"
            )
        return None
    compiler.prepare(default_cache(), world.cuda, world.place.local_size)
    if not options.compile_cache:
        return None
    cache_file = compiler.CacheFile(options.compile_cache, world.rank, world.device)
    world.say(*cache_file.load())
    return cache_file


def fallbacks(model: GPT, world: World) -> list[str]:
    """Lines on everything that runs slower than the record and this device allow.

    Call it after model.context has seen all windows, because choosing a backend records what it passes over.
    """
    s, found = model.settings, sorted(model.passed)
    for name in ("fp8_head", "fp8_mlp"):
        if getattr(s.numerics, name) and not (world.cuda and capability(world.device) >= FP8_SINCE):
            found.append(f"numerics.{name} is computed in its reference form: 8-bit products need compute "
                         "capability 8.9")
    if world.cuda and not compiles(s, world):
        found.append("nothing is compiled: system.compile is off")
    layers = [moe for _, moe in model.mixtures()] if world.cuda else []
    if any(moe.select_backend(world.device, model.train_dtype, model.compiled) == "padded" for moe in layers):
        why = (
            "system.experts is padded" if s.system.experts == "padded"
            else "torch's grouped_mm cannot do these"
        )
        found.append(f"experts are multiplied in padded blocks: {why}")
    return found


def attention_backend(model: GPT, world: World, plans: list[StepPlan]) -> str:
    """Names of the attention backends that training steps use, over all their shapes."""
    names = set()
    for shape in shapes(plans):
        model.update_yarn(shape.windows)
        # every token a document of its own
        rows = torch.zeros((1, shape.seq_len), dtype=torch.long, device=world.device)
        names |= set(model.context(rows, 0, shape.windows, max_docs=shape.seq_len).backends())
    model.rotary_tables.reset()  # a short run's first step may stand in a later stage
    return ", ".join(sorted(names))


def out_of_memory(run: Run, error: torch.OutOfMemoryError) -> str:
    """One line: how much was asked for, and the setting that lowers it most without changing the record."""
    said = str(error).split(". ")[0]
    if run.s.system.kernels.loss in ("auto", "whole"):
        remedy = "--set system.kernels.loss=chunks, so that the head's logits never exist in full"
    elif run.ranks_per_microbatch > 1:
        now = run.ranks_per_microbatch
        remedy = f"--set system.ranks_per_microbatch={now // 2} (now {now})"
    elif run.s.system.activation_checkpoint != "on" and recomputable(run.s):
        remedy = ("--set system.activation_checkpoint=on, so that the blocks keep nothing for the backward "
                  "pass")
    elif run.world.size == 1 or (run.world.size < LOGICAL_RANKS and run.optimizer.plan.name == "sharded"):
        remedy = (
            f"use more than {run.world.size} GPU{'s' if run.world.size > 1 else ''}, which share the "
            "optimizer's state"
        )
    else:
        remedy = "one logical rank a forward is the least; take a GPU with more memory, or --scale small"
    return f"out of memory with {run.ranks_per_microbatch} logical ranks a forward ({said}): {remedy}"


def start_processes(program: str, options: Namespace, resolved: Resolved) -> int:
    """--nproc: check settings, devices and data, then run `program` in N processes. Returns the exit code."""
    s = resolved.settings
    check_devices(resolved, options.nproc)
    require_shards(find_corpus(options, resolved), steps=len(plan(s)), **stream_arguments(s))
    return launch([sys.executable, program, *sys.argv[1:]], options.nproc)
