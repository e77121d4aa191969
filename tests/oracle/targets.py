"""What suites call numclip's functions on: here the host; the GPU is in tests.cuda.devices."""

from __future__ import annotations

from typing import Any

import numclip as nc


class Host:
    """numclip's functions, for gradients of the host."""

    device = "cpu"

    def __init__(self, examples: int) -> None:
        self.examples = examples

    def __getattr__(self, name: str) -> Any:
        return getattr(nc, name)
