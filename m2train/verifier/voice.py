"""What patients say around the facts: surface forms by persona, and the words they react to."""

from __future__ import annotations

import re

_HARD = (
    "hard|frightening|worrying|difficult|scary|tough|awful|distressing|frustrating|upsetting|exhausting|painful|unpleasant|"
    "uncomfortable|miserable|debilitating|unsettling|stressful|draining|tiring|alarming|rough|horrible|dreadful|nasty|terrible|"
    "annoying|troubling|concerning|maddening|unbearable|embarrassing"
)
_VERY = r"(?:(?:so|very|really|quite|pretty|rather|incredibly|extremely|terribly|truly|such a) )*"
EMPATHY = re.compile(
    rf"\b(?:(?:i'?m|i am|so|very|really|truly) {_VERY}sorry\b(?! for your loss|,? but i| i (?:can|am|do))|sorry to hear|"
    rf"(?:must|can) (?:be|feel|have been) {_VERY}(?:{_HARD})|(?:sounds|seems|looks|feels) {_VERY}(?:{_HARD})|"
    r"i (?:can |do )?(?:understand|see|imagine|hear|appreciate|know) (?:that|how|why|what|you'?re|this|it)\b|"
    r"(?:it is|it's|that is|that's) (?:completely |totally |quite |perfectly )?(?:understandable|natural)|"
    r"thank you for (?:telling|sharing|being)|no wonder|(?:we|i) will (?:help|look after|take (?:good )?care)|i'?m here (?:to|for)|i am here (?:to|for))"
)
"""Words of a doctor that show feeling for the patient."""

TREATMENT = re.compile(
    r"\b(?:take|taking|prescrib\w*|tablets?|antibiotics?|medicines?|medications?|treat(?:ment|ed|ing)?|therapy|surgery|operation|injection|cream|inhaler|dose|"
    r"i (?:recommend|suggest|advise)|you should|you need|start you on|physiotherapy)\b"
)
COSTLY = re.compile(
    r"\b(?:mri|ct scan|scans?|private(?:ly)?|specialist|surgery|operation|clinic|referral|expensive|tests?|hospital stay|therapy|brand)\b"
)
GOODBYE = re.compile(
    r"\b(?:good ?bye|bye(?: for now)?|take care(?! of (?:it|this|that|your|the))|see you (?:soon|then|next|in|later)|have a (?:good|nice|lovely) (?:day|evening|week(?:end)?)|"
    r"(?:thanks|thank you) for coming|that (?:is|will be) all for (?:today|now)|our (?:time|consultation) is (?:up|over))\b"
)
PLAN = re.compile(
    r"\b(?:(?:i|we)(?:'ll| will|'m going to|'re going to| am going to| are going to| shall|'d like to| would like to| want to| need to) (?:\w+ ){0,2}"
    r"(?:refer|prescribe|start you|send you|admit|book|arrange|order|call an ambulance|give you|put you on|treat|get you (?:to|in)|organise|scan|operate)|"
    r"(?:you (?:should|must|need to|have to)|please|i (?:recommend|suggest|advise)(?: that)?(?: you)?) (?:\w+ ){0,2}(?:take|start|stop|go (?:straight )?to|call|see|rest|avoid|book|use|come back)\b|"
    r"here is your prescription|(?:go|come) (?:straight )?to (?:the )?(?:hospital|emergency|a and e|casualty))"
)
ASSERTS = re.compile(
    r"\b(?:you (?:have|may have|might have|probably have|are having|are suffering)|you'?ve got|this (?:is|looks|sounds|seems|could be|may be|might be)|it (?:is|looks|sounds|seems|could be|may be|might be)|"
    r"it's|that (?:is|looks|sounds)|that's|i (?:think|believe|suspect|am (?:fairly |quite |almost )?(?:sure|certain|confident))|diagnos\w+|points? to|consistent with|sign of|caused by|due to|likely|would explain)\b"
)

THANKS = ("Thank you, that helps.", "Thank you for saying that.", "It is good to be heard.", "That is kind of you.")
HURT = (
    "I do not feel you are listening.",
    "I am quite upset about this, you know.",
    "That felt a bit cold, to be honest.",
    "I was hoping for a kinder word.",
)
REPEAT = ("As I said, ", "Like I told you, ", "I did mention it, ")
LEADS: dict[str, tuple[str, ...]] = {
    "E": ("", "", "Oh yes, ", "Well, ", "Let me think. ", "Good that you ask. "),
    "I": ("", "", "", "Hm. ", "Well, ", "I suppose "),
}
UNKNOWN = (
    "I could not tell you, sorry.", "I have not paid attention to that.", "I do not know about that.", "I really could not say.",
    "No idea, I am afraid.", "I have nothing to say on that one.",
)  # fmt: skip
WITHHELD = ("I would rather not go into that.", "I cannot talk about that.", "I would prefer to leave that aside.")
VAGUE = (
    "I am not sure what you mean.", "I see.", "All right.", "Okay, but I still have {symptom}.", "Hm, I came about {symptom}.",
    "I do not quite follow you.", "It is {symptom} that brought me here.",
)  # fmt: skip
BROAD = (
    "It is mostly {symptom}.",
    "I do not know where to begin. It is {symptom}.",
    "What would you like to know?",
    "Just what I told you, {symptom}.",
)
AGAIN = ("You asked me that already.", "You said that before.", "We have been through that.")
TREATMENT_QUESTIONS = (
    "What can be done about it?", "Is there a treatment for this?", "Will I need medicine for it?", "How do we get rid of it?",
    "Can you give me something for it?",
)  # fmt: skip
COST = (
    "I cannot afford anything expensive.",
    "Will that cost me a lot?",
    "Is there a cheaper way?",
    "Money is tight for us, I have to say.",
)
EVIDENCE = ("What is the evidence for that?", "Has that been shown to work?", "Is that what the guidelines say?")
SAFE = ("I am not sure what to say to that.", "I do not know.", "Sorry, could you ask that another way?")

_LOWERED = frozenset(
    "it the they there my a an no nothing nobody she he we when if sometimes each some since after about around for at in his her this that these those as by on".split()
)


def join(lead: str, sentence: str) -> str:
    """A lead-in and a sentence, with the sentence's capital lowered where English wants it."""
    if lead.rstrip().endswith((".", "?", "!")) or not lead:
        return lead + sentence
    first = sentence.split(" ", 1)[0]
    return lead + (sentence[0].lower() + sentence[1:] if first.lower() in _LOWERED else sentence)
