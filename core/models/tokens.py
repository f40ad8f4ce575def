"""Messages to token ids, the same way for whoever samples and whoever learns. Imports no torch."""

import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from jinja2 import TemplateError

from ..errors import ModelError, PolicyError, PromptError
from ..types import Completion, Image, Message, Prompt, Tool
from .encoding import Encoder, Growing


class Pictures(Protocol):
    """What knows how pictures are spelt (``core.models.vision``)."""

    @property
    def placeholder(self) -> int:
        """The id of each token that features stand in for."""
        ...

    def worded(self, text: str) -> str: ...
    def expanded(self, text: str, images: Sequence[Image]) -> str: ...
    def size(self, image: Image) -> int: ...
    def save(self, folder: Path) -> None: ...


class Rendered(NamedTuple):
    """One prompt."""

    text: str
    ids: tuple[int, ...]
    broken: bool
    """It holds sampled turns, but had to be tokenised from its text."""


class Frame(NamedTuple):
    """What a template puts around an answer."""

    end: int
    """What it writes after one; the end token if that is none of the special ones."""
    before: str = ""
    """White space between what asks for an answer and the answer."""
    after: str = ""
    """White space between the answer and its end."""
    opening: int | None = None
    """The last token of what asks for an answer."""


OPENED = re.compile(r"<think>\s*$")
"""The end of what asks for an answer, where a template begins the thought itself."""
PAD = 0
"""Stands where no token is, and is masked: any id that every model's embeddings have will do."""


