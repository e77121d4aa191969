"""The error where no GPU can be used; it is here so that catching it loads nothing of CUDA."""

from numclip.errors import DeviceError as DeviceError

INSTALL = 'pip install "numclip[cuda12]" (or cuda13, as the driver wants)'
