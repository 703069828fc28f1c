"""One dialogue: the policy as doctor, a simulated patient, tokens appended turn by turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from m2train.config import Recipe
from m2train.records import Dialogue, Turn
from m2train.rollout.chat import ChatTemplate
from m2train.rollout.sampler import Sampler, derive_seed
from m2train.verifier import CaseScript, Verifier


async def run_dialogue(
    sampler: Sampler,
    chat: ChatTemplate,
    verifier: Verifier,
    case: CaseScript,
    uid: str,
    recipe: Recipe,
    *,
    rounds: int,
) -> Dialogue:
    """Let the policy talk to the patient of `case` for at most `rounds` rounds (doctor, then patient).

    Returns:
        The dialogue; it ends on a patient turn, unless the patient ended it after the doctor's.
    """
    seed = derive_seed(recipe.seed, uid)
    patient = verifier.make_patient(case, seed)
    opening = await patient.opening()
    turns = [
        Turn(role="system", text=recipe.rollout.system_prompt, token_ids=chat.open(recipe.rollout.system_prompt)),
        Turn(role="patient", text=opening.text, token_ids=chat.patient(opening.text), state=opening.state),
    ]
    end_reason: Literal["gate", "max_turns", "max_tokens"] = "max_turns"
    for index in range(rounds):
        prompt = context_ids(turns)
        if len(prompt) > recipe.rollout.max_context_tokens:
            end_reason = "max_tokens"
            break
        generation = await sampler.sample(f"{uid}/turn{index}", prompt, affinity=uid)
        visible = chat.visible(generation.token_ids)
        turns.append(
            Turn(role="doctor", text=chat.text(visible), token_ids=chat.close(visible), generation=generation)
        )
        answer = await patient.reply(turns[-1].text)
        if answer is None:
            end_reason = "gate"
            break
        turns.append(Turn(role="patient", text=answer.text, token_ids=chat.patient(answer.text), state=answer.state))
    return Dialogue(uid=uid, case_id=case.id, seed=seed, turns=turns, end_reason=end_reason)


def context_ids(turns: Sequence[Turn]) -> list[int]:
    """The token stream of these turns; after a patient turn it is the prompt of the doctor's next reply."""
    return [token for turn in turns for token in turn.token_ids]
