"""How parts of kernels are compiled: to code that kernels are linked with, and no further.

numba makes machine code of every function, also of one that is compiled into its callers. That is
a quarter of the time that compiling takes, and nobody would run it.
"""

from typing import Any

from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import register_pass
from numba.core.typed_passes import NativeLowering


class _PartLibrary(JITCodeLibrary):
    """Code without a place in memory."""

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._verify_declare_only_symbols()
        self._finalized = True


@register_pass(mutates_CFG=True, analysis_only=False)
class _PartLowering(NativeLowering):
    """numba's pass that emits native code, up to the machine's own."""

    _name = "numclip_part_lowering"

    def run_pass(self, state: Any) -> bool:
        """Emit code, and let others find it by an object that stands for its address."""
        state.library = _PartLibrary(state.targetctx.codegen(), state.func_id.func_qualname)
        state.flags.no_compile = True
        super().run_pass(state)
        part = object()
        state.targetctx.insert_user_function(part, state.cr.fndesc, [state.library])
        state.cr = state.cr._replace(cfunc=part)
        return True


class OwnCompiler(CompilerBase):
    """numba's compiler, with a pass of ours in place of the one that emits native code."""

    lowering: type[NativeLowering]

    def define_pipelines(self) -> list[Any]:
        """Return the passes."""
        pipeline = DefaultPassBuilder.define_nopython_pipeline(self.state, "numclip")
        pipeline.passes = [
            (self.lowering, text) if step is NativeLowering else (step, text)
            for step, text in pipeline.passes
        ]
        pipeline.finalize()
        return [pipeline]


class PartCompiler(OwnCompiler):
    """Compiles parts of kernels."""

    lowering = _PartLowering
