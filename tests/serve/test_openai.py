"""The routes through OpenAI's own client."""

from __future__ import annotations

import math

import httpx
import openai
import pytest

from memwall.engine import Sampling, Settings, load
from memwall.models import DEMO_DIRECTORY
from memwall.models.tokenizer import Tokenizer
from tests.serve.conftest import Running

PROMPT = "The history of the city begins"


def test_a_completion_is_what_the_engine_makes_alone(server: Running) -> None:
    tokenizer = Tokenizer.from_directory(DEMO_DIRECTORY)
    session = load(DEMO_DIRECTORY, Settings(weights="int8", threads=1), tokenizer=tokenizer)
    list(session.generate(tokenizer.encode(PROMPT), Sampling(max_new_tokens=20)))
    answer = server.client().completions.create(model="demo", prompt=PROMPT, max_tokens=20, temperature=0)
    assert answer.choices[0].text == session.last.text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(tokenizer.encode(PROMPT)), 20)


def test_streamed_pieces_are_the_text(server: Running) -> None:
    client = server.client()
    whole = client.completions.create(model="demo", prompt=PROMPT, max_tokens=24, temperature=0)
    stream = client.completions.create(
        model="demo", prompt=PROMPT, max_tokens=24, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )  # type: ignore[union-attr]
    assert len({chunk.id for chunk in chunks}) == 1


