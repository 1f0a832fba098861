"""CUDA C++ compiled at run time by NVRTC, and launched: what torch's CUDA builds bring along is all that it needs.

NVRTC, NVIDIA's run-time compiler, comes with torch (the package nvidia-cuda-nvrtc), and libcuda with the driver. Both
are called through ctypes. There is neither a CUDA toolkit nor a C compiler involved, and a launch takes less of the
host's time than one through Triton: kernels take a single argument, a structure of all that they need.

A compiled file is kept in memory by process and GPU, and on disk, in the user's own cache folder, by everything that it
depends on. A damaged or missing file on disk only means to compile once more, which takes about a second.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import pathlib
import zlib

import torch

import cli

CHECKSUM_BYTES = 4
MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT


@functools.cache
def _libraries():
    """(NVRTC, the driver) as ctypes libraries."""
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
    raise cli.UserError("NVRTC, which torch's CUDA builds bring along, was not found; pip install nvidia-cuda-nvrtc, "
                        "or choose --scan reference, which is slow")  # fmt: skip


def _check_nvrtc(code, program=None):
    nvrtc, _ = _libraries()
    if code == 0:
        return
    nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
    log = b""
    if program is not None:
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        log = log.value
    raise RuntimeError(f"NVRTC: {nvrtc.nvrtcGetErrorString(code).decode()}\n{log.decode()}")


def _check_driver(code):
    if code == 0:
        return
    text = ctypes.c_char_p()
    _libraries()[1].cuGetErrorString(code, ctypes.byref(text))
    raise RuntimeError(f"CUDA: {(text.value or b'unknown error').decode()}")


def _enter_context():
    """Make the context of the current GPU that of this thread. A thread of autograd's may begin without one: torch only
    enters it when it calls CUDA there itself."""
    _, driver = _libraries()
    context = ctypes.c_void_p()
    _check_driver(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), torch.cuda.current_device()))
    _check_driver(driver.cuCtxSetCurrent(context))


def compiled(source, options):
    """The machine code of a CUDA C++ source, bytes. options: a list of NVRTC's, among them the architecture."""
    nvrtc, _ = _libraries()
    program = ctypes.c_void_p()
    _check_nvrtc(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"scan.cu", 0, None, None))
    try:
        words = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        _check_nvrtc(nvrtc.nvrtcCompileProgram(program, len(options), words), program)
        size = ctypes.c_size_t()
        _check_nvrtc(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        binary = ctypes.create_string_buffer(size.value)
        _check_nvrtc(nvrtc.nvrtcGetCUBIN(program, binary))
        return binary.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _cache_folder():
    """Where compiled files are kept: the user's cache folder or, without a home, the folder in the temporary directory
    that only this user can write to (what lies in it is executed). None where that can't be had either."""
    home = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if os.path.isabs(home):
        return pathlib.Path(home, "mambasynth")
    with contextlib.suppress(OSError):
        return pathlib.Path(cli.private_folder(), "nvrtc")
    return None


def _cached(source, options):
    """`compiled`, from the disk where it was compiled before."""
    nvrtc, _ = _libraries()
    version = (ctypes.c_int(), ctypes.c_int())
    _check_nvrtc(nvrtc.nvrtcVersion(*(ctypes.byref(number) for number in version)))
    key = repr((source, options, [number.value for number in version]))
    folder = _cache_folder()
    if folder is None:
        return compiled(source, options)
    path = folder / (hashlib.sha256(key.encode()).hexdigest() + ".cubin")
    with contextlib.suppress(OSError):
        data = path.read_bytes()
        if zlib.crc32(data[:-CHECKSUM_BYTES]).to_bytes(CHECKSUM_BYTES, "little") == data[-CHECKSUM_BYTES:]:
            return data[:-CHECKSUM_BYTES]
    binary = compiled(source, options)
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.{os.getpid()}")
        beside.write_bytes(binary + zlib.crc32(binary).to_bytes(CHECKSUM_BYTES, "little"))
        beside.replace(path)
    return binary


@functools.cache
def kernels(path, defines, device_index):
    """The kernels of a CUDA C++ file for one GPU: a function kernel(name) of which see `_Kernel`.

    defines: a tuple of (name, value) pairs, macros. The GPU must be the current one.
    """
    major, minor = torch.cuda.get_device_capability(device_index)
    options = [f"--gpu-architecture=sm_{major}{minor}", "--std=c++17", "--use_fast_math",
               *(f"-D{name}={value}" for name, value in defines)]  # fmt: skip
    binary = _cached(pathlib.Path(path).read_text(), options)
    _, driver = _libraries()
    _enter_context()
    module = ctypes.c_void_p()
    _check_driver(driver.cuModuleLoadData(ctypes.byref(module), binary))
    return functools.cache(lambda name: _Kernel(module, name))


class _Kernel:
    """A kernel that takes one structure: kernel(blocks, threads, arguments, shared bytes) launches it on the current
    stream of the current GPU."""

    def __init__(self, module, name):
        _, driver = _libraries()
        self.function = ctypes.c_void_p()
        _check_driver(driver.cuModuleGetFunction(ctypes.byref(self.function), module, name.encode()))
        self.launch = driver.cuLaunchKernel
        self.shared = 48 * 1024  # bytes that a block may have; more has to be asked for

    def __call__(self, blocks, threads, arguments, shared=0):
        if shared > self.shared:
            _check_driver(_libraries()[1].cuFuncSetAttribute(self.function, MAX_DYNAMIC_SHARED, shared))
            self.shared = shared
        stream = torch._C._cuda_getCurrentRawStream(torch.cuda.current_device())
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        launch = (self.function, blocks, 1, 1, threads, 1, 1, shared, ctypes.c_void_p(stream), pointers, None)
        code = self.launch(*launch)
        if code == INVALID_CONTEXT:
            _enter_context()
            code = self.launch(*launch)
        _check_driver(code)
