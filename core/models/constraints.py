"""Which tokens a constraint allows next, for whoever samples under it and whoever learns from that.

Both ask the same class, so that a learner rules out what the sampler ruled out. Imports no torch.
"""

import json
from collections.abc import Iterable, Sequence, Set
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import PolicyError
from ..types import Constraint
from .tokens import ChatTokens

Ids = NDArray[np.int64]


def in_any_tokens(constraint: Constraint) -> Constraint:
    """The same texts, in whatever tokens spell them."""
    if not constraint.choices:
        return constraint
    quoted = (json.dumps(text, ensure_ascii=False) for text in constraint.choices)
    return Constraint(grammar=f"start: {' | '.join(quoted)}")


class Follower(Protocol):
    """One completion under a constraint, token by token."""

    def allowed(self) -> Ids:
        """(A,) the tokens that may come next, at least one until ``over``."""
        ...

    def take(self, token: int) -> None:
        """``token`` comes next; it is one of those allowed."""
        ...

    @property
    def over(self) -> bool:
        """Whether the completion is whole."""
        ...


class Constraints:
    """Constraints on what one tokenizer's models say."""

    def __init__(self, tokens: ChatTokens) -> None:
        self._tokens = tokens
        self._vocabulary: Any = None
        self._choice = lru_cache(1 << 16)(tokens.completion)
        self._tree = lru_cache(1 << 10)(self._grown)
        self._begun = lru_cache(1 << 8)(self._compiled)

    def follow(self, constraint: Constraint) -> Follower:
        """
        Raises:
            PolicyError: the grammar is none, or the tokenizer cannot be held to grammars.
        """
        if constraint.choices:
            return Chosen(self._tree(constraint.choices))
        return Matched(self._begun(constraint.grammar).deep_copy(), self._tokens.ends)

    def longest(self, constraint: Constraint) -> int | None:
        """The most tokens of a choice; None for grammars, whose texts may be of any length."""
        return max((len(self._choice(text)) for text in constraint.choices), default=None)

    def choice(self, constraint: Constraint, ids: tuple[int, ...]) -> str:
        """Which choice ``ids`` are."""
        return next(text for text in constraint.choices if self._choice(text) == ids)

    def masks(self, constraint: Constraint, ids: Sequence[int], width: int) -> NDArray[np.bool_]:
        """(T, V) which tokens were allowed where each of ``ids`` was sampled.

        Raises:
            PolicyError: one of ``ids`` was not, or as ``follow``.
        """
        follower = self.follow(constraint)
        masks = np.zeros((len(ids), width), np.bool_)
        for k, token in enumerate(ids):
            masks[k, follower.allowed()] = True
            if not masks[k, token]:
                raise PolicyError(
                    f"token {k} of a constrained completion, {token}, is none that its constraint "
                    f"allows: {str(constraint)[:200]}"
                )
            follower.take(token)
        return masks

    def _grown(self, choices: tuple[str, ...]) -> "Node":
        return tree(map(self._choice, choices))

    def _compiled(self, grammar: str) -> Any:
        import llguidance
        from llguidance.hf import from_tokenizer

        if self._vocabulary is None:
            tokens = self._tokens
            ends = [tokens.end, *sorted(tokens.ends - {tokens.end})]
            try:
                self._vocabulary = from_tokenizer(tokens.tokenizer, eos_token=ends)
            except Exception as cause:
                raise PolicyError(
                    f"the tokenizer of {tokens.tokenizer.name_or_path!r} cannot be held to a "
                    f"grammar: {type(cause).__name__}: {cause}"
                ) from cause
        grammar = llguidance.LLMatcher.grammar_from_lark(grammar)
        matcher = llguidance.LLMatcher(self._vocabulary, grammar)
        if matcher.is_error():
            raise PolicyError(f"a constraint's grammar is none: {matcher.get_error()}")
        return matcher


class Node:
    """A beginning of some choices."""

    __slots__ = ("after", "next", "whole")

    def __init__(self) -> None:
        self.after: dict[int, Node] = {}
        self.whole = False
        self.next: Ids | None = None
        """The keys of ``after``, once somebody asked."""


def tree(choices: Iterable[Sequence[int]]) -> Node:
    """The beginnings of these ids, from the empty one on."""
    root = Node()
    for ids in choices:
        node = root
        for token in ids:
            node = node.after.setdefault(token, Node())
        node.whole = True
    return root


class Chosen:
    """One of some choices; an end token may stand in the middle of one."""

    def __init__(self, root: Node) -> None:
        self._node = root

    def allowed(self) -> Ids:
        node = self._node
        if node.next is None:
            node.next = np.array([*node.after], np.int64)
        return node.next

    def take(self, token: int) -> None:
        self._node = self._node.after[token]

    @property
    def over(self) -> bool:
        return self._node.whole


class Matched:
    """A text of a grammar, and an end token."""

    def __init__(self, matcher: Any, ends: Set[int]) -> None:
        self._matcher = matcher
        self._ends = ends
        self.over = False

    def allowed(self) -> Ids:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        return np.flatnonzero(np.unpackbits(bits, bitorder="little"))

    def take(self, token: int) -> None:
        if token in self._ends:
            self.over = True
        else:
            self._matcher.consume_token(token)
