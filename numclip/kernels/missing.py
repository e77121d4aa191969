"""The error where no GPU can be used; it is here so that catching it loads nothing of CUDA."""

INSTALL = 'pip install "numclip[cuda12]" (or cuda13, as the driver wants)'


class DeviceError(RuntimeError):
    """No NVIDIA GPU can be used; the message says what is missing and how to get it."""
