"""Learning rate as a function of the update's number; no state of its own, so a resume cannot get it wrong."""

from __future__ import annotations

import math

from m2train.config import LearnerConfig


def learning_rate(update: int, num_updates: int, config: LearnerConfig) -> float:
    """Rate of update `update` (from 0) out of `num_updates`.

    Warm-up rises linearly and reaches `lr` at update `warmup_steps - 1`; then constant, or linear or cosine decay
    that reaches `min_lr` at the last update.
    """
    if update < config.warmup_steps:
        return config.lr * (update + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.lr
    span = max(num_updates - 1 - config.warmup_steps, 1)
    done = min((update - config.warmup_steps) / span, 1.0)
    left = 1.0 - done if config.lr_schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return config.min_lr + (config.lr - config.min_lr) * left
