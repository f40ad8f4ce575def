"""Pictures by their content: each once on disk, few in memory, found wherever they lie."""

import threading
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prompts import grey, png

from selfwright.core import images as module
from selfwright.core.errors import DiskError, StoreError
from selfwright.core.images import ImageStore, picture, place
from selfwright.core.types import Image, Message, Observation


@pytest.fixture
def store(tmp_path: Path) -> Generator[ImageStore]:
    """One that keeps new pictures in ``tmp_path / "kept"``."""
    with (made := ImageStore()).kept_in(tmp_path / "kept"):
        yield made


def bare(image: Image) -> Image:
    return replace(image, png=b"")


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@given(st.integers(1, 50), st.integers(1, 50), st.integers(0, 255))
def test_a_picture_says_what_it_is(width: int, height: int, shade: int) -> None:
    image = grey(shade, width, height)
    assert (image.width, image.height) == (width, height) and len(image.sha256) == 64
    assert image == grey(shade, width, height) != grey((shade + 1) % 256, width, height)


@pytest.mark.parametrize("data", [b"", b"GIF89a", png()[:20], png()[1:], b"\x89PNG\r\n\x1a\n" * 9])
def test_what_is_no_png_is_no_picture(data: bytes) -> None:
    with pytest.raises(ValueError, match=f"wanted a PNG file, got {len(data)} bytes"):
        picture(data)


def test_its_bytes_are_no_part_of_what_it_is() -> None:
    image = grey(3)
    assert image == bare(image) and hash(image) == hash(bare(image))
    assert repr(image) == repr(bare(image)) and "PNG" not in repr(image)
    for one, other in (
        (Message("user", (image, "x")), Message("user", (bare(image), "x"))),
        (Observation("x", (image,)), Observation("x", (bare(image),))),
    ):
        assert one == other and hash(one) == hash(other) and repr(one) == repr(other)


def test_kept_once_and_read_back_by_whoever_looks_there(store: ImageStore, tmp_path: Path) -> None:
    one, other = grey(1), grey(2)
    assert store.keep(one).png == store.keep(grey(1)).png == b""
    store.keep(other)
    assert store.keep(bare(one)) == one
    assert files(tmp_path / "kept") == sorted(place(tmp_path / "kept", i) for i in (one, other))
    assert store.read(bare(one)) == one.png
    elsewhere = ImageStore()
    with pytest.raises(StoreError, match=f"{one.sha256} is missing; looked in nowhere"):
        elsewhere.read(bare(one))
    elsewhere.look_in(tmp_path / "kept")
    assert elsewhere.read(bare(one)) == one.png
    # Whoever has the bytes needs no store.
    assert ImageStore().read(one) == one.png


def test_blocks_say_where_new_ones_go_and_all_stay_findable(tmp_path: Path) -> None:
    store = ImageStore()
    with store.kept_in(tmp_path / "run"):
        store.keep(grey(1))
        with store.kept_in(tmp_path / "inner"):
            store.keep(grey(2))
        store.keep(grey(3))
    store.keep(grey(4))
    assert [len(files(tmp_path / name)) for name in ("run", "inner")] == [2, 1]
    other = ImageStore()
    for name in ("run", "inner"):
        other.look_in(tmp_path / name)
    assert [other.read(bare(grey(k))) for k in (1, 2, 3)] == [grey(k).png for k in (1, 2, 3)]
    assert store.read(bare(grey(4))) == grey(4).png


def test_saved_they_lie_in_a_folder_of_ones_own(store: ImageStore, tmp_path: Path) -> None:
    known, new = grey(1), grey(2)
    store.keep(known)
    store.save([bare(known), new, bare(known)], tmp_path / "saved")
    store.save([known, new], tmp_path / "saved")
    assert [path.read_bytes() for path in files(tmp_path / "saved")] == [
        image.png for image in sorted((known, new), key=lambda image: image.sha256)
    ]
    with pytest.raises(StoreError, match=f"{grey(3).sha256} is missing; looked in .*kept"):
        store.save([bare(grey(3))], tmp_path / "saved")


