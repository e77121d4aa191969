"""Gradient clipping for NumPy training code."""

__version__ = "0.2.0"

from numclip.accumulator import NormAccumulator as NormAccumulator
from numclip.diagnostics import get_num_threads as get_num_threads
from numclip.diagnostics import set_num_threads as set_num_threads
from numclip.diagnostics import show_versions as show_versions
from numclip.diagnostics import warmup as warmup
from numclip.errors import DeviceError as DeviceError
from numclip.errors import NonFiniteGradientError as NonFiniteGradientError
from numclip.errors import RankError as RankError
from numclip.functional import adaptive_clip as adaptive_clip
from numclip.functional import clip_by_average_norm as clip_by_average_norm
from numclip.functional import clip_by_block_rms as clip_by_block_rms
from numclip.functional import clip_by_global_norm as clip_by_global_norm
from numclip.functional import clip_by_norm as clip_by_norm
from numclip.functional import clip_by_value as clip_by_value
from numclip.functional import clip_per_example as clip_per_example
from numclip.functional import global_norm as global_norm
from numclip.group import Group as Group
from numclip.groups import ParamGroups as ParamGroups
from numclip.history import History as History
from numclip.optim import SGD as SGD
from numclip.optim import Adam as Adam
from numclip.optim import Optimizer as Optimizer
from numclip.report import ClipReport as ClipReport
from numclip.report import GroupReport as GroupReport
from numclip.report import TensorReport as TensorReport
from numclip.rules import Adaptive as Adaptive
from numclip.rules import ByAverageNorm as ByAverageNorm
from numclip.rules import ByBlockRMS as ByBlockRMS
from numclip.rules import ByGlobalNorm as ByGlobalNorm
from numclip.rules import ByNorm as ByNorm
from numclip.rules import ByValue as ByValue
from numclip.running_rules import AdaGC as AdaGC
from numclip.running_rules import AutoClip as AutoClip
from numclip.running_rules import ZClip as ZClip
from numclip.slices import IndexedSlices as IndexedSlices
from numclip.state import StateError as StateError

__all__ = [
    name
    for name, value in globals().items()
    if getattr(value, "__module__", "").startswith("numclip.")
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
