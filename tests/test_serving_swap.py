"""New adapters: swapped in when they win, kept out when they do not, and nobody is cut off."""

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx2
import pytest
from prompts import prompt_of
from serving import Echo, limits, running, served, transformers_policy, until
from test_serving import TASK, opened, refusal, seen

from selfwright.agents.serving.champion import Gate
from selfwright.core.recipe import section
from selfwright.core.statistics import Comparison, compare_outcomes
from selfwright.core.types import Sampling
from selfwright.loop.evaluate import EvalSpec
from selfwright.loop.progress import Progress
from selfwright.loop.serve import Trial

pytestmark = pytest.mark.server


def adapter(base: Path, folder: Path, spread: float, seed: int = 0) -> Path:
    """A LoRA on ``base``: with no spread it changes nothing, with a large one it spoils all."""
    import peft
    import torch
    import transformers

    untyped: Any = peft
    hf: Any = transformers
    model = hf.AutoModelForCausalLM.from_pretrained(base)
    wrapped = untyped.get_peft_model(
        model, peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"])
    )
    generator = torch.Generator().manual_seed(seed)
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            weight.data = spread * torch.randn(weight.shape, generator=generator)
    wrapped.save_pretrained(folder)
    return folder


def by_name(**skill: int) -> Callable[[Path | None, Path], Any]:
    """A trial whose results are those of checkpoints that solve so many of 40 tasks."""

    def outcomes(path: Path | None) -> Mapping[str, bool]:
        most = skill["base" if path is None else path.name]
        return {str(task): task < most for task in range(40)}

    async def trial(champion: Path | None, challenger: Path) -> Comparison:
        await asyncio.sleep(0)
        return compare_outcomes(outcomes(champion), outcomes(challenger))

    return trial


def adapters_in(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / "adapters" / name).mkdir(parents=True)
        (folder / "adapters" / name / "adapter_config.json").write_text("{}")
    return folder / "adapters"


async def settled(client: httpx2.AsyncClient, path: str, **more: Any) -> dict[str, Any]:
    """An offer, once it is decided."""
    response = await client.post("/v1/adapters", json={"path": path, **more})
    assert response.status_code == 202, response.text
    told: dict[str, Any] = response.json()

    async def decided() -> bool:
        told.update((await client.get(f"/v1/adapters/{told['id']}")).json())
        return told["status"] != "running"

    await until(decided)
    return told


def test_who_wins_is_swapped_in_and_who_does_not_is_kept_out(tmp_path: Path) -> None:
    async def main() -> None:
        policy = Echo()
        trial = by_name(base=10, better=25, same=10, luckier=12, worse=2)
        adapters_in(tmp_path, "better", "same", "luckier", "worse")
        what = served(policy, adapters=tmp_path / "adapters", trial=trial)
        async with running(what) as client:
            id = await opened(client)
            for name, verdict in (("same", "inconclusive"), ("luckier", "inconclusive")):
                told = await settled(client, name)
                assert (told["status"], told["comparison"]["verdict"]) == ("kept", verdict)
                assert policy.checkpoint == "base"
            told = await settled(client, "better")
            assert told["status"] == "swapped" and policy.checkpoint == "better"
            compared = told["comparison"]
            assert compared["difference"] == pytest.approx(15 / 40)
            # Fifteen tasks that only the new one solves: two tails of a fair coin.
            assert compared["p_value"] == pytest.approx(2 * 0.5**15)
            told = await settled(client, "worse")
            assert (told["status"], told["comparison"]["verdict"]) == ("kept", "worse")
            acted = (await client.post(f"/v1/sessions/{id}/act", json=seen())).json()
            assert acted["checkpoint"] == "better", "the session goes on, by the new weights"
            told = await settled(client, "worse", force=True)
            assert (told["status"], told["comparison"]) == ("swapped", None)
            assert policy.checkpoint == "worse"
            assert len((await client.get("/v1/adapters")).json()["data"]) == 5
            text = (await client.get("/metrics")).text
            assert 'selfwright_adapters_total{result="kept"} 3.0' in text

    asyncio.run(main())


def test_an_answer_in_flight_ends_by_the_weights_it_began_with(tmp_path: Path) -> None:
    async def main() -> None:
        policy = Echo()
        what = served(policy, adapters=adapters_in(tmp_path, "new"))
        async with running(what) as client:
            one, two = await opened(client), await opened(client)
            policy.free.clear()
            acting = asyncio.create_task(client.post(f"/v1/sessions/{one}/act", json=seen()))
            await policy.begun.wait()
            offer = {"path": "new", "force": True}
            forced = asyncio.create_task(client.post("/v1/adapters", json=offer))

            async def offered() -> bool:
                return bool((await client.get("/v1/adapters")).json()["data"])

            await until(offered)
            # Whoever comes after the offer waits for the new weights.
            later = asyncio.create_task(client.post(f"/v1/sessions/{two}/act", json=seen()))
            response = await client.post("/v1/adapters", json=offer)
            assert refusal(response) == (409, "trial_running")
            assert policy.checkpoint == "base" and not forced.done()
            policy.free.set()
            assert (await acting).json()["checkpoint"] == "base"
            assert (await later).json()["checkpoint"] == "new"
            assert (await forced).json()["status"] == "swapped"

    asyncio.run(main())


