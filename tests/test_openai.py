"""The endpoint as a policy, against a real HTTP server that can be busy, broken or a liar."""

import asyncio
import base64
import json
import math
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from components import SINGLE
from hypothesis import given
from hypothesis import strategies as st
from prompts import grey
from pydantic import ValidationError

from selfwright.agents.engines import openai as module
from selfwright.agents.engines.answers import text_of, tokens_of
from selfwright.agents.engines.openai import OpenAIConfig, OpenAIPolicy
from selfwright.core.errors import PolicyError, PromptTooLong
from selfwright.core.play.asking import yes_share
from selfwright.core.recipe import read
from selfwright.core.store import read_trajectories
from selfwright.core.types import Completion, Constraint, Message, Prompt, Sampling
from selfwright.loop.run import run

PICTURE = grey(9)
PROMPT = Prompt((Message("system", ("be brief",)), Message("user", (PICTURE, "say hi"))))
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


def said(content: Any, finish: str | None = "stop", tokens: int = 7, **more: Any) -> Answer:
    message = {"role": "assistant", "content": content, **more}
    choice = {"message": message, "finish_reason": finish}
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
    url = "data:image/png;base64," + base64.b64encode(PICTURE.png).decode()
    image = {"type": "image_url", "image_url": {"url": url}}
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


def test_what_passes_is_tried_again() -> None:
    got, endpoint = completed((429, "slow", {"retry-after": "9999"}), (0, ""), (503, ""), said("x"))
    assert got.text == "x" and len(endpoint.asked) == 4
    with pytest.raises(PolicyError, match=r"did not answer in 2 tries; the last: 500 overworked"):
        completed((500, "overworked"), tries=2)


THOUGHT = {"type": "thinking", "thinking": [{"type": "text", "text": "let me see"}]}
CALL = {"type": "function", "function": {"name": "look_it_up", "arguments": "{}"}}


def part(text: str, kind: str = "text") -> dict[str, str]:
    return {"type": kind, "text": text}


@pytest.mark.parametrize(
    ("content", "more", "text"),
    [
        ("", {}, ""),
        ("", {"reasoning_content": "nothing to say", "refusal": None, "tool_calls": []}, ""),
        ("hi", {"refusal": "no", "tool_calls": [CALL], "reasoning": "well"}, "hi"),
        ([THOUGHT, part("1+"), {"type": "reasoning", "text": "so"}, part("2")], {}, "1+2"),
        ([part("so"), part(" on", "output_text")], {}, "so on"),
        ([THOUGHT, part("")], {}, ""),
        (["bare ", part("text")], {}, "bare text"),
    ],
)
def test_a_text_is_read_in_whatever_form(content: Any, more: dict[str, Any], text: str) -> None:
    got, endpoint = completed(said(content, **more))
    assert (got.text, got.finish, len(endpoint.asked)) == (text, "stop", 1)


@given(st.lists(st.tuples(st.sampled_from(["text", "output_text", "thinking"]), st.text())))
def test_text_parts_are_joined_in_their_order(parts: list[tuple[str, str]]) -> None:
    choice = {"message": {"content": [{"type": kind, kind: t, "text": t} for kind, t in parts]}}
    texts = [text for kind, text in parts if kind != "thinking"]
    if texts:
        assert text_of(choice) == "".join(texts)
    else:
        with pytest.raises(ValueError, match=r"thoughts and no text|no text: "):
            text_of(choice)


@pytest.mark.parametrize(
    ("content", "finish", "more", "why"),
    [
        (None, "stop", {}, r'answered no text: \{"role": "assistant", "content": null'),
        ([], "stop", {}, "answered no text: "),
        (None, "stop", {"refusal": "I must not"}, "answered a refusal: I must not"),
        ([{"type": "refusal", "refusal": "Never"}], "stop", {}, "answered a refusal: Never"),
        (None, "tool_calls", {"tool_calls": [CALL]}, r"no text but tool_calls: .*look_it_up"),
        ("", "tool_calls", {"tool_calls": [CALL]}, r"no text but tool_calls: .*look_it_up"),
        (None, "stop", {"function_call": {"name": "go"}}, r"no text but function_call: .*go"),
        (None, "stop", {"reasoning_content": "hm"}, "thoughts and no text .finish_reason 'stop'"),
        (None, "length", {"reasoning": "hm"}, "finish_reason 'length'.; more max_tokens may do"),
        ("", "length", {"reasoning_content": "hm"}, "more max_tokens may do"),
        ([THOUGHT], "length", {}, "more max_tokens may do"),
        ("", "content_filter", {}, "nothing, as its content_filter has it"),
        ([{"type": "audio", "id": "a1"}], "stop", {}, r'neither text nor thought: .*"a1"'),
        ([part("x"), {"type": "text", "text": {"value": "y"}}], "stop", {}, '"value": "y"'),
        (7, "stop", {}, "neither text nor thought: 7"),
        ("half \ud83d", "stop", {}, r"half of a surrogate pair, .*ud83d"),
    ],
)
def test_what_is_no_text_is_named(
    content: Any, finish: str, more: dict[str, Any], why: str
) -> None:
    async def use(policy: OpenAIPolicy) -> None:
        with pytest.raises(PolicyError, match=why) as caught:
            await policy.complete(PROMPT, Sampling(), 0)
        assert len(str(caught.value)) < 400

    _, endpoint = with_policy(use, said(content, finish, **more))
    assert len(endpoint.asked) == 1, "asking again would cost, and come to the same"


