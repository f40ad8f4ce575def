"""How much a server takes on, and what it says to whoever asks for more."""

from pydantic import Field

from ...core.config import Config


class Limits(Config):
    """Every limit of a server; ``-o limits.KEY=VALUE`` sets one."""

    body_mb: float = Field(default=16.0, gt=0)
    """Of one request."""
    body_s: float = Field(default=30.0, gt=0)
    """How long a request may take to arrive: its head, then its body. Also how long an answer
    may lie unread."""
    connections: int = Field(default=512, ge=1)
    """Open at once, whatever they are for; more are closed unheard."""
    parallel: int = Field(default=128, ge=1)
    """Requests in flight."""
    sessions: int = Field(default=256, ge=1)
    idle_s: float = Field(default=900.0, gt=0)
    """A session or a game that is not used for so long ends."""
    steps: int = Field(default=256, ge=1)
    """The most actions of one session."""
    history_mb: float = Field(default=8.0, gt=0)
    """The most a session may hold of what it was shown."""
    games: int = Field(default=8, ge=1)
    """On the playground, at once."""
    images: int = Field(default=8, ge=0)
    """In one request."""
    image_mb: float = Field(default=4.0, gt=0)
    image_pixels: int = Field(default=16_000_000, ge=1)
    prompt_chars: int = Field(default=200_000, ge=1)
    prompt_tokens: int = Field(default=32_768, ge=1)
    """Where the engine's tokenizer is known; the model's own context may be shorter."""
    tokens: int = Field(default=1024, ge=1)
    """Of one completion."""
    drain_s: int = Field(default=30, ge=1)
    """How long requests in flight may take to end once the server is told to."""
    trial_s: float = Field(default=3600.0, gt=0)
    """How long the comparison of a new adapter with the present one may take."""


class Refusal(Exception):
    """A request that is answered with an error, as OpenAI's servers word it."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        retry_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        """Which of our refusals it is: a word for programs, and for the metrics."""
        self.param = param
        """The field at fault."""
        self.headers = {} if retry_s is None else {"Retry-After": str(retry_s)}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = kinds.get(self.status, kind)
        return {
            "error": {
                "message": str(self),
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }
