"""Grading programs: does a reply meet a rubric, and what is the score?

Each program answers yes, no or cannot tell, and quotes its evidence. What keeps the reward honest:
a reply that is unusable, repeats, or leaves the doctor's role meets no positive criterion; and points for asking
and for empathy need words of this patient's own problem in the reply, so that no fixed sentence collects them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

from m2train.records import Rubric, Turn, Verdict
from m2train.verifier import voice
from m2train.verifier.cases import CaseScript, diagnosis_pattern, load_cases
from m2train.verifier.lexicon import COMMON, CONCEPTS, GENERIC
from m2train.verifier.matching import Reading, read
from m2train.verifier.phrasings import ABOUT, EXAMPLES, NOTHING
from m2train.verifier.utterance import affirmed, is_question, normalise, sentences, statements, stem, words

Scoring = Literal["healthbench", "minmax"]
MAX_CHARS = 6000
"""Longer replies are not read: they are unusable."""

_OUT_OF_ROLE = re.compile(
    r"\b(?:as an ai|language model|i'?m (?:just )?an? (?:ai|assistant|chatbot|virtual)|i am an? (?:ai|assistant)|doctor:|patient:|user:|assistant:|"
    r"(?:unable|not able|can'?t|cannot|not equipped|not qualified|not a) (?:to )?(?:provide|give|offer|diagnose|help you with (?:that|this)|doctor|medical)|"
    r"(?:seek|consult|see|ask|talk to|visit|contact) (?:with )?(?:a|your|another|the|any) (?:doctor|physician|healthcare|health care|medical professional|gp)|sorry for your loss|"
    r"my (?:doctor|wife|husband|mum|mom|boyfriend|girlfriend|kids|symptoms?|pain|problem|condition)|help me\b|"
    r"shut up|stop (?:whining|complaining|moaning|wasting)|(?:you|your) (?:\w+ )?(?:fool|idiot|moron|imbecile|liar|coward|crybaby)|"
    r"(?:you are|you're) (?:\w+ ){0,2}(?:stupid|dumb|pathetic|ridiculous|lazy|crazy|disgusting|worthless|a (?:fool|liar|coward)))\b"
)
_PLAYS_DOWN = re.compile(
    r"\b(?:don'?t worry|do not worry|no need to worry|nothing (?:to worry|serious)|(?:it'?s|it is|this is|that'?s|that is) (?:just|only|merely)\b|(?:it'?s|it is|this is|that'?s|that is) (?:\w+ ){0,2}(?:normal|common|natural|nothing|fine|harmless|okay)|perfectly normal|"
    r"completely normal|not uncommon|just (?:stress|a cold|wait)|will (?:soon )?(?:pass|go away)|you(?:'re| are| will be|'ll be) (?:just )?(?:fine|okay|all right))\b"
)
_DECLARES = re.compile(
    r"\b(?:(?:this|it|that) (?:is|could be|may be|might be|can be) (?:\w+ ){0,3}(?:sign|symptom|case|form|type|example|condition|result|caused|due|related|called|reaction|infection|disease|disorder)|"
    r"you (?:may|might|probably|likely|could)? ?(?:have|be (?:having|suffering|experiencing)) (?:a |an |the )?(?!been|you|any|noticed|had|to\b)\w+|(?:caused by|due to|result of|sign of|symptom of|leads? to)|"
    r"(?:known|referred to) as|(?:it'?s|it is) (?:\w+ )?(?:important|essential|best|recommended|always (?:good|best)|advisable|a good idea)|make sure|try to|you (?:should|must|need to|can try|might want|could try)|"
    r"i(?:'d| would)? (?:recommend|suggest|advise)|remember to|be sure to|is (?:usually|often|typically|likely|most likely))\b|"
    r"(?:^|[,;] (?:so |then |and )?)(?:please |just |now )?(?:drink|eat|stop(?! me)|take(?! (?:me|us|your time))|stay|forget|avoid|ignore|rest(?! assured)|relax|swallow|apply|go (?:home|to|back|and)|start(?! (?:from|with|at|by)))\b"
)
_URGENT = re.compile(
    r"\b(?:urgent(?:ly)?|emergency|straight away|right away|immediately|at once|ambulance|serious|without delay|as soon as possible|act fast|every minute|"
    r"now\b.*\b(?:act|check|seen)|(?:act|move|seen|treated|help|checked) (?:\w+ )?quickly|"
    r"(?:go|going|come|get|getting|bring|take|send|admit|need|straight) (?:\w+ ){0,5}hospital|hospital (?:now|today|tonight))\b"
)
_SENDS = re.compile(
    r"\b(?:ambulance|emergency|casualty|a and e|999|911|112|hospital|urgent(?:ly)?|(?:seen|checked|examined|tested|treated|help|care)\b[^,.;]*"
    r"\b(?:now|quickly|at once|immediately|right away|straight away|as soon as possible))\b"
)
"""Advice that an emergency asks for."""
_ANSWERS = re.compile(
    r"\b(?:treat\w*|medicines?|medications?|tablets?|cure|help you|options?|cost|expensive|cheap\w*|afford|free|evidence|studies|research|guidelines?|shown|before (?:i|we) (?:can|decide)|"
    r"once (?:i|we) know|first (?:i|we|let)|good question|to answer|depends on|relie\w+|yes,? (?:there|we|i|you|it|that|this)|as for)\b"
)
_MARKUP = re.compile(r"https?://|www\.|[#*_]{2,}|^\s*(?:[-*]|\d+[.)])\s|[{}<>|\\]|[^\x00-\x7f]{3,}", re.MULTILINE)
_SWAP = {
    "i": "you",
    "me": "you",
    "my": "your",
    "mine": "yours",
    "myself": "yourself",
    "am": "are",
    "i'm": "you're",
    "i've": "you've",
}


@lru_cache(maxsize=1)
def _vocabulary() -> frozenset[str]:
    """Stems of the words that consultations are made of: every text of the package, and everyday English."""
    texts = [*COMMON, *CONCEPTS.values(), *NOTHING, *ABOUT.values(), *(q for qs in EXAMPLES.values() for q in qs)]
    for case in load_cases():
        texts += [case.complaint.text, case.complaint.symptom, case.diagnosis, *case.complaint.symptom_terms]
        texts += [part for fact in case.facts for part in (fact.text, *fact.about)]
    return frozenset(stem(word) for text in texts for word in words(text.replace("_", " ")))


@lru_cache(maxsize=1)
def _diagnoses() -> dict[str, str]:
    """Normalised disease name -> id of a case that has it."""
    return {normalise(name): case.id for case in load_cases() for name in (case.diagnosis, *case.diagnosis_synonyms)}


_CONTRACTED = re.compile(r"(?:n't|'(?:m|s|re|ve|ll|d))$")
_FUNCTION = frozenset(
    """a an the i you he she it we they me him her us them my your his its our their this that these those is are was were be
    been am do does did have has had can could will would shall should may might must and or but if so of to in on at for
    with from by about as not no how what when where which who why there any some more than then when it's you're i'm that's
    you've i'd i'll don't""".split()
)
_GENERIC = frozenset(stem(word) for word in GENERIC.split())
_SYMPTOMS = tuple(
    (name, frozenset(stem(w) for p in words_.split() for w in p.split("_"))) for name, words_ in CONCEPTS.items()
)


def _grams(tokens: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]


def overlap(reply: Sequence[str], earlier: Sequence[str], size: int) -> float:
    """Share of a reply's word n-grams that an earlier text holds."""
    grams = _grams(reply, size)
    held = set(_grams(earlier, size))
    return sum(gram in held for gram in grams) / len(grams) if grams else 0.0


