"""What ends a run: one line of cause, no traceback for the user."""

from __future__ import annotations


class RunError(RuntimeError):
    """Something outside the recipe gave out (an engine, a learner rank, the disk); the message is the cause."""
