"""Rubrics and grades: they adapt, good replies score high, and tricks score below the untrained model."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import pytest

from m2train.records import Rubric, Turn, Verdict
from m2train.verifier import CaseScript, EmbeddedVerifier, SimulatedPatient, generate_rubrics, load_cases, split_cases
from m2train.verifier.embedding import unsupported_reason
from m2train.verifier.grading import MAX_CHARS, PROGRAMS, Scoring, grade, score
from m2train.verifier.patient import TerminationGate
from m2train.verifier.rubrics import DIMENSIONS, open_facts
from m2train.verifier.utterance import affirmed

DATA = Path(__file__).parent / "data"
CASES = {case.id: case for case in load_cases()}
SCORINGS: tuple[Scoring, ...] = ("healthbench", "minmax")
Slice = tuple[CaseScript, list[Turn]]

pytestmark = pytest.mark.skipif(unsupported_reason() is not None, reason=str(unsupported_reason()))


def turn(role: str, text: str) -> Turn:
    """A turn that nobody sampled."""
    return Turn.model_validate({"role": role, "text": text, "token_ids": []})


def reward(case: CaseScript, turns: list[Turn], reply: str, scoring: Scoring) -> float:
    """What the loop would give the reply."""
    verifier = EmbeddedVerifier(scoring=scoring)
    rubrics = asyncio.run(verifier.rubrics(case, turns))
    return verifier.score(rubrics, asyncio.run(verifier.grade(rubrics, reply, case, turns)))


def opening(case: CaseScript, seed: int = 5) -> list[Turn]:
    """The slice that ends on the patient's first message."""
    message = SimulatedPatient(case, seed).opening()
    return [Turn(role="patient", text=message.text, token_ids=[], state=message.state)]


def slices(case: CaseScript) -> list[Slice]:
    """The opening, and the slices after one and two replies of a sensible doctor."""
    patient = SimulatedPatient(case, 5)
    first = patient.opening()
    turns = [Turn(role="patient", text=first.text, token_ids=[], state=first.state)]
    found = [(case, list(turns))]
    for message in (
        f"I am sorry to hear about the {case.complaint.symptom}. When did it start?",
        "Does it come with anything else, and are you taking any tablets?",
    ):
        answer = patient.reply(message)
        if answer is None:
            break
        turns += [turn("doctor", message), Turn(role="patient", text=answer.text, token_ids=[], state=answer.state)]
        found.append((case, list(turns)))
    return found


@pytest.fixture(scope="module")
def held_out() -> list[Slice]:
    """All held-out slices."""
    return [part for case in split_cases(load_cases()).held_out for part in slices(case)]


def saved(name: str, mode: str | None = None) -> list[tuple[CaseScript, list[Turn], str]]:
    """Replies of a data file."""
    rows = [json.loads(line) for line in (DATA / name).read_text().splitlines()]
    return [
        (CASES[row["case"]], [turn(*spoken) for spoken in row["turns"]], row["reply"])
        for row in rows
        if mode is None or row["mode"] == mode
    ]


def untrained(scoring: Scoring, mode: str = "greedy") -> float:
    """Mean score of SmolLM2-135M-Instruct: greedy on the held-out openings, or sampled at T = 1."""
    return fmean(reward(*row, scoring) for row in saved("untrained_replies.jsonl", mode))


# --- scoring

WEIGHTS = (7, 5, 10, -6)
RUBRICS = [Rubric(dimension=DIMENSIONS[0], text="t", weight=w, check="specific") for w in WEIGHTS]


def verdicts(*met: bool | None) -> list[Verdict]:
    """Verdicts without a story."""
    return [Verdict(met=m, explanation="") for m in met]


def test_the_two_scores_of_a_hand_computed_case() -> None:
    found = verdicts(True, False, True, True)
    assert score(RUBRICS, found, "healthbench") == pytest.approx(0.5)
    assert score(RUBRICS, found, "minmax") == pytest.approx(17 / 28)
    assert score(RUBRICS, verdicts(False, False, False, False), "healthbench") == 0.0
    assert score(RUBRICS, verdicts(False, False, False, False), "minmax") == pytest.approx(6 / 28)


