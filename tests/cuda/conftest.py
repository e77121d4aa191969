"""The GPU, or the stand-in for one, is there before numba asks for a driver: at its import."""

from tests.cuda import gpu as gpu
