"""The Python half of the null device: Inductor writes kernels and launches none; launches are counted.

Each patch is called with the module that it changes, right after that module's import. Nothing here imports
torch before the program does.
"""

import atexit
import ctypes
import itertools
import json
import os
import sys
from collections import Counter
from typing import NamedTuple

COUNTERS = ("kernels", "gemms", "inductor", "triton", "syncs", "reads", "sends", "mallocs", "frees",
            "collectives", "replays", "refused")  # the order of device.h
DEVICE = {"max_shared_mem": 232448, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32}

steps = []  # counts at the start of each training step, by COUNTERS
generated = {}  # source of each kernel that Inductor wrote, by name
own = Counter()  # launches of the project's Triton kernels, by name
grids = {}  # largest grid of each of them
clock = [False]  # whether training steps are running
# largest memory_allocated in training steps, and before and between them (validation), bytes
peaks = {"step": 0, "rest": 0}
attention = set()  # (tokens, documents, longest, heads) of the varlen calls in them
documents = []  # of each training step, for each logical rank, the tokens of its documents


def library():
    """The shared library that is loaded already."""
    return ctypes.CDLL(os.environ["NULLCUDA_LIBRARY"])


def counts():
    """All counters of this process so far."""
    found = (ctypes.c_long * len(COUNTERS)).in_dll(library(), "nullcuda_count")
    return dict(zip(COUNTERS, found))


def note(counter):
    """Count one launch on the current stream, or put it into the graph that the stream records."""
    import torch
    stream = torch.cuda.current_stream().cuda_stream
    library().nullcuda_note(COUNTERS.index(counter), ctypes.c_void_p(stream))


# ----- patches

def patches():
    """{module: function that changes it after its import}."""
    return {
        "torch": patch_torch,
        "torch._inductor.async_compile": patch_inductor,
        "torch._inductor.fx_passes.pad_mm": patch_padding,
        "torch.distributed.distributed_c10d": patch_objects,
        "torch.nn.attention.varlen": patch_varlen,
        "triton.runtime.driver": patch_driver,
        "triton.runtime.jit": patch_jit,
        "system.run": patch_steps,
        "data.batch": patch_batches,
    }


def patch_torch(module):
    """cuDNN brings its own CUDA runtime, which finds no device."""
    module.backends.cuda.enable_cudnn_sdp(False)
    module.backends.cudnn.enabled = False
    atexit.register(report)


class Driver:
    """What Triton and Inductor ask an active driver."""

    class utils:
        get_device_properties = staticmethod(lambda device: DEVICE)

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        import torch
        return torch.device("cuda", self.get_current_device())

    def get_device_interface(self):
        import torch
        return torch.cuda

    def get_current_device(self):
        import torch
        return torch.cuda.current_device()

    def get_current_stream(self, device=None):
        return 0

    def set_current_device(self, device):
        """There is one."""

    def is_active(self):
        return True

    def get_benchmarker(self):
        return lambda call, **options: 1.0


def patch_driver(module):
    module.driver.set_active(Driver())


class Generated:
    """A kernel that Inductor wrote: launching it counts."""

    def __init__(self, name):
        self.name = name

    def run(self, *args, **options):
        note("inductor")

    def result(self):
        return self


def patch_inductor(module):
    """Instead of compiling a kernel, keep its source."""
    def triton(self, kernel_name, source_code, device_str="cuda"):
        compile(source_code, kernel_name, "exec")
        generated[f"{len(generated):04}_{kernel_name}"] = source_code
        return Generated(kernel_name)

    module.AsyncCompile.triton = triton


def patch_padding(module):
    """Whether padding a product pays is measured, which a device without time cannot."""
    module.should_pad_bench = lambda *args, **options: False


