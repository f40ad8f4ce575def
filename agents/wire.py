"""Conversations with calls of functions, as OpenAI's protocol has them and as models write them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from ..core.actions import Call
from ..core.types import Tool
from .calls import Form, call_text, read_calls

NOT_DONE = "Not done."


def calls_out(calls: Sequence[Call], first: int = 0) -> list[dict[str, Any]]:
    """``tool_calls`` of an assistant's message; ids count from ``first``."""
    return [
        {
            "id": f"call_{first + k}",
            "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(call.arguments)},
        }
        for k, call in enumerate(calls)
    ]


def calls_in(given: Any) -> list[Call]:
    """What ``tool_calls`` call.

    Raises:
        ValueError: they are none, or arguments are no JSON object.
    """
    if not isinstance(given, list):
        raise ValueError("tool_calls is no list")
    calls: list[Call] = []
    for one in cast(list[Any], given):
        function = fields(fields(one).get("function"))
        name, text = function.get("name"), function.get("arguments") or "{}"
        if not isinstance(name, str):
            raise ValueError(f"a call of no function: {str(one)[:80]}")
        arguments: Any = json.loads(text) if isinstance(text, str) else text
        if not isinstance(arguments, dict):
            raise ValueError(f"arguments that are no JSON object: {str(text)[:80]}")
        calls.append(Call(name, cast(dict[str, Any], arguments)))
    return calls


def as_text(content: str, calls: Sequence[Call], form: Form = "hermes") -> str:
    """What a model said that made ``calls`` beside its words."""
    return "\n".join(part for part in (content, *(call_text(call, form) for call in calls)) if part)


def with_calls(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]
) -> Iterator[dict[str, Any]]:
    """Messages of the protocol, whose assistants' texts become calls where they are some.

    A result that follows no call is the user's words; a call without one came to nothing, which is
    said, as the protocol wants a result of each.
    """
    count, waiting = 0, list[str]()
    names = [tool.name for tool in tools]
    for message in messages:
        role, content = message["role"], message["content"]
        if role != "tool":
            yield from _unanswered(waiting)
            waiting = []
        if role == "assistant" and isinstance(content, str):
            calls = calls_out(read_calls(content, names), count) if tools else []
            count, waiting = count + len(calls), [call["id"] for call in calls]
            if calls:
                yield {**message, "content": None, "tool_calls": calls}
                continue
        if role == "tool":
            if waiting:
                yield {**message, "tool_call_id": waiting.pop(0)}
                continue
            message = {**message, "role": "user"}
        yield dict(message)
    yield from _unanswered(waiting)


def _unanswered(calls: Sequence[str]) -> Iterator[dict[str, Any]]:
    return ({"role": "tool", "content": NOT_DONE, "tool_call_id": one} for one in calls)


def fields(value: Any) -> dict[str, Any]:
    """An object's; none of anything else."""
    return cast(dict[str, Any], value) if isinstance(value, dict) else {}
