"""Which of a patient's facts does an utterance of the doctor ask for?

An utterance is cut into sentences; only questions and requests for information count, statements, advice and offers
do not. For each question every fact of the script is scored by two signals: the lexicon (a phrasing of its topic, words
of its `about` list up to synonyms, words of its text) and a sentence encoder (the fact's text, a question made of its
terms, example questions of its topic). A question that is closer to a topic this patient has no fact on tells nothing.
The best fact is taken; others only where the lexicon finds them in words of their own ("do you smoke or drink?").

Development questions, right fact told / a wrong one told: lexicon alone 57 % / 9 %, encoder alone 86 % (ranking
only), both 90 % / 3.5 %. That is why the encoder is a requirement and not an option.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from m2train.verifier.cases import CaseScript, Fact, load_cases
from m2train.verifier.embedding import encode, encode_all
from m2train.verifier.lexicon import ASKING, CONCEPTS, WEAK
from m2train.verifier.phrasings import ABOUT, EXAMPLES, NOTHING
from m2train.verifier.utterance import WORD, asking_part, clauses, is_question, normalise, sentences, stem, words

_BROAD = re.compile(
    r"\b(?:tell me (?:a (?:bit|little) )?more|more about (?:it|this|that|your symptoms?|the problem|what|how you)|what(?:'s| is| has|'s been)? (?:been )?(?:going on|happening|the (?:matter|problem)|bothering|troubling|happened|wrong)|"
    r"what (?:brings|brought) you|how can i help|how are you(?: feeling)?(?: today| now)?|tell me about (?:it|this|that|yourself|your (?:symptoms?|problem)|the problem)|"
    r"describe (?:it|this|your symptoms?|the problem|what)|explain|how do you feel|how are things|go on|start from the beginning|talk me through it)\b"
)


@dataclass(frozen=True, slots=True)
class Match:
    """A fact that was asked for."""

    fact: Fact
    score: float
    evidence: str
    """The words of the doctor that asked for it."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What an utterance asks."""

    matches: tuple[Match, ...]
    questions: tuple[str, ...]
    """Sentences that ask something."""
    broad: bool
    """Asks in general ("tell me more"), not for anything in particular."""


@lru_cache(maxsize=1)
def _concept_table() -> dict[tuple[str, ...], tuple[str, ...]]:
    """Stemmed phrase -> concepts."""
    table: dict[tuple[str, ...], list[str]] = {}
    for concept, phrases in CONCEPTS.items():
        for phrase in phrases.split():
            table.setdefault(tuple(stem(part) for part in phrase.split("_")), []).append(concept)
    return {key: tuple(value) for key, value in table.items()}


@lru_cache(maxsize=1)
def _asking() -> dict[str, re.Pattern[str]]:
    return {topic: re.compile("|".join(f"(?:{p})" for p in patterns)) for topic, patterns in ASKING.items()}


_WEAK_STEMS = frozenset(stem(word) for word in WEAK)


@dataclass(frozen=True, slots=True)
class _Keys:
    """What a fact answers to."""

    phrases: tuple[tuple[str, ...], ...]
    concepts: frozenset[str]
    text: frozenset[str]


@lru_cache(maxsize=512)
def _keys(case: CaseScript) -> tuple[_Keys, ...]:
    table = _concept_table()
    keys = []
    for fact in case.facts:
        phrases = tuple(tuple(stem(w) for w in words(term)) for term in fact.about)
        concepts = frozenset(c for phrase in phrases if not _weak(phrase) for c in table.get(phrase, ()))
        text = frozenset(s for s in map(stem, words(fact.text)) if s not in _STOP_STEMS)
        keys.append(_Keys(phrases, concepts, text))
    return tuple(keys)


def _weak(phrase: tuple[str, ...]) -> bool:
    return all(part in _WEAK_STEMS for part in phrase)


