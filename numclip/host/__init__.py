"""The engine of the host's memory: tables, plans and kernels over them."""
