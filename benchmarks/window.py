"""What it costs to show a model only the newest pictures of an episode (``agent.images``).

    python benchmarks/window.py [--episodes 32]

Episodes of eight turns, a picture in each, are sampled and learned by ``scratch-vlm:128x4``: with
all pictures in view, and with the newest three. A picture that is left out changes what the prompt
begins with, so that each later turn is read anew and is a row of its own. Results go to
``benchmarks/results/window.json``.
"""

import argparse
import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from selfwright.agents import scratch
from selfwright.agents.chat import Chat, ChatConfig
from selfwright.agents.engines.transformers import TransformersConfig, TransformersPolicy
from selfwright.core.files import write_json
from selfwright.core.images import STORE
from selfwright.core.types import Action, Batch, Example, Observation, Sampling, Step, Task
from selfwright.environments.pictures import Drawings, PicturesConfig, painted
from selfwright.trainers.learning.learner import LearnerConfig, PlainLearner
from selfwright.trainers.learning.loss import NLL

RESULT = Path(__file__).with_name("results") / "window.json"
TURNS = 8
HOT = Sampling(1.0, 1.0, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--episodes", type=int, default=32)
    episodes = int(parser.parse_args().episodes)
    torch.set_num_threads(2)
    found: dict[str, Any] = {"turns": TURNS, "episodes": episodes}
    with tempfile.TemporaryDirectory() as folder:
        words = ["What colour is the shape? Answer red, green, blue or yellow."] * 99
        scratch.make("scratch-vlm:128x4", words, Path(folder), 0)
        for _ in range(2):  # The first time warms up.
            for images in (None, 3):
                found["all" if images is None else f"newest {images}"] = measured(
                    folder, images, episodes
                )
    write_json(RESULT, found)
    print(found)


def measured(model: str, images: int | None, episodes: int) -> dict[str, float]:
    """Seconds to sample and to learn, and the tokens that were learned from."""
    agent = Chat(ChatConfig(images=images))
    began = time.perf_counter()
    examples = asyncio.run(sampled(model, agent, episodes))
    between = time.perf_counter()
    learner = PlainLearner(LearnerConfig(device="cpu", batch_size=len(examples)), model, 0)
    learned = time.perf_counter()
    metrics = learner.update(Batch(NLL(), tuple(examples)), 0.0)
    return {
        "sampled_s": round(between - began, 2),
        "learned_s": round(time.perf_counter() - learned, 2),
        "rows": metrics["train/rows"],
        "tokens": metrics["train/tokens"],
    }


async def sampled(model: str, agent: Chat, episodes: int) -> list[Example]:
    policy = TransformersPolicy(TransformersConfig(device="cpu", model=model), model, 0)
    drawings = Drawings("train", PicturesConfig())

    async def episode(number: int) -> list[Example]:
        task = Task(f"look {number}", "Look.", TURNS)
        history: list[Step] = []
        examples: list[Example] = []
        for turn in range(TURNS):
            shown = STORE.keep(painted(drawings.drawn(number * TURNS + turn)))
            seen = Observation("What colour is the shape?", (shown,))
            prompt = agent.prompt(task, history, seen)
            completion = await policy.complete(prompt, HOT, number)
            history.append(Step(seen, Action(completion.text, completion, prompt), 0.0))
            examples.append(Example(prompt, completion, 1.0))
        return examples

    try:
        every = await asyncio.gather(*(episode(k) for k in range(episodes)))
    finally:
        await policy.close()
    return [one for episode in every for one in episode]


if __name__ == "__main__":
    main()
