"""What OpenAI-compatible endpoints answer: the text, or why there is none and whether it passes."""

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

from ..wire import as_text, calls_in, fields

PASSING = frozenset({408, 409, 425, 429})
"""Status codes that may be gone at the next try, beside those of broken servers."""
SPENT = re.compile(r"insufficient.?quota|billing|credit", re.I)
"""Names of errors that no waiting mends, though they come as too many requests."""
FINAL = re.compile(r"invalid|not.?found|authenti|unauthori|permission|forbidden|unsupported", re.I)
"""Names of errors that come again however often one asks."""
BUSY = re.compile(
    r"rate.?limit|too.?many.?requests|over.?load|server.?error|internal|unavailable|busy|"
    r"bad.?gateway|time.?d?.?out|deadline.?exceeded|resource.?exhausted|throttl|capacity|"
    r"try.?again|temporar|loading",
    re.I,
)
"""Names and words of errors that may be gone at the next try."""
PAGE = re.compile(r"(?:error|title|h1|status)\W{1,8}(?:code\W{1,3})?(?:429|5\d\d)\b", re.I)
"""Where a gateway's page says that it is one of these."""
TOO_LONG = re.compile(
    r"context_length_exceeded|maximum (?:context|model) length|context window", re.I
)
"""What is said of a prompt that is too long."""
BROKEN_OFF = frozenset({"error", "abort", "insufficient_system_resource"})
"""Reasons to finish that are the server's own trouble."""
THOUGHTS = frozenset({"thinking", "redacted_thinking", "reasoning", "reasoning_content"})
"""Types of parts, and fields of a message, that are no answer."""
CALLS = ("tool_calls", "function_call")


class Failure(NamedTuple):
    """An answer that is none."""

    how: str
    came: Any
    passing: bool
    """It may be gone at the next try."""


def read(status: int, content: bytes) -> Any:
    """The answer's JSON, or a ``Failure``, whatever the status line says."""
    text = content.decode(errors="replace")
    try:
        answer: Any = json.loads(content)
    except (ValueError, RecursionError):
        answer = None
    if not 200 <= status < 300:
        passing = passes(status) and not SPENT.search(" ".join(names(answer)))
        return Failure("refused the request", text, passing)
    if answer is None and text.strip() != "null":
        # JSON that was cut off, or nothing at all, broke on the way.
        cut = text.lstrip()[:1] in ("", "{", "[")
        passing = cut or bool(BUSY.search(text) or PAGE.search(text))
        return Failure("answered with no JSON", text, passing)
    found = trouble(answer)
    return answer if found is None else Failure("answered with an error", answer, found)


def trouble(answer: Any) -> bool | None:
    """Whether the error that an answer holds may pass; None: it holds none."""
    given = fields(answer)
    choices = given.get("choices")
    first = fields(choices[0]) if isinstance(choices, list) and choices else {}
    held = next((one["error"] for one in (given, first) if one.get("error")), None)
    if held is None and str(first.get("finish_reason")) in BROKEN_OFF:
        return True
    if held is None and not choices:
        # Some put the error where the answer would be.
        held = given if {*given} & {"errors", "code", "status", "detail", "message"} else None
    return None if held is None else may_pass(held)


def may_pass(error: Any) -> bool:
    """By its status code, else by its names, else by its words; what tells nothing is final."""
    kinds = [*names(error)]
    if any(map(SPENT.search, kinds)):
        return False
    codes = [int(one) for one in kinds if re.fullmatch(r"[45]\d\d", one)]
    if codes or any(map(FINAL.search, kinds)):
        return any(map(passes, codes))
    words = error if isinstance(error, str) else str(fields(error).get("message") or "")
    return any(map(BUSY.search, [*kinds, words]))


def passes(status: int) -> bool:
    return status in PASSING or (500 <= status < 600 and status != 501)


def names(error: Any, depth: int = 3) -> Iterator[str]:
    """What kind of error it is, in numbers and names, also those that lie inside it."""
    for key, value in fields(error).items():
        if key.lower().replace("_", "") in ("code", "status", "statuscode", "httpcode", "type"):
            if isinstance(value, str | int):
                yield str(value)
        elif key in ("error", "errors") and depth:
            inner = cast("list[Any]", value) if isinstance(value, list) else [value]
            for one in inner:
                yield from names(one, depth - 1)


def text_of(choice: Any, calls: bool = False) -> str:
    """What was answered; '' only where just that was.

    Text parts are joined in their order, thoughts are left out. With ``calls``, calls of functions
    are text, too, in Hermes' form.

    Raises:
        ValueError: there is no text, or what there is could not be understood. It says what came.
    """
    message = fields(fields(choice).get("message"))
    if not message:
        raise ValueError(f"no message: {shown(choice)}")
    content = message.get("content")
    texts, refusals, thought = parts_of(content)
    text = "".join(texts)
    if calls and message.get("tool_calls"):
        text = as_text(text, calls_in(message["tool_calls"]))
    if text:
        return valid(text)
    refusals += [str(message["refusal"])] if message.get("refusal") else []
    if refusals:
        raise ValueError(f"a refusal: {shown(' '.join(refusals))}")
    for key in CALLS:
        if message.get(key):
            raise ValueError(f"no text but {key}: {shown(message[key])}")
    finish = fields(choice).get("finish_reason")
    if finish == "content_filter":
        raise ValueError("nothing, as its content_filter has it")
    thought = thought or any(message.get(key) for key in THOUGHTS)
    if thought and (not texts or finish == "length"):
        cut = "; more max_tokens may do" if finish == "length" else ""
        raise ValueError(f"thoughts and no text (finish_reason {finish!r}){cut}")
    if not texts:
        raise ValueError(f"no text: {shown(message)}")
    return text


def parts_of(content: Any) -> tuple[list[str], list[str], bool]:
    """Texts, refusals, and whether there were thoughts.

    Raises:
        ValueError: there was something else.
    """
    if content is None:
        return [], [], False
    parts = cast("list[Any]", content) if isinstance(content, list) else [content]
    texts: list[str] = []
    refusals: list[str] = []
    thought = False
    for part in parts:
        kind = fields(part).get("type")
        if isinstance(part, str):
            texts.append(part)
        elif kind in ("text", "output_text") and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "refusal":
            refusals.append(str(part.get("refusal")))
        elif kind in THOUGHTS:
            thought = True
        else:
            raise ValueError(f"content that is neither text nor thought: {shown(part)}")
    return texts, refusals, thought


def valid(text: str) -> str:
    """Raises: ValueError: it is no Unicode, which can be neither tokenised nor stored."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half of a surrogate pair, which is no text: {text!a}") from error
    return text


def tokens_of(answer: Any) -> int | None:
    """Tokens read and written, as the endpoint counts them; None: it does not say."""
    usage = fields(fields(answer).get("usage"))
    total, *both = (usage.get(f"{one}_tokens") for one in ("total", "prompt", "completion"))
    counts = [one for one in ([total] if total else both) if isinstance(one, int) and one >= 0]
    return sum(counts) if counts else None


def shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