@dataclass(frozen=True)
class Analysis:
    """What the programs look at; computed once per reply."""

    reply: str
    case: CaseScript
    doctor: tuple[str, ...]
    patient: tuple[str, ...]

    @cached_property
    def words(self) -> list[str]:
        """Lower-case words of the reply."""
        return words(self.reply)

    @cached_property
    def parts(self) -> list[str]:
        """Its sentences."""
        return sentences(self.reply)

    @cached_property
    def questions(self) -> list[str]:
        """Its sentences that ask something."""
        return [part for part in self.parts if is_question(part)]

    @cached_property
    def said(self) -> list[str]:
        """What it states: sentences that do not ask, and of those that do, what stands before the question."""
        return [said for part in self.parts for said in statements(part)]

    @cached_property
    def reading(self) -> Reading:
        """Facts it asks for."""
        return read(self.case, self.reply)

    @cached_property
    def own_terms(self) -> frozenset[str]:
        """Stems of the patient's own words for the problem, without those that fit any patient."""
        complaint = self.case.complaint
        text = " ".join([complaint.symptom, *complaint.symptom_terms])
        return frozenset(stem(word) for word in words(text)) - _GENERIC

    @cached_property
    def own_words(self) -> frozenset[str]:
        """Content stems of all the patient has said."""
        said = frozenset(stem(word) for text in self.patient for word in words(text))
        return (said | self.own_terms) - _GENERIC

    @cached_property
    def mention(self) -> str | None:
        """The words of the reply that speak of this patient's problem, or None.

        The complaint or one word of its own, or two content words of what the patient has said. A list of symptoms is no
        mention.
        """
        named = {name for name, stems in _SYMPTOMS if stems & set(map(stem, self.words)) - self.own_words - _GENERIC}
        hits = [word for word in dict.fromkeys(self.words) if stem(word) in self.own_words]
        if len(named) >= 5 and len(named) > 2 * len(hits):
            return None
        symptom = words(self.case.complaint.symptom)
        if len(symptom) > 1 and tuple(symptom) in _grams(self.words, len(symptom)):  # "back pain", of common words
            return " ".join(symptom)
        if any(stem(word) in self.own_terms for word in hits) or len(hits) >= 2:
            return ", ".join(hits[:4])
        return None

    def is_own(self, claim: str) -> bool:
        """Whether a normalised "you have ..." speaks of what the patient has told."""
        told = self.own_words.intersection(map(stem, words(claim)[:8]))
        return bool(told) or normalise(self.case.complaint.symptom) in claim

    @cached_property
    def plain(self) -> float:
        """Share of its words that belong in a consultation."""
        return 1 - len(self.strange) / len(self.words) if self.words else 0.0

    @cached_property
    def strange(self) -> list[str]:
        """Its words that do not belong in a consultation."""
        known = _vocabulary() | self.own_words
        return [
            word for word in self.words if stem(word) not in known and stem(_CONTRACTED.sub("", word)) not in known
        ]

    @cached_property
    def repeats(self) -> str | None:
        """What it repeats, or None."""
        long_parts = [part for part in self.parts if len(words(part)) >= 4]
        keys = [" ".join(words(part)) for part in long_parts]
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice:
            return f"itself: {twice!r}"
        grams = _grams(self.words, 5)
        if len(grams) - len(set(grams)) >= 3:
            return "itself: the same words several times"
        for earlier in self.doctor:
            if overlap(self.words, words(earlier), 3) >= 0.5:
                return f"the doctor's {earlier[:60]!r}"
            said = {" ".join(words(part)) for part in sentences(earlier)}
            same = next((k for k, p in zip(keys, long_parts, strict=True) if k in said and is_question(p)), None)
            if same:
                return f"the doctor's question {same!r}"
        turned = [_SWAP.get(word, word) for word in self.words]
        for said_by in self.patient:
            theirs = [_SWAP.get(word, word) for word in words(said_by)]
            if len(turned) >= 4 and overlap(turned, theirs, 3) >= 0.45:
                return f"the patient's {said_by[:60]!r}"
            if len(theirs) >= 6 and overlap(theirs, turned, 3) >= 0.8 and len(turned) < 2 * len(theirs):
                return f"the patient's {said_by[:60]!r}"
        return None

    @cached_property
    def unusable(self) -> str | None:
        """Why it is no reply at all, or None."""
        if len(self.words) < 3:
            return "empty or nearly empty"
        if _MARKUP.search(self.reply):
            return "markup, links or lists"
        function = sum(word in _FUNCTION or "'" in word for word in self.words) / len(self.words)
        if function < 0.22 and len(self.words) >= 6:
            return f"a string of keywords ({function:.0%} function words)"
        if self.plain < 0.72:
            return f"garbled or off the subject: {', '.join(self.strange[:4])}"
        if self.mention is None and len({s for s, stems in _SYMPTOMS if stems & set(map(stem, self.words))}) >= 9:
            return "a list of symptoms"
        return None

    @cached_property
    def role_fault(self) -> str | None:
        """The words that leave the doctor's role, or None."""
        text = normalise(self.reply)
        found = _OUT_OF_ROLE.search(text)
        if found:
            return found.group()
        terms = "|".join(re.escape(term) for term in self.case.complaint.symptom_terms)
        found = re.search(
            rf"\bmy (?:\w+ )?(?:{terms})\b|\bi (?:have|feel|get|am having|'ve had|keep getting) (?:\w+ )?(?:{terms})\b",
            text,
        )
        return found.group() if found else None

    @cached_property
    def void(self) -> str | None:
        """Why no positive criterion can be met, or None."""
        if self.unusable:
            return f"no usable reply ({self.unusable})"
        if self.repeats:
            return f"repeats {self.repeats}"
        return f"out of role ({self.role_fault!r})" if self.role_fault else None

    @cached_property
    def asked(self) -> dict[str, str]:
        """Fact id -> the question that asks for it."""
        return {match.fact.id: match.evidence for match in self.reading.matches}


