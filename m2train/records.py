"""What one step leaves behind: dialogues, slices, replies, verdicts.

These are the records that cross every seam: rollout -> verifier -> learner -> report, and the files under
`rollouts/`. Tokens are the only truth: `text` is for people, `token_ids` is what was generated and trained.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Role = Literal["system", "doctor", "patient"]


class Record(BaseModel):
    """Base of all records: unknown fields are errors, so that old files are never half read."""

    model_config = ConfigDict(extra="forbid")


class VersionSpan(Record):
    """Generated tokens [start, end) came from this weight version."""

    version: str
    start: int
    end: int


class Generation(Record):
    """One sampled continuation, exactly as the engine returned it."""

    token_ids: list[int]
    logprobs: list[float]
    """fp32 log-prob of each token under the processed (temperature, top-p) distribution."""
    finish_reason: Literal["stop", "length"]
    weight_versions: list[VersionSpan]
    seed: int


class Turn(Record):
    """One message of a dialogue; `token_ids` is what it appended to the stream, template included."""

    role: Role
    text: str
    token_ids: list[int]
    generation: Generation | None = None
    """Set on doctor turns: the sampled part of `token_ids` (thinking included)."""
    state: dict[str, Any] = Field(default_factory=dict)
    """Simulator state after this turn (facts told, verdicts of gate, affective and factual unit)."""


class Dialogue(Record):
    """One rollout of the policy against one simulated patient."""

    uid: str
    case_id: str
    seed: int
    turns: list[Turn]
    end_reason: Literal["gate", "max_turns", "max_tokens"]


class Rubric(Record):
    """One weighted criterion for the next reply; `check` names the program that grades it."""

    dimension: str
    text: str
    weight: int = Field(ge=-10, le=10)
    check: str
    args: dict[str, Any] = Field(default_factory=dict)


class Verdict(Record):
    """Whether the criterion was met (`None`: the grader could not tell, counted as a grader failure)."""

    met: bool | None
    explanation: str


class Reply(Record):
    """One candidate reply to a slice with its grades."""

    generation: Generation
    text: str
    """Visible text: thinking removed."""
    verdicts: list[Verdict]
    rubric_reward: float
    length_reward: float = 0.0
    advantage: float = 0.0

    @property
    def reward(self) -> float:
        """R = R_rubric + R_length (M2 report, section 3.3.2)."""
        return self.rubric_reward + self.length_reward


class Group(Record):
    """A slice of a dialogue and the G replies sampled from it: one GRPO task."""

    uid: str
    case_id: str
    dialogue_uid: str
    num_turns: int
    """The slice is the first `num_turns` turns of the dialogue; it ends on a patient turn."""
    context_ids: list[int]
    """The prompt that every reply continues (generation prompt included)."""
    context: list[Turn]
    rubrics: list[Rubric]
    replies: list[Reply]


class StepRollouts(Record):
    """All of one step; written to `rollouts/step_000000.json`."""

    step: int
    weight_version: str
    dialogues: list[Dialogue]
    groups: list[Group]
    drops: dict[str, int] = Field(default_factory=dict)
    """Reason -> count of slices, replies or groups that were sampled but not trained on."""
