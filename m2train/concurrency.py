"""Coroutines side by side that end together."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import TypeVar

T = TypeVar("T")


async def gather_or_cancel(jobs: Iterable[Coroutine[None, None, T]]) -> list[T]:
    """Results in order; the first failure, or a cancellation, ends the other jobs and is raised once they have."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