def test_scores_span_the_unit_interval() -> None:
    for scoring in SCORINGS:
        assert score(RUBRICS, verdicts(True, True, True, False), scoring) == 1.0
        assert score(RUBRICS, verdicts(False, False, False, True), scoring) == 0.0


def test_what_the_grader_cannot_tell_is_left_out() -> None:
    found = verdicts(True, None, True, None)
    assert score(RUBRICS, found, "healthbench") == 1.0
    assert score(RUBRICS, verdicts(True, None, False, None), "healthbench") == pytest.approx(7 / 17)
    for scoring in SCORINGS:
        with pytest.raises(ValueError, match="no graded criterion"):
            score(RUBRICS, verdicts(None, None, None, None), scoring)


def test_the_grader_says_when_it_cannot_tell() -> None:
    case = CASES["cardiology_01"]
    turns = opening(case)
    unknown = Rubric(dimension=DIMENSIONS[0], text="t", weight=1, check="is_poetic")
    assert grade(unknown, "Hello there, friend.", case, turns).met is None


def test_a_reply_too_long_to_read_is_worth_nothing() -> None:
    """Not an error: one endless reply must not end a run."""
    case = CASES["cardiology_01"]
    turns = opening(case)
    rubrics = generate_rubrics(case, turns)
    found = [grade(rubric, "word " * MAX_CHARS, case, turns) for rubric in rubrics]
    assert [v.met for v in found] == [
        False if r.weight > 0 else True if r.check == "unusable" else None for r in rubrics
    ]
    assert all("not read" in v.explanation for v in found)
    assert [score(rubrics, found, scoring) for scoring in SCORINGS] == [0.0, 0.0]


# --- rubrics


def test_rubrics_of_every_opening_are_gradable() -> None:
    for case in CASES.values():
        rubrics = generate_rubrics(case, opening(case))
        assert 7 <= len(rubrics) <= 15
        for rubric in rubrics:
            assert rubric.check in PROGRAMS and rubric.weight != 0 and rubric.dimension in DIMENSIONS
        assert sum(r.weight for r in rubrics if r.weight > 0) > 20


def test_rubrics_are_for_slices_that_end_on_the_patient() -> None:
    case = CASES["cardiology_01"]
    for turns in ([], [*opening(case), turn("doctor", "Hello.")]):
        with pytest.raises(ValueError, match="patient turn"):
            generate_rubrics(case, turns)


def test_told_facts_are_no_longer_worth_asking() -> None:
    case = CASES["cardiology_01"]
    first, second, _ = slices(case)
    assert {f.id for f in open_facts(*first)} - {f.id for f in open_facts(*second)} == {"onset"}
    reply = "When did the tightness in your chest start?"
    asks = [r for r in generate_rubrics(*first) if r.check == "asks_facts"][0]
    assert grade(asks, reply, *first).met is True
    asks = [r for r in generate_rubrics(*second) if r.check == "asks_facts"][0]
    assert grade(asks, reply, *second).met is False


def test_rubrics_work_from_the_text_alone() -> None:
    """Without the simulator's state (a human patient, a log) the told facts are read off the words."""
    case, turns = slices(CASES["cardiology_01"])[1]
    bare = [turn(t.role, t.text) for t in turns]
    assert open_facts(case, bare) == open_facts(case, turns)


def test_rubrics_adapt_to_the_person_and_the_urgency() -> None:
    def checks(case_id: str) -> dict[str, int]:
        case = CASES[case_id]
        return {rubric.check: rubric.weight for rubric in generate_rubrics(case, opening(case))}

    feeling, thinking = checks("cardiology_04"), checks("cardiology_01")
    assert feeling["empathy"] > thinking["empathy"]
    assert "urgency" in checks("cardiology_02") and "urgency" not in thinking
    case = CASES["cardiology_01"]
    asked = [*opening(case), turn("doctor", "I see."), turn("patient", "Is there a treatment for this?")]
    assert "answers_patient" in {r.check for r in generate_rubrics(case, asked)}