def test_no_message_is_not_an_empty_one() -> None:
    for choice in ({"text": "as of old"}, {"message": None}, {"message": "hi"}):
        with pytest.raises(PolicyError, match="answered no message: "):
            completed((200, {"choices": [choice]}))


def error(**keys: Any) -> dict[str, Any]:
    return {"error": {"message": "Provider returned error", **keys}}


def broken_off(**keys: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": "half an ans"}
    return {"choices": [{"message": message, **keys}], "usage": {"total_tokens": 5}}


PAGE = "<html><head><title>{}</title></head><body style='font-weight: 500'></body></html>"
PASSES: list[Any] = [
    error(code=429),
    error(code="429", type="invalid_request_error"),
    error(code=502) | {"choices": None},
    error(code=524) | {"choices": []},
    error(status=503),
    error(status="RESOURCE_EXHAUSTED"),
    error(type="rate_limit_error", code=None),
    error(type="server_error"),
    error(code=1302, type="overloaded_error"),
    {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}},
    {"error": "Rate limit reached, try again in 2 s"},
    {"error": {"message": "The server is temporarily unavailable"}},
    {"object": "error", "message": "engine", "type": "InternalServerError", "code": 500},
    {"success": False, "errors": [{"code": 503, "message": "no"}]},
    {"status": 429, "message": "slowly"},
    broken_off(error={"code": 502, "message": "gone"}, finish_reason="error"),
    broken_off(finish_reason="error"),
    broken_off(finish_reason="insufficient_system_resource"),
    PAGE.format("502 Bad Gateway"),
    PAGE.format("503 Backend fetch failed"),
    "upstream request timeout",
    "",
    '{"choices": [{"message": {"content": "1+',
]


@pytest.mark.parametrize("answer", PASSES, ids=lambda one: json.dumps(one)[:60])
def test_what_passes_is_tried_again_whatever_the_status_line_says(answer: Any) -> None:
    got, endpoint = completed((200, answer, {"retry-after": "0.01"}), (200, answer), said("x"))
    assert got.text == "x" and len(endpoint.asked) == 3
    with pytest.raises(PolicyError, match=r"did not answer in 2 tries; the last: 200 "):
        completed((200, answer), tries=2)


FINAL: list[Any] = [
    error(code=401),
    error(code=400, message="the server is busy with others than you"),
    error(code="404", type="server_error"),
    error(code="model_not_found", message="no such model: internal-7b"),
    error(type="invalid_request_error", message="rate limits do not come into it"),
    error(type="authentication_error"),
    error(code=429, type="insufficient_quota"),
    error(code=402),
    error(),
    {"error": "Model big-model does not exist"},
    {"detail": "Not Found"},
    {"object": "error", "message": "no such model", "type": "NotFoundError", "code": 404},
    broken_off(error={"code": 403, "message": "no"}, finish_reason="error"),
    PAGE.format("Welcome"),
    "data: {}",
]


@pytest.mark.parametrize("answer", FINAL, ids=lambda one: json.dumps(one)[:60])
def test_what_is_final_is_said_at_once_whatever_the_status_line_says(answer: Any) -> None:
    async def use(policy: OpenAIPolicy) -> None:
        with pytest.raises(PolicyError, match=r"answered with (an error|no JSON): 200 .") as caught:
            await policy.complete(PROMPT, Sampling(), 0)
        words = answer if isinstance(answer, str) else json.dumps(answer)
        assert words[:60] in str(caught.value)

    assert len(with_policy(use, (200, answer), said("never"))[1].asked) == 1


def test_a_spent_account_is_not_asked_again_and_a_cloud_is() -> None:
    async def use(policy: OpenAIPolicy) -> None:
        with pytest.raises(PolicyError, match=r"refused the request: 429 .*insufficient_quota"):
            await policy.complete(PROMPT, Sampling(), 0)

    spent = 429, error(type="insufficient_quota", code="insufficient_quota")
    assert len(with_policy(use, spent, said("never"))[1].asked) == 1
    got, endpoint = completed((524, PAGE.format("524: A timeout occurred")), said("x"))
    assert got.text == "x" and len(endpoint.asked) == 2


def test_what_cannot_be_unpacked_is_tried_again() -> None:
    packed = 200, "not gzip at all", {"content-encoding": "gzip"}
    got, endpoint = completed(packed, said("x"))
    assert got.text == "x" and len(endpoint.asked) == 2


