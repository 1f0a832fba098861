"""The selective scan in CUDA C++ (scan.cu), for NVIDIA GPUs: its two passes as functions of torch tensors.

There are batch x d_inner independent recurrences: enough to fill a GPU at any batch size worth training with. So a warp
takes a few channels of one sequence and walks through time in order, the states in registers; there is no parallel
scan, which would cost extra work. Where the warps are too few (batch sizes of 1 to 8), time is split as well, by three
kernels: one finds the state at the end of each split as if the split had started from zero, one composes these into the
state that each split really starts from, and then every split is computed on its own. The backward pass does the same
in reverse.

The forward pass saves the state before every chunk of steps, and the backward pass computes the others again from
these. With bfloat16 it doesn't compute C . h + D u again, but finds it in y, which the layer behind keeps anyway. dB
and dC are sums over channels: each block writes its own partial sum and another kernel adds them, so that results don't
depend on the order in which blocks finish.

Arithmetic and state are float32. Inputs are float32, bfloat16 or float16; float64 is refused, use another back end.
Shapes: u, delta, z, y (batch, time, d_inner); B, C (batch, time, N); A (d_inner, N); D, delta_bias (d_inner,). Views
that are strided in batch and time are taken as they are; the last dimension must be contiguous.
"""

import contextlib
import ctypes
import functools
import pathlib

import torch

import cli
from kernels import nvrtc
from kernels.selective_scan import check_bfloat16

# Steps between saved states: the longer, the less memory they take, but time can only be split between them. The
# shorter is taken where the GPU needs that, and for more than 32 states, for want of shared memory.
CHUNK, SHORT_CHUNK = 48, 32
WARPS_FOR_CHUNK = 1024  # warps of 8 channels, without any splitting, from which on the longer is taken
BACKWARD_STEPS = 4  # states and decays of so many steps lie in registers at once
BACKWARD_WARPS = 4  # per block, for up to 32 states; fewer for more states
MAX_STATE = 256
MAX_SPLITS = 64
WARPS_TO_FILL = 12  # warps of 8 channels that each multiprocessor should have; time is split where there are fewer
FORWARD_WARPS = 4  # as in scan.cu
THREADS = 256  # of the kernels that are no scan

SOURCE = pathlib.Path(__file__).with_name("scan.cu")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NEEDS_Y = (torch.bfloat16,)  # dtypes of which the backward pass takes y, the forward pass's output

POINTER, LONG, INT = ctypes.c_void_p, ctypes.c_longlong, ctypes.c_int


