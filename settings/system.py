"""The axis `system` of the settings: how a run is executed.

Nothing here changes the mathematics beyond the order of sums. In `check(self, s)`, s is the whole Settings.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from settings.declare import lookup, opt


@dataclass(frozen=True)
class Kernels:
    """The implementation of each operation; implementations of one operation differ only by rounding.

    auto: torch's own operations, until a table in bench/results shows that another implementation is faster
    on the card.
    """
    loss: Literal["auto", "whole", "chunks", "triton"] = opt(
        "auto", "head and cross entropy. whole: all logits at once. chunks: chunks of tokens, whose logits "
                "the backward pass recomputes, so that the logits never exist in full. triton: the same "
                "with fused Triton kernels. auto: whole, or on CUDA in chunks if whole logits do not fit in "
                "memory (system/memory.py)")
    muon: Literal["auto", "torch", "triton"] = opt(
        "auto", "Newton-Schulz. torch: whole products. triton: half of each symmetric product and its "
                "mirror image (record 27). auto: torch", needs="optim.muon")
    mlp: Literal["auto", "torch", "triton"] = opt(
        "auto", "dense MLPs. torch: one operation after the other. triton: relu^2 fused into the first "
                "product (record 59). auto: torch", needs="model.mlp.activation=relu_sq")
    qk: Literal["auto", "torch", "triton"] = opt(
        "auto", "norm and rotation of queries and keys. torch: one operation after the other. triton: one "
                "launch, in float32 (as record 90). auto: torch", needs="model.attn.rope")
    transpose: Literal["auto", "torch", "triton"] = opt(
        "auto", "transposed copies that the products of the FP8 head need on CUDA. torch: torch's copy. "
                "triton: in tiles (records 74 and 76). auto: triton if installed",
        needs="numerics.fp8_head")

    def check(self, s: Any) -> Iterator[str]:
        if self.muon == "triton" and s.numerics.newton_schulz_form == "expanded":
            yield ("system.kernels.muon=triton computes the factored form: set "
                   "numerics.newton_schulz_form=symmetric, or leave it out")
        if self.mlp == "triton" and s.numerics.products != "matmul":
            yield ("system.kernels.mlp=triton does not round its operands to numerics.products = "
                   f"{s.numerics.products}: leave it at auto")
        if self.mlp == "triton" and s.model.bias:
            yield "system.kernels.mlp=triton has no bias: set model.bias=false"
        if self.qk == "triton" and s.model.attn.latent:
            yield ("system.kernels.qk=triton turns whole heads, model.attn.latent a part of them: leave it "
                   "at auto")


@dataclass(frozen=True)
class System:
    """The execution of a run (axis system): changes the order of sums and nothing else of the mathematics."""
    device: Literal["auto", "cpu", "cuda"] = opt("auto", "device of the run. auto: CUDA if there is a GPU")
    precision: Literal["record", "float32", "float64", "bf16_matmul"] = opt("record",
        "precision of the whole run. record: as `numerics` says. float32, float64: every dtype in `numerics` "
        "that --set does not assign becomes this one, without FP8. bf16_matmul: float32, with "
        "numerics.products=bfloat16. All but record change the ml_hash", shrink="precision")
    compile: Literal["auto", "on", "off"] = opt(
        "auto", "compilation of the model with torch.compile. auto: on CUDA")
    attention: Literal["auto", "dense", "documents", "banded", "flex", "varlen", "flash3", "flash4"] = opt(
        "auto", "attention backend (kernels/attention.py); all backends mask the same keys. auto: the "
                "fastest for the device and the window")
    experts: Literal["auto", "grouped", "padded"] = opt(
        "auto", "matrix product of the experts. grouped: torch's grouped_mm. padded: blocks padded to one "
                "size (kernels/experts.py)", needs="model.mlp.moe")
    expert_parallel: bool = opt(False, "expert parallelism: each process holds its share of every layer's "
                                       "experts, and tokens travel by all-to-all (off: every process holds "
                                       "all experts)", off=False, needs="model.mlp.moe")
    kernels: Kernels = opt(Kernels, "implementation of each operation")
    cuda_graphs: bool = opt(False, "CUDA graphs of the optimizer: each update is captured in the warm-up",
                            off=False)
    comm: Literal["auto", "replicated", "bucketed", "sharded", "allreduce_updates", "adam_hooks",
                  "interleaved"] = opt(
        "auto", "communication of the optimizer. replicated: gradients are all-reduced during the backward "
                "pass (record 23). bucketed: they are all-reduced in buckets after it (record 22). In both, "
                "every process updates every parameter except Muon's matrices, which are shared out. "
                "sharded: each process updates a shard, as in ZeRO (record 24). allreduce_updates: Muon's "
                "updates are all-reduced (record 6). adam_hooks: as sharded, but only AdamW's reductions "
                "start in the backward pass, and Muon's follow AdamW's updates (record 44). interleaved: "
                "Muon's reductions start before AdamW's updates, and AdamW's last all-gather after Muon's "
                "updates (record 57). auto: sharded")
    table_gradients: Literal["auto", "dense", "rows"] = opt(
        "auto", "gradient of the bigram table. dense: a tensor of the table's size. rows: the rows that a "
                "step looks up, which alone travel between processes (record 71). auto: rows if the "
                "table has row_moment, whose update then moves no other rows", needs="model.embed.bigram")
    table_parallel: bool = opt(
        False, "table parallelism (record 92): each process holds an equal part of the bigram table's rows, "
               "and rows travel by all-to-all (off: every process holds the table)", off=False,
        needs="model.embed.bigram")
    small_allreduce: int = opt(
        0, "AdamW parameters of fewer elements are all-reduced, and updated by every process (record 52: "
           "1024)", unit="element", off=0, least=0, most=2 ** 31)
    reduction: Literal["ordinary", "ordered"] = opt(
        "ordinary", "order of the sum over logical ranks. ordered: the eight logical gradients are summed "
                    "in one fixed binary tree, which gives the same bits on 1, 2, 4 and 8 processes")
    ranks_per_microbatch: int = opt(0, "micro-batch: logical ranks in one forward pass. 0: on the CPU all "
                                    "ranks of the process, on CUDA as many as make 65,536 tokens, or fewer "
                                    "if they do not fit in memory (system/memory.py)")
    activation_checkpoint: Literal["auto", "on", "off"] = opt(
        "auto", "activation checkpointing: blocks keep no activations and run again in the backward pass. "
                "auto: on CUDA, if the run does not fit in memory otherwise (system/memory.py)")
    warmup_steps: int = opt(-1, "untimed warm-up steps, whose effects are undone. -1: 3, and if compiled "
                                "also one per window", least=-1, most=100_000)
    warmup_tokens: Literal["random", "real"] = opt("random", "tokens of the untimed warm-up steps")

    def check(self, s: Any) -> Iterator[str]:
        if self.ranks_per_microbatch not in (0, 1, 2, 4, 8):
            yield (f"system.ranks_per_microbatch = {self.ranks_per_microbatch}: must be 0 (automatic), 1, 2, "
                   "4 or 8")
        if self.reduction == "ordered":
            yield from self.check_ordered()
        if self.expert_parallel and self.comm == "allreduce_updates":
            yield "system.expert_parallel keeps updates where they are: choose another system.comm"
        if self.table_parallel and self.table_gradients == "dense":
            yield ("system.table_parallel sends rows of gradients: set system.table_gradients=rows, or "
                   "system.table_parallel=false")
        if self.activation_checkpoint == "on" and s.model.mlp.moe:
            yield ("system.activation_checkpoint=on would count the tokens per expert twice: leave it off "
                   "with model.mlp.moe")
        if self.activation_checkpoint == "on" and not recomputable(s):
            yield ("system.activation_checkpoint=on would move delayed scales twice: leave it off with "
                   "numerics.fp8_mlp.c_proj")
        if self.comm == "allreduce_updates" and s.numerics.matrix_mantissa:
            yield ("system.comm=allreduce_updates has no place for the lower bits of "
                   "numerics.matrix_mantissa: choose another system.comm")
        if self.cuda_graphs and self.comm == "allreduce_updates":
            yield ("system.cuda_graphs does not capture communication: choose another system.comm than "
                   "allreduce_updates")
        if self.cuda_graphs and self.warmup_steps in (0, 1):
            yield (f"system.cuda_graphs are captured in the second untimed step: system.warmup_steps = "
                   f"{self.warmup_steps} is too few")

    def check_ordered(self) -> Iterator[str]:
        if self.ranks_per_microbatch not in (0, 1):
            yield ("system.reduction=ordered sums logical ranks one by one: leave "
                   "system.ranks_per_microbatch at 0 or 1")
        if self.comm == "allreduce_updates":
            yield ("system.reduction=ordered does not go with system.comm=allreduce_updates: choose "
                   "replicated or sharded")
        if self.expert_parallel:
            yield ("system.reduction=ordered sums the gradients of whole layers: leave "
                   "system.expert_parallel off")


def recomputable(s: Any) -> bool:
    """True if a block's forward pass has no side effects, so that activation checkpointing can repeat it."""
    return s.model.mlp.moe is None and lookup(s, "numerics.fp8_mlp.c_proj") is None  # backward needs it
