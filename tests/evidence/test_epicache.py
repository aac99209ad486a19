"""The parts of EpiCache's evidence that its verdicts hang on: dialogues, the ranking by words, real conversations."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from memwall.cli.evidence import load_experiment
from memwall.errors import InputError
from memwall.systems import find_system


@pytest.fixture(scope="module")
def epicache() -> ModuleType:
    return load_experiment(find_system("epicache"))


def test_dialogues_state_what_is_asked(epicache: ModuleType) -> None:
    told = epicache.dialogue(3)
    assert len(told.lines) == len(epicache.TOPICS) * epicache.SESSIONS * epicache.LINES
    assert len(told.facts) == len(epicache.TOPICS) * epicache.FACTS
    for question, answer, line in told.facts:
        name = question.split("number of ")[1].split("?")[0]
        assert told.lines[line].text == f"The secret number of {name} is {answer}."
    other = epicache.dialogue(4)
    assert [line.text for line in other.lines] != [line.text for line in told.lines]
    places = [line for _, _, line in told.facts]
    assert places != sorted(places)  # questions come in random order


def test_ranking_by_words(epicache: ModuleType) -> None:
    ranking = epicache.Bm25(["the falcon hunts in the forest", "the wall is blue", "the letter of the uncle"])
    assert [ranking.best(text) for text in ("Where do falcons hunt?", "Which walls are blue?", "the uncles")] == [
        0,
        1,
        2,
    ]


def test_conversations_are_read(epicache: ModuleType, tmp_path: Path) -> None:
    told = {
        "session_1": [{"speaker": "Ann", "dia_id": "D1:1", "text": "Hi."}],
        "session_2": [{"speaker": "Bob", "dia_id": "D2:1", "text": "I moved."}],
    }
    asked = [{"question": "Who moved?", "evidence": ["D2:1"]}, {"question": "Why?", "evidence": ["D9:9"]}]
    path = tmp_path / "talk.json"
    path.write_text(json.dumps([{"conversation": told, "qa": asked}]))
    ((lines, questions),) = epicache.read_locomo(path)
    assert [line.line for line in lines] == ["Ann: Hi.\n", "Bob: I moved.\n"]
    assert questions == [("Who moved?", [1])]
    path.write_text('[{"qa": []}]')
    with pytest.raises(InputError, match="LoCoMo"):
        epicache.read_locomo(path)


def test_more_is_judged_over_dialogues(epicache: ModuleType) -> None:
    worse = [[False, False]] * 4
    assert epicache.surplus([[True, False]] * 4, worse) == (0.5, 0.0)
    assert epicache.is_more([[True, False]] * 4, worse)
    assert not epicache.is_more([[True, True], *worse[1:]], worse)
