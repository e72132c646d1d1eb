"""The null device itself: programs see a GPU, launches are counted, what must fail fails.

Run by tests/nullcuda/run.sh tests/nullcuda/selftest.py, and by tests/cuda.sh first.
"""

import ctypes
import os

import torch
import torch.nn.functional as F

import nullcuda

cuda = torch.device("cuda")


def bf16(*shape, grad=False):
    return torch.zeros(*shape, device=cuda, dtype=torch.bfloat16, requires_grad=grad)


def since(before):
    return {name: value - before[name] for name, value in nullcuda.counts().items() if value != before[name]}


def the_host_reads_zeros():
    x = torch.arange(1000.0)
    assert not x.pin_memory().to(cuda, non_blocking=True).cpu().any() and x.pin_memory().equal(x)


def launches_are_counted():
    x, before = torch.ones(300, 200, device=cuda, requires_grad=True), nullcuda.counts()
    (x @ x.t()).sigmoid().sum().backward()
    found = since(before)
    assert found["gemms"] >= 2 and found["kernels"] >= 3 and "syncs" not in found, found
    before = nullcuda.counts()
    assert isinstance(x.detach().sum().item(), float)
    found = since(before)  # through pinned memory, and waited for
    assert found.get("reads", 0) + found.get("sends", 0) == 1 and found["syncs"] >= 1, found


def a_copy_to_pinned_memory_waits_for_nothing():
    x, to = torch.ones(4, device=cuda), torch.empty(4, pin_memory=True)
    before = nullcuda.counts()
    to.copy_(x, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    assert event.query() and since(before) == {"sends": 1}, since(before)
    before = nullcuda.counts()
    x.cpu()
    assert since(before)["reads"] == 1 and since(before)["syncs"] >= 1


def a_host_read_is_refused_in_debug_mode():
    x = torch.ones(3, device=cuda)
    torch.cuda.set_sync_debug_mode("error")
    try:
        x.sum().item()
    except RuntimeError as error:
        assert "synchronizing" in str(error)
    else:
        raise AssertionError("a read passed")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def memory_ends():
    try:
        torch.empty(150 * 2 ** 30, dtype=torch.uint8, device=cuda)
    except torch.OutOfMemoryError:
        return
    raise AssertionError("150 GiB on a device of 140")


def the_operations_of_a_record_run():
    q, k, v = (bf16(1, 4, 256, 64, grad=True) for _ in range(3))
    F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
    a, b = (torch.zeros(64, 64, device=cuda).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones(1, device=cuda)
    assert torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16).shape == (64, 64)
    ends = torch.tensor([16, 32, 48, 64], device=cuda, dtype=torch.int32)
    assert F.grouped_mm(bf16(64, 64), bf16(4, 64, 64).mT, offs=ends).shape == (64, 64)


def generated_kernels_are_counted():
    x, before = torch.ones(1000, device=cuda), nullcuda.counts()
    torch.compile(lambda x: (x.sin() + 1).cumsum(0), fullgraph=True)(x)
    assert since(before)["inductor"] >= 1 and nullcuda.generated


def a_graph_replays_its_launches():
    x, graph = torch.ones(1000, device=cuda), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.add_(1)
        x.mul_(2)
    before = nullcuda.counts()
    graph.replay()
    assert since(before) == {"kernels": 2, "replays": 1}, since(before)


def a_graph_with_a_read_fails():
    x = torch.ones(1000, device=cuda)
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            x.sum().item()
    except RuntimeError as error:
        assert "captur" in str(error), error
    else:
        raise AssertionError("a read passed while a graph was captured")


def an_impossible_launch_is_refused():
    runtime = nullcuda.library()
    before = nullcuda.counts()["refused"]
    three = ctypes.c_uint * 3

    class Dim3(ctypes.Structure):
        _fields_ = [("size", three)]

    launched = runtime.cudaLaunchKernel(None, Dim3(three(1, 70000, 1)), Dim3(three(128, 1, 1)), None,
                                        ctypes.c_size_t(0), None)
    assert launched != 0 and nullcuda.counts()["refused"] == before + 1
    runtime.cudaGetLastError()


if __name__ == "__main__":
    assert torch.cuda.get_device_capability() == (9, 0) and os.environ["SPEEDRUN_NULL_DEVICE"] == "1"
    laws = [the_host_reads_zeros, launches_are_counted, a_host_read_is_refused_in_debug_mode,
            a_copy_to_pinned_memory_waits_for_nothing, memory_ends, the_operations_of_a_record_run,
            generated_kernels_are_counted, a_graph_replays_its_launches, a_graph_with_a_read_fails,
            an_impossible_launch_is_refused]
    for law in laws:
        law()
        print(f"ok {law.__name__.replace('_', ' ')}", flush=True)
