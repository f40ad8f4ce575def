"""The endpoint as a policy, against a real HTTP server that can be busy, broken or a liar."""

import asyncio
import json
import math
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from selfwright.agents.engines import openai as module
from selfwright.agents.engines.openai import OpenAIConfig, OpenAIPolicy
from selfwright.core.asking import yes_share
from selfwright.core.errors import PolicyError
from selfwright.core.types import Completion, Message, Sampling

PROMPT = (Message("system", "be brief"), Message("user", "say hi", (b"\x89PNG",)))
Answer = tuple[int, Any] | tuple[int, Any, dict[str, str]]


class Endpoint:
    """Answers in turn with these, the last one for ever; keeps what it was asked."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.busy = self.most = 0
        self.url = ""

    async def __aenter__(self) -> "Endpoint":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            lines = head.decode().split("\r\n")
            assert lines[0] == "POST /v1/chat/completions HTTP/1.1"
            headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines[1:])}
            body = json.loads(await reader.readexactly(int(headers["content-length"])))
            self.asked.append((headers, body))
            self.busy += 1
            self.most = max(self.most, self.busy)
            await asyncio.sleep(0.01)
            self.busy -= 1
            code, said, *more = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            if code == 0:
                writer.close()
                return
            text = (said if isinstance(said, str) else json.dumps(said)).encode()
            extra = "".join(f"{k}: {v}\r\n" for one in more for k, v in one.items())
            writer.write(
                f"HTTP/1.1 {code} X\r\ncontent-length: {len(text)}\r\n{extra}\r\n".encode()
            )
            writer.write(text)
            await writer.drain()


def said(text: str | None, finish: str = "stop", tokens: int = 7) -> Answer:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return 200, {"choices": [choice], "usage": {"total_tokens": tokens}}


def likely(*pairs: tuple[str, float]) -> Answer:
    top = [{"token": token, "logprob": math.log(p)} for token, p in pairs]
    return 200, {"choices": [{"logprobs": {"content": [{"top_logprobs": top}]}}]}


def with_policy(
    use: Callable[[OpenAIPolicy], Coroutine[Any, Any, Any]], *answers: Answer, **keys: Any
) -> tuple[Any, Endpoint]:
    async def main() -> tuple[Any, Endpoint]:
        async with Endpoint(*answers) as endpoint:
            config = OpenAIConfig.model_validate({"model": "m", "url": endpoint.url} | keys)
            policy = OpenAIPolicy(config, "big-model", 0)
            try:
                return await asyncio.wait_for(use(policy), 20), endpoint
            finally:
                await policy.close()

    return asyncio.run(main())


def completed(
    *answers: Answer, sampling: Sampling | None = None, **keys: Any
) -> tuple[Completion, Endpoint]:
    sampling = sampling or Sampling(0.5, 0.9, 12, ("\n",))
    return with_policy(lambda p: p.complete(PROMPT, sampling, 2**40 + 3), *answers, **keys)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGEST_WAIT_S", 0.02)


def test_what_is_asked_and_what_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "s3cret")
    got, endpoint = completed(said("hi\nthere"), key="SOME_KEY", body={"reasoning_effort": "low"})
    assert got == Completion("hi", finish="stop")
    ((headers, body),) = endpoint.asked
    assert headers["authorization"] == "Bearer s3cret"
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw=="}}
    assert body == {
        "model": "big-model",
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [image, {"type": "text", "text": "say hi"}]},
        ],
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 12,
        "seed": (2**40 + 3) % 2**31,
        "stop": ["\n"],
        "reasoning_effort": "low",
    }
    cut, endpoint = completed(said("so on", "length"))
    assert cut.finish == "length" and "authorization" not in endpoint.asked[0][0]
    assert completed(said(None))[0].text == ""


def test_what_passes_is_tried_again() -> None:
    got, endpoint = completed((429, "slow", {"retry-after": "9999"}), (0, ""), (503, ""), said("x"))
    assert got.text == "x" and len(endpoint.asked) == 4
    with pytest.raises(PolicyError, match=r"did not answer in 2 tries; the last: 500 overworked"):
        completed((500, "overworked"), tries=2)


def test_what_does_not_pass_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "s3cret")
    wrong = (401, "no such key: s3cret"), said("never")
    with pytest.raises(
        PolicyError, match=r"refused .*: 401 no such key: \*\*\* \(is the key in SOME"
    ):
        completed(*wrong, key="SOME_KEY")
    with pytest.raises(PolicyError, match="answered with no JSON: <html>"):
        completed((200, "<html>"))
    for odd in ("{}", "[]", '{"choices": []}', '"text"', '{"choices": 3}', "null"):
        with pytest.raises(PolicyError, match="gave no choices"):
            completed((200, odd))
    with pytest.raises(PolicyError, match="cannot be held to listed actions"):
        completed(said("x"), sampling=Sampling(choices=("a",)))


def test_budgets_stop_it() -> None:
    async def until_refused(policy: OpenAIPolicy) -> int:
        for count in range(9):
            try:
                await policy.complete(PROMPT, Sampling(), 0)
            except PolicyError as error:
                assert "is spent: " in str(error)
                return count
        return 9

    assert with_policy(until_refused, said("x"), calls=3)[0] == 3
    # Of 7 tokens each: the third is still within 15.
    assert with_policy(until_refused, said("x"), tokens=15)[0] == 3
    assert with_policy(until_refused, said("x"))[0] == 9


def test_no_more_at_once_than_asked() -> None:
    async def many(policy: OpenAIPolicy) -> None:
        await asyncio.gather(*(policy.complete(PROMPT, Sampling(), k) for k in range(12)))

    assert with_policy(many, said("x"), parallel=3)[1].most == 3


def test_single_words_are_scored() -> None:
    top = likely((" Yes", 0.5), ("yes", 0.2), ("No", 0.1), ("maybe", 0.1))

    async def use(policy: OpenAIPolicy) -> tuple[float, Completion]:
        other = await policy.score(PROMPT, Completion("never"))
        return await yes_share(policy, PROMPT), other

    (share, other), endpoint = with_policy(use, top)
    assert share == pytest.approx(0.7 / 0.8)
    # What is not among them has what they leave.
    assert other.logprobs == pytest.approx((math.log(0.1),))
    assert endpoint.asked[0][1]["top_logprobs"] == 20
    with pytest.raises(PolicyError, match="scores single words only"):
        with_policy(lambda p: p.score(PROMPT, Completion("two words")), top)
    with pytest.raises(PolicyError, match=r"tells no log-probabilities .* answer: verdict"):
        with_policy(lambda p: p.score(PROMPT, Completion("yes")), said("yes"))


def test_it_cannot_be_trained() -> None:
    async def use(policy: OpenAIPolicy) -> None:
        await policy.load(None)
        await policy.load(Path("adapter"))

    with pytest.raises(PolicyError, match="cannot load adapter: use it as teacher or judge"):
        with_policy(use, said("x"))


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"url": "ftp://x/v1"}, "wanted an address such as http"),
        ({"url": "http://me:word@x/v1"}, "no password in the address"),
        ({"url": "http://x/v1", "key": "NOT_THERE_AT_ALL"}, "the environment has no NOT_THERE"),
    ],
)
def test_bad_settings_are_refused_with_the_recipe(keys: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        OpenAIConfig.model_validate({"model": "m"} | keys)


@given(st.text(max_size=12))
def test_no_retry_after_makes_it_wait_for_ever(header: str) -> None:
    assert 0 <= module.asked_wait(header) <= module.LONGEST_WAIT_S
