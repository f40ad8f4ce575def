"""One vLLM server: started here and watched, or somebody else's. Never imports vllm."""

import asyncio
import json
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, cast

import aiohttp

from ...core.errors import PolicyError, PromptTooLong
from ...core.hosting.supervised import Supervised
from ...core.types import Image
from . import data_url
from .answers import TOO_LONG

MODEL = "base"
"""What our servers call their model."""
COMPLETIONS = "/v1/completions"
"""Takes ids on every server, but tells words, too, at some cost to the server."""
GENERATE = "/inference/v1/generate"
"""Ids go in and come out, and nothing else, with pictures beside them; not every server has it."""
SHORT = aiohttp.ClientTimeout(10.0)
"""Deadline of a question that any server that lives can answer."""
UNHEARD = (aiohttp.ClientError, TimeoutError)
"""What is raised where no answer comes."""
SHOWN = 300
"""Characters of a server's answer that an error shows."""
QUIET = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


class Gone(PolicyError):
    """A server died, hung or hung up; what it was asked may be asked again."""


class Answer(NamedTuple):
    """What a server sampled."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """(T,) nats; empty if they were not asked for."""
    finish: str
    prompt: Sequence[Mapping[str, Any]]
    """Of each token of the prompt, if asked for: log-probabilities by the token's id."""

    def joined(self, rest: "Answer") -> "Answer":
        """This one, and what it goes on with."""
        ids, logprobs = (*self.ids, *rest.ids), (*self.logprobs, *rest.logprobs)
        return Answer(ids, logprobs, rest.finish, self.prompt)


