"""The CUDA C++ kernels of the scan against a float64 loop and autograd.

With a CUDA GPU they run on it. Without one, the same source is compiled as C++ and the threads of a GPU are emulated
(emulated_cuda.hpp): slowly, but with every index, barrier and exchange between lanes as on a GPU.
"""

import ctypes
import shutil
import subprocess
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import cli
from kernels import nvrtc, scan_cuda

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
has_compiler = pytest.mark.skipif(DEVICE == "cpu" and shutil.which("g++") is None,
                                  reason="needs a GPU, or g++ for the emulation")  # fmt: skip

TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
SHAPES = {
    # batch, time, d_inner, N, input dtype, initial state?, warps wanted per multiprocessor (more: time is split), chunk
    "bfloat16, tensor cores, whole states": (1, 100, 68, 32, torch.bfloat16, True, 1, 48),
    "bfloat16, uneven": (1, 39, 18, 5, torch.bfloat16, False, 12, 32),
    "bfloat16, many states": (1, 37, 20, 64, torch.bfloat16, False, 1, 32),
    "uneven in everything, split": (2, 75, 18, 5, torch.float32, True, 12, 32),
    "float16, many states, fewer warps per block": (1, 37, 20, 64, torch.float16, False, 1, 32),
}


SHUFFLED = [0]  # 1: the emulated threads go on in another order


@pytest.fixture(autouse=True)
def emulation(tmp_path_factory, monkeypatch):
    """Without a GPU, kernels come from the emulation: one library for each set of constants, kept for the session."""
    if DEVICE == "cuda":
        return
    folder = tmp_path_factory.getbasetemp()
    source = scan_cuda.SOURCE.parent.parent / "tests" / "emulated_cuda.hpp"

    def load(device, defines):
        path = folder / f"scan_{abs(hash(defines))}.so"
        if not path.exists():
            macros = [f"-D{name}={value}" for name, value in defines]
            subprocess.run(["g++", "-O1", "-std=c++17", "-shared", "-fPIC", "-w", "-x", "c++", *macros, "-o", path,
                            source], check=True)
        library = ctypes.CDLL(path)

        ctypes.c_int.in_dll(library, "shuffled").value = SHUFFLED[0]

        def kernel(name):
            def launch(blocks, threads, arguments, shared=0):
                assert name != "scan_backward" or shared == library.shared_size()
                getattr(library, f"run_{name}")(ctypes.byref(arguments), blocks, threads)

            return launch

        return kernel

    monkeypatch.setattr(scan_cuda, "load_kernels", load)


def reference_scan(u, delta, A, B, C, D, z, delta_bias, h0):
    """The recurrence, one step after the other: y and the last state."""
    dt = F.softplus(delta + delta_bias)
    h, ys = h0, []
    for t in range(u.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * u[:, t])[..., None] * B[:, t, None, :]
        ys.append((h * C[:, t, None, :]).sum(-1) + D * u[:, t])
    return torch.stack(ys, 1) * F.silu(z), h


def scan_inputs(batch, time, d_inner, n_state, dtype, seed=0):
    """u, delta, A, B, C, D, z, delta_bias as the Mamba block passes them: delta, z, B and C are slices of wider
    tensors. For bfloat16 and for 64 states these start where 16 bytes can be loaded at once; otherwise they don't."""
    first = 8 if dtype == torch.bfloat16 or n_state == 64 else 3
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    xz = normal(batch, time, 2 * d_inner).to(DEVICE, dtype)
    x_dbl = normal(batch, time, first + 2 * n_state).to(DEVICE, dtype)
    u, wide = (normal(batch, time, width).to(DEVICE, dtype) for width in (d_inner, 2 * d_inner))
    A = -(3 * torch.rand(d_inner, n_state, generator=generator)).to(DEVICE)
    D, delta_bias = normal(d_inner).to(DEVICE), (normal(d_inner) - 2).to(DEVICE)
    B, C = x_dbl[..., first : first + n_state], x_dbl[..., first + n_state :]
    return u, wide[..., :d_inner], A, B, C, D, xz[..., d_inner:], delta_bias


def assert_close(names, actual, expected, tolerance):
    errors = {name: ((a.double() - e).norm() / e.norm()).item()
              for name, a, e in zip(names, actual, expected, strict=True)}  # fmt: skip
    assert all(error < tolerance for error in errors.values()), errors  # NaN fails too


