"""Rollouts by `verifiers`, in the world of ``served.py``: its side of the comparison there.

    PYTHON benchmarks/peers/verifiers_rollouts.py SETTINGS.json

PYTHON is that of an environment with verifiers 0.4; SETTINGS.json is written by ``served.py``. The
world is the simulated user of ``Env.run``, as in verifiers' own games; the harness is a chat in
this process, so no episode starts any. This file is also the plug-in that verifiers loads by name.
The last line printed is what was measured, as JSON; it fails if any episode did.
"""

# Checked without verifiers, which lives in an environment of its own.
# pyright: basic, reportMissingImports=false

import asyncio
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import verifiers.v1 as vf

LIMIT_S = 600
TRIES = 3
"""As often as OpenAI's client asks; on the way to the server verifiers leaves this to harnesses."""
MULTIPLEX = 8
"""Episodes that share a pool of connections: the default of 32 costs a third more CPU."""
__all__ = ["WordsEnv", "WordsHarness", "WordsTaskset"]


class WordsData(vf.TaskData):
    replies: list[str]


class WordsTask(vf.Task[WordsData, vf.State, vf.TaskConfig]):
    pass


class WordsTasksetConfig(vf.TasksetConfig):
    settings: Path


class WordsTaskset(vf.Taskset[WordsTask, WordsTasksetConfig]):
    def load(self) -> Iterator[WordsTask]:
        for one in json.loads(self.config.settings.read_text())["tasks"]:
            yield WordsTask(WordsData(prompt=one["opening"], replies=one["replies"]))


class WordsSession(vf.HarnessSession):
    """One episode's chat, which keeps what was said instead of reading it off the trace."""

    def __init__(self, *told: Any, **more: Any) -> None:
        super().__init__(*told, **more)
        self._said: list[dict[str, Any]] = []
        self._http = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {self.secret}"},
            timeout=aiohttp.ClientTimeout(total=LIMIT_S),
        )

    async def _run(self, messages: vf.Messages | None) -> vf.ProgramResult:
        heard = messages or [vf.UserMessage(content=self.data.prompt)]
        self._said += [{"role": one.role, "content": one.content} for one in heard]
        asked = {"model": self.ctx.model, "messages": self._said}
        status, text = 0, ""
        for k in range(TRIES):
            # So marked, an answer that was lost on its way back is not sampled again.
            again = {"x-stainless-retry-count": str(k)}
            url = f"{self.endpoint}/chat/completions"
            async with self._http.post(url, json=asked, headers=again) as response:
                status, text = response.status, await response.text()
            if status < 500:
                break
        if status != 200:
            return vf.ProgramResult(1, "", f"{status} {text}")
        answer = json.loads(text)["choices"][0]["message"]["content"]
        self._said.append({"role": "assistant", "content": answer or ""})
        return vf.ProgramResult(0, "", "")

    async def close(self) -> None:
        await super().close()
        await self._http.close()


class WordsHarness(vf.Harness[vf.HarnessConfig]):
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def session(self, *told: Any, **more: Any) -> WordsSession:
        return WordsSession(self, *told, **more)

    async def launch(self, *told: Any, **more: Any) -> vf.ProgramResult:
        raise NotImplementedError("its sessions launch nothing")


class WordsEnvConfig(vf.EnvConfig):
    player: vf.AgentConfig = vf.AgentConfig(runtime=vf.SubprocessConfig())
    step_s: float = 0.0


class WordsEnv(vf.Env[WordsEnvConfig]):
    async def run(self, task: WordsTask, agents: vf.Agents) -> None:
        async with agents.player.interaction(task) as talk:
            for reply in (None, *task.data.replies):  # It is the prompt that opens.
                if (await talk.turn(reply)).terminated:
                    raise RuntimeError("the episode ended early")
                await asyncio.sleep(self.config.step_s)
        talk.trace.record_reward("reward", 0.0)


async def measured(file: Path) -> dict[str, float]:
    told = json.loads(file.read_text())
    taskset = {"id": Path(__file__).stem, "settings": file}
    pool = {"type": "elastic", "multiplex": MULTIPLEX}
    config = {"taskset": taskset, "step_s": told["step_s"], "interception": pool}
    env = vf.load_environment(vf.resolve_env_config(config))
    # Of its two clients the one that this server answers: for the other's requests (clients/train)
    # vLLM gives log-probabilities in a form that renderers 0.1.12 refuses.
    client = vf.EvalClientConfig(base_url=f"{told['url']}/v1", api_key_var="VLLM_API_KEY")
    sampling = vf.Sampling(temperature=1.0, max_tokens=told["max_tokens"])
    context = vf.ModelContext("base", client, sampling)
    gate = asyncio.Semaphore(told["at_once"])

    async def played(tasks: Sequence[WordsTask], attempts: int) -> list[vf.ModelCall]:
        """The completions of as many episodes of each."""
        slots = [slot for task in tasks for slot in env.slots(task, attempts)]
        episodes = await asyncio.gather(*(env.run_slot(slot, context, gate) for slot in slots))
        for one in episodes:
            if not one.ok:
                raise RuntimeError(f"failed: {[*one.errors, *(t.errors for t in one.traces)]}")
        calls = [call for one in episodes for trace in one.traces for call in trace.calls]
        return [call for call in calls if call.error is None]  # Not those that were asked again.

    async with env.serving():
        tasks = list(env.taskset)
        await played([tasks[0].with_data(prompt="warm up", replies=[])], told["at_once"])
        began = time.perf_counter()
        calls = await played(tasks, told["attempts"])
        seconds = time.perf_counter() - began
    if len(calls) != (wanted := len(tasks) * told["attempts"] * told["turns"]):
        raise RuntimeError(f"wanted {wanted} completions, got {len(calls)}")
    tokens = sum(call.usage.completion_tokens for call in calls)
    return {
        "requests": len(calls),
        "answer_tokens": round(tokens / len(calls), 1),
        "seconds": round(seconds, 2),
        "tokens_per_s": round(tokens / seconds, 1),
    }


async def main(file: Path) -> None:
    async with asyncio.timeout(LIMIT_S):
        print(json.dumps(await measured(file)))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
