"""The material of the cache study, and the three tasks on real caches of the demo model, in small."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from memwall import kv
from memwall.errors import InputError
from memwall.models import model_directory
from memwall.plan.choose import held_out_text
from memwall.studies.dialogues import LINES, TOPICS, dialogue
from memwall.studies.kv_tasks import Sizes, Tasks
from memwall.studies.recall_task import hide_facts, is_right
from memwall.studies.subjects import CacheSubject, StudyModel, Subject

SMALL = Sizes(windows=2, prompt_tokens=96, decoded_tokens=12, tries=1, recall_tokens=200, dialogues=1)


@pytest.fixture(scope="module")
def model() -> StudyModel:
    return StudyModel(model_directory("demo"), "float32")


@pytest.fixture(scope="module")
def tasks(model: StudyModel) -> Tasks:
    return Tasks(model, held_out_text(), SMALL)


def test_facts_stand_in_the_prompt_and_every_one_is_asked(model: StudyModel) -> None:
    text = np.array(model.encode(held_out_text()))
    for seed in range(5):
        hidden = hide_facts(
            model.tokenizer, text, np.random.default_rng(seed), num_tokens=300, num_facts=3, opening=model.opening[0]
        )
        (first, _), *others = hidden.questions
        assert len(hidden.prompt) + len(first) == 300
        assert hidden.prompt[0] == model.opening[0]
        assert len(others) == 2
        words = model.tokenizer.decode(hidden.prompt)
        for asked, answer in hidden.questions:
            beginning = model.tokenizer.decode(asked).splitlines()[-1].split("? ")[-1]
            assert f"{beginning} {answer}." in words
    with pytest.raises(InputError, match="longer text"):
        hide_facts(model.tokenizer, text[:50], np.random.default_rng(0), num_tokens=300)
    assert is_right(" 4711. And", "4711")
    assert not is_right("The number 4711", "4711")


@pytest.mark.parametrize(
    ("answer", "steps"),
    [("4711", 2), ("47", 1), ("4712", 2), ("5", 1), ("4711 and so on", 3), (None, 3)],
)
def test_no_more_is_said_than_tells_whether_it_is_right(answer: str | None, steps: int) -> None:
    words = [" ", "47", "11", " and"]

    class Saying(Subject):
        """Says those words, whatever it is asked."""

        taken = 0

        def step(self, token: int) -> np.ndarray:
            self.taken += 1
            return np.eye(len(words))[token + 1]

        def decode(self, tokens: list[int]) -> str:
            return "".join(words[token] for token in tokens)

        begin = read = branch = nbytes = encode = None  # type: ignore[assignment]

    subject = Saying()
    said = subject.say(np.eye(len(words))[0], 4, answer=answer)
    assert (subject.taken, said) == (steps, "".join(words[: steps + 1]))
    if answer is not None:
        assert is_right(said, answer) == is_right("".join(words), answer)


def test_topics_return_after_others() -> None:
    told = dialogue(3)
    assert told.lines == [line for session in told.sessions for line in session]
    assert all(len(session) == LINES for session in told.sessions)
    assert len(told.facts) == 2 * len(TOPICS)
    for question, answer, line in told.facts:
        assert answer in told.lines[line].text
        assert question.split("? ")[-1] in told.lines[line].text
    assert dialogue(3) == told != dialogue(4)


def test_a_float32_cache_loses_nothing_and_its_bytes_are_counted(tasks: Tasks) -> None:
    found = {policy: run(tasks, "text", policy) for policy in ("float32", "float16", "kivi(2bit,group=16,residual=16)")}
    exact, half, two = found.values()
    assert exact["kl_nats"] == pytest.approx(0, abs=1e-6)
    assert exact["perplexity"] == pytest.approx(exact["exact_perplexity"], rel=1e-4)
    assert exact["top1_agreement"] == 1
    assert exact["scored_tokens"] == SMALL.windows * SMALL.decoded_tokens
    assert half["kl_nats"] < two["kl_nats"]
    assert half["kv_bytes"] == half["float16_bytes"] == exact["kv_bytes"] / 2
    assert two["kv_bits_per_value"] < 0.6 * half["kv_bits_per_value"]
    assert all(one["step_seconds"] > 0 for one in found.values())


def test_recall_asks_for_all_facts_and_counts_the_pruned_prompt(tasks: Tasks) -> None:
    whole, pruned = (run(tasks, "recall", policy) for policy in ("float16", "snapkv(tokens=48,window=16)"))
    assert (whole["recall_asked"], whole["later_asked"]) == (1, 3)
    assert 0 <= pruned["later"] <= 1
    assert whole["tokens"] == SMALL.recall_tokens
    assert pruned["kv_bytes"] < whole["kv_bytes"] / 3


def test_questions_leave_no_trace(tasks: Tasks, model: StudyModel) -> None:
    """What a branch read is forgotten, whatever the cache: the same question gets the same logits again."""
    tokens = tasks.tokens[:150].tolist()
    for policy in ("float16", "snapkv(0.3)+think(0.4)+kivi(2bit,group=16,residual=16)", "epicache(tokens=64,chunk=64)"):
        subject = CacheSubject(model, policy)
        subject.read([*model.opening, *tokens])
        asked, seen = model.encode("\nWhat is this?"), []
        held = subject.nbytes
        for _ in range(2):
            with subject.branch():
                seen.append(subject.read(asked).copy())
                subject.say(seen[-1], 2)
            assert subject.nbytes == held
            assert subject.cache.length == 151
        np.testing.assert_array_equal(*seen)
        subject.begin()
        assert subject.cache.length == 0
        subject.release()


def test_a_conversation_is_read_turn_by_turn_or_by_episodes(tasks: Tasks, model: StudyModel) -> None:
    whole = run(tasks, "talk", "float16")
    assert whole["talk_asked"] == 8
    assert whole["talk"] > 0.5
    episodes = run(tasks, "talk", "epicache(tokens=100,episodes=2,chunk=96)")
    assert episodes["tokens"] == whole["tokens"]
    # two episodes held, and the one in use: 100 of some 690 tokens each
    assert episodes["kv_bytes"] < 0.6 * whole["kv_bytes"]
    assert episodes["kv_bytes"] > 0.4 * whole["kv_bytes"]


def test_material_that_cannot_do_is_refused(model: StudyModel) -> None:
    with pytest.raises(InputError, match="--text: 4 tokens in it"):
        Tasks(model, "Too short.", SMALL)
    long = Sizes(windows=1, prompt_tokens=4000, decoded_tokens=500, tries=1, recall_tokens=200, dialogues=1)
    with pytest.raises(InputError, match="positions"):
        Tasks(model, held_out_text(), long)


def run(tasks: Tasks, task: str, policy: str) -> dict[str, Any]:
    subject = CacheSubject(tasks.model, policy)
    try:
        return tasks.run(task, subject)
    finally:
        subject.release()
        assert isinstance(subject.cache, kv.KVCache)
