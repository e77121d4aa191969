"""Entries of kernels, which run in the ordinary floating-point environment, or pack a job.

The entry of a kernel sets the ordinary environment and restores the caller's afterwards, so that
results depend on neither. The kernel's body is a function of its own that is never inlined: the
compiler may move arithmetic past the instructions that set the environment.

The entry of a kernel that takes a share ``[begin, end)`` has a second use. Called with
``(job, PACK, ...)`` it computes nothing and writes its other arguments to the memory at `job`,
with the address of a function that computes any share. Native code can compute a job without
knowing the types of its arguments (see `team`).
"""

import gc
from typing import Any

from llvmlite import ir
from numba.core import lowering, types
from numba.core.compiler_machinery import register_pass
from numba.core.errors import LoweringError
from numba.core.typed_passes import NativeLowering

from numclip.host.runtime.parts import OwnCompiler
from numclip.host.runtime.registers import call_in_ordinary_environment

PACK = -1
"""The value of `end` with which an entry packs a job."""

SHARE, COUNT, SIZE, NEXT, FAILED, ARGUMENTS, JOB_WORDS = 0, 1, 2, 3, 4, 8, 96
"""Words of a job: the function's address, how many items there are, how many a share has, the
first item that no thread has taken, whether a share failed; the first word of the arguments, and
the number of words."""

_I32, _I64 = ir.IntType(32), ir.IntType(64)


class _EntryLower(lowering.Lower):
    """Lowers a kernel to a body and the entry that has the kernel's name."""

    def setup_function(self, fndesc: Any) -> None:
        """Declare the entry with the kernel's name, and begin the body in its stead."""
        results = getattr(fndesc.restype, "types", (fndesc.restype,))
        if any(isinstance(result, types.Array) for result in results):
            # numba returns one by Python code: a signal's exception there is a SystemError.
            raise LoweringError("a kernel returns numbers; it writes to arrays it is given")
        self.entry = self.context.declare_function(self.module, fndesc)
        self.function = ir.Function(
            self.module, self.entry.function_type, f"{self.entry.name}.body"
        )
        self.function.linkage = "internal"
        self.function.attributes.add("noinline")
        self.call_conv.decorate_function(
            self.function, fndesc.args, fndesc.argtypes, noalias=fndesc.noalias
        )
        self.entry_block = self.function.append_basic_block("entry")
        self.builder = ir.IRBuilder(self.entry_block)
        self.call_helper = self.call_conv.init_call_helper(self.builder)

    def lower_normal_function(self, fndesc: Any) -> None:
        """Emit the body, then the entry."""
        super().lower_normal_function(fndesc)
        builder = ir.IRBuilder(self.entry.append_basic_block("entry"))
        if fndesc.args[:2] == ("begin", "end") and fndesc.argtypes[:2] == (types.int64,) * 2:
            self._emit_pack(builder, fndesc.argtypes)
        builder.ret(call_in_ordinary_environment(builder, self.function, self.entry.args))

    def _emit_pack(self, builder: ir.IRBuilder, argtypes: Any) -> None:
        """Emit the code that packs a job, if `end` is `PACK`."""
        begin, end, *values = self.call_conv.decode_arguments(builder, argtypes, self.entry)
        packing = builder.icmp_signed("==", end, ir.Constant(_I64, PACK))
        with builder.if_then(packing, likely=False):
            values = [
                self._borrowed(builder, kind, value)
                for kind, value in zip(argtypes[2:], values, strict=True)
            ]
            packed = ir.LiteralStructType([value.type for value in values])
            if ARGUMENTS * 8 + self.context.get_abi_sizeof(packed) > JOB_WORDS * 8:
                raise LoweringError("the arguments of a kernel do not fit into a job")
            words = builder.inttoptr(begin, _I64.as_pointer())
            for k, value in enumerate(values):
                builder.store(value, _field(builder, words, packed, k))
            share = self._share(argtypes, packed)
            builder.store(builder.ptrtoint(share, _I64), words)
            result = self.entry.args[0]
            builder.store(ir.Constant(result.type.pointee, None), result)
            builder.ret(ir.Constant(_I32, 0))

    def _borrowed(self, builder: ir.IRBuilder, kind: Any, value: Any) -> Any:
        """Emit an array without its reference count, which is valid in the packing call alone."""
        if not isinstance(kind, types.Array):
            return value
        array = self.context.make_array(kind)(self.context, builder, value)
        array.meminfo = ir.Constant(array.meminfo.type, None)
        array.parent = ir.Constant(array.parent.type, None)
        return array._getvalue()

    def _share(self, argtypes: Any, packed: ir.Type) -> ir.Function:
        """Emit ``share(job, begin, end)``, which returns 0 unless the kernel failed."""
        function_type = ir.FunctionType(_I64, [_I64, _I64, _I64])
        share = ir.Function(self.module, function_type, f"{self.entry.name}.share")
        share.linkage = "internal"
        builder = ir.IRBuilder(share.append_basic_block("entry"))
        job, begin, end = share.args
        words = builder.inttoptr(job, _I64.as_pointer())
        values = [builder.load(_field(builder, words, packed, k)) for k in range(len(argtypes) - 2)]
        pack = self.call_conv._get_arg_packer(argtypes)
        result, error = self.entry.args[:2]
        results = [builder.alloca(result.type.pointee), builder.alloca(error.type.pointee)]
        arguments = [*results, *pack.as_arguments(builder, [begin, end, *values])]
        code = call_in_ordinary_environment(builder, self.function, arguments)
        builder.ret(builder.sext(code, _I64))
        return share


def _field(builder: ir.IRBuilder, words: Any, packed: ir.Type, k: int) -> Any:
    """Emit the address of the k-th argument of a job."""
    start = builder.gep(words, [ir.Constant(_I64, ARGUMENTS)])
    start = builder.bitcast(start, packed.as_pointer())
    return builder.gep(start, [ir.Constant(_I32, 0), ir.Constant(_I32, k)])


@register_pass(mutates_CFG=True, analysis_only=False)
class _EntryLowering(NativeLowering):
    """numba's pass that emits native code, with an entry for each kernel."""

    _name = "numclip_entry_lowering"

    @property
    def lowering_class(self) -> type[_EntryLower]:
        """The class that emits the code."""
        return _EntryLower


class KernelCompiler(OwnCompiler):
    """Compiles kernels, with entries."""

    lowering = _EntryLowering

    def compile_extra(self, func: Any) -> Any:
        """Compile a kernel and its parts without garbage collection.

        numba makes so many objects that collection takes a fifth of the time.
        """
        looks = gc.isenabled()
        gc.disable()
        try:
            return super().compile_extra(func)
        finally:
            if looks:
                gc.enable()
