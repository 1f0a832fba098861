"""CUDA C++ compiled at run time by NVRTC, and launched: what torch's CUDA builds bring along is all that it needs.

NVRTC, NVIDIA's run-time compiler, comes with torch (the package nvidia-cuda-nvrtc), and libcuda with the driver. Both
are called through ctypes. There is neither a CUDA toolkit nor a C compiler involved, and a launch takes less of the
host's time than one through Triton: kernels take a single argument, a structure of all that they need.

What is compiled is kept in memory by process and GPU, and on disk by everything that it depends on: in the user's cache
folder or, where nothing can be written there, in a folder of the temporary directory that only this user can read or
write, since what lies in it is executed. Where that can't be had either, every process compiles anew, which takes about
a second. A file whose checksum is wrong counts as missing. Several processes may compile at once: each writes a file of
its own, which then takes the place of the others' as a whole.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import pathlib
import tempfile

import torch

import cli

MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
SHARED_PER_BLOCK = 97  # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT


@functools.cache
def libraries():
    """(NVRTC, the driver) as ctypes libraries. None where there is no NVRTC of torch's CUDA version, or no driver."""
    if torch.version.cuda is None:
        return None
    major = torch.version.cuda.split(".")[0]
    names = []
    package = importlib.util.find_spec("nvidia")  # the namespace of NVIDIA's packages, of which torch requires some
    for folder in package.submodule_search_locations if package else ():
        for file in [*pathlib.Path(folder).glob(f"cu{major}/lib/libnvrtc*.so.*"),
                     *pathlib.Path(folder).glob("cuda_nvrtc/lib/libnvrtc*.so.*")]:
            if file.name.startswith("libnvrtc-builtins.so"):  # NVRTC asks for it by its name alone
                with contextlib.suppress(OSError):
                    ctypes.CDLL(str(file))
            elif file.name == f"libnvrtc.so.{major}":
                names.append(str(file))
    for name in (*names, f"libnvrtc.so.{major}", "libnvrtc.so"):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name), ctypes.CDLL("libcuda.so.1")
    return None


def _check_nvrtc(code):
    if code == 0:
        return
    nvrtc, _ = libraries()
    nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
    raise RuntimeError(f"NVRTC: {nvrtc.nvrtcGetErrorString(code).decode()}")


def _check_driver(code):
    if code == 0:
        return
    text = ctypes.c_char_p()
    libraries()[1].cuGetErrorString(code, ctypes.byref(text))
    raise RuntimeError(f"CUDA: {(text.value or b'unknown error').decode()}")


def _enter_context():
    """Make the context of the current GPU that of this thread. A thread of autograd's may begin without one: torch only
    enters it when it calls CUDA there itself."""
    _, driver = libraries()
    context = ctypes.c_void_p()
    _check_driver(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), torch.cuda.current_device()))
    _check_driver(driver.cuCtxSetCurrent(context))


def shared_per_block(device_index):
    """The bytes of shared memory that a block may have on a GPU."""
    _, driver = libraries()
    device, number = ctypes.c_int(), ctypes.c_int()
    _check_driver(driver.cuDeviceGet(ctypes.byref(device), device_index))
    _check_driver(driver.cuDeviceGetAttribute(ctypes.byref(number), SHARED_PER_BLOCK, device))
    return number.value


