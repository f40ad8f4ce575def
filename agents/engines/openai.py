"""A policy behind an OpenAI-compatible endpoint: a teacher, a judge, or whom to compare with."""

import asyncio
import json
import math
import os
import random
import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, Self, cast

import httpx2
from pydantic import Field, field_validator, model_validator

from ...core.config import PolicyConfig
from ...core.errors import PolicyError, PromptTooLong
from ...core.models.tokens import cut, functions
from ...core.types import Completion, Message, Prompt, Sampling
from ..wire import with_calls
from . import data_url
from .answers import TOO_LONG, Failure, names, read, shown, text_of, tokens_of

TOP = 20
"""Alternatives that are asked for when one word is scored."""
LONGEST_WAIT_S = 60.0
"""Between two tries, whatever the endpoint asks for."""
SHOWN = 300
"""Characters of an endpoint's answer that an error shows."""


class OpenAIConfig(PolicyConfig):
    url: str
    """Up to and with its version: ``http://127.0.0.1:8000/v1``."""
    key: str = ""
    """The environment variable that holds the key, which is never stored; empty: none is sent."""
    parallel: int = Field(default=16, ge=1)
    """Requests in flight at once."""
    tries: int = Field(default=6, ge=1)
    """Of one request, when the endpoint is busy, broken or not reached."""
    calls: int | None = Field(default=None, ge=1)
    """The most requests this policy may cost, tries that were answered included."""
    tokens: int | None = Field(default=None, ge=1)
    """The most tokens, read and written, as the endpoint counts them; one that does not is refused.
    """
    limit_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """How a request calls its ``max_tokens``: some endpoints take the other name only."""
    body: dict[str, Any] = Field(default_factory=dict[str, Any])
    """More fields for every request, such as ``reasoning_effort: low``."""

    @field_validator("url")
    @classmethod
    def _web(cls, url: str) -> str:
        parts = httpx2.URL(url)
        if parts.scheme not in ("http", "https") or not parts.host:
            raise ValueError(f"wanted an address such as http://127.0.0.1:8000/v1, got {url!r}")
        if parts.userinfo:
            raise ValueError("no password in the address; name an environment variable in key")
        return url.rstrip("/")

    @model_validator(mode="after")
    def _key_there(self) -> Self:
        if not self.key:
            return self
        key = os.environ.get(self.key, "").strip()
        if not key:
            raise ValueError(f"the environment has no {self.key}; export it, or give no key")
        if not re.fullmatch(r"[!-~]+", key):  # An error about the header would show it.
            raise ValueError(
                f"what {self.key} holds is no key: wanted letters, digits and signs of ASCII, "
                "without a space between them"
            )
        return self


