"""An utterance of the doctor as text: its sentences, its words, and which of its sentences ask for information.

Statements, advice, offers and examinations do not ask, whatever their punctuation; of a question only the asking part
counts, not what it sets aside ("besides the cough"), refers back to or sets the scene with.
"""

from __future__ import annotations

import re
from functools import lru_cache

WORD = re.compile(r"[a-z0-9]+(?:['-][a-z0-9]+)*")
_AUX = (
    "do|does|did|is|are|was|were|am|have|has|had|can|could|would|will|should|may|might|isn't|aren't|wasn't|don't|doesn't|"
    "didn't|haven't|hasn't|hadn't|can't|couldn't|wouldn't|won't"
)
_WH = "what|which|who|whom|whose|where|whereabouts|when|why|how|what's|where's|how's|who's|when's"
_QUESTION_START = re.compile(
    rf"^(?:(?:and|so|but|or|okay|ok|also|well|now|then|right|alright|please|just|thanks?|thank you|sorry|first(?:ly)?|"
    rf"next|finally|lastly|in that case|i see|next)[,. ]+)*(?:(?:{_AUX})\s+(?:you|your|it|the|this|that|there|they|these|those|"
    rf"he|she|his|her|any|anyone|anybody|anything|i ask|we|either|someone|people|my|a|an|\w+ing)\b|(?:{_WH})\b)"
)
_REQUEST = re.compile(
    r"\b(?:(?:tell|give|talk|walk|take|run|show) me (?:\w+ly )?(?:about|more|a|what|when|where|which|how|who|whether|if|your|the|through|some|any|an|exactly|everything|back|of)|"
    r"think back|cast your mind|describe|put an? (?:finger|number|date|figure)|(?:give|score|mark|rate) (?:it|the|this|your|that) |"
    r"let me (?:know|ask|hear)(?: you)? (?:what|when|where|how|whether|which|about)|let(?:'s| us) (?:talk|hear|speak|go|discuss|turn|move on to|chat)|"
    r"i(?:'d| would|'ll)? (?:also |just |really |still )?(?:like|need|want|have|wish|love) to (?:know|ask|hear|understand|check|find out|learn)|"
    r"i(?:'m| am) (?:wondering|curious|interested)|i(?: was|'m)? ?(?:just )?wonder(?:ed|ing)?|(?:may|can|could|must) i ask|mind (?:if i ask|telling|my asking)|"
    r"say (?:a bit |a little |something |some )?(?:more )?about|explain (?:to me )?(?:what|when|where|how)|point to|talk to me about|fill me in|remind me|"
    r"help me (?:understand|picture|see)|paint me|list (?:your|any|the|all|everything)|run through|go through|name (?:the|your|any|everything))\b"
)
_ADVICE = re.compile(
    r"\b(?:(?:tell|let) (?:me|us|someone|a|the|your) ?(?:doctor|nurse|gp)? ?(?:know )?(?:straight away|immediately|at once|if it|if the|if you (?:feel|notice|get|develop|start|have any questions))|"
    r"come back (?:to|in|if|and|for|on|next)|call (?:999|911|an ambulance)|have you (?:considered|thought (?:about|of)) (?!harm|end|suicid|hurt|kill|tak(?:ing|e) your|dying|death)|"
    r"why (?:don't|not) (?:you )?(?:try|take|eat|drink|go|see)|(?:did|do) you know (?:that|how)|do you (?:understand|agree)\b|"
    r"do you mind if i (?:examine|take|listen|look|have a look|check|do|press|feel)|does that (?:make sense|sound|help|seem|answer)|"
    r"do you have any (?:other |more )?questions|any questions|is that (?:ok|okay|all right|alright|clear|acceptable)|"
    r"would you (?:like|prefer|be (?:happy|willing|able|prepared)|agree|mind (?!telling|my|if i ask|saying|describing))|do you (?:want|like|prefer) (?:me|us)\b|"
    r"shall (?:i|we)|should (?:i|we)|(?:can|could|may|might|will) (?:i|we) (?:examine|take|listen|look|have|check|get|do|book|refer|arrange|press|feel|see|just|offer|start|help|call|send|give|prescribe)|"
    r"(?:can|could|will|would) you (?:please )?(?:hop|lie (?:down|back|on|here)|sit (?:up|down|here|on)|take (?:off|a deep|these)|roll|open your|come (?:back|in|here|to)|sign|undress|"
    r"turn (?:over|round|around)|book|cut down|avoid|try|fill|ring|pop|rest for|give up)|"
    r"how are you today|how do you do|(?:how|what) (?:can|could|may) (?:i|we) (?:do|help)|what (?:brings|brought) you|what seems to be)\b"
)
_BESIDES = re.compile(
    r"\b(?:besides|apart from|aside from|other than|leaving aside|setting aside|putting aside|in addition to|as well as|never mind|"
    r"forget(?:ting)? about|regardless of|rather than|without going into)\b[^,;?]*"
)
_SUBORDINATE = re.compile(
    r"\b(?:when|while|whenever|if|since|because|as|now that|given that|before|after|although|though) (?:you|it|he|she|they|i|we|the|your|this|that|these) (?!ever\b)[^,?;]*,"
)
_PREAMBLE = re.compile(
    r"^.*?\b(?:you (?:said|mentioned|told|say|mention|were saying|described)|i (?:see|understand|know|hear|can|heard|read|note|realise|appreciate|am|'m|would|will|'ll|think|believe|suspect)|"
    r"i'm|i'll|it (?:sounds|must|seems|looks)|that (?:sounds|must|is)|thank|sorry)\b"
)
_ASK_TAIL = re.compile(rf"(?:,|\band\b|\bor\b|-) (?:{_AUX}|{_WH}) (?:you|it|the|your|there|any|long|often|bad)\b")
_JOINED = re.compile(rf"(?:,| -)? ?\b(?:and|or|but)(?: also)? (?=(?:{_AUX}|{_WH}) )")


