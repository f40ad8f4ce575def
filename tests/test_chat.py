"""The talking agent: what a model is shown, and that it only ever grows at its end."""

from prompts import grey, prompt_of

from selfwright.agents.chat import Chat, ChatConfig
from selfwright.agents.conversation import GONE
from selfwright.core.types import Action, Completion, Message, Observation, Parsed, Step, Task

PICTURE, NEW = grey(1), grey(2)
TASK = Task("t", "Make 24.", 4)


def history(turns: int) -> list[Step]:
    return [
        Step(
            Observation(f"seen {k}", (PICTURE,) if k == 1 else ()),
            Action(f"act {k}", Completion(f" act {k} ", (k, k + 1))),
            0.0,
        )
        for k in range(turns)
    ]


def said(k: int) -> Message:
    return Message("assistant", (f" act {k} ",), token_ids=(k, k + 1))


def test_the_task_then_turn_by_turn() -> None:
    agent = Chat(ChatConfig())
    prompt = agent.prompt(TASK, history(2), Observation("now", (NEW,)))
    assert prompt.messages == (
        Message("user", ("Make 24.\nseen 0",)),
        said(0),
        Message("user", (PICTURE, "seen 1")),
        said(1),
        Message("user", (NEW, "now")),
    )
    assert prompt.images == (PICTURE, NEW) and prompt.tools == ()
    assert agent.prompt(TASK, [], Observation("")) == prompt_of("Make 24.")
    brief = Chat(ChatConfig(system="Be brief."))
    assert brief.prompt(TASK, history(2), Observation("now")).messages == (
        Message("system", ("Be brief.",)),
        *agent.prompt(TASK, history(2), Observation("now")).messages,
    )
    assert agent.parse(" 3 + 4\n", Observation("")) == Parsed("3 + 4")


def test_prompts_only_grow() -> None:
    agent = Chat(ChatConfig())
    for turn in range(1, 4):
        steps = history(4)
        before = agent.prompt(TASK, steps[: turn - 1], steps[turn - 1].observation).messages
        after = agent.prompt(TASK, steps[:turn], steps[turn].observation).messages
        assert after[: len(before)] == before
        assert after[len(before)] == said(turn - 1)


def test_a_window_keeps_the_task_and_the_last_attempts() -> None:
    agent = Chat(ChatConfig(window=2))
    assert agent.prompt(TASK, history(3), Observation("now")).messages == (
        Message("user", ("Make 24.\nseen 0",)),
        said(2),
        Message("user", ("now",)),
    )
    assert len(agent.prompt(TASK, history(1), Observation("now")).messages) == 3


def test_only_the_newest_pictures_are_shown() -> None:
    now = Observation("now", (NEW, PICTURE))

    def shown(images: int | None) -> tuple[Message, ...]:
        return Chat(ChatConfig(images=images)).prompt(TASK, history(2), now).messages

    whole = shown(None)
    assert shown(3) == shown(9) == whole
    for images, kept in ((2, (NEW, PICTURE)), (1, (GONE, PICTURE)), (0, (GONE, GONE))):
        *before, last = shown(images)
        assert last.parts == (*kept, "now")
        assert before == [*whole[:2], Message("user", (GONE, "seen 1")), said(1)]


def test_listed_actions_are_shown_below_what_the_world_says() -> None:
    seen = Observation("A room.", actions=("go north", "take coin"))
    step = Step(seen, Action("go north", Completion("go north", (1,), tokenizer="mine")), 0.0)
    shown = Chat(ChatConfig()).prompt(TASK, [step], Observation("A hall.", actions=("go south",)))
    assert [message.text for message in shown.messages] == [
        "Make 24.\nA room.\nActions: go north; take coin",
        "go north",
        "A hall.\nActions: go south",
    ]
    assert shown.messages[1].tokenizer == "mine"
    hidden = Chat(ChatConfig(list_actions=False)).prompt(TASK, [], seen)
    assert hidden == prompt_of("Make 24.\nA room.")


def test_of_a_long_list_the_first_actions_are_shown_and_how_many_more_there_are() -> None:
    seen = Observation("A room.", actions=tuple(f"take {k}" for k in range(7)))
    shown = Chat(ChatConfig(most_actions=5)).prompt(TASK, [], seen)
    words = "Make 24.\nA room.\nActions: take 0; take 1; take 2; take 3; take 4"
    assert shown == prompt_of(f"{words}; and 2 more")
    whole = Chat(ChatConfig(most_actions=7)).prompt(TASK, [], seen)
    assert whole == prompt_of(f"{words}; take 5; take 6")
