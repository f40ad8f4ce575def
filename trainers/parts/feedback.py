"""What was wrong with an attempt, in words, and the prompts that ask for a better one."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from ...core.errors import RecipeError
from ...core.play.asking import ask
from ...core.play.players import without
from ...core.protocols import Context
from ...core.seeds import derive
from ...core.types import Judged, Observation, Prompt, Step, Trajectory
from ..learning.examples import asked, prompted
from .credit import by_task, score
from .lines import read_lines

QUESTION = (
    "That attempt did not succeed. Say in one or two sentences what is wrong with it and what "
    "would have to change. Do not give the answer itself."
)
Source: TypeAlias = Literal["world", "judge", "policy", "none"]
About: TypeAlias = Literal["last", "any"]
Pool: TypeAlias = Literal["unsolved", "failed"]
NO_FEEDBACK = "That attempt did not succeed. Try again."


@dataclass(frozen=True)
class Item:
    """An attempt that failed, and what somebody says about one of its actions."""

    judged: Judged
    step: int
    """Index of the action that the feedback is about."""
    feedback: str = ""
    refinement: str = ""
    """A better answer that somebody wrote; empty: nobody did."""

    @property
    def trajectory(self) -> Trajectory:
        return self.judged.trajectory

    @property
    def old_step(self) -> Step:
        """The action to be refined; the first of those in its answer."""
        return self.trajectory.steps[self.step]

    @property
    def end(self) -> int:
        """Index of the step after its answer."""
        after = (k for k in self.trajectory.answers if k > self.step)
        return next(after, len(self.trajectory.steps))

    @property
    def old_text(self) -> str:
        """All actions of its answer."""
        steps = self.trajectory.steps[self.step : self.end]
        return "\n".join(step.action.text for step in steps)


class Line(BaseModel):
    """A line of a feedback file: ``{"trajectory": 3, "step": 0, "feedback": "..."}``.

    With ``"refinement": "..."`` it also says what would have been better.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    trajectory: int = Field(ge=0)
    """Row of the trajectories' file, from 0."""
    step: int = Field(ge=0)
    feedback: str = Field(min_length=1)
    refinement: str = ""


def read_feedback(path: Path, given: Sequence[Judged], threshold: float) -> list[Item]:
    """The items of a feedback file about the trajectories ``given``.

    Raises:
        ValueError: listing every line that is malformed, or about something that is not there, or
            about an attempt that did not fail.
    """
    return read_lines(
        path, lambda line: _item(Line.model_validate(line), given, threshold), "feedback"
    )


def _item(line: Line, given: Sequence[Judged], threshold: float) -> Item:
    if line.trajectory >= len(given):
        raise ValueError(f"trajectory {line.trajectory} is unknown, there are {len(given)}")
    judged = given[line.trajectory]
    if line.step >= len(judged.trajectory.steps):
        count = len(judged.trajectory.steps)
        raise ValueError(f"step {line.step} of trajectory {line.trajectory} is none of its {count}")
    if judged.trajectory.steps[line.step].action.place:
        raise ValueError(f"step {line.step} of trajectory {line.trajectory} goes on with an answer")
    if judged.verdict.score is None or judged.verdict.score >= threshold:
        raise ValueError(f"trajectory {line.trajectory} did not fail: {judged.verdict.score}")
    return Item(judged, line.step, line.feedback, line.refinement)


async def known(items: Sequence[Item], context: Context) -> list[Item]:
    """The items, whose stored tasks are again the world's own.

    Raises:
        RecipeError: listing every task that is none of the world's training tasks.
    """
    found: list[Item] = []
    faults: dict[str, None] = {}
    for item in items:
        try:
            task = await context.named(item.trajectory.task.id)
        except ValueError as error:
            faults[str(error)] = None
        else:
            trajectory = prompted(replace(item.trajectory, task=task), context.agent)
            found.append(replace(item, judged=replace(item.judged, trajectory=trajectory)))
    if faults:
        raise RecipeError("trainer.trajectories: " + "; ".join(faults))
    return found


def failures(
    judged: Sequence[Judged], threshold: float, pool: Pool, about: About, seed: int
) -> list[Item]:
    """One failed attempt per task, and the action about which something is to be said."""
    items: list[Item] = []
    for group in by_task(judged):
        failed = [one for one in group if score(one) < threshold]
        solved = len(failed) < len(group)
        failed = [one for one in failed if one.trajectory.steps]
        if failed and not (solved and pool == "unsolved"):
            rng = random.Random(derive(seed, group[0].trajectory.task.id))
            one = rng.choice(failed)
            answers = one.trajectory.answers
            items.append(Item(one, rng.choice(answers) if about == "any" else answers[-1]))
    return items


async def with_feedback(
    items: Sequence[Item],
    source: Source,
    context: Context,
    seed: int,
) -> list[Item]:
    """The items with their feedback; those about which nothing was said are left out."""
    if source == "policy":
        prompts = [_asked(item, context) for item in items]
        completions = await ask(context.policy, prompts, context.sampling_of("policy"), seed)
        words = ["" if one is None else one.text.strip() for one in completions]
    else:
        words = [_feedback(item, source) for item in items]
    return [replace(i, feedback=text) for i, text in zip(items, words, strict=True) if text]


def _feedback(item: Item, source: Source) -> str:
    if source == "none":
        return NO_FEEDBACK
    if source == "judge":
        return item.judged.verdict.feedback
    later = item.trajectory.steps[item.end :]
    return later[0].observation.text if later else item.trajectory.final.text


def _asked(item: Item, context: Context) -> Prompt:
    return _continued(item, QUESTION, context)


def _continued(item: Item, text: str, context: Context) -> Prompt:
    before = without(item.trajectory.steps[: item.end], item.old_step.action.left_out)
    return context.agent.prompt(item.trajectory.task, before, Observation(text))


def refining(item: Item, layout: Literal["conversation", "blocks"], context: Context) -> Prompt:
    """The prompt that asks for something better than ``item.old_step``, given the feedback.

    ``conversation``: the feedback stands where the world's next words would. ``blocks``: the
    prompt as it was, then labelled blocks of the old answer and of the feedback.
    """
    if layout == "conversation":
        return _continued(item, item.feedback, context)
    blocks = f"OLD ANSWER:\n{item.old_text}\n\nFEEDBACK:\n{item.feedback}\n\nNEW ANSWER:"
    return asking_more(asked(item.trajectory, item.step), blocks)


def asking_more(prompt: Prompt, text: str) -> Prompt:
    """``prompt``, whose last message goes on with a paragraph of ``text``."""
    *before, last = prompt.messages
    *parts, end = last.parts if isinstance(last.parts[-1], str) else (*last.parts, "")
    more = replace(last, parts=(*parts, f"{end}\n\n{text}"))
    return replace(prompt, messages=(*before, more))


def shuffled(items: Sequence[Item], seed: int) -> list[Item]:
    """Every item with the feedback of another one, if there is another."""
    order = list(range(len(items)))
    random.Random(seed).shuffle(order)
    donors = dict(zip(order, [*order[1:], *order[:1]], strict=True))
    return [replace(item, feedback=items[donors[k]].feedback) for k, item in enumerate(items)]
