"""States that worlds can be brought back to, of episodes that others may begin in the midst of."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

MOST = 256 * 2**20
"""Characters that are kept at most; the oldest episodes are forgotten first."""


@dataclass
class _Episode:
    parent: str
    shared: int
    """So many leading actions are the parent's."""
    actions: list[str]
    states: dict[int, str] = field(default_factory=dict[int, str])
    """By the number of actions that led there."""
    size: int = 0


class Snapshots:
    """By episode and the number of its actions."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._size = 0
        self._episodes: OrderedDict[str, _Episode] = OrderedDict()

    def begin(self, id: str, parent: str = "", actions: Sequence[str] = ()) -> None:
        """An episode begins, where ``actions`` have brought its parent."""
        self._forget(id)
        self._episodes[id] = _Episode(parent, len(actions), [*actions])

    def put(self, id: str, action: str, state: str) -> None:
        """One more action of an episode, and where it led; ``state`` empty: nobody knows."""
        if (episode := self._episodes.get(id)) is None:
            return
        episode.actions.append(action)
        if not state:
            return
        episode.states[len(episode.actions)] = state
        episode.size += len(state)
        self._size += len(state)
        while self._size > self._most:
            self._forget(next(iter(self._episodes)))

    def find(self, id: str, actions: Sequence[str]) -> tuple[int, str]:
        """How many of ``actions``, leading ones of that episode, need not be done again, and the
        state that they led to; 0 and empty if all must be."""
        for count in range(len(actions), 0, -1):
            episode = self._episodes.get(id)
            if episode is None:
                break
            if episode.actions[:count] != [*actions[:count]]:
                continue
            if state := self._state(episode, count):
                return count, state
        return 0, ""

    def _state(self, episode: _Episode | None, count: int) -> str:
        while episode is not None:
            if count > episode.shared or count in episode.states:
                return episode.states.get(count, "")
            episode = self._episodes.get(episode.parent)
        return ""

    def _forget(self, id: str) -> None:
        if (gone := self._episodes.pop(id, None)) is not None:
            self._size -= gone.size