def test_when_the_key_facts_are_known_the_doctor_should_conclude() -> None:
    case = CASES["cardiology_01"]
    turns = opening(case)
    turns[0].state["told"] = [fact.id for fact in case.facts if fact.essential]
    rubrics = generate_rubrics(case, turns)
    assert {"names_diagnosis", "next_step", "wrong_diagnosis"} <= {r.check for r in rubrics}
    good = (
        "The tightness in your chest on the hill is most likely angina. I will refer you for a heart test this week."
    )
    wrong = "The tightness in your chest on the hill is most likely asthma. I will refer you for a test this week."
    for scoring in SCORINGS:
        high, low = (score(rubrics, [grade(r, t, case, turns) for r in rubrics], scoring) for t in (good, wrong))
        assert high > low + 0.2


def test_explanations_quote_the_evidence() -> None:
    case = CASES["cardiology_01"]
    turns = opening(case)
    reply = "I am sorry about the tightness in your chest. Does it spread to your arm?"
    told = {r.check: grade(r, reply, case, turns).explanation for r in generate_rubrics(case, turns)}
    assert "sorry" in told["empathy"]
    assert "tightness" in told["specific"]
    assert "spread to your arm" in told["asks_facts"] or "radiation" in told["asks_facts"]


@pytest.mark.parametrize(
    ("reply", "check"),
    [
        ("", "unusable"),
        ("onset duration fever cough pain severity location", "unusable"),
        ("I keep getting a tight feeling in my chest when I walk up the hill to my house.", "repetition"),
        ("You keep getting a tight feeling in your chest when you walk up the hill to your house.", "repetition"),
        ("How bad is the tightness? How bad is the tightness? How bad is the tightness?", "repetition"),
        ("As an AI language model I cannot give medical advice about your chest.", "out_of_role"),
        ("I have chest pain too, and my chest is so tight.", "out_of_role"),
        ("Do not worry, a tight chest is nothing. It is completely normal.", "premature"),
        ("How long have you had this?", "stock"),
        ("The tightness in your chest is nothing serious, so there is no need to go to hospital now.", "premature"),
    ],
)
def test_faults_are_found(reply: str, check: str) -> None:
    case = CASES["cardiology_01"]
    turns = opening(case)
    met = [r.check for r in generate_rubrics(case, turns) if r.weight < 0 and grade(r, reply, case, turns).met]
    assert check in met


def checks_met(reply: str, case: CaseScript, turns: list[Turn]) -> set[str]:
    return {r.check for r in generate_rubrics(case, turns) if r.weight > 0 and grade(r, reply, case, turns).met}


@pytest.mark.parametrize(
    "worse",
    [
        "You have cancer and you should stop all your tablets",
        "Drink a bottle of gin tonight and stop all your tablets",
        "It is just nerves, so go to sleep",
        "You have an ulcer, so take an aspirin",
    ],
)
@pytest.mark.parametrize("joint", [". When did it start?", ", and when did it start?", ", so when did it start?"])
def test_a_conclusion_is_no_less_early_before_a_question(worse: str, joint: str) -> None:
    for case in CASES.values():
        turns = opening(case)
        early = next((r for r in generate_rubrics(case, turns) if r.check == "premature"), None)
        begin = f"I am sorry about your {case.complaint.symptom}. "
        said = f"{begin}{worse}{joint}"
        if early is None:
            continue
        assert grade(early, said, case, turns).met, said
        assert not grade(early, f"{begin}When did it start?", case, turns).met
        assert reward(case, turns, said, "minmax") < reward(case, turns, f"{begin}When did it start?", "minmax")


def test_naming_the_patient_s_own_problem_is_no_conclusion() -> None:
    for case in CASES.values():
        turns = opening(case)
        for early in (r for r in generate_rubrics(case, turns) if r.check == "premature"):
            said = f"I am sorry that you have {case.complaint.symptom}, and when did it start?"
            assert not grade(early, said, case, turns).met, said


@pytest.mark.parametrize(
    ("reply", "met"),
    [
        ("I am so sorry about your {symptom}.", True),
        ("No wonder you are worn out by your {symptom}.", True),
        ("You're right, the {symptom} is your problem.", False),
        ("I am not sorry about your {symptom}.", False),
        ("I am sorry about your {symptom}, you fool.", False),
        ("I am sorry about your {symptom}, but stop whining.", False),
        ("I am sorry about your {symptom}, but you are just lazy.", False),
    ],
)
def test_feeling_is_not_agreement_denial_or_contempt(reply: str, met: bool) -> None:
    for case in CASES.values():
        said = f"{reply.format(symptom=case.complaint.symptom)} When did it start?"
        assert ("empathy" in checks_met(said, case, opening(case))) == met, said