def check_scan(batch, time, d_inner, n_state, dtype, with_h0, gradient_tolerance=None):
    inputs = scan_inputs(batch, time, d_inner, n_state, dtype)
    h0 = torch.randn(batch, d_inner, n_state).to(DEVICE) if with_h0 else None
    dy = torch.randn(batch, time, d_inner).to(DEVICE, dtype)
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    start = h0.double() if with_h0 else torch.zeros(batch, d_inner, n_state, dtype=torch.float64, device=DEVICE)
    y_exact, h_exact = reference_scan(*exact, start)
    gradients = torch.autograd.grad(y_exact, exact, dy.double())

    y, chunk_states, h_last = scan_cuda.scan_forward(*inputs, h0)
    assert chunk_states.shape == scan_cuda.chunk_states_shape(batch, time, d_inner, n_state)
    assert chunk_states.dtype == scan_cuda.chunk_states_dtype(dtype)
    dxz = torch.full((batch, time, 2 * d_inner), 7.0, device=DEVICE, dtype=dtype)
    first = inputs[3].storage_offset()
    dx_dbl = torch.full((batch, time, first + 2 * n_state), 7.0, device=DEVICE, dtype=dtype)
    dz, dB, dC = dxz[..., d_inner:], dx_dbl[..., first : first + n_state], dx_dbl[..., first + n_state :]
    delta = inputs[1]
    beside_delta = delta._base[..., d_inner:]
    untouched = beside_delta.clone()
    du, ddelta, dA, dD, ddelta_bias = scan_cuda.scan_backward(dy, *inputs, chunk_states, dz, dB, dC, y)

    assert ddelta.data_ptr() == delta.data_ptr()  # overwritten by its gradient
    assert torch.equal(beside_delta, untouched)
    assert (dxz[..., :d_inner] == 7).all() and (dx_dbl[..., :first] == 7).all()  # nothing beside the views is touched
    assert y.dtype == du.dtype == ddelta.dtype == dtype
    assert h_last.dtype == dA.dtype == dD.dtype == ddelta_bias.dtype == torch.float32
    tolerance = TOLERANCE[dtype]
    assert_close(["y", "h"], [y, h_last], [y_exact, h_exact], tolerance)
    actual = [du, ddelta, dA, dB, dC, dD, dz, ddelta_bias]
    names = ["du", "ddelta", "dA", "dB", "dC", "dD", "dz", "ddelta_bias"]
    assert_close(names, actual, gradients, gradient_tolerance or tolerance)


@has_compiler
@pytest.mark.parametrize("name", SHAPES)
def test_scan(name, monkeypatch):
    *shape, warps_to_fill, chunk = SHAPES[name]
    monkeypatch.setattr(scan_cuda, "WARPS_TO_FILL", warps_to_fill)
    monkeypatch.setattr(scan_cuda, "_chunk", lambda *_: chunk)
    check_scan(*shape)


@has_compiler
def test_gates_that_are_shut_or_almost_so():
    """With bfloat16 the backward pass has C . h + D u from y, which is 0 where z is, but for what is added to z. The
    derivative of silu is nearly 0 at -1.28."""
    u, *others, z, delta_bias = scan_inputs(1, 24, 36, 32, torch.bfloat16)
    values = [0.0, -0.0, 1e-40, 2.0**-60, -(2.0**-60), 1e-12, -1e-12, 1e-4, -1.28, 20.0, -20.0, 80.0, -80.0, -150.0]
    z = torch.tensor(values, dtype=torch.bfloat16, device=DEVICE).repeat(62)[: z.numel()].view(z.shape)
    exact = [tensor.double() for tensor in (u, *others, z, delta_bias)]
    exact[6].requires_grad_()
    y_exact, _ = reference_scan(*exact, torch.zeros(1, 36, 32, dtype=torch.float64, device=DEVICE))
    (dz_exact,) = torch.autograd.grad(y_exact.sum(), exact[6])
    y, states, _ = scan_cuda.scan_forward(u, *others, z, delta_bias)
    dz, dB, dC = (torch.empty_like(tensor) for tensor in (z, others[2], others[3]))
    scan_cuda.scan_backward(torch.ones_like(y), u, *others, z, delta_bias, states, dz, dB, dC, y)
    for value in {float(number) for number in z.flatten()}:
        close = torch.allclose if value < -70 else lambda a, b, **_: (a - b).norm() < 1e-2 * b.norm()  # those may be 0
        assert close(dz[z == value].double(), dz_exact[z == value], atol=1e-30), value