def test_chat_streamed_and_whole(server: Running) -> None:
    client = server.client()
    ask = {
        "model": "demo",
        "messages": [{"role": "user", "content": "hello"}],
        "temperature": 0.0,
        "max_completion_tokens": 9,
    }
    whole = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(**ask, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert whole.usage is not None
    assert whole.usage.completion_tokens <= 9


def test_stop_texts_end_and_are_not_shown(server: Running) -> None:
    client = server.client()
    text = client.completions.create(model="demo", prompt=PROMPT, max_tokens=24, temperature=0).choices[0].text
    word = text.split()[3]
    answer = client.completions.create(model="demo", prompt=PROMPT, max_tokens=24, temperature=0, stop=[word])
    assert answer.choices[0].text == text[: text.index(word)]
    assert answer.choices[0].finish_reason == "stop"
    streamed = client.completions.create(
        model="demo", prompt=PROMPT, max_tokens=24, temperature=0, stop=word, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in streamed) == text[: text.index(word)]


def test_choices_share_the_prompt_and_differ_by_their_seed(server: Running) -> None:
    client = server.client()
    prompt = PROMPT + " with a long story about the river and the hills, the harbour and the ships that came to it."
    ask = {"model": "demo", "prompt": prompt, "n": 3, "max_tokens": 12, "temperature": 1.0, "seed": 5}
    first, again = client.completions.create(**ask), client.completions.create(**ask)
    texts = [choice.text for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len(set(texts)) > 1
    assert texts == [choice.text for choice in again.choices]
    assert again.usage.prompt_tokens_details.cached_tokens > 0


def test_several_prompts_and_token_ids(server: Running) -> None:
    client = server.client()
    ids = server.post("/tokenize", {"prompt": PROMPT}).json()["tokens"]
    answer = client.completions.create(model="demo", prompt=[PROMPT, "Another"], max_tokens=5, temperature=0)
    same = client.completions.create(model="demo", prompt=ids, max_tokens=5, temperature=0)
    assert answer.choices[0].text == same.choices[0].text
    assert len(answer.choices) == 2
    echoed = client.completions.create(model="demo", prompt=PROMPT, max_tokens=5, temperature=0, echo=True)
    assert echoed.choices[0].text == PROMPT + same.choices[0].text


def test_logprobs_name_the_likeliest_first(server: Running) -> None:
    client = server.client()
    chat = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=3,
        temperature=0,
        logprobs=True,
        top_logprobs=4,
    )
    content = chat.choices[0].logprobs.content  # type: ignore[union-attr]
    assert content is not None
    assert len(content) == chat.usage.completion_tokens  # type: ignore[union-attr]
    for token in content:
        assert token.top_logprobs[0].token == token.token
        assert len(token.top_logprobs) == 4
        assert sum(math.exp(one.logprob) for one in token.top_logprobs) <= 1.0001
    plain = client.completions.create(model="demo", prompt=PROMPT, max_tokens=3, temperature=0, logprobs=2)
    told = plain.choices[0].logprobs
    assert told is not None
    assert "".join(told.tokens or []) == plain.choices[0].text
    assert told.text_offset == [0, *(sum(map(len, (told.tokens or [])[:i])) for i in (1, 2))]


def test_what_is_around(server: Running) -> None:
    assert server.client().models.list().data[0].id == "demo"
    assert server.client().models.retrieve("demo").id == "demo"
    assert server.get("/health").status_code == 200
    assert "version" in server.get("/version").json()
    ids = server.post("/tokenize", {"prompt": "the river"}).json()
    assert ids["count"] == len(ids["tokens"])
    assert "the river" in server.post("/detokenize", {"tokens": ids["tokens"]}).json()["prompt"]
    metrics = server.get("/metrics").text
    for name in (
        "num_requests_running",
        "kv_cache_usage_perc",
        "generation_tokens_total",
        "time_to_first_token_seconds_bucket",
    ):
        assert f"memwall:{name}" in metrics
    assert 'memwall:memory_bytes{owner="kv/pages",tier="ram"}' in metrics


def test_the_page_needs_nothing_from_elsewhere_and_its_data_adds_up(server: Running) -> None:
    page = server.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http://" not in page.text
    assert "https://" not in page.text
    assert "src=" not in page.text
    found = server.memory()
    pool = found["pool"]
    assert sum(length for _, length in pool["cells"]) == -(-pool["limit_pages"] // pool["stride"])
    held = sum(row["bytes"] for row in found["ledger"] if row["tier"] == "ram")
    assert held == pytest.approx(found["resident_bytes"], rel=0.03)
    for name in ("queue", "requests", "latency", "totals"):
        assert name in found


@pytest.mark.parametrize(
    ("changes", "status", "names"),
    [
        ({"model": "other"}, 404, "other"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 100000}, 400, "max_tokens"),
        ({"max_tokens": True}, 400, "whole number"),
        ({"temperature": 3}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"top_p": -1}, 400, "top_p"),
        ({"n": 99}, 400, "n is 99"),
        ({"seed": -1}, 400, "seed"),
        ({"logprobs": 1000}, 400, "logprobs"),
        ({"stop": ["a"] * 40}, 400, "stop"),
        ({"stop": ""}, 400, "stop"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": None}, 400, "prompt"),
        ({"prompt": [1, -5]}, 400, "token ids"),
        ({"prompt": [10**30]}, 400, "token ids"),
        ({"prompt": ["a"] * 1000}, 400, "1000 prompts"),
        ({"prompt": "word " * 600}, 400, "context"),
        ({"frequency_penalty": 3}, 400, "-2 to 2"),
        ({"best_of": 4}, 400, "best_of"),
        ({"tempreature": 1}, 400, "did you mean temperature"),
        ({"stream_options": {"include_usage": True}}, 400, "stream"),
    ],
)
def test_what_cannot_be_done_is_named(server: Running, changes: dict[str, object], status: int, names: str) -> None:
    answer = server.post("/v1/completions", {"model": "demo", "prompt": "a", "max_tokens": 1, **changes})
    assert answer.status_code == status
    error = answer.json()["error"]
    assert names in error["message"]
    assert error["type"]


@pytest.mark.parametrize(
    ("body", "names"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "must be a JSON object"),
        (b'{"prompt": "\xff"}', "UTF-8"),
        (b'{"prompt": "a", "temperature": NaN}', "NaN"),
        (b'{"prompt": "\\ud800"}', "cannot be encoded"),
        (b'{"prompt": ' + b"[" * 20000 + b"]" * 20000 + b"}", "deeply"),
        (b'{"\\ud800": 1}', "unknown parameter"),
        (b'{"messages": 5}', "messages"),
    ],
)
def test_broken_bodies_are_refused(server: Running, body: bytes, names: str) -> None:
    path = "/v1/chat/completions" if b"messages" in body else "/v1/completions"
    answer = httpx.post(server.url + path, content=body, headers={"content-type": "application/json"}, timeout=60)
    assert answer.status_code == 400, answer.text
    assert names in answer.json()["error"]["message"]


def test_chats_that_cannot_be_done_are_named(server: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="two tools are called 'f'"):
        server.client().chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": "hi"}],
            tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}] * 2,
        )
    answer = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]})
    assert answer.status_code == 400
    assert "type text" in answer.json()["error"]["message"]


def test_nothing_is_everywhere_else(server: Running) -> None:
    assert server.get("/nothing").status_code == 404
    assert server.get("/v1/completions").status_code in (404, 405)
    assert server.get("/v1/models/other").status_code == 404