def test_no_key_is_ever_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    key = 's3"cret/of\\mine'
    monkeypatch.setenv("SOME_KEY", f"{key}\n")
    for answer in (
        (401, f"no such key: {key}"),
        (200, {"error": {"code": 401, "message": f"no such key: {key}"}}),
        (200, {"error": {"code": 429, "message": "x" * 285 + key}}),
        (200, f"who is {key}?"),
        said([{"type": "odd", "key": key}]),
    ):
        with pytest.raises(PolicyError) as caught:
            completed(answer, key="SOME_KEY", tries=2)
        assert not any(piece in str(caught.value) for piece in ("s3", "cret", "mine"))
    with pytest.raises(PolicyError, match=r"\(is the key in SOME_KEY right\?\)"):
        completed((200, error(code="401")), key="SOME_KEY")
    # What no header can carry would be shown by the error that says so.
    monkeypatch.setenv("SOME_KEY", "s3cret\nof mine")
    with pytest.raises(ValidationError, match="what SOME_KEY holds is no key") as refused:
        OpenAIConfig.model_validate({"model": "m", "url": "http://x/v1", "key": "SOME_KEY"})
    assert "s3cret" not in str(refused.value)


def test_endpoints_that_know_the_limit_by_another_name() -> None:
    said_so = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    with pytest.raises(PolicyError, match=r"refused .*set limit_name: max_completion_tokens"):
        completed((400, {"error": {"message": said_so, "param": "max_tokens"}}))
    name = "max_completion_tokens"
    _, endpoint = completed(said("x"), limit_name=name)
    body = endpoint.asked[0][1]
    assert body[name] == 12 and "max_tokens" not in body
    top = likely(("yes", 0.5))
    _, endpoint = with_policy(lambda p: p.score(PROMPT, Completion("yes")), top, limit_name=name)
    assert endpoint.asked[0][1][name] == 1 and "max_tokens" not in endpoint.asked[0][1]


def test_a_prompt_that_is_too_long_is_told_as_that() -> None:
    """So that whoever asks may leave the oldest turns out."""
    words = "This model's maximum context length is 8192 tokens. However, you requested 9001."
    for told in ({"code": "context_length_exceeded"}, {"message": words}):
        with pytest.raises(PromptTooLong, match="refused the request: 400"):
            completed((400, error(type="invalid_request_error", **told)))


def test_what_does_not_pass_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "s3cret")
    wrong = (401, "no such key: s3cret"), said("never")
    with pytest.raises(
        PolicyError, match=r"refused .*: 401 no such key: \*\*\* \(is the key in SOME"
    ):
        completed(*wrong, key="SOME_KEY")
    with pytest.raises(PolicyError, match="answered with no JSON: 200 <html>"):
        completed((200, "<html>"))
    for odd in ("{}", "[]", '{"choices": []}', '"text"', '{"choices": 3}', "null"):
        with pytest.raises(PolicyError, match="gave no choices"):
            completed((200, odd))
    with pytest.raises(PolicyError, match="cannot be held to a grammar"):
        completed(said("x"), sampling=Sampling(constraint=Constraint(("a",))))


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
    # What was paid for and of no use counts, too.
    cut = 200, broken_off(finish_reason="error")
    assert with_policy(until_refused, cut, said("x"), calls=3)[0] == 2


@pytest.mark.parametrize("usage", [{}, {"usage": None}, {"usage": {"total_tokens": None}}])
def test_what_an_answer_costs_need_not_be_told_unless_it_is_limited(usage: dict[str, Any]) -> None:
    answer = 200, {"choices": [{"message": {"content": "x"}}], **usage}
    assert completed(answer)[0].text == "x"
    assert completed(answer, calls=2)[0].text == "x"
    with pytest.raises(PolicyError, match=r"does not tell what an answer costs.* limit calls"):
        completed(answer, tokens=100)


def test_both_counts_are_as_good_as_their_sum() -> None:
    assert tokens_of({"usage": {"prompt_tokens": 3, "completion_tokens": 4}}) == 7
    assert tokens_of({"usage": {"total_tokens": 9, "prompt_tokens": 3}}) == 9


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


@pytest.mark.method
def test_in_a_run_it_teaches_and_judges(player: Path, tmp_path: Path) -> None:
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "run"

    async def main() -> tuple[dict[str, Any], list[str]]:
        async with Endpoint(said("1+1\nVERDICT: yes")) as endpoint:
            keys = f"{{use: openai, model: big-model, url: '{endpoint.url}'}}"
            text = SINGLE.replace("MODEL", str(player)) + f"policies: {{friend: {keys}}}\n"
            recipe.write_text(text + "judge: {use: model, model: friend, answer: verdict}\n")
            given = ["iterations=1", "trainer.use=rise", "trainer.turns=2"]
            plan = read(recipe, [*given, "trainer.teacher=friend"])
            result = await run(plan, output)
            return result, [body["messages"][-1]["content"] for _, body in endpoint.asked]

    result, asked = asyncio.run(main())
    assert result["tokens_trained"] > 0 and result["stopped"] is None
    judged = [text for text in asked if "VERDICT: yes or VERDICT: no" in text]
    assert judged and len(judged) < len(asked)
    episodes = read_trajectories(output / "iterations" / "0000")
    taught = [one.trajectory for one in episodes if one.trajectory.policy == "big-model"]
    assert taught and all(one.steps[-1].action.completion.token_ids == () for one in taught)
    assert {one.verdict.score for one in episodes} <= {0.0, 1.0}, "0: there was no answer"