@has_compiler
def test_nan_stays_in_its_channel_and_behind_its_step():
    u, *rest = scan_inputs(1, 12, 18, 5, torch.float32)
    u[0, 5, 2] = float("nan")
    y, _, h_last = scan_cuda.scan_forward(u, *rest)
    assert y[0, 5:, 2].isnan().all() and h_last[0, 2].isnan().all()
    y[0, 5:, 2] = 0
    assert y.isfinite().all()


@has_compiler
def test_an_extreme_decay_forgets_at_once():
    """A = -2^58: exp(dt A) is 0, so a state is its last input alone, and no gradient is NaN."""
    u, delta, A, B, C, D, z, delta_bias = scan_inputs(1, 11, 18, 5, torch.float32)
    A = torch.full_like(A, -(2.0**58))
    y, states, h_last = scan_cuda.scan_forward(u, delta, A, B, C, D, z, delta_bias, torch.ones_like(A)[None])
    h = (F.softplus(delta + delta_bias) * u).double()[..., None] * B.double()[:, :, None]
    assert_close(["h", "y"], [h_last, y], [h[:, -1], ((h * C[:, :, None]).sum(-1) + D * u) * F.silu(z.double())], 3e-6)
    dz, dB, dC = (torch.empty_like(tensor) for tensor in (z, B, C))
    gradients = scan_cuda.scan_backward(torch.ones_like(y), u, delta, A, B, C, D, z, delta_bias, states, dz, dB, dC, y)
    assert all(gradient.isfinite().all() for gradient in (*gradients, dz, dB, dC)) and not gradients[2].any()


def test_what_it_does_not_compute_is_refused():
    inputs = scan_inputs(1, 4, 4, 4, torch.float32)
    with pytest.raises(cli.UserError, match="float64"):
        scan_cuda.scan_forward(*(tensor.double() for tensor in inputs))
    u, *rest = inputs
    with pytest.raises(cli.UserError, match="contiguous"):
        scan_cuda.scan_forward(u.transpose(1, 2), *rest)
    with pytest.raises(cli.UserError, match="up to 256, not 300"):
        scan_cuda._padded(300)


def test_long_chunks_where_no_splitting_is_needed():
    """The README's step, 128 sequences of 1,024 steps in 256 channels, saves every 48th state."""
    assert scan_cuda.chunk_states_shape(128, 1024, 256, 32) == (128, 22, 256, 32)
    assert scan_cuda.chunk_states_shape(8, 1024, 256, 32) == (8, 32, 256, 32)
    assert scan_cuda.chunk_states_shape(128, 1025, 256, 64) == (128, 33, 256, 64)


@pytest.mark.parametrize(("limit", "states"), [(227, 256), (163, 256), (99, 128), (64, 64)])
def test_a_block_fits_into_the_shared_memory_of_a_gpu(limit, states):
    """H100, A100, the GeForces since, Turing, in KiB; up to so many states per channel. More are refused."""
    for n_state in (1, 16, 32, 64, 128, 256):
        for dtype in [torch.float32, torch.float16, *([torch.bfloat16] if limit > 64 else [])]:  # Turing has none
            for batch in (1, 1024):
                arguments = n_state, dtype, scan_cuda._chunk(batch, 256, n_state), limit * 1024
                if n_state > states:
                    with pytest.raises(cli.UserError, match=f"for d_state {n_state}, and this GPU has {limit}; give"):
                        scan_cuda._Sizes(*arguments)
                    continue
                sizes = scan_cuda._Sizes(*arguments)
                assert sizes.shared <= limit * 1024 and sizes.warps in (1, 2, 4)
                assert limit < 227 or sizes.shared <= 227 * 1024 // sizes.blocks - 1024
    if limit == 99:  # where a block has room for fewer warps
        assert [scan_cuda._Sizes(32, torch.float32, 64, kib * 1024).warps for kib in (227, 99)] == [4, 2]


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """In the place of NVRTC and the driver; `calls` holds the sources that were compiled. The home is in tmp_path."""
    calls, kept = [], []

    def compiled(source, options):
        calls.append(source)
        kept.append(list(cli.DOING))
        return b"code of " + source.encode()

    class Libraries:
        def __getattr__(self, name):
            return lambda *args: 0

    monkeypatch.setattr(nvrtc, "compiled", compiled)
    monkeypatch.setattr(nvrtc, "libraries", lambda: (Libraries(), Libraries()))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(cli, "private_folder", lambda: str(tmp_path / "private"))
    return SimpleNamespace(calls=calls, told=kept, home=tmp_path / "home" / "mambasynth",
                           private=tmp_path / "private" / "nvrtc")  # fmt: skip