def compiled(source, options):
    """The machine code of a CUDA C++ source, bytes. options: a list of NVRTC's, among them the architecture.

    Raises RuntimeError, with the first error that the compiler found.
    """
    nvrtc, _ = libraries()
    program = ctypes.c_void_p()
    _check_nvrtc(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"scan.cu", 0, None, None))
    try:
        words = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        size = ctypes.c_size_t()
        if nvrtc.nvrtcCompileProgram(program, len(options), words) != 0:
            _check_nvrtc(nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
            log = ctypes.create_string_buffer(size.value)
            _check_nvrtc(nvrtc.nvrtcGetProgramLog(program, log))
            lines = log.value.decode(errors="replace").split("\n")
            raise RuntimeError(next((line.strip() for line in lines if "error" in line), "NVRTC gives no reason"))
        _check_nvrtc(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        binary = ctypes.create_string_buffer(size.value)
        _check_nvrtc(nvrtc.nvrtcGetCUBIN(program, binary))
        return binary.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


# ---- on disk ---------------------------------------------------------------------------------------------------


def _cache_folders():
    """Where compiled files may lie, one after the other: the user's cache folder, unless there is no home; the user's
    own folder in the temporary directory, unless it can't be had."""
    home = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if os.path.isabs(home):
        yield pathlib.Path(home, "mambasynth")
    with contextlib.suppress(OSError):
        yield pathlib.Path(cli.private_folder(), "nvrtc")


def _read(path):
    """The machine code in a file, or None where it is missing or damaged."""
    with contextlib.suppress(OSError):
        return cli.without_checksum(path.read_bytes()) or None
    return None


def _write(path, binary):
    """Write machine code to a file, which appears whole or not at all. Returns whether it could be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        number, beside = tempfile.mkstemp(dir=path.parent)
    except OSError:
        return False
    try:
        with os.fdopen(number, "wb") as file:
            file.write(cli.with_checksum(binary))
        os.replace(beside, path)
        return True
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        return False


def _cached(source, options):
    """`compiled`, from the disk where it was compiled before."""
    nvrtc, _ = libraries()
    version = (ctypes.c_int(), ctypes.c_int())
    _check_nvrtc(nvrtc.nvrtcVersion(*(ctypes.byref(number) for number in version)))
    key = repr((source, options, [number.value for number in version]))
    paths = [folder / (hashlib.sha256(key.encode()).hexdigest() + ".cubin") for folder in _cache_folders()]
    binary = next((found for found in map(_read, paths) if found is not None), None)
    if binary is None:
        with _told("compiling kernels, once" if paths else "compiling kernels"):
            binary = compiled(source, options)
        any(_write(path, binary) for path in paths)  # in the first place where that can be done
    return binary


@contextlib.contextmanager
def _told(words):
    """Lets progress lines (terminal.py) say what is going on beside."""
    cli.DOING.append(words)
    try:
        yield
    finally:
        cli.DOING.remove(words)


# ---- kernels ---------------------------------------------------------------------------------------------------


@functools.cache
def kernels(path, defines, device_index):
    """The kernels of a CUDA C++ file for one GPU: a function kernel(name) of which see `_Kernel`.

    defines: a tuple of (name, value) pairs, macros. The GPU must be the current one. Raises UserError where the file
    can't be compiled for this GPU, or the driver doesn't take the result.
    """
    architecture = "sm_{}{}".format(*torch.cuda.get_device_capability(device_index))
    options = [f"--gpu-architecture={architecture}", "--std=c++17", "--use_fast_math",
               *(f"-D{name}={value}" for name, value in defines)]  # fmt: skip
    module = ctypes.c_void_p()
    try:
        binary = _cached(pathlib.Path(path).read_text(), options)
        _enter_context()
        _check_driver(libraries()[1].cuModuleLoadData(ctypes.byref(module), binary))
    except RuntimeError as error:
        raise cli.UserError(f"the kernels of {pathlib.Path(path).name} can't be compiled for this GPU, {architecture} "
                            f"({error}); choose --scan mamba-ssm, or --scan reference, which is slow") from None
    return functools.cache(lambda name: _Kernel(module, name))


class _Kernel:
    """A kernel that takes one structure: kernel(blocks, threads, arguments, shared bytes) launches it on the current
    stream of the current GPU."""

    def __init__(self, module, name):
        _, driver = libraries()
        self.function = ctypes.c_void_p()
        _check_driver(driver.cuModuleGetFunction(ctypes.byref(self.function), module, name.encode()))
        self.launch = driver.cuLaunchKernel
        self.shared = 48 * 1024  # bytes that a block may have; more has to be asked for

    def __call__(self, blocks, threads, arguments, shared=0):
        if shared > self.shared:
            _check_driver(libraries()[1].cuFuncSetAttribute(self.function, MAX_DYNAMIC_SHARED, shared))
            self.shared = shared
        stream = torch._C._cuda_getCurrentRawStream(torch.cuda.current_device())
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        launch = (self.function, blocks, 1, 1, threads, 1, 1, shared, ctypes.c_void_p(stream), pointers, None)
        code = self.launch(*launch)
        if code == INVALID_CONTEXT:
            _enter_context()
            code = self.launch(*launch)
        _check_driver(code)
