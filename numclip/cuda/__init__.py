"""Gradients and groups on NVIDIA GPUs; loaded only when a GPU is asked for."""