def test_compiled_code_is_kept_on_disk(compiler):
    """What is damaged on disk is compiled again, and so is another source, or the same with other options."""
    assert [nvrtc._cached("a", ["-x"]) for _ in range(2)] == [b"code of a"] * 2 and compiler.calls == ["a"]
    assert compiler.told == [["compiling kernels, once"]] and not cli.DOING
    assert nvrtc._cached("b", ["-x"]) == b"code of b" and nvrtc._cached("a", ["-y"]) == b"code of a"
    assert compiler.calls == ["a", "b", "a"] and len(list(compiler.home.iterdir())) == 3
    for change in (lambda data: b"damaged" + data[7:], lambda data: data[:9], lambda data: b"", lambda data: bytes(4)):
        for file in compiler.home.iterdir():
            file.write_bytes(change(file.read_bytes()))
        compiler.calls.clear()
        assert [nvrtc._cached("b", ["-x"]) for _ in range(2)] == [b"code of b"] * 2 and compiler.calls == ["b"]


def test_compiled_code_is_kept_in_the_temporary_directory_where_the_home_cannot_be_written_to(compiler, monkeypatch):
    compiler.home.parent.touch()  # no folder: nothing can be made in it, not even by root
    assert [nvrtc._cached("a", []) for _ in range(2)] == [b"code of a"] * 2 and compiler.calls == ["a"]
    (file,) = compiler.private.iterdir()
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")  # as `~` is, without a home
    assert nvrtc._cached("a", []) == b"code of a" and compiler.calls == ["a"]
    # The disk is full: nothing is left behind. No folder at all: compiled anew each time.
    file.unlink()
    with monkeypatch.context() as full:
        full.setattr(nvrtc.os, "replace", raising(OSError("disk full")))
        assert nvrtc._cached("a", []) == b"code of a" and not list(compiler.private.iterdir())
    monkeypatch.setattr(cli, "private_folder", raising(PermissionError("somebody else's")))
    assert [nvrtc._cached("a", []) for _ in range(2)] == [b"code of a"] * 2 and compiler.calls == ["a"] * 4
    assert compiler.told[-1] == ["compiling kernels"]


def raising(error):
    def function(*args):
        raise error

    return function