def normalise(text: str) -> str:
    """Lower case, straight quotes, single spaces."""
    table = {0x2019: "'", 0x2018: "'", 0x201C: '"', 0x201D: '"', 0x2013: "-", 0x2014: "-", 0x2011: "-"}
    return re.sub(r"\s+", " ", text.translate(table).lower()).strip()


_CLAUSE = re.compile(r"[.,;:!?]| (?:but|however|although|though|so|because) ")
_DENIAL = re.compile(
    r"\b(?:not(?! only)|never|no(?! doubt| wonder)|nothing|none|neither|nor|cannot|hardly|rarely)\b|n't\b"
)


def affirmed(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    """The first place where the pattern is found and not denied: "this is not migraine" says nothing of migraine.

    Args:
        pattern: what is looked for.
        text: normalised; a denial counts from the beginning of the clause to the end of what was found.
    """
    for found in pattern.finditer(text):
        start = max((clause.end() for clause in _CLAUSE.finditer(text, 0, found.start())), default=0)
        if not _DENIAL.search(text, start, found.end()):
            return found
    return None


def words(text: str) -> list[str]:
    """Lower-case words of a text."""
    return WORD.findall(normalise(text))


@lru_cache(maxsize=65536)
def stem(word: str) -> str:
    """A light English stemmer: plural, -ing, -ed, -ly and doubled consonants."""
    word = word.removesuffix("'s")
    for suffix, least in (
        ("ies", 3),
        ("iness", 3),
        ("ness", 4),
        ("ingly", 4),
        ("edly", 4),
        ("ing", 3),
        ("ed", 3),
        ("ly", 4),
        ("es", 4),
        ("s", 3),
        ("y", 4),
        ("e", 4),
    ):
        if word.endswith(suffix) and len(word) - len(suffix) >= least and not word.endswith(("ss", "us", "is")):
            word = word[: -len(suffix)]
            break
    if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "lsz":
        word = word[:-1]
    return word.removesuffix("e") if len(word) > 4 else word


def sentences(text: str) -> list[str]:
    """Sentences with their closing mark, normalised."""
    return [part.strip() for part in re.findall(r"[^.!?;\n]+[.!?;]*", normalise(text)) if WORD.search(part)]


def is_question(sentence: str) -> bool:
    """Whether a normalised sentence asks the patient for information."""
    body = sentence.rstrip(" .!?;\"')")
    asked = "?" in sentence
    if _REQUEST.search(body) and not re.search(r"\b(?:don't|do not|no) need to|\bno need\b", body):
        return asked or not re.search(
            r"\b(?:tell|let) me (?:know )?(?:at once |straight away )?(?:if|when) (?:it|the|this|you (?:feel|notice|get|develop|start))",
            body,
        )
    if _ADVICE.search(body) and not _ASK_TAIL.search(body):
        return False
    return (
        asked
        or bool(_QUESTION_START.match(body))
        and not re.match(r"^(?:when|how|what) (?:you|it|i|we|the|this)\b", body)
    )


def asking_part(sentence: str) -> str:
    """The asking part of a question: without what it states, sets aside, refers back to or sets the scene with."""
    pieces = _TO_QUESTION.split(sentence)
    while len(pieces) > 1 and not is_question(pieces[0]):
        del pieces[0]
    body = _BESIDES.sub(" ", sentence[sentence.rindex(pieces[0]) :] if len(pieces) == 1 else sentence)
    start = re.search(
        rf"(?:^|[,;:-] ?|\b(?:and|but|so|or) )((?:{_AUX}) (?:you|your|it|the|this|that|there|they|these|those|he|she|any|his|her)\b|(?:{_WH})\b(?! (?:you|it|i|we|he|she|they|the|your|this|that) (?!ever)))",
        body,
    )
    if start and start.start(1) > 0 and _PREAMBLE.match(body[: start.start(1)]):
        body = body[start.start(1) :]
    stripped = _SUBORDINATE.sub(" ", body)
    return stripped if len(WORD.findall(stripped)) >= 3 else body


_TO_QUESTION = re.compile(
    rf"(?:,|;| -)? ?\b(?:and|or|but|so)(?: also)? (?=(?:{_AUX}|{_WH}) )|[,;:] (?=(?:{_AUX}|{_WH}) (?:you|your|it|the|there|any|this|that)\b)"
)


def statements(sentence: str) -> list[str]:
    """What a normalised sentence states: all of it, or, of one that asks, the clauses that a question follows."""
    if not is_question(sentence):
        return [sentence]
    *before, _ = _TO_QUESTION.split(sentence)
    return [part.strip(" ,;") for part in before if WORD.search(part) and not is_question(part)]


def clauses(question: str) -> list[str]:
    """The questions that one sentence joins; empty if it is a single one."""
    parts = [part.strip(" ,?") for part in _JOINED.split(question)]
    return [part for part in parts if len(WORD.findall(part)) >= 3] if len(parts) > 1 else []
