"""`--size`: hit within 1 % and never passed, by widths mixed over the matrices."""

from __future__ import annotations

from pathlib import Path

import pytest

from memwall.compress.model import compress_model
from memwall.compress.sizes import FolderSize, head_bytes
from memwall.errors import DoesNotFit, InputError, MemwallError
from memwall.models import Checkpoint
from tests.compress.tiny_model import QUICK, contents, make_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("source") / "tiny")


def folder_bytes(folder: Path) -> int:
    return sum(len(data) for data in contents(folder).values())


@pytest.mark.parametrize("size", [720_123, 800_000, 1_000_000, 1_300_001])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_sizes_are_hit_and_never_passed(source: Path, tmp_path: Path, size: int, method: str) -> None:
    report = compress_model(source, tmp_path / "out", size_bytes=size, method=method, tuning=QUICK)
    assert report.folder_bytes == folder_bytes(tmp_path / "out")
    assert 0.99 * size <= report.folder_bytes <= size
    with Checkpoint(tmp_path / "out") as checkpoint:
        checkpoint.verify(digests=True)
    again = compress_model(source, tmp_path / "again", size_bytes=size, method=method, tuning=QUICK)
    assert again.specs == report.specs


def test_more_room_loses_less(source: Path, tmp_path: Path) -> None:
    bits = [
        compress_model(source, tmp_path / str(size), size_bytes=size, method="rtn", tuning=QUICK).bits_per_weight
        for size in (700_000, 900_000, 1_500_000)
    ]
    assert bits == sorted(bits)
    assert bits[-1] > 8  # some matrices stay floats where there is room


def test_sizes_that_cannot_be(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match=r"the least this model takes is [0-9,]+ bytes; try --size [0-9]+"):
        compress_model(source, tmp_path / "out", size_bytes=400_000, tuning=QUICK)
    with pytest.raises(InputError, match=r"16-bit floats of this model take [0-9,]+ bytes in all; try --size [0-9]+"):
        compress_model(source, tmp_path / "out", size_bytes=90_000_000, tuning=QUICK)
    with pytest.raises(InputError, match="does not mix widths to a size"):
        compress_model(source, tmp_path / "out", size_bytes=900_000, method="spqr", tuning=QUICK)
    with pytest.raises(InputError, match="both given"):
        compress_model(source, tmp_path / "out", size_bytes=900_000, bits=4, tuning=QUICK)
    assert not (tmp_path / "out").exists()


def test_the_sizes_named_by_an_error_work(source: Path, tmp_path: Path) -> None:
    for asked in (400_000, 90_000_000):
        with pytest.raises(MemwallError) as refused:
            compress_model(source, tmp_path / "out", size_bytes=asked, method="rtn", tuning=QUICK)
        named = int(str(refused.value).rpartition(" ")[2])
        report = compress_model(source, tmp_path / str(asked), size_bytes=named, method="rtn", tuning=QUICK)
        assert 0.99 * named <= report.folder_bytes <= named


def test_small_files_by_hand(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "other.json").write_text("not copied")
    size = FolderSize(nbytes=1000, source=tmp_path, model_config={})
    empty, named = size.small_files_bytes([], {}, {}), size.small_files_bytes(["a.safetensors"], {}, {"bits": 3})
    assert 2 < empty < named
    assert head_bytes({"w": ("float32", (2, 3))}) % 64 == 0
