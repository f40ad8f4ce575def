"""Stands before the application: who may ask, how much at once, and how large."""

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Collection
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .limits import Limits, Refusal
from .metrics import Metrics

log = logging.getLogger(__name__)

OPEN = ("/", "/health")
"""Paths that need no token: the page holds nothing, and asks for one."""
UNCOUNTED = ("/", "/health", "/metrics")
"""Paths that are answered however busy the server is. They take no body: nothing would bound how
many are held at once."""
DRAINED = 8
"""A body that is refused is still read up to so many times its limit: whoever sends it then meets
an answer and no broken connection."""
SAFE = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""Headers of every answer; uvicorn itself answers what is no HTTP."""


class Admission:
    """ASGI middleware. Bodies are read here, whole, so that nothing behind it can read too much."""

    def __init__(
        self, app: ASGIApp, limits: Limits, metrics: Metrics, token: str, hosts: Collection[str]
    ) -> None:
        """``hosts``: the names under which it may be asked; none: under any.

        With a token a page elsewhere can do nothing, whatever name it makes us go by; without one,
        on loopback, only the name in the address tells our own page from such a page.
        """
        self._app = app
        self._limits = limits
        self._metrics = metrics
        self._token = token.encode()
        self._hosts = hosts
        self._busy = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = [(k.lower().encode(), v.encode()) for k, v in SAFE.items()]
                mine = {name for name, _ in extra}
                given = [pair for pair in message.get("headers", ()) if pair[0] not in mine]
                message = {**message, "headers": [*given, *extra]}
            await send(message)

        counted = scope["path"] not in UNCOUNTED
        self._busy += counted
        self._metrics.busy.set(self._busy)
        try:
            await self._app(scope, await self._admitted(scope, receive, counted), answer)
        except Refusal as refusal:
            await refused(refusal, self._metrics, answer)
        except Exception:
            if status:
                raise  # The answer has begun: only to break off tells that it is not whole.
            log.exception("a request broke")
            broke = Refusal(500, "something broke here", "internal")
            await refused(broke, self._metrics, answer)
        finally:
            self._busy -= counted
            self._metrics.busy.set(self._busy)
            # The pattern, not the path: strangers choose paths.
            route = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if scope["method"] in METHODS else "other"
            self._metrics.requests.labels(method, route, str(status or 500)).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - began)

    async def _admitted(self, scope: Scope, receive: Receive, counted: bool) -> Receive:
        """Where the request's body can be read from. Raises: Refusal: it may not come in."""
        headers = Headers(scope=scope)
        self._check_place(headers)
        if scope["path"] not in OPEN:
            self._check_token(headers)
        if counted and self._busy > self._limits.parallel:
            message = f"{self._limits.parallel} requests are in flight already; try again"
            raise Refusal(429, message, "busy", retry_s=1)
        try:
            async with asyncio.timeout(self._limits.body_s):
                body = await self._body(headers, receive, counted)
        except TimeoutError:
            message = f"the request did not arrive within {self._limits.body_s:g} s"
            raise Refusal(408, message, "too_slow") from None
        replayed = False

        async def replay() -> Message:
            nonlocal replayed
            if replayed:
                return await receive()
            replayed = True
            return {"type": "http.request", "body": body, "more_body": False}

        return replay

    def _check_place(self, headers: Headers) -> None:
        host = headers.get("host", "")
        if self._hosts and _name(host) not in self._hosts:
            message = f"this server does not go by the name {host[:80]!r}"
            raise Refusal(403, message, "wrong_host")
        origin = headers.get("origin")
        if origin is not None and _place(origin) != host.lower():
            raise Refusal(403, "pages from elsewhere may not ask here", "wrong_origin")

    def _check_token(self, headers: Headers) -> None:
        if not self._token:
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        # Starlette reads headers as Latin-1, which gives back the bytes that were sent.
        right = hmac.compare_digest(given.encode("latin-1").strip(), self._token)
        if kind.lower() != "bearer" or not right:
            message = "wanted the header Authorization: Bearer TOKEN, with this server's token"
            raise Refusal(401, message, "wrong_token")

    async def _body(self, headers: Headers, receive: Receive, counted: bool) -> bytes:
        most = int(self._limits.body_mb * 1e6) if counted else 0
        fault = f"the request is larger than {self._limits.body_mb:g} MB"
        refusal = Refusal(413, fault if counted else "this path takes no body", "body_too_large")
        announced = headers.get("content-length", "")
        if announced.isdecimal() and int(announced[:20]) > DRAINED * most:
            raise refusal
        parts, size, more = list[bytes](), 0, True
        while more and size <= DRAINED * most:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refusal(400, "the request broke off", "broken_off")
            part: bytes = message.get("body", b"")
            size += len(part)
            more = message.get("more_body", False)
            if size <= most:
                parts.append(part)
            else:
                parts.clear()
        if size > most:
            raise refusal
        return b"".join(parts)


METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


async def refused(refusal: Refusal, metrics: Metrics, send: Send) -> None:
    metrics.refusals.labels(refusal.code).inc()
    body = json.dumps(refusal.body).encode()
    headers: list[Any] = [(k.lower().encode(), v.encode()) for k, v in refusal.headers.items()]
    headers += [(b"content-type", b"application/json")]
    headers += [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _name(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _place(origin: str) -> str:
    """Host and port of an Origin header."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""