class ChatTokens:
    """Renders a conversation through a tokenizer's chat template.

    What a policy sampled earlier in the conversation enters as the ids it sampled. Only where a
    template is not append-only (it rewrites earlier turns) is the whole prompt tokenised from its
    text; ``breaks`` counts those prompts, ``prompts`` all of them.
    """

    def __init__(
        self,
        tokenizer: Any,
        remember: int = 1 << 22,
        placeholder: int | None = None,
        ends: Iterable[int] = (),
        vision: Pictures | None = None,
        blind: str = "",
    ) -> None:
        """``tokenizer``: a transformers tokenizer with a chat template.

        ``remember``: how many ids of prompts are kept, so that a conversation is not rendered
        anew from its beginning every turn.

        ``placeholder``: the id that stands for an image, one for each, in models that read images;
        whoever samples makes as many of it as the image is worth.

        ``vision``: instead, what spells out all that stands for an image.

        ``blind``: why there is none, though the model would see.

        ``ends``: the ids that end an answer by the model's own settings, beside what its tokenizer
        calls the end.

        Raises:
            ModelError: it has no chat template, or no end token.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise ModelError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; use an "
                "instruction-tuned model, or put a chat_template.jinja beside its tokenizer"
            )
        given = tuple(ends) if tokenizer.eos_token_id is None else (tokenizer.eos_token_id, *ends)
        if not given:
            raise ModelError(f"the tokenizer of {tokenizer.name_or_path!r} has no end token")
        self.tokenizer = tokenizer
        self.vision = vision
        self._blind = blind
        self._placeholder = placeholder if vision is None else vision.placeholder
        self._encode = Encoder(tokenizer)
        self.fingerprint = _fingerprint(tokenizer)
        """Of the vocabulary: what an id means."""
        added = tokenizer.added_tokens_decoder
        self._controls = {i: one.content for i, one in added.items() if one.special}
        self._frame = self._framed(given[0])
        self.end = self._frame.end
        """What an answer that was not sampled ends with."""
        self.ends = frozenset({self.end, *given})
        """Each of them ends an answer that is sampled."""
        self.breaks = 0
        self.prompts = 0
        self._remember = remember
        self._remembered = 0
        self._known: OrderedDict[Prompt, Rendered] = OrderedDict()

    def prompt(self, prompt: Prompt) -> tuple[int, ...]:
        """The ids a model sees before it answers.

        Raises:
            PromptError: there are images, and not as many placeholders in the template's words;
                or the template refuses these messages.
        """
        images = prompt.images
        if images and self._placeholder is None:
            message = "this model reads text only, but the prompt holds images"
            raise PromptError(f"{message}{self._blind}")
        # Looked at while their bytes are at hand.
        tokens = sum(map(self.vision.size, images)) if self.vision else len(images)
        rendered = self._prompt(bare(prompt))
        places = rendered.ids.count(self._placeholder)
        if self._placeholder is not None and places != tokens:
            raise PromptError(
                f"the prompt holds {len(images)} images"
                + (f" of {tokens} tokens" if self.vision else "")
                + f", but {places} times "
                f"{self.tokenizer.convert_ids_to_tokens(self._placeholder)!r}, which stands for one"
            )
        self.prompts += 1
        self.breaks += rendered.broken
        return rendered.ids

    def lead(self, prompt: Prompt) -> str:
        """What the template itself begins an answer's text with: a ``<think>``, or nothing."""
        return lead_of(self._prompt(bare(prompt)).text)

    def sampled(self, answer: Message | Completion) -> bool:
        """Whether it holds ids as sampled, and of this vocabulary."""
        return bool(answer.token_ids) and answer.tokenizer in ("", self.fingerprint)

    def answer(self, completion: Completion) -> tuple[int, ...]:
        """Its ids as sampled; those of its text if it was not sampled, or by another tokenizer."""
        if self.sampled(completion):
            return completion.token_ids
        return self.completion(completion.text)

    def completion(self, text: str) -> tuple[int, ...]:
        """The ids of an answer that was not sampled, its end token included.

        As a conversation has them in which the template has written it.
        """
        frame = self._frame
        return (*self._encode(frame.before + text + frame.after, frame.opening), frame.end)

    def text(self, ids: Sequence[int]) -> str:
        """Sampled ids as text, without the end token."""
        return self.tokenizer.decode(
            list(ids[:-1] if ids and ids[-1] in self.ends else ids),
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )

    def save(self, folder: Path) -> None:
        """Write the tokenizer, and what spells out pictures."""
        self.tokenizer.save_pretrained(folder)
        if self.vision is not None:
            self.vision.save(folder)

    def growing(self) -> Growing:
        """``text`` of ids that come one after another."""
        return Growing(self.text, self._piece)

    def _piece(self, token: int) -> str:
        return "" if token in self._controls else self.tokenizer.convert_ids_to_tokens(token) or ""

    def ends_of(self, stops: Sequence[str]) -> frozenset[int]:
        """``ends``, and the special tokens among stop texts: no text shows those."""
        return self.ends.union(i for i, content in self._controls.items() if content in stops)

    def control(self, text: str) -> str:
        """The first control token that ``text`` would be read as holding; empty if it holds none.

        A template is rendered before it is tokenised, so whoever may write such a token into a
        message may also end it and begin another in somebody else's name.
        """
        return next((self._controls[i] for i in self._encode(text) if i in self._controls), "")

    def _prompt(self, prompt: Prompt) -> Rendered:
        """Turn by turn, from the longest beginning that is known."""
        messages = prompt.messages
        cuts = [k for k, message in enumerate(messages) if k and self.sampled(message)]
        cuts.append(len(messages))
        rendered, begin = None, 0
        for k in reversed(range(len(cuts))):
            part = replace(prompt, messages=messages[: cuts[k]])
            rendered = self._known.get(part)
            if rendered is not None:
                self._known.move_to_end(part)
                begin = k + 1
                break
        for k in range(begin, len(cuts)):
            answer = messages[cuts[k - 1]] if k else None
            part = replace(prompt, messages=messages[: cuts[k]])
            rendered = self._rendered(part, rendered, answer)
            self._keep(part, rendered)
        assert rendered is not None, "there is always a last cut"
        return rendered

    def _keep(self, prompt: Prompt, rendered: Rendered) -> None:
        self._known[prompt] = rendered
        self._remembered += len(rendered.ids)
        while self._remembered > self._remember and len(self._known) > 1:
            self._remembered -= len(self._known.popitem(last=False)[1].ids)

    def _rendered(
        self, prompt: Prompt, before: Rendered | None, answer: Message | None
    ) -> Rendered:
        """``before`` is the prompt that ``answer`` is to; both None if nothing was sampled yet."""
        whole = self._render(prompt, add_generation_prompt=True)
        if before is None or answer is None:
            return Rendered(whole, self._encode(whole), False)
        words = answer.text.removeprefix(lead_of(before.text))
        since = self._since(whole[len(before.text) :], words, answer.token_ids[-1])
        if since is None or not whole.startswith(before.text):
            return Rendered(whole, self._encode(whole), True)
        ids = (*before.ids, *answer.token_ids)
        return Rendered(whole, (*ids, *self._encode(since, ids[-1])), False)

    def _since(self, rest: str, words: str, last: int) -> str | None:
        """What comes after an answer and its end in ``rest``; None if that begins otherwise.

        ``words``, ``last``: the answer's text and the last token of it.
        """
        bare = words.strip()
        # Many templates trim what was said, or write spaces around it; the tokens are those
        # sampled all the same.
        for whole, text in ((rest, words), (rest, bare), (rest.lstrip(), bare)):
            if whole.startswith(text):
                since, end = whole[len(text) :], self._spelt(last)
                ended = (one for one in (since, since.lstrip()) if end and one.startswith(end))
                return next(ended, end + since)[len(end) :]
        return None

    def _spelt(self, token: int) -> str:
        """A token as the template's words have it, if nothing shows it in an answer's text."""
        if token in self._controls:
            return self._controls[token]
        return self.tokenizer.decode([token]) if token in self.ends else ""

    def _framed(self, end: int) -> Frame:
        """``end``: the end token if the template writes none."""
        asked, answer = Message("user", ("?",)), "ANSWER"
        try:
            opened = self._render(Prompt((asked,)), add_generation_prompt=True)
            shown = self._render(Prompt((asked, Message("assistant", (answer,)))))
        except PolicyError:
            return Frame(end)
        between, _, after = shown.removeprefix(opened).rpartition(answer)
        before = between if shown.startswith(opened) and not between.strip() else ""
        opening = next(reversed(self._encode(opened)), None)
        closing = self._encode(after.strip())
        if not closing or closing[0] not in self._controls:
            return Frame(end, before, "", opening)
        return Frame(closing[0], before, after[: len(after) - len(after.lstrip())], opening)

    def _render(self, prompt: Prompt, add_generation_prompt: bool = False) -> str:
        prompt = self._spoken(prompt)
        text = self._applied(
            [{"role": m.role, "content": self._content(m)} for m in prompt.messages],
            functions(prompt.tools),
            json.loads(prompt.template) if prompt.template else {},
            add_generation_prompt,
        )
        return self.vision.expanded(text, prompt.images) if self.vision else text

    def _applied(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any],
        variables: Mapping[str, Any],
        add_generation_prompt: bool = False,
    ) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=tools or None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
        except TemplateError as cause:
            roles = ", ".join(str(message["role"]) for message in messages)
            raise PromptError(
                f"the chat template of {self.tokenizer.name_or_path!r} refuses a conversation of "
                f"{roles}: {cause}"
            ) from cause

    def _spoken(self, prompt: Prompt) -> Prompt:
        """What this template can show of ``prompt``, the rest in words: its tools in those of the
        system, results of functions and the system's own words in the user's."""
        messages = list(prompt.messages)
        if any(one.role == "tool" for one in messages) and not self._takes_results:
            messages = [replace(m, role="user") if m.role == "tool" else m for m in messages]
        tools = prompt.tools
        if tools and not self._takes_tools:
            prompt = replace(prompt, tools=())
            words = [messages.pop(0).text] if messages[:1] and messages[0].role == "system" else []
            text = "\n\n".join((*words, tools_in_words(tools)))
            messages.insert(0, Message("system", (text,)))
        if len(messages) > 1 and messages[0].role == "system" and not self._takes_system:
            first, second, *rest = messages
            messages = [replace(second, parts=(f"{first.text}\n\n", *second.parts)), *rest]
        return replace(prompt, messages=tuple(messages))

    @cached_property
    def _takes_tools(self) -> bool:
        """Whether the template shows functions it is given."""
        probe = Tool("PROBE", "", '{"properties":{},"type":"object"}')
        return self._shows([("user", "?")], "PROBE", functions((probe,)))

    @cached_property
    def _takes_results(self) -> bool:
        """Whether it shows results of functions, of a call that is written as text."""
        return self._shows([("user", "?"), ("assistant", "CALL"), ("tool", "PROBE")], "PROBE")

    @cached_property
    def _takes_system(self) -> bool:
        return self._shows([("system", "PROBE"), ("user", "?")], "PROBE")

    def _shows(
        self, turns: Sequence[tuple[str, str]], words: str, tools: Sequence[Any] = ()
    ) -> bool:
        messages = [
            {"role": role, "content": self._content(Message("user", (text,)))}
            for role, text in turns
        ]
        try:
            return words in self._applied(messages, tools, {})
        except (PromptError, LookupError, TypeError, ValueError):
            return False

    def _content(self, message: Message) -> Any:
        if self._placeholder is None:
            return message.text
        words = self.vision.worded if self.vision else str
        return [
            {"type": "text", "text": words(part)} if isinstance(part, str) else {"type": "image"}
            for part in message.parts
        ]


