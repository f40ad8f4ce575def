"""Tasks that a policy writes for itself to practise on."""

import random
from collections.abc import Sequence

from ...core.play.asking import ask
from ...core.protocols import Context
from ...core.seeds import derive
from ...core.types import Judged, Message, Metrics, Prompt, Start, Task

REQUEST = "These are tasks. Write one more of the same form, a little easier, and nothing else."
SHOWN = 4
"""Tasks that a request shows."""


async def practised(
    context: Context,
    known: Sequence[Task],
    wanted: int,
    attempts: int,
    turns: int | None,
    seed: int,
) -> tuple[list[Judged], Metrics]:
    """Episodes of tasks that the policy wrote, ``attempts`` each, played and judged.

    A task is written as its id. Only what the world knows as a training task by that id counts, so
    that nothing unsolvable or held out is practised; nor is any of ``known``, or one twice.

    Raises:
        PolicyError: the policy answered less than half of ``wanted`` requests.
    """
    if not (wanted and known):
        return [], {}
    prompts: list[Prompt] = []
    for k in range(wanted):
        shown = random.Random(derive(seed, "shown", k)).sample(list(known), min(SHOWN, len(known)))
        words = "\n".join([REQUEST, *(task.id for task in shown)])
        prompts.append(Prompt((Message("user", (words,)),)))
    completions = await ask(
        context.policy, prompts, context.sampling_of("policy"), derive(seed, "write")
    )
    taken = {task.id for task in known}
    valid: list[Task] = []
    for one in completions:
        try:
            task = await context.named("" if one is None else one.text.strip())
        except ValueError:
            continue
        if task.id not in taken:
            valid.append(task)
            taken.add(task.id)
    starts = [
        Start(task, derive(seed, task.id), attempt, turns=turns)
        for task in valid
        for attempt in range(attempts)
    ]
    played = await context.attempt(starts) if starts else []
    return played, {"practice/written": float(wanted), "practice/valid": float(len(valid))}