def patch_jit(module):
    """A launch of a Triton kernel binds its arguments, computes its grid and counts."""
    def run(self, *args, grid, warmup, **options):
        names = [parameter.name for parameter in self.params]
        bound = {p.name: p.default for p in self.params if p.has_default} | dict(zip(names, args)) | options
        missing = [name for name in names if name not in bound]
        if missing:
            raise TypeError(f"{self.fn.__name__} was launched without {', '.join(missing)}")
        size = tuple(grid(bound) if callable(grid) else grid) + (1, 1)
        if min(size) < 1 or size[0] >= 2 ** 31 or max(size[1:3]) > 65535:
            raise RuntimeError(f"no device takes a grid of {size[:3]} ({self.fn.__name__})")
        own[self.fn.__name__] += 1
        grids[self.fn.__name__] = max(grids.get(self.fn.__name__, (0, 0, 0)), size[:3])
        note("triton")

    module.JITFunction.run = run


def patch_objects(module):
    """Collectives of Python objects go through gloo: over NCCL, torch compares their sizes on the device."""
    gather, groups = module.all_gather_object, []

    def all_gather_object(object_list, obj, group=None):
        if module.get_backend(group) == "nccl":
            if not groups:
                groups.append(module.new_group(backend="gloo"))
            group = groups[0]
        return gather(object_list, obj, group=group)

    module.all_gather_object = all_gather_object


def patch_varlen(module):
    """Remember for what FlashAttention was launched."""
    import torch
    forward = torch.ops.aten._flash_attention_forward

    def counted(query, key, value, ends, *args, **options):
        if clock[0]:
            attention.add((query.size(0), ends.numel() - 1, args[1], query.size(1)))
        return forward(query, key, value, ends, *args, **options)

    torch.ops.aten._flash_attention_forward = counted


def note_peak():
    """Credit the peak since the last call to what has been running: steps, or the rest."""
    import torch
    what = "step" if clock[0] else "rest"
    peaks[what] = max(peaks[what], torch.cuda.max_memory_allocated())
    torch.cuda.reset_peak_memory_stats()


def patch_steps(module):
    """The trainer's profiler is told of each step: note counters and memory there."""
    before, stop = module.Profiler.before_step, module.Clock.stop

    def before_step(self, step):
        steps.append(counts())
        note_peak()
        clock[0] = True
        before(self, step)

    def stopped(self):
        note_peak()
        clock[0] = False
        stop(self)

    module.Profiler.before_step, module.Clock.stop = before_step, stopped


def patch_batches(module):
    """The documents of a step, which the device, having computed nothing, cannot tell."""
    to_rows = module.to_rows

    def counted(batch, seq_len, device, bos, segment=None):
        documents.append([pieces(lengths(rank[:-1].tolist(), seq_len, bos), segment) for rank in batch])
        return to_rows(batch, seq_len, device, bos, segment)

    module.to_rows = counted


def lengths(ids, seq_len, bos):
    """Tokens of each document among ids; one begins with every row of seq_len ids and with `bos`."""
    starts = [i for i, token in enumerate(ids) if token == bos or i % seq_len == 0]
    return [end - start for start, end in zip(starts, [*starts[1:], len(ids)])]


def pieces(documents, segment):
    """Tokens of what attention keeps apart: documents of so many tokens, cut at every multiple of segment."""
    if segment is None:
        return documents
    return [min(segment, length - start) for length in documents for start in range(0, length, segment)]


# ----- report