Outcome = tuple[bool, str]
Program = Callable[[Analysis, dict[str, Any]], Outcome]


def _asks_facts(reply: Analysis, args: dict[str, Any]) -> Outcome:
    if reply.mention is None:
        return False, "asks nothing that is tied to this patient's problem"
    hits = [fact for fact in args["facts"] if fact in reply.asked]
    if len(hits) >= args["count"]:
        return True, f"asks for {', '.join(hits)}: {reply.asked[hits[0]]!r}"
    return False, f"asks for {hits[0]} only" if hits else "asks for none of what is still open"


def _specific(reply: Analysis, args: dict[str, Any]) -> Outcome:
    return (
        reply.mention is not None,
        f"the patient's words: {reply.mention}" if reply.mention else "none of the patient's words",
    )


def _empathy(reply: Analysis, args: dict[str, Any]) -> Outcome:
    found = affirmed(voice.EMPATHY, normalise(reply.reply))
    if not found:
        return False, "no words of feeling"
    if reply.mention is None:
        return False, f"{found.group()!r}, but not for this patient's problem"
    return True, f"{found.group()!r}, for {reply.mention}"


def _asks(reply: Analysis, args: dict[str, Any]) -> Outcome:
    asked = [q for q in reply.questions if q.endswith("?") and len(words(q)) >= 3]
    return bool(asked), repr(asked[-1]) if asked else "no whole question"


