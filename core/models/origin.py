"""What a checkpoint stands on: noted beside it by content, found again wherever it was moved."""

import hashlib
import json
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from ..errors import ModelError, StoreError
from ..files import read_json, write_json
from .gguf import resolved

ADAPTER = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
NOTE = "base.json"
"""In a checkpoint's folder: where its base is, and the digest of that."""
INSIDE = "base"
"""The folder, in a checkpoint's or a run's, of its base."""
BLOCKS, BLOCK = 8, 8192
"""So many blocks of so many bytes, evenly spaced, are looked at of each tensor."""


def parts_of(model: str) -> tuple[str, Path | None]:
    """The base of what is called ``model``, and the folder of the adapter on it, if there is one.

    ``model``: a hub id, a model's folder, an adapter's, a run's checkpoint or the run itself, or
    what ``gguf`` knows. The base may have an adapter itself (``layers_of``).

    Raises:
        ModelError: nothing says on which base an adapter stands, or it is no GGUF file that can be
            read.
    """
    model = resolved(model)
    for folder in (Path(model), Path(model) / "checkpoint"):
        if (folder / ADAPTER).is_file():
            return base_of(folder), folder
        if (folder / "config.json").is_file():
            return str(folder), None
    return model, None


def layers_of(model: str) -> tuple[str, tuple[Path, ...]]:
    """The plain model that ``model`` begins with, and the adapters on it, the lowest first.

    Raises:
        ModelError: they go round in a circle.
    """
    found: list[Path] = []
    base, adapter = parts_of(model)
    while adapter is not None:
        if adapter in found:
            raise ModelError(f"the adapter {adapter} names itself as its base")
        found.append(adapter)
        base, adapter = parts_of(base)
    return base, tuple(reversed(found))


def base_of(folder: Path) -> str:
    """The model that the adapter in ``folder`` belongs to, there or not.

    Raises:
        ModelError: nothing says which.
    """
    base = found_base(folder)
    if base is None:
        raise ModelError(f"{folder / ADAPTER} does not say on which base model it was trained")
    return base


def found_base(folder: Path) -> str | None:
    """The model that the checkpoint in ``folder`` was trained on; None if nothing says which.

    Of several places where it may be, the first with the content that was noted: a folder may have
    been moved, and something else have taken its place.
    """
    note, named = _note(folder), None
    if (folder / ADAPTER).is_file():
        named = _mapping(folder / ADAPTER).get("base_model_name_or_path")
    named = named or note.get("model")
    home, weights = folder.resolve(), note.get("weights")
    there = [
        str(place)
        for place in _places(home, note.get("path"), named)
        if place.resolve() != home
        and any((place / name).is_file() for name in ("config.json", ADAPTER))
    ]
    if weights and len(there) > 1:
        there = [place for place in there if digest(place) == weights] or there
    return there[0] if there else named


def _places(home: Path, path: str | None, named: str | None) -> Iterator[Path]:
    """Where a base may be, the likeliest first."""
    yield home / INSIDE
    if path:
        yield (home / path).resolve()
    if named:
        yield Path(named)
    run = home.parents[2] if home.parent.parent.name == "iterations" else None
    # Before there were notes, only the place was told; the run may have been moved since.
    if run and named:
        yield run / Path(named).parent.name / Path(named).name  # bases/phase_2
    if run:
        yield run / INSIDE
        yield from [run / "checkpoint" / INSIDE] if path else []


def note_base(folder: Path, base: str) -> None:
    """Note beside the checkpoint in ``folder`` which model it was trained on; if a copy of that is
    inside, by that.

    peft notes the plain model at the bottom, even where that had an adapter already.
    """
    note: dict[str, Any] = {"model": base, "weights": digest(base)}
    if Path(base).is_dir():
        note["model"] = str(Path(base).resolve())
        inside = (folder / INSIDE).is_dir()
        note["path"] = INSIDE if inside else os.path.relpath(note["model"], folder.resolve())
    write_json(folder / NOTE, note)
    if (folder / ADAPTER).is_file():
        settings = read_json(folder / ADAPTER)
        if settings["base_model_name_or_path"] != note["model"]:
            write_json(folder / ADAPTER, settings | {"base_model_name_or_path": note["model"]})


