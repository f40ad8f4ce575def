"""Pieces of a conversation have the ids of the whole, and text that grows is the text of the whole,
for every kind of tokenizer."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from selfwright.core.models.encoding import Growing
from selfwright.core.models.tokens import ChatTokens
from selfwright.core.types import Message, Prompt

SPECIAL = ["[UNK]", "<|end|>", "<|user|>", "<|assistant|>"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TURNS = "{% for m in messages %}<|{{ m.role }}|>NL{{ m.content }}<|end|>NL{% endfor %}"
ASKS = "{% if add_generation_prompt %}<|assistant|>NL{% endif %}"
TEMPLATES = {
    "joined": (TURNS + ASKS).replace("NL", ""),
    "lines": (TURNS + ASKS).replace("NL", "\n"),
    "brackets": "{% for m in messages %}{% if m.role == 'user' %}[i] {{ m.content }} [/i]"
    "{% else %} {{ m.content }} <|end|>{% endif %}{% endfor %}",
}
KINDS = ("bytes", "bytes with a space", "first", "always", "never", "prepended", "words", "trimmed")


def core_of(kind: str) -> Any:
    """A tokenizer of that kind, with no merges: no token reaches across a border."""
    vocabulary = {w: k for k, w in enumerate([*SPECIAL, "▁", "\n", *"[]/", *LETTERS])}
    if kind.startswith("bytes"):
        for sign in sorted(pre_tokenizers.ByteLevel.alphabet()):
            vocabulary.setdefault(sign, len(vocabulary))
        made: Any = tokenizers.Tokenizer(models.BPE(vocabulary, []))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space="space" in kind)
        made.decoder = decoders.ByteLevel()
        return made
    if kind == "words":
        for piece in [f"##{letter}" for letter in LETTERS]:
            vocabulary[piece] = len(vocabulary)
        made = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        made.normalizer = normalizers.BertNormalizer()
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece()
        return made
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    made = tokenizers.Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="[UNK]"))
    if kind in ("prepended", "trimmed"):
        first: Any = (
            normalizers.Prepend("▁") if kind == "prepended" else normalizers.Strip(True, False)
        )
        made.normalizer = normalizers.Sequence([first, normalizers.Replace(" ", "▁")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    strips = [] if kind in ("never", "trimmed") else [decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence([*parts, *strips])
    return made


def fast_of(kind: str, template: str = "lines") -> Any:
    fast: Any = PreTrainedTokenizerFast(
        tokenizer_object=core_of(kind),
        unk_token="[UNK]",
        eos_token="<|end|>",
        additional_special_tokens=SPECIAL[2:],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = TEMPLATES[template]
    return fast


@cache
def tokens_of(kind: str, template: str = "lines") -> ChatTokens:
    """To be left as it is."""
    return ChatTokens(fast_of(kind, template))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=15, deadline=None)
@given(texts=st.lists(st.text("abc x", max_size=6), min_size=3, max_size=5))
def test_pieces_have_the_ids_of_the_whole(kind: str, template: str, texts: list[str]) -> None:
    tokens = tokens_of(kind, template)
    fast = tokens.tokenizer
    messages: list[Message] = []
    for k, text in enumerate(texts):
        if k % 2:
            ids = tokens.completion(text)
            messages.append(Message("assistant", (text,), token_ids=ids))
        else:
            messages.append(Message("user", (text,)))
        asks = k % 2 == 0
        whole = fast.apply_chat_template(
            [{"role": m.role, "content": m.text} for m in messages],
            tokenize=False,
            add_generation_prompt=asks,
        )
        right = fast.backend_tokenizer.encode(whole, add_special_tokens=False).ids
        if asks:
            assert list(tokens.prompt(Prompt(tuple(messages)))) == right
        else:
            pieces = [*tokens.prompt(Prompt(tuple(messages[:-1]))), *messages[-1].token_ids]
            assert pieces == right[: len(pieces)] and tokens.end not in right[len(pieces) :]
    assert tokens.breaks == 0


def test_a_piece_after_a_cut_answer_begins_no_text() -> None:
    tokens = ChatTokens(fast_of("first"))
    user = Message("user", ("go",))
    said = tokens.completion("yes")[:-2]
    talk = (user, Message("assistant", ("ye",), token_ids=said), user)
    spelt = tokens.tokenizer.convert_ids_to_tokens(list(tokens.prompt(Prompt(talk))))
    assert "".join(spelt).endswith("<|assistant|>\nye<|end|>\n<|user|>\ngo<|end|>\n<|assistant|>\n")
    # Another role's turn is cut off the same way, wherever the special tokens are.
    assert tokens.tokenizer.convert_ids_to_tokens(list(tokens.completion("a<|user|>b"))) == [
        *("a", "<|user|>", "b", "<|end|>")
    ]


def kinds_of_ids(kind: str) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, len(tokens_of(kind).tokenizer) - 1), max_size=30)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_text_that_grows_is_the_text_of_the_whole(kind: str, data: st.DataObject) -> None:
    tokens = tokens_of(kind)
    written = st.text("ab é€😀�", max_size=12).map(lambda text: list(tokens.completion(text)))
    ids = [i for part in data.draw(st.lists(kinds_of_ids(kind) | written)) for i in part]
    growing, after, at, settled = tokens.growing(), tokens.growing(), 0, ""
    while at < len(ids):
        at += data.draw(st.integers(1, 3))
        known, since = growing.settled, after.since(ids[:at])
        text = growing(ids[:at])
        assert text == tokens.text(ids[:at]) and text.startswith(settled)
        assert since == text[known:] and after.settled == growing.settled
        settled = text[: growing.settled]
    # Whoever was lost on the way begins anew.
    assert growing(ids[:1]) == tokens.text(ids[:1])


def test_a_long_text_is_not_decoded_again_and_again() -> None:
    tokens = ChatTokens(fast_of("bytes"))
    ids = tokens.completion("né a😀 " * 200)
    read: list[int] = []

    def text(some: Sequence[int]) -> str:
        read.append(len(some))
        return tokens.text(some)

    growing = Growing(text, tokens.tokenizer.convert_ids_to_tokens)
    for k in range(len(ids)):
        growing(ids[: k + 1])
    assert growing(ids) == "né a😀 " * 200
    assert max(read) <= 10 and sum(read) < 10 * len(ids)


def test_the_models_settings_say_what_ends(model_folder: Callable[[str], Path]) -> None:
    tokens = ChatTokens(fast_of("bytes"), ends=[2, 9])
    assert tokens.end == 1 and tokens.ends == {1, 2, 9}
    user = Message("user", ("go",))
    prompt = tokens.prompt(Prompt((user,)))
    # The next role's token ends an answer: it is not written twice.
    ids = (*tokens.completion("yes")[:-1], 2)
    assert tokens.text(ids) == "yes"
    open_ended = fast_of("bytes")
    open_ended.chat_template = TEMPLATES["lines"].replace("<|end|>\n", "")
    tokens = ChatTokens(open_ended, ends=[2])
    then = tokens.prompt(Prompt((user, Message("assistant", ("yes",), token_ids=ids), user)))
    assert then == (*tokens.prompt(Prompt((user,))), *ids, *tokens.prompt(Prompt((user,)))[1:])
    assert prompt[0] == then[0] and tokens.breaks == 0
    # One that is no special token is one all the same.
    word = tokens.completion("y")[0]
    tokens = ChatTokens(fast_of("bytes"), ends=[word])
    assert tokens.text(tokens.completion("say")[:-1]) == "sa"
    assert tokens.ends_of(["<|user|>", "no"]) == {1, 2, word}
    endless = fast_of("bytes")
    endless.eos_token = None
    assert ChatTokens(endless, ends=[3]).ends == {1, 3}
