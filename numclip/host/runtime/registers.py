"""The register that holds a thread's floating-point environment.

A thread can be set to flush subnormal numbers to zero or to round otherwise than to nearest;
PyTorch does the former on request, libraries linked with ``-ffast-math`` without one.
"""

from typing import Any

from llvmlite import binding, ir

_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
# Round to nearest, keep subnormal numbers, mask exceptions; the lowest six bits only record.
_MXCSR, _MXCSR_MODES = 0x1F80, 0xFFC0


class _X86:
    """The register MXCSR of x86-64."""

    word = _I32

    @staticmethod
    def read(builder: ir.IRBuilder) -> Any:
        """Emit the register's value."""
        slot = builder.alloca(_I32)
        _call(builder, "llvm.x86.sse.stmxcsr", ir.VoidType(), builder.bitcast(slot, _pointer()))
        return builder.load(slot)

    @staticmethod
    def is_odd(builder: ir.IRBuilder, value: Any) -> Any:
        """Emit whether a value says another environment than the ordinary one."""
        modes = builder.and_(value, ir.Constant(_I32, _MXCSR_MODES))
        return builder.icmp_unsigned("!=", modes, ir.Constant(_I32, _MXCSR))

    @staticmethod
    def write(builder: ir.IRBuilder, value: Any) -> None:
        """Emit an assignment to the register; None stands for the ordinary value."""
        slot = builder.alloca(_I32)
        builder.store(ir.Constant(_I32, _MXCSR) if value is None else value, slot)
        _call(builder, "llvm.x86.sse.ldmxcsr", ir.VoidType(), builder.bitcast(slot, _pointer()))

    @staticmethod
    def pause(builder: ir.IRBuilder) -> None:
        """Emit a hint that this is a loop that waits."""
        _call(builder, "llvm.x86.sse2.pause", ir.VoidType())


class _Arm:
    """The register FPCR of AArch64, ordinarily 0."""

    word = _I64

    @staticmethod
    def read(builder: ir.IRBuilder) -> Any:
        """Emit the register's value."""
        return _call(builder, "llvm.aarch64.get.fpcr", _I64)

    @staticmethod
    def is_odd(builder: ir.IRBuilder, value: Any) -> Any:
        """Emit whether a value says another environment than the ordinary one."""
        return builder.icmp_unsigned("!=", value, ir.Constant(_I64, 0))

    @staticmethod
    def write(builder: ir.IRBuilder, value: Any) -> None:
        """Emit an assignment to the register; None stands for the ordinary value."""
        _call(
            builder,
            "llvm.aarch64.set.fpcr",
            ir.VoidType(),
            ir.Constant(_I64, 0) if value is None else value,
        )

    @staticmethod
    def pause(builder: ir.IRBuilder) -> None:
        """Emit a hint that this is a loop that waits."""
        _call(builder, "llvm.aarch64.hint", ir.VoidType(), ir.Constant(_I32, 1))


def _register() -> type[_X86] | type[_Arm] | None:
    triple = binding.get_process_triple()
    if triple.startswith("x86_64"):
        return _X86
    return _Arm if triple.startswith(("aarch64", "arm64")) else None


REGISTER = _register()
"""The processor's register; None on others, where kernels run in the caller's environment."""


def _pointer() -> ir.PointerType:
    return _I8.as_pointer()


def _call(builder: ir.IRBuilder, name: str, result: ir.Type, *arguments: Any) -> Any:
    """Emit a call of an intrinsic function."""
    function_type = ir.FunctionType(result, [argument.type for argument in arguments])
    function = builder.module.declare_intrinsic(name, fnty=function_type)
    return builder.call(function, arguments)


def call_in_ordinary_environment(builder: ir.IRBuilder, function: Any, arguments: Any) -> Any:
    """Emit a call in the ordinary environment.

    Reading the register takes 3 ns; setting it twice, which is rare, takes 20.
    """
    if REGISTER is None:
        return builder.call(function, arguments)
    before = REGISTER.read(builder)
    odd = REGISTER.is_odd(builder, before)
    with builder.if_then(odd, likely=False):
        REGISTER.write(builder, None)
    code = builder.call(function, arguments)
    with builder.if_then(odd, likely=False):
        REGISTER.write(builder, before)
    return code