class OpenAIPolicy:
    """Chat completions over HTTP. Its weights are somebody else's: it cannot be trained.

    A busy or broken endpoint, by its status line or by what it says, is tried again after a random
    wait that doubles, or as long as it asks for. Completions come as words, without ids or
    log-probabilities.
    """

    Config = OpenAIConfig

    def __init__(self, config: OpenAIConfig, model: str, seed: int) -> None:
        self._config = config
        self._model = model
        self._key = os.environ.get(config.key, "").strip() if config.key else ""
        self._random = random.Random(seed)
        self._room = asyncio.Semaphore(config.parallel)
        self._calls = 0
        self._tokens = 0
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._client = httpx2.AsyncClient(headers=headers, timeout=config.timeout_s)

    @property
    def checkpoint(self) -> str:
        return self._model

    def batch_slot(self) -> AbstractContextManager[None]:
        return nullcontext()

    async def complete(self, prompt: Prompt, sampling: Sampling, seed: int) -> Completion:
        """Raises: PolicyError: refused, not reached, not understood, no text, or no budget left."""
        if sampling.constraint:
            raise PolicyError("an endpoint cannot be held to a grammar; leave policy.constrain off")
        if sampling.thought:
            raise PolicyError("an endpoint bounds its own thoughts; leave policy.max_thought out")
        asked: dict[str, Any] = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            self._config.limit_name: sampling.max_tokens,
            "seed": seed % 2**31,
        }
        if sampling.stop:
            asked["stop"] = list(sampling.stop)
        choice = await self._ask(prompt, asked)
        try:
            text = cut(text_of(choice, bool(prompt.tools)), sampling.stop)
        except ValueError as error:
            raise PolicyError(f"{self._config.url} answered {self._shown(str(error))}") from None
        return Completion(
            text, finish="length" if choice.get("finish_reason") == "length" else "stop"
        )

    async def score(self, prompt: Prompt, completion: Completion) -> Completion:
        """Only single words, such as yes or no: among the likeliest first tokens of an answer.

        A word that is not among them gets what probability they leave.

        Raises:
            PolicyError: it is more than a word, or the endpoint tells no log-probabilities.
        """
        word = completion.text.strip().casefold()
        if not word or len(word.split()) != 1:
            raise PolicyError(f"an endpoint scores single words only, got {completion.text[:40]!r}")
        asked = {"temperature": 0.0, "logprobs": True, "top_logprobs": TOP}
        choice = await self._ask(prompt, asked | {self._config.limit_name: 1})
        try:
            first = choice["logprobs"]["content"][0]["top_logprobs"]
            alternatives = [(str(one["token"]), float(one["logprob"])) for one in first]
        except (KeyError, IndexError, TypeError, ValueError):
            raise PolicyError(
                f"{self._config.url} tells no log-probabilities of {self._model}, so it cannot "
                "score; as a judge let it answer in words: answer: verdict"
            ) from None
        mine = [
            math.exp(logprob) for token, logprob in alternatives if token.strip().casefold() == word
        ]
        rest = 1.0 - sum(math.exp(logprob) for _, logprob in alternatives)
        logprob = math.log(max(sum(mine) if mine else rest, 1e-9))
        return Completion(completion.text, logprobs=(min(0.0, logprob),))

    async def load(self, checkpoint: Path | None) -> None:
        if checkpoint is not None:
            raise PolicyError(
                f"{self._config.url} serves its own weights and cannot load {checkpoint}: use it "
                "as teacher or judge, and another engine for the policy in training"
            )

    async def close(self) -> None:
        await self._client.aclose()

    async def _ask(self, prompt: Prompt, asked: dict[str, Any]) -> dict[str, Any]:
        """The first choice of the answer."""
        messages = list(with_calls(list(map(_message, prompt.messages)), prompt.tools))
        body = {"model": self._model, "messages": messages, **asked}
        if prompt.tools:
            body["tools"] = functions(prompt.tools)
        body |= self._config.body
        async with self._room:
            answer = await self._tried(body)
        try:
            choice = answer["choices"][0]
        except (KeyError, IndexError, TypeError):
            choice = None
        if not isinstance(choice, dict):
            raise PolicyError(f"{self._config.url} gave no choices: {self._shown(answer)}")
        return cast("dict[str, Any]", choice)

    async def _tried(self, body: dict[str, Any]) -> Any:
        config, message, wait = self._config, "", 0.0
        for number in range(config.tries):
            if number:
                await asyncio.sleep(wait)
            self._check_budget()
            wait = self._random.uniform(0.5, 1.0) * min(2.0**number, LONGEST_WAIT_S)
            try:
                response = await self._client.post(f"{config.url}/chat/completions", json=body)
            except httpx2.RequestError as error:
                message = self._shown(f"{type(error).__name__}: {error}")
                continue
            self._calls += 1
            answer = read(response.status_code, response.content)
            if not isinstance(answer, Failure):
                self._count(answer)
                return answer
            message = f"{response.status_code} {self._shown(answer.came)}"
            if not answer.passing:
                hint = self._hint(response.status_code, answer)
                long = TOO_LONG.search(shown(answer.came))
                error = PromptTooLong if long else PolicyError
                raise error(f"{config.url} {answer.how}: {message}{hint}")
            wait = max(wait, asked_wait(response.headers.get("retry-after", "")))
        raise PolicyError(
            f"{config.url} did not answer in {config.tries} tries; the last: {message}"
        )

    def _hint(self, status: int, failure: Failure) -> str:
        config, other = self._config, "max_completion_tokens"
        if config.limit_name != other and other in shown(failure.came):
            return f" (set limit_name: {other})"
        unknown = "401" in (str(status), *names(failure.came))
        return f" (is the key in {config.key} right?)" if unknown and config.key else ""

    def _count(self, answer: Any) -> None:
        tokens = tokens_of(answer)
        if tokens is None and self._config.tokens is not None:
            raise PolicyError(
                f"{self._config.url} does not tell what an answer costs, so that tokens cannot be "
                f"limited; limit calls instead: {self._shown(answer)}"
            )
        self._tokens += tokens or 0

    def _check_budget(self) -> None:
        config = self._config
        for name, spent, most in (
            ("calls", self._calls, config.calls),
            ("tokens", self._tokens, config.tokens),
        ):
            if most is not None and spent >= most:
                raise PolicyError(
                    f"the budget of {config.url} is spent: {spent:,} of {most:,} {name}; raise "
                    f"{name} and go on from here"
                )

    def _shown(self, came: Any) -> str:
        """What came, short, without the key, should it be in there."""
        text = shown(came)
        for form in {self._key, json.dumps(self._key)[1:-1]} - {""}:
            text = text.replace(form, "***")
        return text[:SHOWN]


def _message(message: Message) -> dict[str, Any]:
    if not message.images:
        return {"role": message.role, "content": message.text}
    parts: list[dict[str, Any]] = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": data_url(part)}}
        for part in message.parts
    ]
    return {"role": message.role, "content": parts}


def asked_wait(header: str) -> float:
    """Seconds of a Retry-After; 0 for one that is a date or nonsense."""
    try:
        seconds = float(header)
    except ValueError:
        return 0.0
    return min(max(seconds, 0.0), LONGEST_WAIT_S) if math.isfinite(seconds) else 0.0
