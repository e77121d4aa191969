"""The kernels of NVIDIA GPUs, by numba-cuda; loaded only when a GPU is asked for."""
