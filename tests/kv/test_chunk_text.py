"""Reading and ranking the texts of chunks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from memwall.errors import InputError
from memwall.kv.chunk_text import Ranking, read_passages, words


def test_files_and_folders_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", "c.bin"):
        (tmp_path / name).write_text(f"of {name}\n")
    found = read_passages([tmp_path / "c.bin", tmp_path])
    assert [passage.text for passage in found] == ["of c.bin", "of a.md", "of b.txt"]
    (tmp_path / "b.txt").write_text(" \n")
    with pytest.raises(InputError, match=r"b\.txt: is empty"):
        read_passages([tmp_path])


def test_a_score_by_hand() -> None:
    ranking = Ranking(["cats", "cats dogs birds", "birds"])
    # cat: in two of three texts; the second has three words where the mean is 5/3
    rarity = math.log(1 + (3 - 2 + 0.5) / (2 + 0.5))
    want = rarity * 2.2 / (1 + 1.2 * (0.25 + 0.75 * 3 / (5 / 3)))
    assert ranking._score("cat", 1) == pytest.approx(want)
    assert ranking._score("horse", 1) == 0


def test_the_best_come_first_and_words_meet_in_other_forms() -> None:
    ranking = Ranking(["The harbour has bridges.", "A falcon was seen.", "Falcons fly over the bridge, falcons rest."])
    assert ranking.best("Any falcons?", 2) == [2, 1]
    assert ranking.best("harbours", 1) == [0]
    assert ranking.best("nothing of it", 3) == [0, 1, 2]
    assert words("Seen: FALCONS!") == words("seen falcon")
