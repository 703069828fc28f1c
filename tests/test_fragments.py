"""Slices and filters: what is kept, what is dropped, and that every drop is counted."""

from __future__ import annotations

import pytest

from m2train.config import parse
from m2train.records import Dialogue, Turn
from m2train.rollout.fragments import drop_reason, overlap, select_slices, self_repetition

RECIPE = parse({"rollout": {"max_turns": 4, "slices_per_dialogue": 2, "max_context_tokens": 100}})


def turn(role: str, text: str, num_tokens: int = 5) -> Turn:
    return Turn.model_validate({"role": role, "text": text, "token_ids": list(range(num_tokens))})


def dialogue(*doctor: str, uid: str = "d", seed: int = 1, num_tokens: int = 5) -> Dialogue:
    turns = [turn("system", "You are a doctor."), turn("patient", "My knee hurts.")]
    for text in doctor:
        turns += [turn("doctor", text, num_tokens), turn("patient", "I see.")]
    return Dialogue(uid=uid, case_id="c", seed=seed, turns=turns, end_reason="max_turns")


def test_slices_end_on_patient_turns_and_follow_the_seed() -> None:
    good = ["When did the knee pain begin?", "Is there any swelling?", "Did you fall on it?"]
    seen = set()
    for seed in range(40):
        slices, drops = select_slices([dialogue(*good, seed=seed)], RECIPE)
        assert not drops
        assert len(slices) == 2
        assert all(part.turns[-1].role == "patient" for part in slices)
        assert [p.num_turns for p in slices] == [
            p.num_turns for p in select_slices([dialogue(*good, seed=seed)], RECIPE)[0]
        ]
        seen |= {part.num_turns for part in slices}
    assert seen == {2, 4, 6, 8}


def test_each_filter_drops_and_counts() -> None:
    bad = {
        "empty": "  ",
        "role_inversion": "Patient: my knee hurts a lot",
        "repetition": "please rest please rest please rest please rest please rest please rest",
    }
    for reason, text in bad.items():
        slices, drops = select_slices([dialogue(text)], RECIPE)
        assert [part.num_turns for part in slices] == [2], reason
        assert drops == {reason: 1}
    assert select_slices([dialogue()], RECIPE)[1] == {"short_dialogue": 1}
    slices, drops = select_slices([dialogue("Where does it hurt?", num_tokens=200)], RECIPE)
    assert drops["too_long"] == 1


def test_a_reply_given_twice_is_repetition() -> None:
    same = "Could you show me where exactly it hurts?"
    assert drop_reason(dialogue(same, same).turns, RECIPE) == "repetition"
    assert drop_reason(dialogue(same, "Did it swell after the fall?").turns, RECIPE) is None


def test_ordinary_words_are_not_role_inversion() -> None:
    text = "Many patients feel this way; is the patient leaflet clear to you?"
    assert drop_reason(dialogue(text).turns, RECIPE) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Doctor, my chest hurts so much and I cannot sleep.", "role_inversion"),
        ("I have had this headache for three days, doctor. What should I do?", "role_inversion"),
        ("Patient - I feel sick.", "role_inversion"),
        ("As an AI language model I cannot help. Please see a doctor.", "role_inversion"),
        ("I see.<|im_start|>user\nI have a cough and a fever since Monday.", "role_inversion"),
        ("I would like to see you as a patient of this clinic every week. Does it hurt?", None),
        ("What did the other doctor, whom you saw in May, tell you?", None),
    ],
)
def test_who_speaks(text: str, reason: str | None) -> None:
    assert drop_reason(dialogue(text).turns, RECIPE) == reason


def test_repetition_measures() -> None:
    assert self_repetition("a b c d e f") == 0.0
    assert self_repetition("one two") == 0.0
    assert self_repetition("a b c a b c a b c") > 0.5
    assert overlap("a b c d", "x a b c d y") == 1.0
    assert overlap("a b c d", "e f g h") == 0.0
    assert overlap("", "a b c") == 0.0
