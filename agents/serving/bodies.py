"""What goes over the wire, in and out."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ...core.checked import all_unicode
from ...core.config import Config
from .games import Split

Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Loose(BaseModel):
    """Unknown fields are ignored, as OpenAI's servers do."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)
    _unicode = field_validator("*")(all_unicode)


class TextPart(Loose):
    type: Literal["text"]
    text: str


class ImageUrl(Loose):
    url: str


class ImagePart(Loose):
    type: Literal["image_url"]
    image_url: ImageUrl


class CalledFunction(Loose):
    name: str = Field(max_length=128)
    arguments: str = "{}"


class ToolCall(Loose):
    function: CalledFunction


class ChatMessage(Loose):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: (
        str
        | Annotated[
            list[Annotated[TextPart | ImagePart, Field(discriminator="type")]],
            Field(max_length=256),
        ]
        | None
    ) = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=64)] | None = None


class FunctionSchema(Loose):
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=dict[str, Any])


class FunctionTool(Loose):
    type: Literal["function"]
    function: FunctionSchema


class NamedChoice(Loose):
    type: Literal["function"]
    function: CalledFunction


class StreamOptions(Loose):
    include_usage: bool = False


class Chat(Loose):
    """A request to ``/v1/chat/completions``. What is left out is as the agent acts."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=1024)
    model: str = ""
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    # Refused where they ask for something.
    n: int | None = None
    functions: list[Any] | None = None
    logprobs: bool | None = None
    response_format: dict[str, Any] | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None


class Wanted(Config):
    """A task, as somebody else's world sets it."""

    instruction: str
    max_steps: int | None = Field(default=None, ge=1)
    """The most actions; None: as many as the server allows."""
    id: str = Field(default="", max_length=256)


class NewSession(Config):
    task: Wanted
    seed: Seed = 0
    """Of sampling."""


class SessionCreated(Config):
    id: str
    max_steps: int
    model: str
    idle_s: float
    """Unused for so long, it ends."""


class Seen(Config):
    text: str
    images: list[str] = Field(default=[], max_length=64)
    """PNG files in base64, oldest first."""
    actions: list[str] = Field(default=[], max_length=10_000)
    """Every action legal now; none: free text."""


class Asked(Config):
    observation: Seen
    reward: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    """What the world paid for the action before."""
    seed: Seed | None = None
    """Of this one action; None: it follows from the session's."""


class Acted(Config):
    action: str
    completion: str
    """What the model said; the action was read from it."""
    valid: bool
    """There is an action, and it is among those listed, if any were."""
    invalid: str
    """Why no action could be read, in words to be shown next; empty if one could."""
    step: int
    """How many actions the session has had, this one included."""
    checkpoint: str
    """The weights that acted."""
    finish: Literal["stop", "length", ""]
    token_ids: list[int]
    logprobs: list[float]
    tokenizer: str
    place: int = 0
    """Above 0: one more action of an answer given before, which nobody was asked for anew."""


class OfferAdapter(Config):
    path: str = Field(min_length=1, max_length=1024)
    """Below the folder of adapters."""
    force: bool = False
    """Without a comparison."""


class WorldTask(Config):
    index: int
    id: str
    instruction: str


class WorldTasks(Config):
    size: int
    tasks: list[WorldTask]


class NewGame(Config):
    world: str
    split: Split = "test"
    index: int = Field(default=0, ge=0, lt=2**31)
    """Of the task, in its split."""
    seed: Seed = 0


class Stage(Config):
    """What a playground game looks like now."""

    id: str
    instruction: str
    max_steps: int
    text: str
    images: list[str]
    actions: list[str]
    steps: int
    completion: str | None
    """What the agent just said; null before its first action."""
    action: str | None
    valid: bool
    reward: float
    """Of the last action."""
    total: float
    over: bool
    success: bool


class Fault(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    error: Fault