class Replica:
    """A server, how it is asked, and what is known of it."""

    def __init__(self, url: str, start_timeout_s: float, stall_timeout_s: float) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.context = 0
        """The most tokens of a prompt and its answer."""
        self.model = MODEL
        self.generates = False
        """Whether it has ``GENERATE``."""
        self.sees: bool | None = None
        """Whether it takes the pictures of canaries; None: not asked yet."""
        self.spoken: tuple[tuple[float, ...], ...] = ()
        """What it answered to each canary with the last adapter."""
        self.generation = 0
        """How often it was mended."""
        self.mending = asyncio.Lock()
        self._token_count: float | None = None
        """Tokens it had read and made when it was last looked at."""
        self._moved = 0.0
        """When it was last known to have done something, on the monotonic clock."""
        self._looking: asyncio.Task[None] | None = None
        self._start_timeout_s = start_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._opened: aiohttp.ClientSession | None = None

    @property
    def _client(self) -> aiohttp.ClientSession:
        # Made late: it belongs to the event loop in which it is made. Not httpx2: a pool of theirs
        # looks at every connection for every request, and hundreds are in use.
        if self._opened is None:
            # Thousands that ask at once have to wait for one another. Unused connections are let
            # go before the server, after five seconds, does so.
            self._opened = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=3),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._stall_timeout_s),
            )
        return self._opened

    async def up(self) -> None:
        """Wait until it answers. Raises: PolicyError: it does not, within its deadline."""
        try:
            async with asyncio.timeout(self._start_timeout_s):
                while not await self.healthy():
                    self.check()
                    await asyncio.sleep(0.2)
        except TimeoutError:
            raise PolicyError(
                f"{self.url} did not come up within start_timeout_s={self._start_timeout_s:g}"
                + self.words()
            ) from None
        payload = await self._get("/v1/models")
        first = next((one for one in payload["data"] if not one.get("parent")), None)
        if first is None:
            raise PolicyError(f"{self.url} serves no model: {str(payload)[:SHOWN]}")
        self.model, self.context = str(first["id"]), int(first["max_model_len"])
        self.generates = await self._has(GENERATE)

    async def healthy(self) -> bool:
        try:
            async with self._client.get(f"{self.url}/health", timeout=SHORT) as response:
                return response.ok
        except UNHEARD:
            return False

    def check(self) -> None:
        """Raises: PolicyError: its process has ended."""

    def words(self) -> str:
        """The end of its log, for errors; empty if it keeps one elsewhere."""
        return ""

    async def again(self, gone: Gone) -> bool:
        """See that it can be asked again; whether it was started anew for that.

        Raises:
            PolicyError: it cannot.
        """
        if not await self.healthy():
            raise PolicyError(f"{gone}; it was not started here: start it again, and then the run")
        return False

    async def answer(
        self,
        model: str,
        ids: Sequence[int],
        images: Sequence[Image],
        sampling: Mapping[str, Any],
        first: bool = False,
        heard: Callable[[Sequence[int]], None] | None = None,
    ) -> Answer:
        """What follows ``ids``, which hold a placeholder for each of the images.

        ``sampling``: vLLM's own words, among them which log-probabilities are wanted.
        ``heard``: told of the ids sampled so far, where the server has ``GENERATE``.

        Raises: as ``post``.
        """
        if not self.generates:
            if images:
                raise PolicyError(
                    f"{self.url} takes no images beside ids; start it with --enable-scale-out"
                )
            asked = {"prompt": list(ids), "return_token_ids": True, **sampling}
            payload = await self.post(COMPLETIONS, {"model": model, **asked}, first)
            choice = self._choice(payload)
            before, kept = choice["prompt_logprobs"], choice["logprobs"]
            logprobs = kept["token_logprobs"] if kept else ()
        else:
            # Texts to stop at are looked for in words; else it is spared making any.
            how = {"detokenize": bool(sampling.get("stop")), **sampling}
            asked: dict[str, Any] = {"token_ids": list(ids), "sampling_params": how}
            if images:
                parts = [{"type": "image_url", "url": data_url(image)} for image in images]
                asked["content_parts"] = parts
            if heard is not None:
                return await self._streamed({"model": model, **asked}, heard)
            payload = await self.post(GENERATE, {"model": model, **asked}, first)
            choice = self._choice(payload)
            before, kept = payload["prompt_logprobs"], choice["logprobs"]
            logprobs = [one["logprob"] for one in kept["content"]] if kept else ()
        sampled = tuple(choice["token_ids"])
        return Answer(sampled, tuple(map(float, logprobs)), choice["finish_reason"], before or ())

    def _choice(self, payload: Any) -> dict[str, Any]:
        """The first one. Raises: PolicyError: what answered was no vLLM, but a gateway, say."""
        match payload:
            case {"choices": [{"token_ids": [*_]} as choice, *_]}:
                return cast("dict[str, Any]", choice)
            case _:
                text = payload if isinstance(payload, str) else json.dumps(payload)
                raise PolicyError(f"{self.url} answered otherwise than vLLM: {text[:SHOWN]}")

    async def _streamed(
        self, asked: Mapping[str, Any], heard: Callable[[Sequence[int]], None]
    ) -> Answer:
        ids: list[int] = []
        logprobs: list[float] = []
        finish = ""

        def line(text: str) -> None:
            nonlocal finish
            payload: Any = json.loads(text[5:]) if text.startswith("data: {") else {}
            if payload.get("error"):  # Its status line was sent long before.
                words = f"{self.url} broke off: {text[:SHOWN]}{self.words()}"
                match payload["error"]:
                    case {"code": int(code)} if 400 <= code < 500:
                        raise PolicyError(words)
                    case _:
                        raise Gone(words)
            for choice in payload.get("choices", ()):
                ids.extend(choice["token_ids"])
                logprobs.extend(float(one["logprob"]) for one in choice["logprobs"]["content"])
                finish = choice["finish_reason"] or ""
                heard(tuple(ids))

        await self.post(GENERATE, {**asked, "stream": True}, line=line)
        if not finish:
            raise Gone(f"{self.url} broke off after {len(ids)} tokens{self.words()}")
        return Answer(tuple(ids), tuple(logprobs), finish, ())

    async def post(
        self,
        path: str,
        body: Mapping[str, Any],
        first: bool = False,
        line: Callable[[str], None] | None = None,
    ) -> Any:
        """Its answer, however long it takes, as long as it makes tokens.

        ``first``: it may still be warming up. ``line``: told of each line as it comes, for an
        answer that is a stream.

        Raises:
            Gone: it does not answer any more.
            PolicyError: it refuses.
        """
        if body.get("model") == MODEL:
            body = {**body, "model": self.model}
        asked = asyncio.create_task(self._asked(path, body, line))
        stall_s = max(self._stall_timeout_s, self._start_timeout_s if first else 0.0)
        begun = time.monotonic()
        try:
            while True:
                quiet = time.monotonic() - max(begun, self._moved)
                done, _ = await asyncio.wait({asked}, timeout=max(0.0, stall_s - quiet))
                if done:
                    break
                if time.monotonic() - max(begun, self._moved) >= stall_s:
                    await self._look(stall_s)
                if time.monotonic() - max(begun, self._moved) >= stall_s:
                    raise Gone(
                        f"{self.url} has made no token for {stall_s:g} s (stall_timeout_s)"
                        + self.words()
                    )
            status, text = asked.result()
            self._moved = time.monotonic()
        except UNHEARD as error:
            raise Gone(
                f"{self.url} hung up: {type(error).__name__} {error}{self.words()}"
            ) from error
        finally:
            asked.cancel()
        if status >= 500:
            raise Gone(f"{self.url} is broken: {status} {text[:SHOWN]}{self.words()}")
        if status >= 400:
            error = PromptTooLong if TOO_LONG.search(text) else PolicyError
            raise error(f"{self.url}{path} refused: {status} {text[:SHOWN]}")
        try:
            return json.loads(text)
        except ValueError:
            return text

    async def _asked(
        self, path: str, body: Mapping[str, Any], line: Callable[[str], None] | None
    ) -> tuple[int, str]:
        async with self._client.post(f"{self.url}{path}", json=body) as response:
            if line is not None and response.ok:
                async for one in response.content:
                    line(one.decode())
                return response.status, ""
            return response.status, await response.text()

    async def _look(self, timeout_s: float) -> None:
        """See whether it has done something since the last look; the first one counts as such.

        All that wait share one look: thousands of questions at once would be what it hangs on.
        """
        if self._looking is None:
            self._looking = asyncio.create_task(self._count(timeout_s))
            self._looking.add_done_callback(self._looked)
        await asyncio.shield(self._looking)

    def _looked(self, _: object) -> None:
        self._looking = None

    async def _count(self, timeout_s: float) -> None:
        within = aiohttp.ClientTimeout(timeout_s)
        with suppress(*UNHEARD):  # It says nothing: it has not moved.
            async with self._client.get(f"{self.url}/metrics", timeout=within) as response:
                text = await response.text()
            names = ("vllm:generation_tokens_total", "vllm:prompt_tokens_total")
            tokens = sum(metric(text, name) for name in names)
            if tokens != self._token_count:
                self._token_count, self._moved = tokens, time.monotonic()

    async def _has(self, path: str) -> bool:
        """Whether something may be posted there."""
        try:
            async with self._client.get(f"{self.url}{path}", timeout=SHORT) as response:
                return response.status == 405
        except UNHEARD:
            return False

    async def names(self) -> set[str]:
        """Of the models and adapters that it answers by."""
        return {str(one["id"]) for one in (await self._get("/v1/models"))["data"]}

    async def load(self, name: str, folder: Path) -> None:
        """Raises: PolicyError: it refuses, or knows no adapters."""
        try:
            await self.post(
                "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder.resolve())}
            )
        except Gone:
            raise
        except PolicyError as refused:
            raise PolicyError(
                f"the adapter {name} was not loaded: {refused}; a server that was not started here "
                "needs --enable-lora, --max-lora-rank as large as learner.rank, "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and a folder it can read (policy.adapters)"
            ) from refused

    async def unload(self, name: str) -> None:
        await self.post("/v1/unload_lora_adapter", {"lora_name": name})

    async def _get(self, path: str) -> Any:
        try:
            async with self._client.get(f"{self.url}{path}", timeout=SHORT) as response:
                response.raise_for_status()
                return await response.json()
        except (*UNHEARD, ValueError) as error:
            raise PolicyError(f"{self.url}{path} does not answer: {error}{self.words()}") from error

    async def close(self) -> None:
        if self._opened is not None:
            await self._opened.close()


