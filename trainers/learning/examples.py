"""From trajectories to examples: turns to imitate or to reinforce."""

from collections.abc import Sequence
from dataclasses import replace

from ...core.errors import LearnerError
from ...core.protocols import Agent
from ...core.types import Completion, Example, Prompt, Trajectory


def example(trajectory: Trajectory, turn: int, weight: float) -> Example:
    """One turn to imitate: its ids as sampled, or its text where it was not sampled.

    The log-probabilities of sampling are left out: imitation does not compare with the past.
    """
    action = trajectory.steps[turn].action
    completion = action.completion
    return Example(
        asked(trajectory, turn),
        Completion(completion.text, completion.token_ids, tokenizer=completion.tokenizer),
        weight,
    )


def asked(trajectory: Trajectory, turn: int) -> Prompt:
    """What an action answered.

    Raises:
        LearnerError: it was stored by a version that did not keep prompts, or nobody was asked.
    """
    prompt = trajectory.steps[turn].action.prompt
    if not prompt.messages:
        raise LearnerError(
            f"the episode {trajectory.id!r} of {trajectory.task.id!r} holds no prompts: nobody was "
            "asked, or a version of selfwright stored it that did not keep them; play it again"
        )
    return prompt


def prompted(trajectory: Trajectory, agent: Agent) -> Trajectory:
    """The same, with prompts where there are none, as the agent makes them today."""
    steps = list(trajectory.steps)
    for turn, step in enumerate(steps):
        if not (step.action.prompt.messages or step.action.place):
            prompt = agent.prompt(trajectory.task, steps[:turn], step.observation)
            steps[turn] = replace(step, action=replace(step.action, prompt=prompt))
    return replace(trajectory, steps=tuple(steps))


def reinforce(trajectory: Trajectory, advantages: Sequence[float]) -> list[Example]:
    """Every turn of its own, as sampled, with its log-probabilities of then.

    Args:
        advantages: one for each of ``trajectory.turns``.
    """
    return [
        Example(
            asked(trajectory, turn),
            trajectory.steps[turn].action.completion,
            advantage,
        )
        for turn, advantage in zip(trajectory.turns, advantages, strict=True)
    ]


def imitate(trajectory: Trajectory, weight: float = 1.0) -> list[Example]:
    """Every turn of its own."""
    return [example(trajectory, turn, weight) for turn in trajectory.turns]