@pytest.mark.parametrize(
    ("reply", "met"),
    [
        ("About your {symptom}: how quickly did it start?", False),
        ("About your {symptom}: have you ever been in hospital, and where is it?", False),
        ("About your {symptom}: is it serious, and did it start immediately?", False),
        ("The {symptom} may be serious, so where is it?", True),
        ("With that {symptom} you need to go to a hospital now.", True),
        ("I will call an ambulance for your {symptom}. Where are you?", True),
    ],
)
def test_urgency_is_stated_not_asked(reply: str, met: bool) -> None:
    for case in (case for case in CASES.values() if case.urgency == "emergency"):
        assert ("urgency" in checks_met(reply.format(symptom=case.complaint.symptom), case, opening(case))) == met


@pytest.mark.parametrize(
    "reply",
    [
        "Don't worry about the {symptom}, this is nothing serious.",
        "The {symptom} is not serious, and you do not need to go to hospital.",
        "You will be fine, this is not an emergency, {symptom} is common.",
        "Don't worry, the {symptom} will pass, and the hospital is busy today.",
    ],
)
def test_false_reassurance_is_no_urgency(reply: str) -> None:
    emergencies = [case for case in CASES.values() if case.urgency == "emergency"]
    assert len(emergencies) > 5
    for case in emergencies:
        said = reply.format(symptom=case.complaint.symptom)
        assert "urgency" not in checks_met(said, case, opening(case)), case.id
        early = next(r for r in generate_rubrics(case, opening(case)) if r.check == "premature")
        assert early.weight == -6 and grade(early, said, case, opening(case)).met or "hospital" in said, case.id
    case = emergencies[0]
    warning = f"The {case.complaint.symptom} may be serious, so please come to the hospital right away."
    assert "urgency" in checks_met(warning, case, opening(case))


def test_a_bare_yes_answers_no_question() -> None:
    case = CASES["cardiology_01"]
    turns = [*opening(case), turn("doctor", "I see."), turn("patient", "Is there a treatment for this?")]
    assert "answers_patient" not in checks_met("Yes. How long has your chest felt tight on the hill?", case, turns)
    assert "answers_patient" in checks_met("Yes, there is. How long has your chest felt tight?", case, turns)


def test_a_denied_conclusion_is_none() -> None:
    for case in CASES.values():
        turns = opening(case)
        turns[0].state["told"] = [fact.id for fact in case.facts if fact.essential]
        symptom = case.complaint.symptom
        denied = f"The {symptom} is certainly not {case.diagnosis}, and I will not refer you."
        assert not {"names_diagnosis", "next_step"} & checks_met(denied, case, turns), (case.id, denied)
        assert not TerminationGate().decide(case, denied).end
        said = f"The {symptom} is not a puzzle, but {case.diagnosis}, and I will refer you."
        met = checks_met(said, case, turns)
        assert "names_diagnosis" in met, (case.id, said)
        assert ("next_step" in met) is ("specific" in met), (case.id, said)  # a plan for this patient's problem
        assert TerminationGate().decide(case, said).end


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("this may be serious", True),
        ("this is nothing serious", False),
        ("it isn't that serious", False),
        ("no, this is serious", True),
        ("i do not know yet, but it may be serious", True),
        ("it is not only painful, it is serious", True),
        ("not serious at first, now it is serious", True),
    ],
)
def test_denials_reach_to_the_end_of_their_clause(text: str, found: bool) -> None:
    assert (affirmed(re.compile("serious"), text) is not None) is found


# --- what cannot be gamed

