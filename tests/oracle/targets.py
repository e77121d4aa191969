"""Targets on which test suites call numclip's functions: the host; tests.cuda has the GPU's."""

from __future__ import annotations

from typing import Any

import numclip as nc


class Host:
    """numclip's functions, for gradients in the host's memory."""

    device = "cpu"

    def __init__(self, examples: int) -> None:
        self.examples = examples

    def __getattr__(self, name: str) -> Any:
        return getattr(nc, name)