def test_what_may_not_be_offered(tmp_path: Path) -> None:
    async def main() -> None:
        folder = adapters_in(tmp_path, "new")
        (tmp_path / "outside").mkdir()
        (tmp_path / "outside" / "adapter_config.json").write_text("{}")
        (folder / "link").symlink_to(tmp_path / "outside")
        (folder / "empty").mkdir()
        async with running(served(Echo(), adapters=folder)) as client:
            bad = (
                "../outside",
                str(tmp_path / "outside"),
                "link",
                "empty",
                "none",
                "a\0b",
                "x" * 999,
            )
            said = set[str]()
            for path in bad:
                response = await client.post("/v1/adapters", json={"path": path, "force": True})
                assert refusal(response) == (404, "no_adapter")
                said.add(response.json()["error"]["message"])
            assert len(said) == 1, "nobody learns what is there and what is not"
            response = await client.post("/v1/adapters", json={"path": "new"})
            assert refusal(response) == (400, "no_trial")
            assert refusal(await client.get("/v1/adapters/x")) == (404, "no_offer")
        async with running(served(Echo())) as client:
            response = await client.post("/v1/adapters", json={"path": "new", "force": True})
            assert refusal(response) == (403, "no_adapters")

    asyncio.run(main())


def test_a_trial_that_fails_or_never_ends_changes_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async def breaks(champion: Path | None, challenger: Path) -> Comparison:
            if challenger.name == "slow":
                await asyncio.Event().wait()
            raise RuntimeError("a secret of the inside")

        policy = Echo()
        what = served(policy, adapters=adapters_in(tmp_path, "new", "slow"), trial=breaks)
        async with running(what, limits(trial_s=0.3)) as client:
            told = await settled(client, "new")
            assert (told["status"], told["said"]) == ("failed", "RuntimeError")
            assert (await client.get("/v1/adapters")).json()["data"] == [told]
            told = await settled(client, "slow")
            assert told["status"] == "failed" and "took longer than 0.3 s" in told["said"]
            assert policy.checkpoint == "base"
            assert (await client.post("/v1/sessions", json=TASK)).status_code == 201

    asyncio.run(main())


class Reader(Echo):
    """Its checkpoint is what the adapter's file says as it is loaded; some cannot be."""

    def __init__(self) -> None:
        super().__init__()
        self.bad = {"bad"}
        self.may_load = asyncio.Event()
        self.may_load.set()
        self.loading = asyncio.Event()

    async def load(self, checkpoint: Path | None) -> None:
        self.loading.set()
        await self.may_load.wait()
        self.checkpoint = inside(checkpoint)
        if self.checkpoint in self.bad:
            raise ZeroDivisionError(f"a secret of {checkpoint}")


def inside(checkpoint: Path | None) -> str:
    return "base" if checkpoint is None else (checkpoint / "adapter_config.json").read_text()


def test_an_offer_is_what_it_was_when_it_was_made(tmp_path: Path) -> None:
    async def main() -> None:
        latest = adapters_in(tmp_path, "latest") / "latest" / "adapter_config.json"
        asked = list[tuple[Path | None, Path]]()

        async def trial(champion: Path | None, challenger: Path) -> Comparison:
            latest.write_text("2")  # whoever trains does not wait for us
            asked.append((champion, challenger))
            assert champion != challenger
            skills = [10 if one is None else int(inside(one)) for one in (champion, challenger)]
            one, two = ({str(k): k < skill for k in range(40)} for skill in skills)
            return compare_outcomes(one, two)

        policy = Reader()
        what = served(policy, adapters=tmp_path / "adapters", trial=trial)
        async with running(what) as client:
            latest.write_text("25")
            told = await settled(client, "latest")
            assert (told["status"], policy.checkpoint) == ("swapped", "25")
            told = await settled(client, "latest")
            assert (told["status"], told["comparison"]["verdict"]) == ("kept", "worse")
            kept, worse = asked[1]
            assert kept and kept == asked[0][1], "what was found of it before still holds"
            assert kept.is_dir() and not worse.exists()
            latest.write_text("bad")
            told = await settled(client, "latest", force=True)
            assert (told["status"], policy.checkpoint) == ("failed", "25")
        assert not kept.exists()

    asyncio.run(main())


def test_the_time_for_a_trial_does_not_cut_off_the_swap(tmp_path: Path) -> None:
    async def main() -> None:
        policy = Reader()
        policy.may_load.clear()
        trial = by_name(base=10, new=25)
        what = served(policy, adapters=adapters_in(tmp_path, "new"), trial=trial)
        async with running(what, limits(trial_s=0.3)) as client:
            settling = asyncio.create_task(settled(client, "new"))
            await policy.loading.wait()
            # The same loop has both timers, so the trial's comes first.
            await asyncio.sleep(0.31)
            policy.may_load.set()
            assert (await settling)["status"] == "swapped"

    asyncio.run(main())


