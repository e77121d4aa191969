"""Compiles parts of kernels: to code that kernels are linked with, and no further.

numba optimises every function in full and makes machine code of it, even of one that is compiled
into its callers. That takes two fifths of the time of compiling, and the code would never run.
"""

from typing import Any

from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import register_pass
from numba.core.typed_passes import NativeLowering


class _PartLibrary(JITCodeLibrary):
    """Code that is not loaded into memory."""

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._verify_declare_only_symbols()
        self._finalized = True


class _RoughLibrary(_PartLibrary):
    """Code that its kernel optimises, together with all other parts of it."""

    def _optimize_final_module(self) -> None:
        passes, builder = self._codegen._module_pass_manager(
            loop_vectorize=False, slp_vectorize=False, opt=0, cost="cheap"
        )
        passes.run(self._final_module, builder)


@register_pass(mutates_CFG=True, analysis_only=False)
class _PartLowering(NativeLowering):
    """numba's pass that emits native code, up to the machine's own."""

    _name = "numclip_part_lowering"

    def run_pass(self, state: Any) -> bool:
        """Emit code, and register it for callers under an object in place of an address."""
        # A sum is vectorised here: alike in all kernels, even those that know its length.
        library = _PartLibrary if state.flags.fastmath else _RoughLibrary
        state.library = library(state.targetctx.codegen(), state.func_id.func_qualname)
        state.flags.no_compile = True
        super().run_pass(state)
        part = object()
        state.targetctx.insert_user_function(part, state.cr.fndesc, [state.library])
        state.cr = state.cr._replace(cfunc=part)
        return True


class OwnCompiler(CompilerBase):
    """numba's compiler, with the pass `lowering` in place of the one that emits native code."""

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