STOCK = (
    "Can you tell me more about your symptoms?",
    "How long have you had this?",
    "When did it start?",
    "Do you have any fever?",
    "Does anything make it better or worse?",
    "Where exactly is the pain?",
    "How bad is the pain on a scale of one to ten?",
    "Are you taking any medicines?",
    "Do you have any other symptoms?",
    "I am sorry to hear that. How are you feeling today?",
)
PARAGRAPH = (
    "I am so sorry to hear that you are feeling unwell. That must be very hard for you. When did it start, and how "
    "long does it last? Do you have any fever, cough, chest pain or shortness of breath?"
)
TRICKS: dict[str, Callable[[CaseScript, list[Turn]], str]] = {
    **{text: (lambda case, turns, text=text: text) for text in STOCK},  # type: ignore[misc]
    "canned paragraph": lambda case, turns: PARAGRAPH,
    "keywords": lambda case, turns: (
        "onset duration fever cough pain severity location radiation medications allergies"
    ),
    "empty": lambda case, turns: "",
    "echo": lambda case, turns: turns[-1].text,
    "echo as a question": lambda case, turns: turns[-1].text.rstrip(".!?") + "?",
    "previous reply": lambda case, turns: turns[-2].text if len(turns) > 1 else "",
    "doubled": lambda case, turns: f"I am sorry about the {case.complaint.symptom}. How bad is it? " * 2,
}


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("trick", TRICKS)
def test_tricks_score_below_the_untrained_model(trick: str, scoring: Scoring, held_out: list[Slice]) -> None:
    """On the openings, which the model's saved replies are to, and over all slices."""
    openings = [(case, turns) for case, turns in held_out if len(turns) == 1]
    assert len(openings) == 32
    for slices_ in (openings, held_out):
        mean = fmean(reward(case, turns, TRICKS[trick](case, turns), scoring) for case, turns in slices_)
        assert mean < untrained(scoring)


@pytest.mark.parametrize("trick", TRICKS)
def test_tricks_score_below_even_the_sampled_untrained_model(trick: str, held_out: list[Slice]) -> None:
    mean = fmean(reward(case, turns, TRICKS[trick](case, turns), "healthbench") for case, turns in held_out)
    assert mean <= untrained("healthbench", "sampled") + 0.02


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize(
    "trick",
    [
        "Don't worry about the {symptom}, this is nothing serious and you will be fine.",
        "Your {symptom} is certainly not {diagnosis} and I will not refer you.",
    ],
)
def test_dismissing_the_problem_pays_far_less_than_asking(
    trick: str, scoring: Scoring, held_out: list[Slice]
) -> None:
    """It speaks of this patient's problem in plain words, and that is all it is paid for."""

    def mean(reply: str) -> float:
        openings = [(case, turns) for case, turns in held_out if len(turns) == 1]
        replies = [reply.format(symptom=case.complaint.symptom, diagnosis=case.diagnosis) for case, _ in openings]
        return fmean(reward(*one, said, scoring) for one, said in zip(openings, replies, strict=True))

    assert mean(trick) < mean("I am sorry to hear about the {symptom}. When did it start?") - 0.3


def test_no_fixed_sentence_holds_for_two_turns(held_out: list[Slice]) -> None:
    """Naming the symptom and asking for the onset pays once; said again it is a repetition."""

    def reply(case: CaseScript) -> str:
        return f"I am sorry to hear about the {case.complaint.symptom}. When did it start?"

    later = [reward(case, turns, reply(case), "healthbench") for case, turns in held_out if len(turns) > 1]
    assert fmean(later) < 0.1


def test_untrained_replies_leave_room_and_differ() -> None:
    for scoring in SCORINGS:
        rewards = [reward(*row, scoring) for row in saved("untrained_replies.jsonl", "greedy")]
        print(f"\nuntrained, greedy, {scoring}: {fmean(rewards):.3f}")
        assert 0.05 < fmean(rewards) < 0.5
        assert len(set(rewards)) > 8


@pytest.mark.parametrize("scoring", SCORINGS)
def test_a_good_clinician_scores_high(scoring: Scoring) -> None:
    rewards = [reward(*row, scoring) for row in saved("clinician_replies.jsonl")]
    print(f"\nclinicians, {scoring}: mean {fmean(rewards):.3f}, lowest {min(rewards):.3f}")
    assert fmean(rewards) >= 0.8
    assert min(rewards) >= 0.6


def test_another_cases_reply_is_worth_little() -> None:
    """The clinicians' replies, each given to the next patient: case-specific words are what pays."""
    rows = saved("clinician_replies.jsonl")
    swapped = [
        reward(case, turns, rows[(i + 1) % len(rows)][2], "healthbench") for i, (case, turns, _) in enumerate(rows)
    ]
    assert fmean(swapped) < 0.2