def _structure(name, **types):
    """A ctypes structure: names of its fields, separated by blanks, for each of the types POINTER, LONG and INT."""
    kinds = {"pointers": POINTER, "longs": LONG, "ints": INT}
    fields = [(field, kinds[kind]) for kind, names in types.items() for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


# The arguments of the kernels, as scan.cu declares them.
ForwardArgs = _structure("ForwardArgs", pointers="u delta z B C A D delta_bias starts y states h_last dt_sums",
                         longs="u_batch delta_batch z_batch B_batch C_batch",
                         ints="time groups splits split_len")  # fmt: skip
CarryArgs = _structure("CarryArgs", pointers="ends dt_sums A h0 starts", ints="n_batch splits reversed")
BackwardArgs = _structure("BackwardArgs",
                          pointers="dy u z B C y delta A D delta_bias states starts du dz dBC sums",
                          longs="dy_batch u_batch delta_batch z_batch B_batch C_batch dz_batch",
                          ints="n_batch time groups splits split_len")  # fmt: skip
GroupSumArgs = _structure("GroupSumArgs", pointers="dBC dB dC", longs="dB_batch dB_step dC_batch dC_step rows",
                          ints="time groups")  # fmt: skip
RowSumArgs = _structure("RowSumArgs", pointers="rows first second third", ints="n_rows n_first n_second n_third")


def _pointer(tensor):
    return None if tensor is None else tensor.data_ptr()


def check_inputs(*tensors):
    """Raise UserError for tensors that the kernels would compute wrongly: another dtype, strided channels."""
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            raise cli.UserError(f"scan back end cuda takes float32, bfloat16 or float16, not {tensor.dtype}; "
                                "give --scan reference, which is slow")  # fmt: skip
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise cli.UserError("scan back end cuda needs contiguous channels; pass (batch, time, channels) tensors")


def on_device_of(tensor):
    """A context in which the tensor's device is the current one, on which kernels are launched."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def ceil_div(a, b):
    return -(-a // b)


def _padded(n_state):
    """The states per channel that scan.cu reckons with: a power of two."""
    if n_state > MAX_STATE:
        raise cli.UserError(f"scan back end cuda takes d_state up to {MAX_STATE}, not {n_state}; give --scan "
                            "mamba-ssm, or --scan reference, which is slow")  # fmt: skip
    return max(16, 1 << (n_state - 1).bit_length())


@functools.cache
def _processors(device):
    """The number of multiprocessors of a GPU; 1 on a CPU, where the tests emulate the kernels."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def _shared_limit(device):
    """The bytes of shared memory that a block may have on a GPU; on a CPU those of an H100."""
    return nvrtc.shared_per_block(device.index) if device.type == "cuda" else 227 * 1024


class _Sizes:
    """How the kernels divide their work, for N padded states per channel, inputs of a dtype, chunks of steps, and GPUs
    whose blocks may have `limit` bytes of shared memory."""

    def __init__(self, n_state, dtype, chunk, limit):
        N, fast = _padded(n_state), dtype == torch.bfloat16
        self.chunk = chunk
        self.forward_channels = FORWARD_WARPS * (16 if N <= 32 else 8)
        self.blocks = 2 if fast and N <= 32 else 1  # of the backward pass, that a multiprocessor should hold at once
        self.pairs = 2 if fast and N <= 32 else 1  # of channels per lane
        states = N // 8 * (4 if fast else 8)  # bytes of a lane's states of a pair of channels
        warp = self.pairs * (chunk * 96 + 256 * (2 if fast else 6) + chunk // BACKWARD_STEPS * 32 * states)
        self.warps = min(BACKWARD_WARPS, max(1, BACKWARD_WARPS * 32 // N))
        while True:  # fewer warps per block where shared memory is scarce
            self.channels = 8 * self.pairs * self.warps
            self.shared = 4 * (2 * chunk * N + self.warps * 8 * 2 * N) + self.warps * warp
            if self.shared <= limit or self.warps == 1:
                break
            self.warps //= 2
        if self.shared > limit:
            raise cli.UserError(f"scan back end cuda needs {self.shared // 1024} KiB of shared memory per block for "
                                f"d_state {n_state}, and this GPU has {limit // 1024}; give --scan mamba-ssm, or "
                                "--scan reference, which is slow")  # fmt: skip


_sizes = functools.cache(_Sizes)


@functools.cache
def _chunk(batch, d_inner, n_state):
    return CHUNK if n_state <= 32 and batch * ceil_div(d_inner, 8) >= WARPS_FOR_CHUNK else SHORT_CHUNK


@functools.cache
def load_kernels(device, defines):
    """The kernels of scan.cu for a GPU; the tests put their emulation in this function's place."""
    if ("IO", DTYPES[torch.bfloat16]) in defines:
        check_bfloat16("cuda", device)
    return nvrtc.kernels(SOURCE, defines, device.index)


def _kernels(backward, A, sizes, u, delta, z, B, C, dy=None, dz=None, y=None):
    """The kernels of one pass. The strides over time are constants of the compilation: the kernels' addresses then take
    a third of the instructions."""
    d_inner, n_state = A.shape
    steps = {"U": u, "DELTA": delta, "Z": z, "B": B, "C": C, "DY": dy, "DZ": dz}
    return load_kernels(u.device, (
        ("BACKWARD", int(backward)), ("D_INNER", d_inner), ("N_STATE", n_state), ("IO", DTYPES[u.dtype]),
        ("ALIGNED", int(_aligned((u, delta, z, dy, dz, y), 2 * sizes.pairs) and _aligned((B, C), 8)
                        and _padded(n_state) == n_state)),
        ("CHUNK", sizes.chunk), ("BACKWARD_STEPS", BACKWARD_STEPS), ("BACKWARD_WARPS", sizes.warps),
        ("BACKWARD_BLOCKS", sizes.blocks), ("BACKWARD_PAIRS", sizes.pairs),
        *((f"{name}_STEP", 0 if tensor is None else tensor.stride(1)) for name, tensor in steps.items()),
    ))  # fmt: skip


def _aligned(tensors, count):
    """Whether `count` neighbouring channels of the tensors can be loaded at once, wherever they start."""
    return all(number % count == 0 for tensor in tensors if tensor is not None
               for number in (*tensor.shape[2:], *tensor.stride()[:2], tensor.storage_offset(),
                              tensor.data_ptr() // tensor.element_size()))  # fmt: skip


def _split_time(batch, time, d_inner, channels, chunk, device):
    """(groups of channels, splits of time, steps per split: whole chunks). Time is only split where too few warps would
    be busy."""
    groups = ceil_div(d_inner, channels)
    wanted = ceil_div(WARPS_TO_FILL * _processors(device), batch * ceil_div(d_inner, 8))
    chunks = ceil_div(time, chunk)
    chunks_each = ceil_div(chunks, min(wanted, MAX_SPLITS, chunks))
    return groups, ceil_div(chunks, chunks_each), chunks_each * chunk


def _split_starts(kernels, name, forward, cut, A, h0):
    """What each split starts from, (batch, splits, d_inner, N); with a single split that is h0, which may be None.

    name: of the kernel that finds the ends, from the structure `forward` of arguments. cut: what `_split_time`
    returned, but the groups are those of the forward pass.
    """
    (groups, splits, _), (batch, device) = cut, forward.where
    if splits == 1:
        return h0
    ends = torch.empty((batch, splits, *A.shape), dtype=torch.float32, device=device)
    starts = torch.empty_like(ends)
    dt_sums = torch.empty((batch, splits, A.shape[0]), dtype=torch.float32, device=device)
    arguments = forward.arguments(starts=None, h_last=ends, dt_sums=dt_sums)
    kernels(name)(groups * splits * batch, 32 * FORWARD_WARPS, arguments)
    carry = CarryArgs(*map(_pointer, (ends, dt_sums, A, h0, starts)), batch, splits, name == "split_ends_reversed")
    kernels("carry_over_splits")(ceil_div(batch * A.numel(), THREADS), THREADS, carry)
    return starts


class _Forward:
    """The arguments of scan.cu's forward_pass but those that its modes have of their own."""

    def __init__(self, u, delta, z, B, C, A, D, delta_bias, cut):
        self.where = u.shape[0], u.device
        self.head = [*map(_pointer, (u, delta, z, B, C, A, D, delta_bias))]
        batch_strides = (0 if tensor is None else tensor.stride(0) for tensor in (u, delta, z, B, C))
        self.tail = [*batch_strides, u.shape[1], *cut]

    def arguments(self, starts, h_last, y=None, states=None, dt_sums=None):
        return ForwardArgs(*self.head, *map(_pointer, (starts, y, states, h_last, dt_sums)), *self.tail)


def chunk_states_shape(batch, time, d_inner, n_state):
    """Shape of the states that `scan_forward` keeps for `scan_backward`."""
    return batch, ceil_div(time, _chunk(batch, d_inner, n_state)), d_inner, n_state


def chunk_states_dtype(dtype):
    """Dtype of those states, and of the partial sums of dB and dC, for inputs of type `dtype`.

    bfloat16 where the inputs are, since these are rounded as coarsely themselves; float32 otherwise.
    """
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def scan_forward(u, delta, A, B, C, D, z, delta_bias, h0=None):
    """The scan of selective_scan.py: (y, chunk_states, h_last); the shapes are in the docstring of this module.

    h0 (batch, d_inner, N), float32, is the state before the first step, zero if it is None, as the model has it: only
    the tests give another. h_last is the last state, alike. chunk_states: the states before each chunk.
    """
    check_inputs(u, delta, z, B, C)
    batch, time, d_inner = u.shape
    sizes = _sizes(A.shape[1], u.dtype, _chunk(batch, *A.shape), _shared_limit(u.device))
    cut = groups, splits, _ = _split_time(batch, time, d_inner, sizes.forward_channels, sizes.chunk, u.device)
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    shape = chunk_states_shape(batch, time, *A.shape)
    states = torch.empty(shape, dtype=chunk_states_dtype(u.dtype), device=u.device)
    h_last = torch.empty((batch, *A.shape), dtype=torch.float32, device=u.device)
    with on_device_of(u):
        kernels = _kernels(False, A, sizes, u, delta, z, B, C)
        forward = _Forward(u, delta, z, B, C, A, D, delta_bias, cut)
        starts = _split_starts(kernels, "split_ends", forward, cut, A, h0)
        arguments = forward.arguments(starts, h_last, y, states)
        kernels("scan_forward")(groups * splits * batch, 32 * FORWARD_WARPS, arguments)
    return y, states, h_last


def scan_backward(dy, u, delta, A, B, C, D, z, delta_bias, chunk_states, dz, dB, dC, y=None):
    """The gradients of `scan_forward`'s inputs from dy, that of its y, and the chunk_states and y that it returned (y
    only for NEEDS_Y).

    Writes dz, dB and dC into the views given, and ddelta over delta, which isn't needed again.
    Returns (du, ddelta, dA, dD, ddelta_bias): du, ddelta in u's dtype, the others in float32.
    """
    check_inputs(dy, u, delta, z, B, C, dz, dB, dC)
    batch, time, d_inner = u.shape
    n_state = A.shape[1]
    sizes = _sizes(n_state, u.dtype, _chunk(batch, *A.shape), _shared_limit(u.device))
    groups, splits, split_len = _split_time(batch, time, d_inner, sizes.channels, sizes.chunk, u.device)
    du = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    y = y if u.dtype in NEEDS_Y else None
    assert y is None or y.is_contiguous(), "as scan_forward returns it"
    dBC = torch.empty((groups, batch, time, 2 * n_state), dtype=chunk_states_dtype(u.dtype), device=u.device)
    sums = torch.empty((batch * splits, d_inner * (n_state + 2)), dtype=torch.float32, device=u.device)
    dA, dD, ddelta_bias = (torch.empty(shape, dtype=torch.float32, device=u.device)
                           for shape in (A.shape, (d_inner,), (d_inner,)))  # fmt: skip
    with on_device_of(u):
        kernels = _kernels(True, A, sizes, u, delta, z, B, C, dy, dz, y)
        ends_cut = ceil_div(d_inner, sizes.forward_channels), splits, split_len
        reversed_forward = _Forward(dy, delta, z, C, None, A, D, delta_bias, ends_cut)
        starts = _split_starts(kernels, "split_ends_reversed", reversed_forward, ends_cut, A, None)
        tensors = dy, u, z, B, C, y, delta, A, D, delta_bias, chunk_states, starts, du, dz, dBC, sums
        strides = (tensor.stride(0) for tensor in (dy, u, delta, z, B, C, dz))
        arguments = BackwardArgs(*map(_pointer, tensors), *strides, batch, time, groups, splits, split_len)
        kernels("scan_backward")(groups * splits * batch, 32 * sizes.warps, arguments, sizes.shared)
        kernels("sum_groups")(ceil_div(batch * time * n_state, THREADS), THREADS, GroupSumArgs(
            *map(_pointer, (dBC, dB, dC)), dB.stride(0), dB.stride(1), dC.stride(0), dC.stride(1), batch * time, time,
            groups))  # fmt: skip
        kernels("sum_rows")(ceil_div(sums.shape[1], 32), THREADS, RowSumArgs(
            *map(_pointer, (sums, dA, dD, ddelta_bias)), len(sums), dA.numel(), d_inner, d_inner))
    return du, delta, dA, dD, ddelta_bias
