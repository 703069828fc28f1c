"""The model's chat template, applied once to each appended turn. Token ids only.

The template is rendered with marker messages and cut at the markers: what is left are its fixed pieces (turn headers,
end of turn, generation prompt). A piece is encoded once, a message on its own, and the stream of a dialogue is
their concatenation. Nothing that was generated is ever decoded and encoded again, so the tokens that are trained are
the tokens that were sampled, and message text never becomes control tokens, whatever it contains.

For byte-level BPE the stream equals the template applied to the whole dialogue unless a message starts or ends with
white space. One deliberate difference: a generation prompt stays in the stream as the model saw it, so where a
template adds an empty thinking block for the reply and drops it from history (Qwen3 with thinking off), history
keeps it. A block that the generation prompt opens stays too: closed, without the thoughts that were in it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m2train.models import ModelError

_SYSTEM, _USER1, _REPLY1, _USER2, _REPLY2 = (f"Zq{i}marker{i}qZ" for i in range(5))
_FIXED_DATE = "01 Jan 2025"
"""Templates that print today's date print this one: a resumed run must see the same tokens."""


class ChatTemplate:
    """Turns of a dialogue as token ids.

    Args:
        folder: model folder with `tokenizer.json` and a chat template.
        thinking: the template's thinking mode.

    Raises:
        ModelError: no template, or one that cannot be applied turn by turn.
    """

    def __init__(self, folder: Path, thinking: bool = False) -> None:
        from tokenizers import Tokenizer

        self._folder = folder
        path = folder / "tokenizer.json"
        if not path.exists():
            raise ModelError(
                f"{folder} has no tokenizer.json; save the tokenizer with save_pretrained (fast tokenizer)"
            )
        try:
            raw = path.read_text(encoding="utf-8")
            self._tokenizer = Tokenizer.from_str(raw)
            self._plain = Tokenizer.from_str(json.dumps({**json.loads(raw), "added_tokens": []}))
        except Exception as err:  # noqa: BLE001  (tokenizers raises nothing more specific)
            raise ModelError(f"{path} is not a tokenizer: {err}; download or save the model again") from err
        self._special = frozenset(
            i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special
        )
        self._think_open = self._tokenizer.token_to_id("<think>")
        self._think_close = self._tokenizer.token_to_id("</think>")
        if thinking and self._think_close is None:
            raise ModelError(
                f"model.thinking = true, but the tokenizer of {folder} has no token </think>; set it to false"
            )
        render = _renderer(folder, thinking)
        self._open_ids, self._end_system_ids = self._probe_system(render)
        self._probe_turns(render)
        self.stop_token_ids = self._find_stop_ids()
        """Ids that end a reply: the template's end of turn, and the model's end-of-sequence tokens."""

    def open(self, system: str) -> list[int]:
        """The system turn."""
        return [*self._open_ids, *self._text(system, self._strip["system"]), *self._end_system_ids]

    def patient(self, text: str) -> list[int]:
        """A user turn and the header that opens the model's reply (the generation prompt)."""
        return [*self._user_ids, *self._text(text, self._strip["user"]), *self._prompt_ids]

    def visible(self, generated_ids: Sequence[int]) -> list[int]:
        """The generated ids without the thinking block and without the end of turn; a slice, nothing re-encoded.

        A reply that was cut while still thinking has nothing visible.
        """
        ids = self._without_end(generated_ids)
        if self._think_close is None:
            return ids
        if self._think_close in ids:
            last = len(ids) - 1 - ids[::-1].index(self._think_close)
            return self._without_blank_start(ids[last + 1 :])
        return [] if self._opens_thinking or self._think_open in ids else ids

    def close(self, visible_ids: Sequence[int]) -> list[int]:
        """A finished reply as it stands in later history: exactly one end of turn, sampled or not.

        If the generation prompt has opened a thinking block, the block's end comes first.
        """
        return [*self._close_thinking_ids, *self._without_end(visible_ids), *self._end_reply_ids]

    def text(self, ids: Sequence[int]) -> str:
        """Visible text for people and graders, control tokens that a reply has no business with included."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False)).strip()

    def _text(self, text: str, strip: bool) -> list[int]:
        """Encode message text; control-token strings in it stay text."""
        return list(self._plain.encode(text.strip() if strip else text, add_special_tokens=False).ids)

    def _pieces(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _without_end(self, ids: Sequence[int]) -> list[int]:
        end = len(ids)
        while end and ids[end - 1] in self.stop_token_ids:
            end -= 1
        return list(ids[:end])

    def _without_blank_start(self, ids: list[int]) -> list[int]:
        start = 0
        while start < len(ids) and not self._tokenizer.decode([ids[start]]).strip():
            start += 1
        return ids[start:]

    def _probe_system(self, render: Any) -> tuple[list[int], list[int]]:
        first = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER1}]
        text = render(first, True)
        self._require(_SYSTEM in text and _USER1 in text, "a system or user message is missing from its output")
        begin, rest = text.split(_SYSTEM)
        between, self._prompt = rest.split(_USER1)
        reply, user = {"role": "assistant", "content": _REPLY1}, {"role": "user", "content": _USER2}
        later, closed = render([*first, reply, user], True), render([*first, reply], False)
        self._require(
            _REPLY1 in later and _USER2 in later and _REPLY1 in closed, "earlier turns are missing from its output"
        )
        self._end_reply = closed.split(_REPLY1)[1]
        ending = later.split(_REPLY1)[1].split(_USER2)[0]  # end of reply + user header
        self._header = ending.removeprefix(self._end_reply)
        self._require(
            ending.startswith(self._end_reply) and between.endswith(self._header),
            "its user turns begin in different ways",
        )
        self._end_system = between.removesuffix(self._header)
        return self._pieces(begin), self._pieces(self._end_system)

    def _probe_turns(self, render: Any) -> None:
        self._user_ids = self._pieces(self._header)
        self._prompt_ids = self._pieces(self._prompt)
        self._end_reply_ids = self._pieces(self._end_reply)
        self._require(bool(self._end_reply_ids), "it does not end the assistant's turns")
        opened, closed = self._prompt.rfind("<think>"), self._prompt.rfind("</think>")
        self._opens_thinking = opened > closed
        blank = {"role": "assistant", "content": _REPLY2}
        padded = [{"role": r, "content": f"  {m}  "} for r, m in (("system", _SYSTEM), ("user", _USER1))]
        text = render([*padded, blank], False)
        self._strip = {r: f"  {m}  " not in text for r, m in (("system", _SYSTEM), ("user", _USER1))}
        # Prove the cuts on a whole dialogue before anything is trained on them.
        roles = ["system", "user", "assistant", "user", "assistant", "user"]
        words = [_SYSTEM, _USER1, _REPLY1, _USER2, _REPLY2, _USER1]
        whole = render([{"role": r, "content": w} for r, w in zip(roles, words, strict=True)], True)
        history = whole[
            whole.index(_USER1) + len(_USER1) : whole.index(_REPLY1)
        ]  # user end + reply header in history
        closing = self._close_thinking(history)
        self._close_thinking_ids = self._pieces(closing)
        self.prompt_stays = history == self._prompt + closing
        """Whether the template shows earlier replies exactly as they were prompted."""
        if not self.prompt_stays:
            before, _, last = whole.rpartition(_USER1)
            whole = before.replace(history, self._prompt + closing) + _USER1 + last
        begin = whole.split(_SYSTEM)[0]
        ours = begin + _SYSTEM + self._end_system
        for user, reply in ((_USER1, _REPLY1), (_USER2, _REPLY2)):
            ours += self._header + user + self._prompt + closing + reply + self._end_reply
        ours += self._header + _USER1 + self._prompt
        self._require(ours == whole, "its turns depend on other turns")

    def _close_thinking(self, history: str) -> str:
        """What ends, before a past reply, the thinking block that the prompt opens; empty if it opens none.

        As the template ends it between a user's text and a past reply (`history`), if it shows a block there.
        """
        if not self._opens_thinking or self._think_close is None:
            return ""
        gap = "\n" if "\n" in self._prompt.rpartition("<think>")[2] else ""
        _, shown, after = history.rpartition("</think>")
        closing = f"{gap}</think>{after if shown else 2 * gap}"
        if history.startswith(self._prompt) and shown:
            closing = history.removeprefix(self._prompt)
        if self._pieces(self._prompt + closing) != self._prompt_ids + self._pieces(closing):
            return closing.lstrip()  # Qwen's "\n\n" is one token: two of "\n" before </think> no model has seen
        return closing

    def _find_stop_ids(self) -> tuple[int, ...]:
        ids = {token for token in self._end_reply_ids[:1] if token in self._special}
        for name in ("config.json", "generation_config.json"):
            path = self._folder / name
            eos = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
            ids.update(eos if isinstance(eos, list) else [] if eos is None else [eos])
        self._require(bool(ids), "neither it nor the model's config names a token that ends a reply")
        return tuple(sorted(ids))

    def _require(self, good: bool, problem: str) -> None:
        if not good:
            raise ModelError(
                f"the chat template of {self._folder} cannot be applied turn by turn: {problem}; "
                "give the model a template in the manner of ChatML, Qwen or Llama 3 (chat_template.jinja)"
            )


def _renderer(folder: Path, thinking: bool) -> Any:
    """A function (messages, add_generation_prompt) -> str in the environment that chat templates expect."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks replies for loss masks; here it is its content."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    env.filters["tojson"] = lambda x, **kw: json.dumps(x, ensure_ascii=False, **kw)
    env.globals |= {"raise_exception": raise_exception, "strftime_now": lambda _: _FIXED_DATE}
    source, special = _template_source(folder)
    try:
        template = env.from_string(source)
    except TemplateError as err:
        line = getattr(err, "lineno", 0)
        raise ModelError(f"the chat template of {folder} is not valid Jinja: {err}, in its line {line}") from err

    def render(messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        try:
            return template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, enable_thinking=thinking, **special
            )
        except Exception as err:  # whatever a template does with its input
            raise ModelError(
                f"the chat template of {folder} refuses a dialogue of a system message, user and assistant: "
                f"{err}; give the model a template that takes one (chat_template.jinja)"
            ) from err

    return render


def _template_source(folder: Path) -> tuple[str, dict[str, str]]:
    path = folder / "tokenizer_config.json"
    config: dict[str, Any] = {}
    if path.exists():
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as err:
            raise ModelError(f"{path} is not JSON: {err}; download or save the model again") from err
    special = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = config.get(name)
        if value is not None:
            special[name] = value["content"] if isinstance(value, dict) else value
    beside = folder / "chat_template.jinja"
    source: Any = beside.read_text(encoding="utf-8") if beside.exists() else config.get("chat_template")
    if isinstance(source, list):  # several named templates
        source = next((item["template"] for item in source if item["name"] == "default"), None)
    if not source:
        raise ModelError(
            f"{folder} has no chat template; expected chat_template.jinja or one in tokenizer_config.json; "
            "use an instruct model, or write a template there"
        )
    return str(source), special