def test_a_missing_and_a_damaged_file_are_named(tmp_path: Path) -> None:
    gone, damaged = grey(1), grey(2)
    with (writer := ImageStore()).kept_in(tmp_path):
        for image in (gone, damaged):
            writer.keep(image)
    place(tmp_path, gone).unlink()
    path = place(tmp_path, damaged)
    path.write_bytes(damaged.png[:-1] + b"x")
    store = ImageStore()
    store.look_in(tmp_path)
    with pytest.raises(StoreError, match=f"{gone.sha256} is missing; looked in {tmp_path}"):
        store.read(bare(gone))
    with pytest.raises(StoreError, match=f"{damaged.sha256}.png is damaged"):
        store.read(bare(damaged))
    with pytest.raises(StoreError, match=f"{damaged.sha256}.png is damaged"):
        store.save([bare(damaged)], tmp_path / "saved")
    assert files(tmp_path / "saved") == []


def test_what_is_not_whole_is_taken_from_elsewhere_and_written_anew(tmp_path: Path) -> None:
    """As a power cut leaves it: the name is there, the content is not."""
    image = grey(1)
    for name in ("good", "bad"):
        with (writer := ImageStore()).kept_in(tmp_path / name):
            writer.keep(image)
    place(tmp_path / "bad", image).write_bytes(b"")
    store = ImageStore()
    for name in ("good", "bad"):
        store.look_in(tmp_path / name)
    assert store.read(bare(image)) == image.png
    store.save([bare(image)], tmp_path / "bad")
    assert place(tmp_path / "bad", image).read_bytes() == image.png
    place(tmp_path / "bad", image).write_bytes(b"")
    with (again := ImageStore()).kept_in(tmp_path / "bad"):
        again.keep(image)
    assert place(tmp_path / "bad", image).read_bytes() == image.png


def test_many_at_once_keep_look_and_read(store: ImageStore, tmp_path: Path) -> None:
    pictures = [grey(k) for k in range(16)]
    faults: list[BaseException] = []
    ready = threading.Barrier(8)

    def work(number: int) -> None:
        try:
            ready.wait(20)
            for image in pictures[number:] + pictures[:number]:
                kept = store.keep(image)
                store.look_in(tmp_path / f"{number} {image.sha256[:4]}")
                assert store.read(kept) == image.png
            store.save(pictures, tmp_path / "saved")
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert faults == []
    for folder in ("kept", "saved"):
        assert len(files(tmp_path / folder)) == 16, "each once, and no draft is left"
        for image in pictures:
            assert place(tmp_path / folder, image).read_bytes() == image.png


def test_memory_holds_only_what_was_read_last(
    store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = [grey(k) for k in range(4)]
    monkeypatch.setattr(module, "REMEMBERED", 3 * len(pictures[0].png) + 8)
    for image in pictures[:3]:
        store.keep(image)
    store.read(bare(pictures[0]))
    store.keep(pictures[3])  # Of four, the second was asked for longest ago.
    for path in files(tmp_path / "kept"):
        path.unlink()
    for held in (0, 2, 3):
        assert store.read(bare(pictures[held])) == pictures[held].png
    with pytest.raises(StoreError, match="is missing"):
        store.read(bare(pictures[1]))


def test_one_larger_than_all_of_memory_is_read_all_the_same(
    store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = store.keep(grey(1))
    monkeypatch.setattr(module, "REMEMBERED", 8)
    small = ImageStore()
    small.look_in(tmp_path / "kept")
    assert small.read(image) == small.read(image) == grey(1).png


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DiskError, match=r"cannot write .*file"):
        ImageStore().save([grey(1)], tmp_path / "file" / "images")
    store, folder = ImageStore(), tmp_path / "file" / "images"
    with store.kept_in(folder), pytest.raises(DiskError, match=r"cannot write .*file"):
        store.keep(grey(1))
