"""The kernels of NVIDIA GPUs, by numba-cuda."""