class Launched(Replica):
    """A server of ours, which dies with us."""

    def __init__(
        self,
        command: list[str],
        environment: Mapping[str, str],
        log: Path,
        limits: tuple[float, float],
        restarts: int,
    ) -> None:
        self._port = free_port()
        super().__init__(f"http://127.0.0.1:{self._port}", *limits)
        self._command = [*command, "--host", "127.0.0.1", "--port", str(self._port)]
        self._environment = environment
        self._log = log
        self._allowed = restarts
        self._restarted: list[str] = []
        """Why, each time."""
        self.process = self._launch()

    def _launch(self) -> Supervised:
        try:
            return Supervised(self._command, self._environment, self._log)
        except OSError as error:
            raise PolicyError(f"cannot start vLLM: {error}") from error

    def check(self) -> None:
        if not self.process.alive:
            hint = ""
            if "No module named 'vllm'" in self.process.last_words():
                hint = (
                    "; set policy.python, or SELFWRIGHT_VLLM_PYTHON, to the interpreter of an "
                    "environment with vLLM"
                )
            raise PolicyError(f"the vLLM server ended before it answered{hint}{self.words()}")

    def words(self) -> str:
        text = "\n".join([*self.process.errors(), self.process.last_words()]).strip()
        return f"; its last words:\n{text}" if text else ""

    async def again(self, gone: Gone) -> bool:
        if self.process.alive and "hung up" in str(gone) and await self.healthy():
            return False
        if len(self._restarted) >= self._allowed:
            why = "; ".join(self._restarted) or "never"
            raise PolicyError(
                f"{gone}\nit was started again {self._allowed} times already, as often as "
                f"policy.restarts allows: {why}"
            )
        self._restarted.append(str(gone).splitlines()[0].removesuffix("; its last words:"))
        await asyncio.to_thread(self.process.stop)
        self.process = self._launch()
        return True

    async def close(self) -> None:
        await super().close()
        await asyncio.to_thread(self.process.stop)


def launched(
    python: str,
    model: str,
    arguments: Mapping[str, Any],
    device: str | None,
    log: Path,
    limits: tuple[float, float],
    restarts: int,
) -> Launched:
    """A server of ``model``, on its way up. Raises: PolicyError: it cannot be started."""
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--served-model-name", MODEL, "--enable-lora", "--generation-config", "vllm"]
    command += ["--uvicorn-log-level", "warning"]
    # The one that reads grammars as the in-process engine does, and the learner.
    command += ["--structured-outputs-config.backend", "guidance"]
    for key, value in arguments.items():
        values = cast("list[Any]", value) if isinstance(value, list) else [value]
        command += [f"--{key}", *(str(one) for one in values if one is not True)]
    environment = os.environ | QUIET
    if device is not None:
        environment |= {"CUDA_VISIBLE_DEVICES": device}
    return Launched(command, environment, log, limits, restarts)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def metric(text: str, name: str) -> float:
    """The sum of a counter over all its labels, in Prometheus's text."""
    lines = (line for line in text.splitlines() if line.partition("{")[0] == name)
    return sum(float(line.rpartition(" ")[2]) for line in lines)