_STOP_STEMS = frozenset(
    stem(w)
    for w in """a an the i me my we our you your he him his she her it its they them their this that these those and or but if so
    of to in on at by for from with as is am are was were be been being do does did have has had having will would can
    could should may might not no nor any some all just like about up down out over off into than then there here when what
    which who how more most very too also only get got go goes going went come comes came take takes took put say said
    feel felt know think make makes made one two three ever never""".split()
)


@lru_cache(maxsize=8192)
def _tokens(text: str) -> tuple[tuple[str, ...], tuple[tuple[int, int], ...]]:
    found = list(WORD.finditer(text))
    return tuple(stem(m.group()) for m in found), tuple(m.span() for m in found)


def _phrase_spans(phrase: tuple[str, ...], tokens: tuple[str, ...]) -> list[int]:
    size = len(phrase)
    return [i for i in range(len(tokens) - size + 1) if tokens[i : i + size] == phrase]


@dataclass(slots=True)
class _Candidate:
    fact: Fact
    score: float
    strong: frozenset[int]
    """Token positions of direct evidence."""
    topical: bool
    named: bool
    """Asked for by name: the topic in a word or two, or a finding."""


def _score(case: CaseScript, sentence: str) -> list[_Candidate]:
    tokens, spans = _tokens(sentence)
    table = _concept_table()
    said: dict[str, set[int]] = {}
    for i in range(len(tokens)):
        for size in (1, 2, 3):
            for concept in table.get(tokens[i : i + size], ()):
                said.setdefault(concept, set()).update(range(i, min(i + size, len(tokens))))
    hits = {topic: pattern.search(sentence) for topic, pattern in _asking().items()}
    own = {stem(w) for term in case.complaint.symptom_terms for w in words(term)}
    found = []
    for fact, keys in zip(case.facts, _keys(case), strict=True):
        score, strong = 0.0, set[int]()
        hit = hits[fact.topic]
        if hit:
            score += 1.4 if fact.topic == "associated" else 2.2
            if hit.end() - hit.start() <= 12:  # a long phrasing covers words of other topics
                strong |= {i for i, (a, b) in enumerate(spans) if a < hit.end() and b > hit.start()}
        about = 0.0
        for phrase in keys.phrases:
            places = _phrase_spans(phrase, tokens)
            if not places:
                continue
            if _weak(phrase):
                about += 0.5
            elif len(phrase) == 1 and phrase[0] in own:
                about += 0.7
            else:
                about += 1.8
                strong |= {i + k for i in places for k in range(len(phrase))}
        for concept in keys.concepts & said.keys():
            if {tokens[i] for i in said[concept]} <= own:
                about += 0.3
                continue
            about += 1.0 if about else 1.7
            strong |= said[concept]
        score += min(about, 3.0)
        text = len(keys.text & set(tokens))
        score += min(0.35 * text, 1.05)
        if score > 0:
            named = hit.end() - hit.start() <= 12 if hit else fact.topic == "associated" and about >= 1.5
            found.append(_Candidate(fact, score, frozenset(strong), hit is not None, named))
    return found


@lru_cache(maxsize=1)
def _topic_vectors() -> dict[str, NDArray[np.float32]]:
    """Vectors of the example questions per topic, and of questions that ask for nothing."""
    return {topic: encode_all(examples) for topic, examples in {**EXAMPLES, "": NOTHING}.items()}


@dataclass(frozen=True, slots=True)
class _FactVectors:
    """A case's facts for the encoder."""

    text: NDArray[np.float32]
    asked: NDArray[np.float32]
    single: tuple[NDArray[np.float32], ...]
    """Per fact: questions made of each of its terms, and of all of them."""


@lru_cache(maxsize=512)
def _fact_vectors(case: CaseScript) -> _FactVectors:
    return _FactVectors(
        encode_all([fact.text for fact in case.facts]),
        encode_all([_asked(fact) for fact in case.facts]),
        tuple(encode_all([_asked(fact), *_asked_singly(fact)]) for fact in case.facts),
    )


def _asked(fact: Fact) -> str:
    *most, last = fact.about
    return _ask_about(fact, f"{', '.join(most)} or {last}" if most else last)


