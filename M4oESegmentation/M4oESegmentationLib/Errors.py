"""What the user sees when something cannot be done."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import slicer.util

_EXPECTED = (ValueError, RuntimeError, OSError, MemoryError, ImportError, subprocess.CalledProcessError)


def showError(message: str, error: object) -> None:
    """Shows a sentence and, below it, the reason as another one."""
    reason = str(error)
    slicer.util.errorDisplay(f"{message}\n\n{reason[:1].upper()}{reason[1:]}")


@contextmanager
def errorsShown(message: str) -> Iterator[None]:
    """Shows an error below a message, and goes on; a fault of ours is in the log with its place."""
    try:
        yield
    except _EXPECTED as error:
        logging.error("M4oE: %s %s", message, error)
        showError(message, error)
