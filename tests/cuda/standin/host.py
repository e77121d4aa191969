"""Kernels' code as numba-cuda hands it to NVVM, compiled for the processor instead.

As on a GPU, a product and a sum may be rounded once. The result is a shared object with
`standin_entry`, which takes the addresses of a kernel's arguments, and the bytes of each.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm

SEPARATOR = "; standin: next module\n"
AGGREGATE = r"\{[^{}()]*\}|\[[^\[\]()]*\]|<[^<>()]*>"
POINTER = re.compile(rf"(?:i\d+|half|float|double|ptr|{AGGREGATE})\*")
BYTES = {"i1": 1, "i8": 1, "i16": 2, "half": 2, "i32": 4, "float": 4}  # 8 else
# What a GPU's code calls, by what does the same here.
RENAMED = {
    "llvm.nvvm.read.ptx.sreg.tid.x": "standin_thread",
    "llvm.nvvm.read.ptx.sreg.tid.y": "standin_thread_y",
    "llvm.nvvm.read.ptx.sreg.tid.z": "standin_thread_z",
    "llvm.nvvm.read.ptx.sreg.ntid.x": "standin_threads",
    "llvm.nvvm.read.ptx.sreg.ntid.y": "standin_threads_y",
    "llvm.nvvm.read.ptx.sreg.ntid.z": "standin_threads_z",
    "llvm.nvvm.read.ptx.sreg.ctaid.x": "standin_block",
    "llvm.nvvm.read.ptx.sreg.nctaid.x": "standin_blocks",
    "llvm.nvvm.barrier0.or": "standin_barrier_or",
    "llvm.nvvm.barrier0": "standin_barrier",
    "llvm.nvvm.atomic.load.inc.32.p0i32": "standin_increase",
    "llvm.nvvm.membar.gl": "standin_fence",
    "llvm.nvvm.shfl.sync.down.i32": "standin_shuffle",
}
FUNCTIONS = ("copysign", "fabs", "floor", "frexp", "hypot", "ldexp", "log2", "pow", "sqrt", "trunc")
LIBRARY = {f"__nv_{name}{end}": f"{name}{end}" for name in FUNCTIONS for end in ("", "f")}
DEFINITIONS = """
define linkonce_odr i32 @standin_increase(ptr %place, i32 %last) {
  %old = atomicrmw uinc_wrap ptr %place, i32 %last seq_cst
  ret i32 %old
}
define linkonce_odr void @standin_fence() {
  fence seq_cst
  ret void
}
declare i32 @standin_shuffle_down(i32, i32)
define linkonce_odr i32 @standin_shuffle(i32 %mask, i32 %word, i32 %apart, i32 %clamp) {
  %found = call i32 @standin_shuffle_down(i32 %word, i32 %apart)
  ret i32 %found
}
declare i32 @finite(double)
define linkonce_odr i32 @__nv_isfinited(double %x) {
  %found = call i32 @finite(double %x)
  ret i32 %found
}
"""


def for_the_host(code: str) -> str:
    """LLVM's code for a GPU as code for any processor: one kind of pointers, no target."""
    code = re.sub(r'(?m)^(target .*|@"llvm\.used".*|!nvvm.*)$', "", code)
    code = code.replace("ptx_kernel ", "")
    for theirs, own in {**RENAMED, **LIBRARY}.items():
        code = re.sub(rf'@"?{re.escape(theirs)}"?(?=\()', f"@{own}", code)
    code = re.sub(r" addrspace\(\d+\)", "", code).replace("addrspacecast", "bitcast")
    code = re.sub(r"\bf(mul|add|sub) (?=double|float)", r"f\1 contract ", code)
    pure = r"declare i32 @standin_(?:threads?(?:_[yz])?|blocks?)\([^\n]*"
    code = re.sub(f"({pure})", r"\1 memory(none) nounwind willreturn", code)
    while True:
        plain = POINTER.sub("ptr", code)
        if plain == code:
            return code
        code = plain


def _entry(module: Any, name: str) -> str:
    """What calls a kernel with the arguments found at some addresses, and tells their sizes."""
    kinds = [str(argument.type) for argument in module.get_function(name).arguments]
    lines = []
    for k, kind in enumerate(kinds):
        lines += [
            f"%at{k} = getelementptr ptr, ptr %given, i64 {k}",
            f"%place{k} = load ptr, ptr %at{k}",
            f"%own{k} = load {kind}, ptr %place{k}",
        ]
    passed = ", ".join(f"{kind} %own{k}" for k, kind in enumerate(kinds))
    sizes = ", ".join(f"i32 {BYTES.get(kind, 8)}" for kind in kinds) or "i32 0"
    body = "\n".join(lines)
    return f"""
declare void @"{name}"({", ".join(kinds)})
@standin_count = constant i32 {len(kinds)}
@standin_sizes = constant [{max(len(kinds), 1)} x i32] [{sizes}]
define void @standin_entry(ptr %given) {{
{body}
call void @"{name}"({passed})
ret void
}}
"""


def _machine() -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features().flatten()
    target = llvm.Target.from_default_triple()
    name = llvm.get_host_cpu_name()
    return target.create_target_machine(name, features, opt=2, reloc="pic", codemodel="small")


def _linked(code: str, name: str, machine: Any) -> Any:
    parts = code.split(SEPARATOR)[1:]
    main, *others = [llvm.parse_assembly(for_the_host(part)) for part in parts]
    for other in [*others, llvm.parse_assembly(DEFINITIONS)]:
        main.link_in(other)
    main.link_in(llvm.parse_assembly(_entry(main, name)))
    for function in main.functions:
        if not function.is_declaration and function.name != "standin_entry":
            function.linkage = "internal"
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(main, builder)
    return main


def compiled(code: str, name: str, folder: Path, compiler: str) -> Path:
    """The shared object of a kernel; made once, and kept for every process of these tests."""
    kind = llvm.get_host_cpu_name(), name, code
    target = folder / f"{hashlib.sha256(repr(kind).encode()).hexdigest()[:32]}.so"
    if not target.exists():
        machine = _machine()
        with tempfile.TemporaryDirectory(dir=folder) as made:
            own = Path(made, "kernel.o")
            own.write_bytes(machine.emit_object(_linked(code, name, machine)))
            linked = own.with_suffix(".so")
            subprocess.run([compiler, "-shared", "-o", linked, own, "-lm"], check=True)
            os.replace(linked, target)  # at once: other processes look here too
    return target
