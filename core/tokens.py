"""Messages to token ids, the same way for whoever samples and whoever learns. Imports no torch."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from .errors import PolicyError
from .types import Message


class ChatTokens:
    """Renders a conversation through a tokenizer's chat template.

    What a policy sampled earlier in the conversation enters as the ids it sampled. Only where a
    template is not append-only (it rewrites earlier turns) is the whole prompt tokenised from its
    text; ``breaks`` counts those prompts, ``prompts`` all of them.
    """

    def __init__(self, tokenizer: Any, remember: int = 65_536) -> None:
        """``tokenizer``: a transformers tokenizer with a chat template."""
        if not getattr(tokenizer, "chat_template", None):
            raise PolicyError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; use an "
                "instruction-tuned model, or put a chat_template.jinja beside its tokenizer"
            )
        if tokenizer.eos_token_id is None:
            raise PolicyError(f"the tokenizer of {tokenizer.name_or_path!r} has no end token")
        self.tokenizer = tokenizer
        self.end: int = tokenizer.eos_token_id
        self.end_text: str = tokenizer.eos_token
        self.pad: int = self.end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.breaks = 0
        self.prompts = 0
        self._remember = remember
        self._known: OrderedDict[tuple[Message, ...], tuple[str, tuple[int, ...]]] = OrderedDict()

    def prompt(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The ids a model sees before it answers."""
        if any(message.images for message in messages):
            raise PolicyError("this model reads text only, but the prompt holds images")
        self.prompts += 1
        return self._prompt(tuple(messages))[1]

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

    def _prompt(self, messages: tuple[Message, ...]) -> tuple[str, tuple[int, ...]]:
        known = self._known.get(messages)
        if known is not None:
            self._known.move_to_end(messages)
            return known
        whole = self._render(messages)
        rendered = (whole, self._continued(messages, whole) or self._encode(whole))
        self._known[messages] = rendered
        if len(self._known) > self._remember:
            self._known.popitem(last=False)
        return rendered

    def _continued(self, messages: tuple[Message, ...], whole: str) -> tuple[int, ...] | None:
        """The prompt of the last sampled turn, what was sampled, and the text since."""
        sampled = [k for k, message in enumerate(messages) if message.token_ids]
        if not sampled:
            return None
        last = messages[sampled[-1]]
        before, ids = self._prompt(messages[: sampled[-1]])
        if not whole.startswith(before + last.text):
            self.breaks += 1
            return None
        since = whole[len(before) + len(last.text) :]
        if last.token_ids[-1] == self.end and since.startswith(self.end_text):
            since = since[len(self.end_text) :]
        return (*ids, *last.token_ids, *self._encode(since))

    def _render(self, messages: tuple[Message, ...]) -> str:
        return self.tokenizer.apply_chat_template(
            [{"role": message.role, "content": message.text} for message in messages],
            tokenize=False,
            add_generation_prompt=True,
        )

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
