"""Fragment-level sampling (M2 report, section 3.3.3): slices of a dialogue's history, filtered.

A slice is everything up to and including a patient turn; G next replies are sampled from it, and only they are
trained. The report names the filters (repeated generations, overly long dialogues, role inversion) without their
implementation; these are ours, and every drop is counted by reason.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from m2train.config import Recipe
from m2train.records import Dialogue, Turn
from m2train.rollout.dialogue import context_ids
from m2train.rollout.sampler import derive_seed

_ROLE_INVERSION = re.compile(
    r"^\s*(?:patient|user|human|assistant)\s*[:\u2013-]|\bas (?:a|your|the) patient\b(?! of\b)|"
    r"\bi(?:'m| am) (?:the|your|a) patient\b|^\s*doctor,|, doctor\s*[.!?,]|\bplease help me\b|\bas an ai\b|"
    r"\blanguage model\b|<\|[^<>|]{1,40}\|>",  # the last: a control token of the template, and so another's turn
    re.I | re.M,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """The first `num_turns` turns of a dialogue."""

    dialogue: Dialogue
    num_turns: int

    @property
    def turns(self) -> list[Turn]:
        """The turns of the slice; the last one is the patient's."""
        return self.dialogue.turns[: self.num_turns]

    @property
    def uid(self) -> str:
        """Names the slice within the run."""
        return f"{self.dialogue.uid}/slice{self.num_turns}"


def select_slices(dialogues: Sequence[Dialogue], recipe: Recipe) -> tuple[list[Slice], Counter[str]]:
    """Choose `rollout.slices_per_dialogue` slices of each dialogue among those that pass the filters.

    Returns:
        The slices, and how many candidates each filter dropped, needed or not (`short_dialogue`: slices that were
        wanted of a dialogue with fewer patient turns). The choice depends on the dialogue's seed alone.
    """
    chosen: list[Slice] = []
    drops: Counter[str] = Counter()
    for dialogue in dialogues:
        good: list[Slice] = []
        for end, turn in enumerate(dialogue.turns, start=1):
            if turn.role != "patient":
                continue
            candidate = Slice(dialogue=dialogue, num_turns=end)
            reason = drop_reason(candidate.turns, recipe)
            if reason is None:
                good.append(candidate)
            else:
                drops[reason] += 1
        wanted = recipe.rollout.slices_per_dialogue
        offered = sum(turn.role == "patient" for turn in dialogue.turns)
        if offered < wanted:
            drops["short_dialogue"] += wanted - offered
        rng = random.Random(derive_seed(dialogue.seed, "slices"))
        picked = rng.sample(good, min(wanted, len(good)))
        chosen += sorted(picked, key=lambda s: s.num_turns)
    return chosen, drops


def drop_reason(turns: Sequence[Turn], recipe: Recipe) -> str | None:
    """Why a slice is not worth training on, or None."""
    if len(context_ids(turns)) > recipe.rollout.max_context_tokens:
        return "too_long"
    said = [turn.text for turn in turns if turn.role == "doctor"]
    if any(not text.strip() for text in said):
        return "empty"
    if any(_ROLE_INVERSION.search(text) for text in said):
        return "role_inversion"
    limit = recipe.rollout.repeat_threshold
    if any(self_repetition(text) >= limit for text in said):
        return "repetition"
    if any(overlap(a, b) >= limit for i, a in enumerate(said) for b in said[:i]):
        return "repetition"
    return None


def self_repetition(text: str) -> float:
    """Share of a text's word 3-grams that are copies of an earlier one (0 for a text under 3 words)."""
    grams = _trigrams(text)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def overlap(a: str, b: str) -> float:
    """Share of the shorter text's distinct word 3-grams that the other text has too."""
    one, two = set(_trigrams(a)), set(_trigrams(b))
    return len(one & two) / min(len(one), len(two)) if one and two else 0.0


def _trigrams(text: str) -> list[tuple[str, ...]]:
    words = re.findall(r"[a-z0-9']+", text.lower())
    return list(zip(words, words[1:], words[2:], strict=False))