def blocks(tokens):
    """Blocks of 128 that a document of so many tokens needs."""
    return -(-tokens // 128)


def passes(tokens):
    """The documents, as lists of their lengths, of each forward pass whose attention may have so many tokens.

    Of several logical ranks together, or with paired heads, where each token is two positions.
    """
    out = []
    for ranks, positions in itertools.product(documents, (1, 2)):
        size = positions * sum(ranks[0])
        together = tokens // size  # logical ranks of a forward pass
        if together and tokens % size == 0 and len(ranks) % together == 0:
            out += [[positions * length for rank in ranks[i:i + together] for length in rank]
                    for i in range(0, len(ranks), together)]
    return out


class Call(NamedTuple):
    """Blocks of a FlashAttention call, forward, and of the documents of its forward pass."""
    started: int  # for each head: those of the longest document in its arguments, for each document
    needed: int  # that have work
    longest: int  # of one document
    number: int  # of documents
    heads: int

    @property
    def least(self):
        """What the interface starts for these documents."""
        return self.longest * self.number


def flash_calls():
    """The calls in training steps.

    Each is compared with the forward pass whose number of documents and longest one it was given; a call with
    the numbers of no pass, with the one that needs most.
    """
    out = []
    for tokens, number, longest, heads in attention:
        found = passes(tokens)
        own = [lengths for lengths in found if (len(lengths), max(lengths)) == (number, longest)]
        started = blocks(longest) * number
        calls = [Call(started, sum(map(blocks, lengths)), blocks(max(lengths)), len(lengths), heads)
                 for lengths in own or found]
        if own:
            out.append(min(calls, key=lambda call: call.needed))
        elif calls:
            out.append(max(calls, key=lambda call: call.least))
    return out


def about_flash(calls):
    """The call that is farthest above what its documents need; of several the one with most empty blocks."""
    if not calls:
        return dict.fromkeys(("waste", "blocks", "least_blocks", "longest_blocks", "mean_blocks"))
    worst = max(calls, key=lambda call: (call.started / call.least, call.started / call.needed))
    return {"waste": round(worst.started / worst.needed, 2), "blocks": worst.started * worst.heads,
            "least_blocks": worst.least * worst.heads, "longest_blocks": worst.longest,
            "mean_blocks": round(worst.needed / worst.number, 2)}


def account():
    """What this process did on the device."""
    note_peak()
    each = [{name: b[name] - a[name] for name in COUNTERS} for a, b in zip(steps, steps[1:])]
    dynamo = sys.modules.get("torch._dynamo.utils")
    reserved = ctypes.c_long.in_dll(library(), "nullcuda_peak").value
    return {
        "argv": sys.argv,
        "total": counts(),
        "steps": each,
        "generated": len(generated),
        "own": dict(own),
        "grids": {name: list(size) for name, size in grids.items()},
        "attention": sorted(attention),
        **about_flash(flash_calls()),
        "breaks": dict(dynamo.counters["graph_break"]) if dynamo else {},
        "graphs": dynamo.counters["stats"]["unique_graphs"] if dynamo else 0,
        "reserved_gib": round(reserved / 2 ** 30, 3),
        "peak_gib": round(max(peaks.values()) / 2 ** 30, 3),
        "step_peak_gib": round(peaks["step"] / 2 ** 30, 3),
        "collectives": f"{ctypes.c_uint64.in_dll(library(), 'nullcuda_collectives').value:016x}",
    }


def report():
    """At the end of a process: a line, or files in $NULLCUDA_REPORT; kernels in $NULLCUDA_SOURCES."""
    import torch
    if not torch.cuda.is_initialized():
        return
    about, folder, sources = account(), os.environ.get("NULLCUDA_REPORT"), os.environ.get("NULLCUDA_SOURCES")
    if sources:
        os.makedirs(sources, exist_ok=True)
        for name, source in generated.items():
            with open(os.path.join(sources, f"{name[:100]}.py"), "w", encoding="utf-8") as file:
                file.write(source)
    if folder:
        with open(os.path.join(folder, f"{os.getpid()}.json"), "w", encoding="utf-8") as file:
            json.dump(about, file, indent=1)
        library().nullcuda_write_launches(os.path.join(folder, f"{os.getpid()}.launches").encode())
        return
    said = [f"{value:,} {name}" for name, value in about["total"].items() if value]
    said += [f"{about['generated']} kernels generated", f"{sum(about['breaks'].values())} graph breaks"]
    print(f"null device: {', '.join(said)}, peak {about['peak_gib']} GiB", file=sys.stderr)
