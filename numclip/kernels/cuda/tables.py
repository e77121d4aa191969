"""The columns of the tables that kernels of the GPU read and write, and their codes."""

from numclip.tables import *  # noqa: F403