def _asked_singly(fact: Fact) -> list[str]:
    return [_ask_about(fact, term) for term in fact.about]


def _ask_about(fact: Fact, about: str) -> str:
    return ABOUT.get(fact.topic, "Can you tell me about {about}?").format(about=about)


def stored_texts() -> list[str]:
    """Every text of the package that is compared with a doctor's words."""
    facts = [fact for case in load_cases() for fact in case.facts]
    texts = [*NOTHING, *(question for questions in EXAMPLES.values() for question in questions)]
    for fact in facts:
        texts += [fact.text, _asked(fact), *_asked_singly(fact)]
    return texts


_FINDINGS = frozenset(
    """fever sweat nausea breath faint dizzy palpitation swelling rash itch numb weak vision headache cough phlegm wheeze
    lump jaundice confused appetite swallow hearing allergy smoke drink cannabis pregnant period stool pee""".split()
)


@lru_cache(maxsize=8192)
def _findings(text: str) -> frozenset[str]:
    """Findings and habits that a text names."""
    tokens, _ = _tokens(normalise(text))
    table = _concept_table()
    return frozenset(
        concept
        for i in range(len(tokens))
        for size in (1, 2, 3)
        for concept in table.get(tokens[i : i + size], ())
        if concept in _FINDINGS
    )


_WEIGHTS = {
    "text": 3.536,
    "asked": 5.838,
    "single": -5.456,
    "topic": 4.155,
    "topic3": 1.354,
    "gap_topic": -8.425,
    "gap_other": -7.401,
    "lexicon": 1.4,
    "topical": -0.279,
    "strong": -1.075,
    "other": -2.27,
    "whole": 6.772,
    "topic_whole": 4.228,
    "associated": 3.219,
}
"""A softmax over a case's facts and "nothing", fitted on the development questions and, at 3 % weight, on the example
questions put to patients with and without such a fact (each example then left out of its topic)."""
_NULL = 6.209
_SURE = 0.55
"""Probability from which a fact is told."""
_SURE_HALF = 0.75
"""The same for half a question."""
_SECOND = 3.2
"""Lexicon score from which a further fact of the same question counts."""


def _logits(case: CaseScript, sentence: str, core: str, lexical: dict[str, _Candidate]) -> list[float]:
    """One logit per fact; `_NULL` is that of "asks for no fact"."""
    vectors, part, whole = _fact_vectors(case), encode(core), encode(sentence)
    likeness = {topic: examples @ part for topic, examples in _topic_vectors().items()}
    near = {topic: float(values.max()) for topic, values in likeness.items()}
    own = {fact.topic for fact in case.facts}
    foreign = max(value for topic, value in near.items() if topic not in own)
    named = _findings(core)
    logits = []
    for i, fact in enumerate(case.facts):
        found = lexical.get(fact.id)
        single = float((vectors.single[i] @ part).max())
        other = named and not (found and (found.topical or found.strong)) and not named & _findings(fact.text)
        values = {
            "text": float(vectors.text[i] @ part),
            "asked": float(vectors.asked[i] @ part),
            "single": single,
            "lexicon": min(found.score, 3.4) if found else 0.0,
            "topical": float(found is not None and found.topical),
            "strong": float(found is not None and bool(found.strong)),
            "other": float(bool(other)),
            "whole": float((vectors.text[i] + vectors.asked[i]) @ whole) / 2,
        }
        if fact.topic == "associated":
            values |= {"associated": 1.0, "gap_other": max(0.0, foreign - max(near["associated"], single))}
        else:
            values |= {
                "topic": near[fact.topic],
                "topic3": float(np.sort(likeness[fact.topic])[-3:].mean()),
                "topic_whole": float((_topic_vectors()[fact.topic] @ whole).max()),
                "gap_topic": max(0.0, foreign - near[fact.topic]),
            }
        logits.append(sum(_WEIGHTS[name] * value for name, value in values.items()))
    return logits


