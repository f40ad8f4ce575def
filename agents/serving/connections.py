"""Connections of strangers: so many at once, and none that only sits there."""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

from .limits import Limits


def protocol(limits: Limits) -> type[H11Protocol]:
    """What uvicorn speaks, with limits that it lacks.

    It waits for ever for the first head, for the end of any, and for whoever does not read what is
    answered. ``Admission`` meets a request only between these, so the time is taken here.
    """

    class Bounded(H11Protocol):
        _late: asyncio.TimerHandle | None = None
        """Set while they are waited for: no request is being answered, or no answer is read."""

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                # Not even a refusal is said: whoever has come to hold connections would not read.
                transport.abort()
            else:
                self._watch()

        def handle_events(self) -> None:
            super().handle_events()
            self._watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._watch()

        def resume_writing(self) -> None:
            super().resume_writing()
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._unwatch()

        def _watch(self) -> None:
            answering = self.cycle and not self.cycle.response_complete
            if self.transport.is_closing() or (answering and not self.flow.write_paused):
                self._unwatch()
            elif self._late is None:
                # Aborted, as to close is to wait until all that was written has been read.
                self._late = self.loop.call_later(limits.body_s, self.transport.abort)

        def _unwatch(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

    return Bounded