def belongs(folder: Path, base: str) -> None:
    """Raises: ModelError: the adapter was trained on another model than ``base``.

    Not where nothing is known: of adapters by others, and of models that are not on this machine.
    """
    wanted = _note(folder).get("weights")
    found = digest(base) if wanted else None
    if wanted and found and wanted != found:
        raise ModelError(
            f"the adapter {folder} was trained on other weights ({wanted[:12]}, noted as "
            f"{_note(folder)['model']}) than those of {base} ({found[:12]}); give the base that "
            "it belongs to"
        )


def _note(folder: Path) -> dict[str, Any]:
    if not (folder / NOTE).is_file():
        return {}
    note = _mapping(folder / NOTE)
    if not all(isinstance(note.get(key), str | None) for key in ("model", "path", "weights")):
        raise StoreError(f"{folder / NOTE} is damaged: model, path and weights are texts")
    return note


def _mapping(file: Path) -> dict[str, Any]:
    payload: Any = read_json(file)
    if not isinstance(payload, dict):
        raise StoreError(f"{file} is damaged: wanted a mapping")
    return cast("dict[str, Any]", payload)


def digest(model: str) -> str | None:
    """What tells models apart by their weights; None if they are not on this machine.

    It looks at every tensor's name, shape and dtype, and at up to 64 KiB of its values: training
    changes nearly all of them, and tens of gigabytes are not to be read whole for this. It is the
    same however the tensors are spread over files. An adapter counts in full.
    """
    base, adapters = layers_of(model)
    files = _files(base)
    if not files:
        return None
    stats = [(file, file.stat()) for file in files]
    found = _looked_at(tuple((str(file), s.st_mtime_ns, s.st_size) for file, s in stats))
    for folder in adapters:
        settings = _mapping(folder / ADAPTER) | {"base_model_name_or_path": None}
        more = [found, _sum(folder / WEIGHTS), json.dumps(settings, sort_keys=True)]
        found = hashlib.sha256("\0".join(more).encode()).hexdigest()
    return found


def _sum(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"cannot read {file}: {error.strerror}") from error


def _files(model: str) -> list[Path]:
    """The files of a plain model's weights; none if they are not on this machine."""
    from huggingface_hub import try_to_load_from_cache

    folder = Path(model)
    if not folder.is_dir():
        try:
            cached = try_to_load_from_cache(model, "config.json")
        except ValueError:
            return []  # No hub id.
        if not isinstance(cached, str):
            return []
        folder = Path(cached).parent
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        names = set(_mapping(index).get("weight_map", {}).values())
    files = [folder / name for name in sorted(names)]
    return files if all(file.is_file() for file in files) else []


@lru_cache(64)
def _looked_at(files: tuple[tuple[str, int, int], ...]) -> str:
    """Of safetensors files with their times of change and sizes, by which they are remembered."""
    found: dict[str, str] = {}
    for name, _, _ in files:
        try:
            found |= _tensors(Path(name))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as cause:
            raise ModelError(f"{name} is damaged: {cause!r}") from cause
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def _tensors(file: Path) -> dict[str, str]:
    """A digest of each tensor, by name."""
    found: dict[str, str] = {}
    with file.open("rb") as opened:
        # 8 bytes: how long the header is; the header, JSON; the values of one tensor after another.
        length = int.from_bytes(opened.read(8), "little")
        if length > file.stat().st_size:
            raise ValueError("its header is longer than the file")
        header: dict[str, Any] = json.loads(opened.read(length))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            seen = hashlib.sha256(f"{entry['dtype']} {entry['shape']}".encode())
            for offset, size in blocks(end - begin):
                opened.seek(8 + length + begin + offset)
                seen.update(opened.read(size))
            found[name] = seen.hexdigest()
    return found


def blocks(size: int) -> Iterator[tuple[int, int]]:
    """Offset and length of what is looked at of ``size`` bytes: all, or blocks from end to end."""
    if size <= BLOCKS * BLOCK:
        yield 0, size
    else:
        yield from (((size - BLOCK) * k // (BLOCKS - 1), BLOCK) for k in range(BLOCKS))