def lead_of(asked: str) -> str:
    found = OPENED.search(asked)
    return found[0] if found else ""


def tools_in_words(tools: Sequence[Tool]) -> str:
    """For models whose template knows no functions: what they may call, and how."""
    schemas = "\n".join(json.dumps(one["function"], ensure_ascii=False) for one in functions(tools))
    return (
        f"You may call these functions:\n{schemas}\nTo call one, answer with\n<tool_call>\n"
        '{"name": the function, "arguments": {its arguments}}\n</tool_call>'
    )


def functions(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Tools in the form that chat templates and OpenAI's protocol know them in."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": json.loads(tool.parameters),
            },
        }
        for tool in tools
    ]


def bare(prompt: Prompt) -> Prompt:
    """The same, its pictures without their bytes: whoever remembers it does not hold those."""
    if not any(image.png for image in prompt.images):
        return prompt
    return replace(
        prompt,
        messages=tuple(
            replace(
                message,
                parts=tuple(
                    part if isinstance(part, str) else replace(part, png=b"")
                    for part in message.parts
                ),
            )
            for message in prompt.messages
        ),
    )


def cut(text: str, stops: Sequence[str]) -> str:
    """What stands before the stop texts."""
    for stop in stops:
        text = text.split(stop)[0]
    return text


def _fingerprint(tokenizer: Any) -> str:
    vocabulary = repr(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    return hashlib.blake2b(vocabulary.encode(errors="surrogatepass"), digest_size=8).hexdigest()
