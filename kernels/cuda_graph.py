"""The one place where work is captured as a CUDA graph: a single launch then replays all its kernels.

A training step or a generation step of a small model launches hundreds of short kernels, and launching them takes the
host longer than the GPU needs to run them. A graph replays them all with one launch.
"""

import torch

WARM_UP_CALLS = 3  # calls before the capture: in these, kernels are compiled and allocators and optimisers set up


def captured(function, example, state, device):
    """`function(example)` as the replay of a CUDA graph.

    function: takes one tensor, or nothing where example is None. What it does must be the same at every call: the
        same kernels, the same shapes, no value read back to the host.
    example: a tensor with the shape, dtype and device of the later inputs, or None.
    state: a function that returns a list of the tensors that `function` changes and whose values matter. The warm-up
        calls change them too: they are put back before this function returns. Those that only the warm-up creates
        (Adam's moments and step counts) are set to zero.
    device: the CUDA device.

    Returns `replay`: replay(x) copies x into the graph's input and launches the graph (replay() where example is None).
    It returns what `function` returned during the capture: the same tensors every time, overwritten by the next replay.
    """
    before = [(tensor, tensor.detach().clone()) for tensor in state()]
    arguments = [] if example is None else [example.clone()]
    with torch.cuda.device(device):
        # CUDA asks for a warm-up on a stream other than the one that the capture will be made from.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_CALLS):
                function(*arguments)
        torch.cuda.current_stream().wait_stream(stream)
        reset(state(), before)
        graph = torch.cuda.CUDAGraph()
        # This records the kernels without running them: `state` stays as it is. Other threads may go on calling CUDA
        # meanwhile, as the one does that watches over the exchanges between several GPUs.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = function(*arguments)

    def replay(*inputs):
        for argument, value in zip(arguments, inputs, strict=True):
            argument.copy_(value)
        graph.replay()
        return result

    # The graph holds only the addresses of the tensors that it reads and writes. As long as somebody holds `replay`,
    # this reference keeps the function, and with it those tensors, from being freed.
    replay.function = function
    return replay


@torch.no_grad()
def reset(tensors, before):
    """Give each tensor its value from `before`, (tensor, value) pairs, or zeros if it isn't among them."""
    values = {id(tensor): value for tensor, value in before}
    for tensor in tensors:
        if id(tensor) in values:
            tensor.copy_(values[id(tensor)])
        else:
            tensor.zero_()
