"""The playground in a real browser: by keyboard alone, in a narrow window, with hostile text."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

import httpx2
import pytest
from playwright.async_api import Page, async_playwright
from prompts import png
from serving import Echo, limits, running, served, transformers_policy
from test_rollout import said
from test_serving import refusal

from selfwright.agents.serving.playground import playground
from selfwright.agents.serving.room import Served
from selfwright.core.chromium import chromium as found
from selfwright.core.config import Config, Fleet
from selfwright.core.hosting.pool import Worlds, open_worlds
from selfwright.core.images import picture
from selfwright.core.types import (
    Completion,
    Image,
    Observation,
    Prompt,
    Sampling,
    Task,
    TimeStep,
    WorldSpec,
)

pytestmark = [pytest.mark.server, pytest.mark.browser]

chromium = cache(found)
"""One for all tests of this process."""
HOSTILE = "<img src=x onerror=\"document.title='owned'\"> \u202egnp.exe"


def square(step: int) -> Image:
    """A square that moves."""
    rows = b"".join(
        b"\0"
        + b"".join(
            b"\xd0\x60\x20"
            if abs(x - 20 * step - 20) < 12 and abs(y - 40) < 12
            else b"\x20\x50\x80"
            for x in range(160)
        )
        for y in range(80)
    )
    return picture(png(160, 80, rows=rows))


class Gallery:
    """Shows a picture and text that is up to no good; solved by the fourth action."""

    Config = Config
    spec = WorldSpec(isolation="inline")

    def __init__(self, config: Config) -> None:
        self._done = 0

    def tasks(self, split: str) -> list[Task]:
        return [Task(f"{split}-{k}", f"Task {k}: {HOSTILE}", 3 + k) for k in range(3)]

    async def reset(self, task: Task, seed: int) -> Observation:
        self._done, self._task = 0, task
        return self._seen()

    async def step(self, action: str) -> TimeStep:
        self._done += 1
        if self._task.id.endswith("2") and self._done == 2:
            raise ZeroDivisionError("a secret of the world")
        won = self._done == 4
        return TimeStep(self._seen(), float(won), won, success=won)

    def _seen(self) -> Observation:
        actions = ("go left", "go right", HOSTILE)
        return Observation(f"Room {self._done}. {HOSTILE}", (square(self._done),), actions)

    async def close(self) -> None:
        pass


def opener(name: str, **fleet: Any) -> Callable[[], Awaitable[Worlds]]:
    async def open() -> Worlds:
        return await open_worlds(name, {}, Fleet.model_validate({"parallel": 8, **fleet}))

    return open


GALLERY = {"gallery": opener(f"{__name__}:Gallery")}


@asynccontextmanager
async def browsing(
    url: str, width: int = 1100, height: int = 900, dark: bool = False
) -> AsyncGenerator[Page]:
    async with async_playwright() as play:
        browser = await play.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page = await browser.new_page(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
        )
        page.set_default_timeout(20_000)
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
        try:
            await page.goto(url)
            yield page
            assert faults == []
        finally:
            await browser.close()


def with_page(
    use: Callable[[Page, httpx2.AsyncClient], Coroutine[Any, Any, None]],
    policy: Any = None,
    worlds: Any = GALLERY,
    **view: Any,
) -> None:
    async def main() -> None:
        what = served(policy() if policy else Echo(), worlds=worlds)
        async with running(what) as client, browsing(str(client.base_url), **view) as page:
            await use(page, client)

    asyncio.run(main())


async def state(page: Page, text: str) -> None:
    """Waits until the page says so."""
    await page.wait_for_function(
        "t => document.getElementById('state').textContent.includes(t)", arg=text
    )


async def snap(page: Page, name: str, folder: Path) -> None:
    await page.screenshot(path=folder / f"{name}.png", full_page=True)


def test_by_keyboard_alone(tmp_path: Path) -> None:
    async def use(page: Page, client: httpx2.AsyncClient) -> None:
        await state(page, "Ready")

        async def focused() -> str:
            return await page.evaluate("document.activeElement.id")

        async def tab_to(id: str) -> None:
            for _ in range(15):
                await page.keyboard.press("Tab")
                if await focused() == id:
                    width = await page.evaluate(
                        "getComputedStyle(document.activeElement).outlineWidth"
                    )
                    assert width == "3px", "one sees where the keyboard is"
                    return
            raise AssertionError(f"{id} is not reached by Tab")

        await tab_to("task")
        await page.keyboard.press("ArrowDown")  # the second task: four steps
        await page.wait_for_function(
            "() => document.getElementById('steps').textContent === '0 of 4'"
        )
        await state(page, "Ready")
        await tab_to("step")
        await page.keyboard.press("Enter")
        await state(page, "Step 1 of 4")
        assert await focused() == "step"
        await page.keyboard.press("Tab")
        assert await focused() == "play"
        await page.keyboard.press("Space")
        await page.wait_for_function("() => !document.getElementById('pause').disabled")
        assert await focused() == "pause"
        await page.keyboard.press("Space")
        await state(page, "Paused")
        assert await focused() == "play"
        await page.keyboard.press("Enter")
        await state(page, "Solved after 4 steps")
        assert await page.locator("#log li").count() == 4
        assert await page.locator("#total").text_content() == "1"
        assert await focused() == "reset"
        await snap(page, "solved", tmp_path)
        await page.keyboard.press("Enter")
        await state(page, "Ready")
        assert await page.locator("#log li").count() == 0

    with_page(use)


def test_what_worlds_and_models_say_stays_text(tmp_path: Path) -> None:
    async def use(page: Page, client: httpx2.AsyncClient) -> None:
        await state(page, "Ready")
        await page.click("#step")
        await state(page, "Step 1 of 3")
        for place in ("#seen", "#instruction", "#log", "#actions"):
            shown = await page.locator(place).text_content() or ""
            assert "<img src=x onerror" in shown and "\u202e" not in shown and "\\u202e" in shown
        assert await page.title() == "Playground"
        assert await page.locator("img").count() == 1
        loaded = "document.querySelector('#shots img').naturalWidth"
        assert await page.evaluate(loaded) == 160
        assert await page.locator("#log").text_content()
        assert "not legal" in (await page.locator("#log").text_content() or "")
        # Even a script that got in could not run, nor send anything anywhere.
        await page.evaluate("document.body.insertAdjacentHTML('beforeend', '<b id=b>x</b>')")
        answer = await client.get("/")
        rules = answer.headers["content-security-policy"]
        assert "default-src 'none'" in rules and "unsafe" not in rules
        assert "http" not in playground()[0].split("<script>")[0], "nothing comes from elsewhere"

    with_page(use)


@pytest.mark.parametrize("dark", [False, True])
def test_in_a_narrow_window_nothing_sticks_out(tmp_path: Path, dark: bool) -> None:
    async def use(page: Page, client: httpx2.AsyncClient) -> None:
        await state(page, "Ready")
        await page.click("#play")
        await state(page, "Over after 3 steps, not solved")
        width = await page.evaluate("document.documentElement.scrollWidth")
        assert width <= 360
        for button in ("step", "play", "pause", "reset"):
            box = await page.locator(f"#{button}").bounding_box()
            assert box and box["height"] >= 44 and box["x"] + box["width"] <= 360
        assert await page.evaluate(CONTRAST) >= 4.5
        await snap(page, f"narrow-{'dark' if dark else 'light'}", tmp_path)

    with_page(use, width=360, height=740, dark=dark)


CONTRAST = """
() => {
  const light = (text) => {
    const [r, g, b] = text.match(/[\\d.]+/g).slice(0, 3).map(Number).map((v) => v / 255)
      .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (one) => {
    for (; one; one = one.parentElement) {
      const colour = getComputedStyle(one).backgroundColor;
      if (!colour.endsWith(", 0)")) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  let least = 21;
  const texts = "h1, h2, label, dt, dd, p, li, span, button:not(:disabled)";
  for (const one of document.querySelectorAll(texts)) {
    if (!one.textContent.trim() || !one.getClientRects().length) continue;
    const [a, b] = [light(getComputedStyle(one).color), light(behind(one))].sort((x, y) => y - x);
    least = Math.min(least, (a + 0.05) / (b + 0.05));
  }
  return least;
}
"""
"""The least contrast of any text on the page, as WCAG 2 counts it."""


def test_a_world_that_breaks_is_said_and_another_game_begins() -> None:
    async def use(page: Page, client: httpx2.AsyncClient) -> None:
        await state(page, "Ready")
        await page.select_option("#task", "2")
        await state(page, "Ready")
        await page.click("#step")
        await state(page, "Step 1 of 5")
        task = client.post("/playground/games", json={"world": "gallery", "index": 2})
        id = (await task).json()["id"]
        assert (await client.post(f"/playground/games/{id}/step")).status_code == 200
        response = await client.post(f"/playground/games/{id}/step")
        assert refusal(response) == (502, "world_failed")
        assert "secret" not in response.text
        assert refusal(await client.post(f"/playground/games/{id}/step")) == (404, "no_game")
        await page.click("#reset")
        await state(page, "Ready")

    with_page(use)


def test_a_token_is_asked_for() -> None:
    async def main() -> None:
        what = served(Echo(), worlds=GALLERY)
        token = "s\u00e9same \u2603"
        async with running(what, token=token) as client, async_playwright() as play:
            browser = await play.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
            page = await browser.new_page()
            await page.goto(str(client.base_url))
            await page.wait_for_selector("#door:not([hidden])")
            await page.keyboard.type(token)
            await page.keyboard.press("Enter")
            await state(page, "Ready")
            assert await page.locator("#door").is_hidden()
            await browser.close()

    asyncio.run(main())


def test_what_is_no_action_is_answered_in_words_in_a_game() -> None:
    async def main() -> None:
        what = Served("tiny", said("not so", "left"), worlds=GALLERY)
        async with running(what) as client:
            begun = (await client.post("/playground/games", json={"world": "gallery"})).json()
            path = f"/playground/games/{begun['id']}/step"
            mute, acted = [(await client.post(path)).json() for _ in "ab"]
        assert mute["text"] == f"Say one word, not 'not so'. You saw {begun['text']!r}."
        assert (mute["valid"], mute["steps"], mute["images"]) == (False, 1, begun["images"])
        assert acted["text"].startswith("Room 1.") and acted["steps"] == 2

    asyncio.run(main())


def test_games_are_few_and_end() -> None:
    now = 0.0

    async def main() -> None:
        nonlocal now
        what = served(Echo(), worlds={"gallery": opener(f"{__name__}:Gallery", parallel=2)})
        async with running(what, limits(games=2, idle_s=60.0), clock=lambda: now) as client:
            asked = {"world": "gallery", "index": 1}
            ids = [(await client.post("/playground/games", json=asked)).json()["id"] for _ in "ab"]
            response = await client.post("/playground/games", json=asked)
            assert refusal(response) == (429, "too_many_games")
            assert (await client.delete(f"/playground/games/{ids[0]}")).status_code == 204
            # Its instance of the world is free again, as is one whose game was left alone.
            assert (await client.post("/playground/games", json=asked)).status_code == 201
            now = 61.0
            for _ in range(2):
                assert (await client.post("/playground/games", json=asked)).status_code == 201
            bad = {"world": "other"}, {"world": "gallery", "index": 99}
            for one in bad:
                response = await client.post("/playground/games", json=one)
                assert response.status_code in (404, 429)
            tasks = (await client.get("/playground/worlds/gallery/tasks?count=2&begin=1")).json()
            assert tasks["size"] == 3 and [one["index"] for one in tasks["tasks"]] == [1, 2]
            response = await client.get("/playground/worlds/other/tasks")
            assert refusal(response) == (404, "no_world")

    asyncio.run(main())


def test_games_left_alone_give_their_worlds_back_though_nobody_asks() -> None:
    held = list[Worlds]()

    async def open() -> Worlds:
        held.append(await opener(f"{__name__}:Gallery", parallel=1)())
        return held[0]

    async def main() -> None:
        what = served(Echo(), worlds={"gallery": open})
        async with running(what, limits(idle_s=0.2)) as client:
            response = await client.post("/playground/games", json={"world": "gallery", "index": 1})
            assert response.status_code == 201
            async with asyncio.timeout(20), held[0].lease():
                pass

    asyncio.run(main())


AGAIN = """
() => {
  const real = fetch;
  window.asked = 0;
  window.fetch = (path, ...more) => {
    window.asked += path.endsWith("/step");
    return real(path, ...more);
  };
  const [steps, play, pause] = ["steps", "play", "pause"].map((id) => document.getElementById(id));
  new MutationObserver((_, watch) => {
    watch.disconnect();
    setTimeout(() => { pause.click(); play.click(); });
  }).observe(steps, { childList: true });
  play.click();
}
"""
"""Plays; as soon as the first step is there, pauses and plays again. Counts the steps asked for."""


def test_paused_and_played_again_it_plays_once() -> None:
    class Slow(Echo):
        """Once it has answered, it waits for ``may``."""

        may = asyncio.Event()

        async def complete(self, prompt: Prompt, sampling: Sampling, seed: int) -> Completion:
            if self.asked:
                await self.may.wait()
            return await super().complete(prompt, sampling, seed)

    policy = Slow()

    async def use(page: Page, client: httpx2.AsyncClient) -> None:
        await state(page, "Ready")
        await page.select_option("#task", "1")
        await page.wait_for_function(
            "() => document.getElementById('steps').textContent === '0 of 4'"
        )
        await page.evaluate(AGAIN)
        await page.wait_for_function("() => window.asked === 2")
        # The first loop's sleep began earlier and is shorter, so it has woken when this one ends.
        await page.evaluate("() => new Promise((done) => setTimeout(done, 700))")
        assert await page.evaluate("window.asked") == 2
        policy.may.set()
        await state(page, "Solved after 4 steps")

    with_page(use, lambda: policy)


def test_a_trained_agent_is_watched_in_its_own_world(player: Path, tmp_path: Path) -> None:
    async def main() -> None:
        worlds = {"countdown": opener("countdown")}
        policy = transformers_policy(player)
        async with (
            running(served(policy, policy.tokens, worlds=worlds)) as client,
            browsing(str(client.base_url)) as page,
        ):
            await state(page, "Ready")
            await page.click("#step")
            await page.wait_for_selector("#log li")
            await snap(page, "countdown", tmp_path)

    asyncio.run(main())
