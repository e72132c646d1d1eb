"""Write the step-1 gradient of every bank of short/11 at micro, reduced over the processes: gradients.py OUT
[PATH=VALUE...]"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist

from data.batch import to_rows
from data.corpus import sample_corpus
from data.stream import Stream, stream_arguments
from model import GPT
from optim import Optimizer
from settings import deltas
from system.comm import communication
from system.world import World

s = deltas.resolve("short/11", scale="micro", sets=sys.argv[2:]).settings
world = World(s)
model = GPT(s)
model.initialise(0)
with torch.no_grad():  # away from the zeros of the start, which would hide most gradients
    for name, p in sorted(model.named_parameters()):
        p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
optimizer = Optimizer(model, s, communication(s, world.rank, world.size))
corpus = sample_corpus()
batch = Stream(corpus, ranks=world.ranks, **stream_arguments(s)).next()
x, y, _ = to_rows(batch, s.data.seq_len, world.device, corpus.bos)
optimizer.expect(last=True)
(model(x.flatten(0, 1), y.flatten(0, 1)).mean() * (len(world.ranks) / 8)).backward()
optimizer.accumulate()
whole = {}
for bank in optimizer.banks:
    grad, _ = optimizer.reduced(bank)
    if bank.comm.shards > 1:
        parts = [torch.empty_like(grad) for _ in range(world.size)]
        dist.all_gather(parts, grad.contiguous())
        grad = torch.cat(parts)
    whole[bank.name()] = grad[:bank.units].clone()
if world.main:
    torch.save(whole, sys.argv[1])
if world.size > 1:
    dist.destroy_process_group()
