"""The GPU's kernels as compiled for a GPU, run on the processor: no GPU is needed.

The simulator runs the kernels' text as plain Python, and other forms of what is an intrinsic.
Here numba-cuda compiles them all the way to LLVM's code for a GPU, and llvmlite compiles that
code for the host, with a Python thread for each thread of a block. As on a GPU, a product and a
sum may be rounded once. This proves what types, intrinsics and address arithmetic do; it proves
nothing about speed, or races between blocks.

`install` makes numclip use it for the rest of the process.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from numba.cuda import compiler, cuda_paths, dispatcher, types
from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

from numclip.kernels.cuda import device

THREADS = 4  # of a block; a power of two
CAPABILITY = 9, 0
AGGREGATE = r"\{[^{}()]*\}|\[[^\[\]()]*\]|<[^<>()]*>"
POINTER = re.compile(rf"(?:i\d+|half|float|double|ptr|{AGGREGATE})\*")
# What LLVM's code for a GPU calls, with the simplest that does the same.
DEFINITIONS = """
define weak_odr i32 @"gpu.atomic.load.inc.32.p0i32"(ptr %place, i32 %last) {
  %old = atomicrmw uinc_wrap ptr %place, i32 %last seq_cst
  ret i32 %old
}
define weak_odr void @"gpu.membar.gl"() {
  fence seq_cst
  ret void
}
declare i32 @finite(double)
define weak_odr i32 @"__nv_isfinited"(double %x) {
  %found = call i32 @finite(double %x)
  ret i32 %found
}
"""
LIBRARY = {
    f"__nv_{name}{suffix}": f"{name}{suffix}"
    for name in ("copysign", "fabs", "floor", "frexp", "hypot", "ldexp", "pow", "sqrt", "trunc")
    for suffix in ("", "f")
}

own = threading.local()
barrier = threading.Barrier(THREADS)
pool = ThreadPoolExecutor(THREADS)
votes = [0] * THREADS
WORD, ACTION = ctypes.CFUNCTYPE(ctypes.c_int32), ctypes.CFUNCTYPE(None)
VOTE = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int32)


def any_of(vote: int) -> int:
    """What the threads of a block say together: whether one says yes."""
    votes[own.thread] = vote
    barrier.wait()
    said = any(votes)
    barrier.wait()
    return int(said)


CALLS = {
    "gpu.read.ptx.sreg.tid.x": WORD(lambda: own.thread),
    "gpu.read.ptx.sreg.ctaid.x": WORD(lambda: own.block),
    "gpu.read.ptx.sreg.nctaid.x": WORD(lambda: own.blocks),
    "gpu.barrier0.or": VOTE(any_of),
    "gpu.barrier0": ACTION(lambda: barrier.wait() and None),
}


def for_the_host(code: str) -> str:
    """LLVM's code for a GPU as code for any processor: one kind of pointers, no target."""
    code = re.sub(r'(?m)^(target .*|@"llvm\.used".*)$', "", code)
    code = code.replace("llvm.nvvm.", "gpu.").replace("linkonce_odr", "weak_odr")
    code = re.sub(r" addrspace\(\d+\)", "", code).replace("addrspacecast", "bitcast")
    code = re.sub(r"\bf(mul|add|sub) (?=double|float)", r"f\1 contract ", code)
    code = re.sub(r"(declare i32 @\"gpu\.read[^\n]*)", r"\1 memory(none) nounwind willreturn", code)
    while True:
        plain = POINTER.sub("ptr", code)
        if plain == code:
            return code
        code = plain


@functools.cache
def engine() -> Any:
    """What compiles for this processor, and keeps the code."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features().flatten()
    target = llvm.Target.from_default_triple()
    machine = target.create_target_machine(llvm.get_host_cpu_name(), features, opt=2)
    made = llvm.create_mcjit_compiler(llvm.parse_assembly(DEFINITIONS), machine)
    mathematics = ctypes.CDLL(ctypes.util.find_library("m"))
    for theirs, name in LIBRARY.items():
        llvm.add_symbol(theirs, ctypes.cast(getattr(mathematics, name), ctypes.c_void_p).value)
    for name, call in CALLS.items():
        llvm.add_symbol(name, ctypes.cast(call, ctypes.c_void_p).value)
    return made, machine


def optimized(module: Any, machine: Any) -> Any:
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return module


def type_of(argument: Any) -> Any:
    if isinstance(argument, np.ndarray):
        return types.Array(getattr(types, argument.dtype.name), argument.ndim, "C")
    name = argument.dtype.name if isinstance(argument, np.generic) else type(argument).__name__
    return getattr(types, {"int": "int64", "float": "float64"}.get(name, name))


def flat(argument: Any) -> list[Any]:
    """An argument as the code takes it: an array as its address, sizes and strides."""
    if isinstance(argument, np.ndarray):
        assert argument.flags.c_contiguous
        numbers = argument.size, argument.itemsize, argument.ctypes.data
        shape = *argument.shape, *argument.strides
        return [ctypes.c_int64(number) for number in (0, 0, *numbers, *shape)]
    names = {"float32": ctypes.c_float, "float64": ctypes.c_double}
    return [names.get(type_of(argument).name, ctypes.c_int64)(argument)]


@functools.cache
def compiled(kernel: Any, signature: tuple[Any, ...]) -> Any:
    """A kernel for some types of arguments, as a function of the host."""
    library, _ = compiler._compile_pyfunc_with_fixup(
        kernel.py_func, signature, device=False, abi="numba", cc=CAPABILITY, lto=False
    )
    main, *others = [llvm.parse_assembly(for_the_host(code)) for code in library.llvm_strs]
    made, machine = engine()
    definitions = llvm.parse_assembly(DEFINITIONS)
    for other in [*others, definitions]:
        main.link_in(other)
    missing = {f.name for f in optimized(main, machine).functions if f.is_declaration}
    assert missing <= {*LIBRARY, *CALLS, "finite"} | {f for f in missing if f.startswith("llvm.")}
    made.add_module(main)
    made.finalize_object()
    return ctypes.CFUNCTYPE(None)(made.get_function_address(library._entry_name))


def launch(kernel: Any, count: int, _stream: Any, *arguments: Any) -> None:
    """Run a kernel's blocks, the last one first: their order is not to matter."""
    if not count:
        return
    arrays = [getattr(argument, "_ary", argument) for argument in arguments]
    function = compiled(kernel, tuple(map(type_of, arrays)))
    given = [part for argument in arrays for part in flat(argument)]
    blocks = min(count, device._blocks)

    def run(thread: int) -> None:
        own.thread, own.blocks = thread, blocks
        for block in reversed(range(blocks)):
            own.block = block
            function(*given)
            barrier.wait()

    for done in [pool.submit(run, thread) for thread in range(THREADS)]:
        done.result()


def install() -> None:
    """Let numclip use it: kernels compiled as for a GPU, memory as the simulator's."""
    assert not device.SIMULATED, "the emulator needs NUMBA_ENABLE_CUDASIM to be unset"
    cuda_paths._get_nvrtc_path = lambda: None  # NVVM is all that is needed
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=CAPABILITY)
    device.THREADS, device.CHUNK_BYTES = THREADS, 512  # as small as in the simulator
    device.ROW_SHARES, device.LONG_GROUP, device.SECTOR = 4, 2, 8
    from numclip.kernels.cuda import plan, unit_plan, update_plan  # noqa: F401 - real intrinsics

    device.SIMULATED, device.FakeCUDAArray = True, FakeCUDAArray
    device.cuda = SimpleNamespace(device_array=lambda *a: FakeCUDAArray(np.empty(*a)))
    device.launch = launch
