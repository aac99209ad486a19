"""KVPolicy inside transformers: the same tokens and logits as its own cache and as memwall's engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from memwall.errors import BudgetExceeded, InputError  # noqa: E402
from memwall.hf import KVPolicy  # noqa: E402
from tests.models.families import make_family, some_tokens  # noqa: E402
from tests.models.test_decoder import Loaded  # noqa: E402

FAMILIES = ["llama", "llama-llama3", "mistral", "qwen2", "qwen2-window", "qwen3"]


def load(family: str, tmp_path: Path, attention: str = "memwall") -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(make_family(family, tmp_path), dtype=torch.float32)
    model.set_attn_implementation(attention)
    return model.eval()


def generate(model: Any, prompt: list[int], cache: Any = None) -> Any:
    more = {} if cache is None else {"cache": cache}
    return model.generate(
        torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0,
        output_logits=True, return_dict_in_generate=True, **more,
    )  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_generates_what_the_plain_cache_and_the_engine_give(family: str, tmp_path: Path) -> None:
    prompt = some_tokens(40)
    plain = generate(load(family, tmp_path / "a", "sdpa"), prompt)
    ours = generate(load(family, tmp_path / "b"), prompt, KVPolicy("float32"))
    assert ours.sequences.tolist() == plain.sequences.tolist()
    for got, want in zip(ours.logits, plain.logits):
        torch.testing.assert_close(got, want, atol=2e-4, rtol=0)
    engine = Loaded(make_family(family, tmp_path / "c"), "float32", segment=64)
    tokens = np.asarray(plain.sequences[0, :-1])
    logits = engine.logits(tokens)[len(prompt) - 1 :]
    np.testing.assert_allclose(torch.cat(ours.logits).numpy(), logits, atol=2e-4)


def test_a_compressed_cache_is_small_and_can_go_back(tmp_path: Path) -> None:
    model = load("llama", tmp_path)
    cache = KVPolicy("kivi(4bit,group=16,residual=16)")
    out = generate(model, some_tokens(100), cache)
    assert cache.get_seq_length() == 111
    assert 0 < cache.bits_per_value < 16
    assert cache.nbytes == cache.ledger.total("ram")
    cache.crop(-11)
    assert cache.get_seq_length() == 100
    cache.reset()
    assert cache.nbytes == 0
    again = generate(model, some_tokens(100), cache)
    assert again.sequences.tolist() == out.sequences.tolist()


def test_what_does_not_work_says_so(tmp_path: Path) -> None:
    model = load("llama", tmp_path)
    with pytest.raises(InputError, match="one sequence"):
        model(torch.tensor([[1, 2], [3, 4]]), cache=KVPolicy("float16"))
    mask = torch.tensor([[0, 1, 1]])
    with pytest.raises(InputError, match="padded"):
        model(torch.tensor([[1, 2, 3]]), attention_mask=mask, cache=KVPolicy("float16"))
    with pytest.raises(BudgetExceeded):
        model(torch.tensor([some_tokens(100)]), cache=KVPolicy("float32", memory="20kB"))
    with pytest.raises(InputError, match="unknown KV policy"):
        KVPolicy("nothing")
    model.set_attn_implementation("sdpa")
    with pytest.raises(InputError, match="set_attn_implementation"):
        model(torch.tensor([[1, 2, 3]]), cache=KVPolicy("float16"))


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = json.loads((Path(__file__).parents[1] / "examples" / "kv_in_transformers.ipynb").read_text())
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    sizes = names["sizes"]
    assert sizes["kivi(2bit)"] < sizes["kivi(4bit)"] < sizes["float16"]


def test_other_caches_work_with_the_same_attention(tmp_path: Path) -> None:
    prompt = some_tokens(30)
    plain = generate(load("mistral", tmp_path / "a", "sdpa"), prompt)
    assert generate(load("mistral", tmp_path / "b"), prompt).sequences.tolist() == plain.sequences.tolist()