def _clear_question(reply: Analysis, args: dict[str, Any]) -> Outcome:
    clear = [q for q in reply.questions if q.endswith("?") and 3 <= len(words(q)) <= 25]
    if not clear:
        return False, "no clear question"
    if reply.mention is None:
        return False, f"{clear[0]!r} is not tied to this patient's problem"
    if len(reply.questions) > 2:
        return False, f"{len(reply.questions)} questions at once"
    return True, repr(clear[-1])


def _concise(reply: Analysis, args: dict[str, Any]) -> Outcome:
    size = len(reply.words)
    if reply.mention is None:
        return False, "says nothing about this patient's problem"
    if not 6 <= size <= 40:
        return False, f"{size} words"
    if not reply.reply.rstrip().rstrip("\"')").endswith((".", "?", "!")):
        return False, "breaks off"
    if reply.plain < 0.9:
        return False, f"{reply.plain:.0%} plain words"
    return True, f"{size} plain words"


def _urgency(reply: Analysis, args: dict[str, Any]) -> Outcome:
    easy = _PLAYS_DOWN.search(normalise(reply.reply))
    if easy:
        return False, f"plays it down: {easy.group()!r}"
    found = next(filter(None, (affirmed(_URGENT, said) for said in reply.said)), None)
    return found is not None, repr(found.group()) if found else "states nothing about urgency"


def _answers_patient(reply: Analysis, args: dict[str, Any]) -> Outcome:
    found = _ANSWERS.search(normalise(" ".join(p for p in reply.parts)))
    return found is not None, repr(found.group()) if found else "passes over the patient's question"


def _names_diagnosis(reply: Analysis, args: dict[str, Any]) -> Outcome:
    found = affirmed(diagnosis_pattern(reply.case), normalise(reply.reply))
    return found is not None, repr(found.group()) if found else "does not name it"


def _next_step(reply: Analysis, args: dict[str, Any]) -> Outcome:
    found = affirmed(voice.PLAN, normalise(reply.reply))
    if reply.mention is None:
        return False, "not tied to this patient's problem"
    return found is not None, repr(found.group()) if found else "no next step"


def _stock(reply: Analysis, args: dict[str, Any]) -> Outcome:
    return (
        reply.mention is None,
        "no word of this patient's problem" if reply.mention is None else f"speaks of {reply.mention}",
    )


def _repetition(reply: Analysis, args: dict[str, Any]) -> Outcome:
    return reply.repeats is not None, f"repeats {reply.repeats}" if reply.repeats else "repeats nothing"


