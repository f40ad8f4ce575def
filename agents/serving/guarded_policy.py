"""The policy that a server asks: the served one, behind the checks that strangers' prompts need."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

from ...core.checked import checked_completion
from ...core.models.tokens import ChatTokens, cut
from ...core.protocols import HasStream, Policy
from ...core.types import Completion, Prompt, Sampling
from .champion import Champion
from .limits import Limits, Refusal
from .metrics import Metrics


class GuardedPolicy:
    """A policy. While it answers, its weights stay as they are."""

    def __init__(
        self,
        policy: Policy,
        tokens: ChatTokens | None,
        champion: Champion,
        limits: Limits,
        metrics: Metrics,
    ) -> None:
        self._policy = policy
        self._tokens = tokens
        self._champion = champion
        self._limits = limits
        self._metrics = metrics

    @property
    def checkpoint(self) -> str:
        return self._policy.checkpoint

    def batch_slot(self) -> AbstractContextManager[None]:
        # Nobody waits for anybody: whoever asks while a batch is answered makes up the next one.
        return nullcontext()

    async def complete(
        self,
        prompt: Prompt,
        sampling: Sampling,
        seed: int,
        heard: Callable[[str], None] | None = None,
    ) -> Completion:
        """``heard`` is told of the text so far, by policies that can be heard while they speak.

        Raises:
            Refusal: the prompt is too long, or holds what only a template may write; or there are
                no weights to answer with.
        """
        self._check(prompt)
        sampling = replace(sampling, max_tokens=min(sampling.max_tokens, self._limits.tokens))
        async with self._champion.answering():
            completion = await self._completed(prompt, sampling, seed, heard)
        checked_completion(completion, self.checkpoint)
        self._metrics.tokens.labels("completion").inc(len(completion.token_ids))
        self._metrics.tokens.labels("prompt").inc(self.length(prompt))
        return completion

    async def _completed(
        self,
        prompt: Prompt,
        sampling: Sampling,
        seed: int,
        heard: Callable[[str], None] | None,
    ) -> Completion:
        policy, tokens = self._policy, self._tokens
        if heard is None or tokens is None or not isinstance(policy, HasStream):
            return await policy.complete(prompt, sampling, seed)

        text = tokens.growing()

        def sampled(ids: Sequence[int]) -> None:
            heard(certain(text(ids), sampling.stop))

        return await policy.stream(prompt, sampling, seed, sampled)

    async def score(self, prompt: Prompt, completion: Completion) -> Completion:
        raise NotImplementedError("a server is asked for completions only")

    async def load(self, checkpoint: Path | None) -> None:
        raise NotImplementedError("a server's weights change by offers only")

    async def close(self) -> None:
        await self._policy.close()

    def length(self, prompt: Prompt) -> int:
        """In tokens; 0 where nobody here can count them."""
        if self._tokens is None or prompt.images:
            return 0
        return len(self._tokens.prompt(prompt))

    def _check(self, prompt: Prompt) -> None:
        limits = self._limits
        tools = "\n".join(f"{t.name}\n{t.description}\n{t.parameters}" for t in prompt.tools)
        size = sum(len(message.text) for message in prompt.messages) + len(tools)
        if size > limits.prompt_chars:
            fault = f"the prompt has {size:,} characters, more than {limits.prompt_chars:,}"
            raise Refusal(400, fault, "context_length_exceeded")
        if self._tokens is None:
            return
        if found := self._tokens.control(tools):
            fault = f"the tools hold {found!r}, which ends or begins a message to this model"
            raise Refusal(400, fault, "control_token", "tools")
        for message in prompt.messages:
            # What the policy itself has sampled goes in as the ids that it sampled.
            found = "" if message.token_ids else self._tokens.control(message.text)
            if found:
                fault = (
                    f"the {message.role}'s text holds {found!r}, which ends or begins a message "
                    "to this model; leave it out, or write it another way"
                )
                raise Refusal(400, fault, "control_token", "messages")
        length = self.length(prompt)
        if length > limits.prompt_tokens:
            fault = f"the prompt has {length:,} tokens, more than {limits.prompt_tokens:,}"
            raise Refusal(400, fault, "context_length_exceeded")


def certain(text: str, stops: Sequence[str]) -> str:
    """As much of a text that goes on as is sure to stay: no half character or stop at its end."""
    text = cut(text, stops).rstrip("\ufffd")
    begun = (k for stop in stops for k in range(1, len(stop)) if text.endswith(stop[:k]))
    return text[: len(text) - max(begun, default=0)]
