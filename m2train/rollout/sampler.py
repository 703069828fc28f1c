"""Sampling from the policy, with a seed and a journal entry for every request."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

from m2train.config import Recipe
from m2train.errors import RunError
from m2train.records import Generation
from m2train.rollout.journal import Journal


class Engine(Protocol):
    """What a rollout engine must do: tokens in, tokens out."""

    async def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        max_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        affinity: str,
    ) -> Generation: ...


class Sampler:
    """The policy as the dialogue code sees it.

    Args:
        engine: generates.
        recipe: sampling settings and the run's seed.
        journal: answers requests that an earlier, killed process already made.
        greedy: temperature 0, for evaluation.
    """

    def __init__(self, engine: Engine, recipe: Recipe, journal: Journal, *, greedy: bool = False) -> None:
        self._engine = engine
        self._recipe = recipe
        self._journal = journal
        self._temperature = 0.0 if greedy else recipe.rollout.temperature

    async def sample(self, key: str, prompt_ids: Sequence[int], *, affinity: str) -> Generation:
        """One continuation of at most `algo.max_new_tokens` tokens.

        Args:
            key: names the request within the run; the seed is derived from it.
            prompt_ids: the whole prompt.
            affinity: requests of the same affinity go to the same engine, whose prefix cache they share.

        Raises:
            RunError: the engine's tokens come from other weights than those of this step, or from unnamed ones.
        """
        done = self._journal.get(key)
        if done is not None:
            return done
        generation = await self._engine.generate(
            prompt_ids,
            max_tokens=self._recipe.algo.max_new_tokens,
            temperature=self._temperature,
            top_p=self._recipe.rollout.top_p,
            seed=derive_seed(self._recipe.seed, key),
            affinity=affinity,
        )
        found, expected = {span.version for span in generation.weight_versions}, self._journal.weight_version
        if not found:
            raise RunError(
                f"the engine does not say which weights the tokens of {key} come from; expected {expected}: its vLLM "
                "must report weight_versions (0.32 does)"
            )
        if found != {expected}:
            raise RunError(
                f"{key} was sampled by weights {', '.join(sorted(found - {expected}))}; expected {expected}: "
                "does another run update the same engine (rollout.urls)? give each run its own"
            )
        self._journal.put(key, generation)
        return generation


def derive_seed(seed: int, key: str) -> int:
    """A 31-bit seed that depends on the run's seed and on the request's name only, never on timing."""
    digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") & 0x7FFFFFFF