def test_processes_may_compile_at_the_same_time(compiler):
    """Threads here, which share the name of the process, too. No file of theirs is ever seen in part, or left over."""
    barrier, found = threading.Barrier(4), []

    def go(source):
        barrier.wait()
        found.extend(nvrtc._cached(source, []) == b"code of " + source.encode() for _ in range(20))

    threads = [threading.Thread(target=go, args=(source,)) for source in ("a" * 10**5, "b" * 10**5) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 80 and len(list(compiler.home.iterdir())) == 2


def test_what_cannot_be_compiled_is_one_line(compiler, monkeypatch):
    """A GPU that NVRTC doesn't know, a file that it refuses, a driver that doesn't take the result."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def message():
        nvrtc.kernels.cache_clear()
        with pytest.raises(cli.UserError) as caught:
            nvrtc.kernels(scan_cuda.SOURCE, (("IO", 1),), 0)
        assert "\n" not in str(caught.value) and "scan.cu can't be compiled for this GPU, sm_90" in str(caught.value)
        assert "choose --scan mamba-ssm, or --scan reference" in str(caught.value)
        return str(caught.value)

    nvrtc.kernels.cache_clear()
    assert callable(nvrtc.kernels(scan_cuda.SOURCE, (("IO", 1),), 0))
    monkeypatch.setattr(nvrtc, "_check_driver", raising(RuntimeError("CUDA: device kernel image is invalid")))
    assert "image is invalid" in message()
    monkeypatch.undo()
    compiler_log = b"scan.cu(3): warning #1\nscan.cu(7): error: no such thing\n\n1 error detected\n"

    class Refusing:
        def nvrtcCompileProgram(self, *args):
            return 6

        def nvrtcGetProgramLogSize(self, program, size):
            size._obj.value = len(compiler_log) + 1
            return 0

        def nvrtcGetProgramLog(self, program, log):
            log.value = compiler_log
            return 0

        def __getattr__(self, name):
            return lambda *args: 0

    monkeypatch.setattr(nvrtc, "libraries", lambda: (Refusing(), None))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(nvrtc, "_cache_folders", lambda: ())
    assert "(scan.cu(7): error: no such thing)" in message()


def test_a_kernel_is_launched_from_a_thread_without_a_context(monkeypatch):
    """The first launch fails there; the thread then enters the GPU's context. More shared memory is asked for once."""
    calls = []

    class Driver:
        def __getattr__(self, name):
            def call(*args):
                calls.append((name, args))
                entered = any(called == "cuCtxSetCurrent" for called, _ in calls)
                return nvrtc.INVALID_CONTEXT if name == "cuLaunchKernel" and not entered else 0

            return call

    monkeypatch.setattr(nvrtc, "libraries", lambda: (None, Driver()))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    kernel = nvrtc._Kernel(None, "scan_forward")
    arguments = scan_cuda.CarryArgs(splits=3)
    kernel(5, 64, arguments, 50_000)
    kernel(6, 32, arguments, 50_000)
    names = [name for name, _ in calls]
    assert names == ["cuModuleGetFunction", "cuFuncSetAttribute", "cuLaunchKernel", "cuDevicePrimaryCtxRetain",
                     "cuCtxSetCurrent", "cuLaunchKernel", "cuLaunchKernel"]
    assert calls[1][1][1:] == (nvrtc.MAX_DYNAMIC_SHARED, 50_000) and calls[3][1][1] == 1
    for (_, launch), (blocks, threads) in zip((calls[5], calls[6]), ((5, 64), (6, 32)), strict=True):
        assert launch[1:8] == (blocks, 1, 1, threads, 1, 1, 50_000) and launch[8].value == 7 and launch[10] is None
        assert launch[9][0] == ctypes.addressof(arguments)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("batch", "time", "d_inner", "n_state"), [
    (1, 1024, 256, 32), (4, 300, 256, 32), (64, 257, 256, 32), (16, 128, 192, 16), (2, 200, 64, 64), (3, 100, 40, 200),
])  # fmt: skip
def test_scan_on_gpu(batch, time, d_inner, n_state, dtype):
    torch.manual_seed(0)
    check_scan(batch, time, d_inner, n_state, dtype, with_h0=batch < 4, gradient_tolerance=max(1e-5, TOLERANCE[dtype]))


def everything(inputs, dy):
    """All results of both passes."""
    inputs = inputs[0], inputs[1].clone(), *inputs[2:]  # delta is overwritten
    y, states, h = scan_cuda.scan_forward(*inputs)
    dz, dB, dC = (torch.empty_like(inputs[i]) for i in (6, 3, 4))
    return [y, states, h, dz, dB, dC, *scan_cuda.scan_backward(dy, *inputs, states, dz, dB, dC, y)]


@has_compiler
@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU the next test does the same")
def test_the_order_of_the_threads_changes_nothing(monkeypatch):
    """A race, where a barrier is missing, would."""
    inputs = scan_inputs(1, 75, 36, 32, torch.bfloat16)
    dy = torch.randn_like(inputs[0])
    monkeypatch.setattr(scan_cuda, "_chunk", lambda *_: 48)
    expected = everything(inputs, dy)
    monkeypatch.setattr(f"{__name__}.SHUFFLED", [1])
    assert all(torch.equal(a, b) for a, b in zip(everything(inputs, dy), expected, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_results_repeat_bit_for_bit():
    inputs = scan_inputs(8, 256, 256, 32, torch.bfloat16)
    dy = torch.randn_like(inputs[0])
    assert all(torch.equal(a, b) for a, b in zip(everything(inputs, dy), everything(inputs, dy), strict=True))
