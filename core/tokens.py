"""Messages to token ids, the same way for whoever samples and whoever learns. Imports no torch."""

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError

from .errors import ModelError, PolicyError, PromptError
from .types import Completion, Message


class Rendered(NamedTuple):
    """One prompt."""

    text: str
    ids: tuple[int, ...]
    broken: bool
    """It holds sampled turns, but had to be tokenised from its text."""


class ChatTokens:
    """Renders a conversation through a tokenizer's chat template.

    What a policy sampled earlier in the conversation enters as the ids it sampled. Only where a
    template is not append-only (it rewrites earlier turns) is the whole prompt tokenised from its
    text; ``breaks`` counts those prompts, ``prompts`` all of them.
    """

    def __init__(
        self, tokenizer: Any, remember: int = 1 << 22, placeholder: int | None = None
    ) -> None:
        """``tokenizer``: a transformers tokenizer with a chat template.

        ``remember``: how many ids of prompts are kept, so that a conversation is not rendered
        anew from its beginning every turn.

        ``placeholder``: the id that stands for an image, one for each, in models that read images;
        whoever samples makes as many of it as the image is worth.

        Raises:
            ModelError: it has no chat template, or no end token.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise ModelError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; use an "
                "instruction-tuned model, or put a chat_template.jinja beside its tokenizer"
            )
        if tokenizer.eos_token_id is None:
            raise ModelError(f"the tokenizer of {tokenizer.name_or_path!r} has no end token")
        self.tokenizer = tokenizer
        self._placeholder = placeholder
        # What is inside does the same at a fifth of the cost; a copy, which nobody else sets up.
        self._fast: Any = copy.deepcopy(getattr(tokenizer, "backend_tokenizer", None))
        if self._fast is not None:
            self._fast.no_truncation()
            self._fast.no_padding()
        self.fingerprint = _fingerprint(tokenizer)
        """Of the vocabulary: what an id means."""
        self.eos: int = tokenizer.eos_token_id
        self.end: int = self._end_of_turn()
        """What an answer ends with: mostly ``eos``, but some templates close turns otherwise."""
        self.end_text: str = tokenizer.convert_ids_to_tokens(self.end)
        self.pad: int = self.eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        added = tokenizer.added_tokens_decoder
        self._controls = {i: one.content for i, one in added.items() if one.special}
        self.breaks = 0
        self.prompts = 0
        self._remember = remember
        self._remembered = 0
        self._known: OrderedDict[tuple[Message, ...], Rendered] = OrderedDict()

    def prompt(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The ids a model sees before it answers.

        Raises:
            PromptError: there are images, and not as many placeholders in the template's words;
                or the template refuses these messages.
        """
        images = sum(len(message.images) for message in messages)
        if images and self._placeholder is None:
            raise PromptError("this model reads text only, but the prompt holds images")
        rendered = self._prompt(tuple(messages))
        places = rendered.ids.count(self._placeholder)
        if self._placeholder is not None and places != images:
            raise PromptError(
                f"the prompt holds {images} images, but {places} times "
                f"{self.tokenizer.convert_ids_to_tokens(self._placeholder)!r}, which stands for one"
            )
        self.prompts += 1
        self.breaks += rendered.broken
        return rendered.ids

    def sampled(self, said: Message | Completion) -> bool:
        """Whether it holds ids as sampled, and of this vocabulary."""
        return bool(said.token_ids) and said.tokenizer in ("", self.fingerprint)

    def answer(self, completion: Completion) -> tuple[int, ...]:
        """Its ids as sampled; those of its text if it was not sampled, or by another tokenizer."""
        if self.sampled(completion):
            return completion.token_ids
        return self.completion(completion.text)

    def completion(self, text: str) -> tuple[int, ...]:
        """The ids of an answer that was not sampled, its end token included."""
        return (*self._encode(text), self.end)

    def text(self, ids: Sequence[int]) -> str:
        """Sampled ids as text, without the end token."""
        return self.tokenizer.decode(
            [i for i in ids if i != self.end],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )

    def control(self, text: str) -> str:
        """The first control token that ``text`` would be read as holding; empty if it holds none.

        A template is rendered before it is tokenised, so whoever may write such a token into a
        message may also end it and begin another in somebody else's name.
        """
        return next((self._controls[i] for i in self._encode(text) if i in self._controls), "")

    def _prompt(self, messages: tuple[Message, ...]) -> Rendered:
        """Turn by turn, from the longest beginning that is known."""
        cuts = [k for k, message in enumerate(messages) if k and self.sampled(message)]
        cuts.append(len(messages))
        rendered, begin = None, 0
        for k in reversed(range(len(cuts))):
            rendered = self._known.get(messages[: cuts[k]])
            if rendered is not None:
                self._known.move_to_end(messages[: cuts[k]])
                begin = k + 1
                break
        for k in range(begin, len(cuts)):
            said = messages[cuts[k - 1]] if k else None
            rendered = self._rendered(messages[: cuts[k]], rendered, said)
            self._keep(messages[: cuts[k]], rendered)
        assert rendered is not None, "there is always a last cut"
        return rendered

    def _keep(self, messages: tuple[Message, ...], rendered: Rendered) -> None:
        self._known[messages] = rendered
        self._remembered += len(rendered.ids)
        while self._remembered > self._remember and len(self._known) > 1:
            self._remembered -= len(self._known.popitem(last=False)[1].ids)

    def _rendered(
        self, messages: tuple[Message, ...], before: Rendered | None, said: Message | None
    ) -> Rendered:
        """``before`` is the prompt that ``said`` answered; both None if nothing was sampled yet."""
        whole = self._render(messages, add_generation_prompt=True)
        if before is None or said is None:
            return Rendered(whole, self._encode(whole), False)
        # Many templates trim what was said; the tokens are those sampled all the same.
        for text in (said.text, said.text.strip()):
            if whole.startswith(before.text + text):
                since = whole[len(before.text) + len(text) :]
                if said.token_ids[-1] == self.end:
                    since = since.removeprefix(self.end_text)
                return Rendered(whole, (*before.ids, *said.token_ids, *self._encode(since)), False)
        return Rendered(whole, self._encode(whole), True)

    def _end_of_turn(self) -> int:
        """The special token that the template writes after an answer; the end token if none."""
        answer = "ANSWER"
        try:
            shown = self._render((Message("user", "?"), Message("assistant", answer)))
        except PolicyError:
            return self.eos
        after = self._encode(shown.rpartition(answer)[2].strip())
        added = self.tokenizer.added_tokens_decoder
        is_special = bool(after) and after[0] in added and added[after[0]].special
        return after[0] if is_special else self.eos

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                [{"role": m.role, "content": self._content(m)} for m in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except TemplateError as cause:
            roles = ", ".join(message.role for message in messages)
            raise PromptError(
                f"the chat template of {self.tokenizer.name_or_path!r} refuses a conversation of "
                f"{roles}: {cause}"
            ) from cause

    def _content(self, message: Message) -> Any:
        if self._placeholder is None:
            return message.text
        return [{"type": "image"}] * len(message.images) + [{"type": "text", "text": message.text}]

    def _encode(self, text: str) -> tuple[int, ...]:
        if self._fast is not None:
            return tuple(self._fast.encode(text, add_special_tokens=False).ids)
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def cut(text: str, stops: Sequence[str]) -> str:
    """What stands before the stop texts."""
    for stop in stops:
        text = text.split(stop)[0]
    return text


def _fingerprint(tokenizer: Any) -> str:
    vocabulary = repr(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    return hashlib.blake2b(vocabulary.encode(errors="surrogatepass"), digest_size=8).hexdigest()