def test_without_any_weights_nothing_is_answered_until_others_are_there(tmp_path: Path) -> None:
    async def main() -> None:
        folder = adapters_in(tmp_path, "new", "good")
        (folder / "new" / "adapter_config.json").write_text("bad")
        policy = Reader()
        policy.bad.add("base")
        async with running(served(policy, adapters=folder)) as client:
            id = await opened(client)
            talk = {"messages": [{"role": "user", "content": "x"}]}

            async def answers() -> list[httpx2.Response]:
                return [
                    await client.get("/health"),
                    await client.post("/v1/chat/completions", json=talk),
                    await client.post(f"/v1/sessions/{id}/act", json=seen()),
                ]

            told = await settled(client, "new", force=True)
            assert (told["status"], told["said"]) == ("failed", "ZeroDivisionError")
            for response in await answers():
                assert refusal(response) == (503, "no_weights")
                assert str(tmp_path) not in response.text and "secret" not in response.text
            assert policy.asked == []
            assert (await settled(client, "good", force=True))["status"] == "swapped"
            assert [response.status_code for response in await answers()] == [200] * 3

    asyncio.run(main())


def test_an_adapter_that_does_not_fit_leaves_the_old_one(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    async def main() -> None:
        base = model_folder("qwen3")
        good = adapter(base, tmp_path / "adapters" / "good", 1.0)
        broken = adapter(base, tmp_path / "adapters" / "broken", 1.0, seed=1)
        weights = broken / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-64])
        policy = transformers_policy(base)
        prompt, sampling = prompt_of("Make 6"), Sampling(0.0, 1.0, 8)
        asked = {"messages": [{"role": "user", "content": "Make 6"}]}
        async with running(served(policy, adapters=tmp_path / "adapters")) as client:

            async def says() -> str:
                told = (await client.post("/v1/chat/completions", json=asked)).json()
                return told["choices"][0]["message"]["content"]

            before = await says()
            assert (await settled(client, "good", force=True))["status"] == "swapped"
            after = await says()
            direct = transformers_policy(base)
            assert before == (await direct.complete(prompt, sampling, 0)).text
            await direct.load(good)
            assert after == (await direct.complete(prompt, sampling, 0)).text != before
            await direct.close()
            told = await settled(client, "broken", force=True)
            assert told["status"] == "failed"
            assert told["said"].startswith("ModelError: cannot load the adapter")
            assert await says() == after
            assert (await client.get("/health")).status_code == 200

    asyncio.run(main())


def test_a_trial_plays_both_on_the_same_tasks(player: Path, tmp_path: Path) -> None:
    idle, bad = adapter(player, tmp_path / "idle", 0.0), adapter(player, tmp_path / "bad", 5.0)
    world, fleet = section(
        "environment", "countdown", [f"environment.{o}" for o in ("numbers=2", "largest=9")]
    )
    agent, judge = section("agent", "chat")[0], section("judge", "reward")[0]
    engine, _ = section("policy", "transformers", (), {"model": str(player), "max_tokens": 8})
    spec = EvalSpec(world, agent, fleet, "train", 80, 0, 0.0, 0, judge)

    async def main() -> list[Comparison]:
        trial = Trial(spec, engine, str(player), Progress())
        return [await trial(bad, idle), await trial(idle, bad), await trial(None, idle)]

    up, down, same = asyncio.run(main())
    assert (up.verdict, down.verdict, same.verdict) == ("better", "worse", "inconclusive")
    assert up.tasks == 80 and up.difference == -down.difference > 0
    # An adapter that changes nothing plays as the base does.
    assert same.only_a == same.only_b == 0


def test_the_gate_lets_writers_in_alone_and_before_later_readers() -> None:
    async def main() -> list[str]:
        gate, log = Gate(), list[str]()

        async def read(name: str) -> None:
            async with gate.reading():
                log.append(f"{name} in")
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                log.append(f"{name} out")

        async def write(name: str) -> None:
            async with gate.writing():
                log.append(f"{name} in")
                await asyncio.sleep(0)
                log.append(f"{name} out")

        cancelled = asyncio.create_task(write("never"))
        async with gate.reading():
            await asyncio.sleep(0)
            cancelled.cancel()
            await asyncio.gather(cancelled, return_exceptions=True)
        jobs = (read("a"), read("b"), write("w"), read("c"), write("v"), read("d"))
        async with asyncio.timeout(10):
            await asyncio.gather(*jobs)
        return log

    log = asyncio.run(main())
    assert set(log[:4]) == {"a in", "b in", "a out", "b out"}
    assert log[4:8] == ["w in", "w out", "v in", "v out"]
    assert set(log[8:]) == {"c in", "d in", "c out", "d out"}