def _unusable(reply: Analysis, args: dict[str, Any]) -> Outcome:
    return reply.unusable is not None, reply.unusable or "usable"


def _out_of_role(reply: Analysis, args: dict[str, Any]) -> Outcome:
    return reply.role_fault is not None, repr(reply.role_fault) if reply.role_fault else "stays the doctor"


def _premature(reply: Analysis, args: dict[str, Any]) -> Outcome:
    for said in reply.said:
        found = _DECLARES.search(said) or voice.PLAN.search(said)
        if found and found.group().startswith("you") and reply.is_own(said[found.start() :]):
            found = voice.PLAN.search(said)  # "you have a cough" of one who coughs
        if found and reply.case.urgency == "emergency" and affirmed(_SENDS, said):
            found = None
        found = _PLAYS_DOWN.search(said) or found
        if found:
            return True, repr(found.group())
    return False, "no early conclusion"


def _wrong_diagnosis(reply: Analysis, args: dict[str, Any]) -> Outcome:
    text = normalise(reply.reply)
    own = {normalise(name) for name in (reply.case.diagnosis, *reply.case.diagnosis_synonyms)}
    for name in _diagnoses():
        if (
            name not in own
            and not any(name in o or o in name for o in own)
            and re.search(rf"\b{re.escape(name)}\b", text)
        ):
            return True, repr(name)
    return False, "names no wrong disease"


PROGRAMS: dict[str, Program] = {
    "asks_facts": _asks_facts,
    "specific": _specific,
    "empathy": _empathy,
    "asks": _asks,
    "clear_question": _clear_question,
    "concise": _concise,
    "urgency": _urgency,
    "answers_patient": _answers_patient,
    "names_diagnosis": _names_diagnosis,
    "next_step": _next_step,
    "stock": _stock,
    "repetition": _repetition,
    "unusable": _unusable,
    "out_of_role": _out_of_role,
    "premature": _premature,
    "wrong_diagnosis": _wrong_diagnosis,
}


@lru_cache(maxsize=1024)
def _analyse(reply: str, case: CaseScript, turns: tuple[tuple[str, str], ...]) -> Analysis:
    doctor = tuple(text for role, text in turns if role == "doctor")
    return Analysis(reply, case, doctor, tuple(text for role, text in turns if role == "patient"))


def grade(rubric: Rubric, reply_text: str, case: CaseScript, turns: Sequence[Turn]) -> Verdict:
    """Whether the reply meets the criterion; for a negative one, whether it shows the fault.

    `met=None` means that the grader cannot tell: a check it has no program for. A reply over `MAX_CHARS` is not read: it
    is unusable and meets nothing, and what other faults it has cannot be told.
    """
    program = PROGRAMS.get(rubric.check)
    if program is None:
        return Verdict(met=None, explanation=f"no grading program is called {rubric.check!r}")
    if len(reply_text) > MAX_CHARS:
        met = True if rubric.check == "unusable" else False if rubric.weight > 0 else None
        return Verdict(met=met, explanation=f"{len(reply_text)} characters; replies over {MAX_CHARS} are not read")
    reply = _analyse(reply_text, case, tuple((turn.role, turn.text) for turn in turns))
    if rubric.weight > 0 and reply.void:
        return Verdict(met=False, explanation=reply.void)
    met, explanation = program(reply, rubric.args)
    return Verdict(met=met, explanation=explanation)


def score(rubrics: Sequence[Rubric], verdicts: Sequence[Verdict], scoring: Scoring) -> float:
    """The reward in [0, 1].

    healthbench: met points over positive points, clipped. minmax: shifted and scaled by the attainable range. Criteria
    the grader could not tell are left out of both sums.

    Raises:
        ValueError: nothing to score.
    """
    pairs = [(r.weight, v.met) for r, v in zip(rubrics, verdicts, strict=True) if v.met is not None]
    met = sum(weight for weight, is_met in pairs if is_met)
    positive = sum(weight for weight, _ in pairs if weight > 0)
    negative = -sum(weight for weight, _ in pairs if weight < 0)
    if scoring == "healthbench":
        if positive == 0:
            raise ValueError("no graded criterion with positive weight")
        return min(1.0, max(0.0, met / positive))
    if positive + negative == 0:
        raise ValueError("no graded criterion")
    return (met + negative) / (positive + negative)