@lru_cache(maxsize=512)
def _own_symptom(case: CaseScript) -> re.Pattern[str]:
    """The patient's own problem as a doctor names it: "the tightness in your chest"."""
    words_ = {term for term in map(normalise, (case.complaint.symptom, *case.complaint.symptom_terms))}
    terms = "|".join(sorted(map(re.escape, words_), key=len, reverse=True))
    return re.compile(
        rf"\b(?:the|your|this|that|these|those|his|her) (?:[a-z-]+ ){{0,2}}?(?:{terms})\b"
        rf"(?: (?:in|on|of|behind|under|around|with|over) (?:the|your|one|his|her)? ?[a-z]+(?: (?:{terms}))?)?"
    )


def _sure(logits: Sequence[float]) -> float:
    """Probability of the best fact against the others and against nothing."""
    top = max(logits)
    return 1 / (sum(math.exp(logit - top) for logit in logits) + math.exp(_NULL - top))


def match_sentence(case: CaseScript, sentence: str) -> list[Match]:
    """Facts that one question asks for, best first.

    A question is read as a whole; one made of two ("when did it start, and how long does it last?") also by its
    halves, of which more certainty is asked.
    """
    core = asking_part(sentence)
    chosen = _match_clause(case, sentence, core, _SURE)
    if len(chosen) < 2:
        for clause in clauses(core):
            known = {match.fact.id for match in chosen}
            chosen += [m for m in _match_clause(case, clause, clause, _SURE_HALF) if m.fact.id not in known]
    return chosen[:3]


def _match_clause(case: CaseScript, sentence: str, core: str, needed: float) -> list[Match]:
    """Facts that a question asks for; it is read as it stands and with the patient's own symptom as "it"."""
    lexical = {c.fact.id: c for c in _score(case, core)}
    logits = _logits(case, sentence, core, lexical)
    plain = _own_symptom(case).sub("it", core)
    if plain != core:
        other_lexical = {c.fact.id: c for c in _score(case, plain)}
        other = _logits(case, plain, plain, other_lexical)
        if _sure(other) > _sure(logits):
            logits, lexical = other, other_lexical
    ranked = sorted(zip(logits, case.facts, strict=True), key=lambda item: -item[0])
    evidence = core.strip(" ?")
    named: list[Match] = []
    used: set[int] = set()
    if re.search(r",|\bor\b|\band\b|/", core):
        for logit, fact in ranked:
            found = lexical.get(fact.id)
            if not found or not found.named or found.score < _SECOND:
                continue
            if logit > _NULL and not found.strong & used and len(named) < 3:
                named.append(Match(fact, logit, evidence))
                used |= found.strong
    if len(named) >= 2:
        return named
    top, fact = ranked[0]
    return [Match(fact, top, evidence)] if _sure(logits) >= needed else []


_ELLIPSIS = re.compile(
    r"^(?:and |so |but )?(?:what|how) about (?:you|yourself|him|her|that)\b|^(?:is|are|was|does|do|did|have|has) (?:that|you|it)(?: like that| true| so| one| too)?\s*\?"
)


@lru_cache(maxsize=4096)
def read(case: CaseScript, utterance: str) -> Reading:
    """What an utterance asks this patient for, `never` facts included (the patient withholds those)."""
    found: dict[str, Match] = {}
    parts = sentences(utterance)
    questions = []
    for before, sentence in zip(["", *parts], parts, strict=False):
        if not is_question(sentence):
            continue
        questions.append(sentence)
        if _ELLIPSIS.match(sentence) and before:
            sentence = f"{before.rstrip(' .!')}, {sentence}"
        for match in match_sentence(case, sentence):
            if match.fact.id not in found or found[match.fact.id].score < match.score:
                found[match.fact.id] = match
    broad = not found and any(_BROAD.search(q) for q in questions)
    return Reading(tuple(found.values()), tuple(questions), broad)


def told(case: CaseScript, utterance: str) -> list[Fact]:
    """Facts the patient gives in answer, in the order asked: everything matched that may be told."""
    return [match.fact for match in read(case, utterance).matches if match.fact.disclose != "never"]
