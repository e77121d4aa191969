"""How the host's kernels are compiled, kept, and run by several threads."""
