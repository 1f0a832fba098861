"""The capture of a CUDA graph: what is called when, what is put back, what a replay reads and returns."""

import contextlib
import gc

import pytest
import torch

from kernels import cuda_graph


@pytest.fixture
def fake_cuda(monkeypatch):
    """torch.cuda without a GPU. A graph's replay calls the captured function again; `phase` tells who calls it."""
    phase = ["warm-up"]

    class Stream:
        def wait_stream(self, other):
            pass

    class Graph:
        def replay(self):
            phase[0] = "replay"
            self.function()

    @contextlib.contextmanager
    def graph(captured_graph, capture_error_mode):
        assert capture_error_mode == "thread_local"  # other threads may call CUDA during the capture
        phase[0] = "capture"
        yield

    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return phase


def test_state_is_put_back_after_the_warm_up_and_replays_read_their_input(fake_cuda):
    total, moments, calls, result = torch.tensor(5.0), [], [], torch.zeros(())

    def add(x):
        calls.append(fake_cuda[0])
        if fake_cuda[0] == "capture":  # as on a GPU, where the capture records but computes nothing
            assert total == 5.0 and moments[0] == 0.0
            inputs.append(x)
            return result
        if not moments:
            moments.append(torch.zeros(()))
        total.add_(x)
        moments[0] += 1

    inputs, example = [], torch.tensor(2.0)
    replay = cuda_graph.captured(add, example, lambda: [total, *moments], "cuda")
    assert calls == ["warm-up"] * cuda_graph.WARM_UP_CALLS + ["capture"]
    assert total == 5.0 and moments[0] == 0.0 and example == 2.0
    (graph_input,) = inputs
    assert graph_input is not example and replay.function is add
    graph = replay.__closure__[[*replay.__code__.co_freevars].index("graph")].cell_contents
    graph.function = lambda: total.add_(graph_input)
    assert replay(torch.tensor(3.0)) is result and total == 8.0
    replay(torch.tensor(4.0))
    assert total == 12.0 and example == 2.0


def test_a_function_without_input(fake_cuda):
    calls = []
    replay = cuda_graph.captured(lambda: calls.append(fake_cuda[0]), None, list, "cuda")
    assert calls == ["warm-up"] * cuda_graph.WARM_UP_CALLS + ["capture"]
    with pytest.raises(ValueError, match="argument"):
        replay(torch.zeros(()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_real_graph_keeps_its_tensors_and_its_state():
    def make():
        total = torch.full((1000,), 5.0, device="cuda")
        big = torch.ones(1000, device="cuda")

        def add(x):
            total.add_(big * x)
            return total

        return cuda_graph.captured(add, torch.zeros((), device="cuda"), lambda: [total], "cuda")

    replay = make()
    gc.collect()
    torch.full((1000,), 7.0, device="cuda")  # would be written over what the graph reads, had that been freed
    assert (replay(torch.tensor(2.0, device="cuda")) == 7).all()
    assert (replay(torch.tensor(3.0, device="cuda")) == 10).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_real_graph_without_input():
    count = torch.zeros((), device="cuda")
    replay = cuda_graph.captured(lambda: count.add_(1), None, lambda: [count], torch.device("cuda"))
    assert count == 0
    for _ in range(3):
        replay()
    assert count == 3
