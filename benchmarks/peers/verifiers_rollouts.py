"""Rollouts by `verifiers`, in the world of ``served.py``: its side of the comparison there.

    PYTHON benchmarks/peers/verifiers_rollouts.py SETTINGS.json

PYTHON has verifiers 0.4; ``served.py`` writes SETTINGS.json. The world is the user in ``Env.run``,
as in verifiers' own games; the harness is a chat inside this process, so no episode starts another.
verifiers loads this file by name, too, as its plug-in. The last line printed is what was measured.
"""

# Checked without verifiers, which has an environment of its own.
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
"""As many as OpenAI's client makes; verifiers leaves it to the harness to ask again."""
MULTIPLEX = 8
"""Episodes that share connections to the server; the default of 32 costs more CPU here."""
__all__ = ["WordsEnv", "WordsHarness", "WordsTaskset"]


class WordsData(vf.TaskData):
    replies: list[str]


class WordsTasksetConfig(vf.TasksetConfig):
    settings: Path


class WordsTaskset(vf.Taskset[vf.Task, WordsTasksetConfig]):
    def load(self) -> Iterator[vf.Task]:
        for one in json.loads(self.config.settings.read_text())["tasks"]:
            yield vf.Task(WordsData(prompt=one["opening"], replies=one["replies"]))


class WordsSession(vf.HarnessSession):
    """One episode's chat, which keeps what was said instead of reading it off the trace."""

    def __init__(self, *told: Any) -> None:
        super().__init__(*told)
        self._said: list[dict[str, Any]] = []
        self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=LIMIT_S))

    async def _run(self, messages: vf.Messages | None) -> vf.ProgramResult:
        heard = messages or [vf.UserMessage(content=self.data.prompt)]
        self._said += [{"role": one.role, "content": one.content} for one in heard]
        asked = {"model": self.ctx.model, "messages": self._said}
        url, headers = (
            f"{self.endpoint}/chat/completions",
            {"Authorization": f"Bearer {self.secret}"},
        )
        for k in range(TRIES):
            headers["x-stainless-retry-count"] = str(k)  # An answer lost on its way is told again.
            async with self._http.post(url, json=asked, headers=headers) as response:
                text = await response.text()
            if response.status < 500:
                break
        if response.status != 200:
            return vf.ProgramResult(1, "", f"{response.status} {text}")
        answer = json.loads(text)["choices"][0]["message"]["content"]
        self._said.append({"role": "assistant", "content": answer or ""})
        return vf.ProgramResult(0, "", "")

    async def close(self) -> None:
        await super().close()
        await self._http.close()


class WordsHarness(vf.Harness[vf.HarnessConfig]):
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def session(self, *told: Any) -> WordsSession:
        return WordsSession(self, *told)

    async def launch(self, *told: Any) -> vf.ProgramResult:
        raise NotImplementedError("its sessions launch nothing")


class WordsEnvConfig(vf.EnvConfig):
    player: vf.AgentConfig = vf.AgentConfig(runtime=vf.SubprocessConfig())
    step_s: float = 0.0


class WordsEnv(vf.Env[WordsEnvConfig]):
    async def run(self, task: vf.Task, agents: vf.Agents) -> None:
        async with agents.player.interaction(task) as talk:
            for reply in (None, *task.data.replies):  # The prompt has opened it.
                if (await talk.turn(reply)).terminated:
                    return  # Its trace says why.
                await asyncio.sleep(self.config.step_s)
        talk.trace.record_reward("reward", 0.0)


async def measured(file: Path) -> dict[str, float]:
    told = json.loads(file.read_text())
    taskset = {"id": Path(__file__).stem, "settings": file}
    pool = {"type": "elastic", "multiplex": MULTIPLEX}
    config = {"taskset": taskset, "step_s": told["step_s"], "interception": pool}
    env = vf.load_environment(vf.resolve_env_config(config))
    # Not the client for training: vLLM's /inference/v1/generate is off unless asked for, and gives
    # log-probabilities in a form that renderers 0.1.12 refuses.
    client = vf.EvalClientConfig(base_url=f"{told['url']}/v1", api_key_var="VLLM_API_KEY")
    sampling = vf.Sampling(temperature=1.0, max_tokens=told["max_tokens"])
    context = vf.ModelContext("base", client, sampling)
    gate = asyncio.Semaphore(told["at_once"])

    async def played(tasks: Sequence[vf.Task], attempts: int, turns: int) -> int:
        """Tokens sampled in as many episodes of each."""
        slots = [slot for task in tasks for slot in env.slots(task, attempts)]
        episodes = await asyncio.gather(*(env.run_slot(slot, context, gate) for slot in slots))
        traces = [trace for one in episodes for trace in one.traces]
        wrong = [error.message for one in (*episodes, *traces) for error in one.errors]
        said = [call for trace in traces for call in trace.calls if call.error is None]
        if wrong or not all(one.ok for one in episodes) or len(said) != len(slots) * turns:
            raise RuntimeError(f"{len(said)} completions in {len(slots)} episodes: {wrong[:3]}")
        return sum(call.usage.completion_tokens for call in said)

    async with env.serving():
        tasks = list(env.taskset)
        await played([tasks[0].with_data(prompt="warm up", replies=[])], told["at_once"], 1)
        began = time.perf_counter()
        tokens = await played(tasks, told["attempts"], told["turns"])
        seconds = time.perf_counter() - began
    requests = len(tasks) * told["attempts"] * told["turns"]
    return {
        "requests": requests,
        "answer_tokens": round(tokens / requests, 1),
        "seconds": round(seconds, 2),
        "tokens_per_s": round(tokens / seconds, 1),
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(asyncio.wait_for(measured(Path(sys.argv[1])), LIMIT_S))))
