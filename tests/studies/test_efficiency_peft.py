"""The fine-tuning axis: what its records hold, and what must come out of it by construction."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from memwall import kernels
from memwall.compress.tuning import tune_method
from memwall.models.config import ModelConfig
from memwall.studies import efficiency_peft
from memwall.studies.efficiency_peft import TECHNIQUES, domain_text, peft_axis, settings_of, step_work
from memwall.studies.efficiency_records import Record, RecordStore
from memwall.studies.efficiency_sizes import TINY, Sizes
from tests.compress.tiny_model import make_model

TEXT = "".join(f"A city of {n} lies on a river, and the river comes from hill {n * 7 % 13}. " for n in range(150))


@dataclass
class InOneProcess:
    """A runner that calls jobs here."""

    directory: Path
    store: RecordStore
    sizes: Sizes = TINY
    text: bytes = TEXT.encode()
    name: str = "tiny"
    calls: list[str] = field(default_factory=list)
    done: int = 0

    def key(self, **more: Any) -> str:
        return self.store.key(more)

    def call(self, module: str, job: str, what: str, request: dict[str, Any]) -> Record:
        self.calls.append(what)
        told = getattr(efficiency_peft, job)(
            {"sizes": self.sizes.to_dict(), "threads": 1, "held_out": "", **request}, lambda *_: None
        )
        return Record.from_dict(told)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InOneProcess]:
    threads, folder = kernels.num_threads(), tmp_path_factory.mktemp("axis")
    yield InOneProcess(make_model(folder / "model"), RecordStore(folder / "store"))
    kernels.set_num_threads(threads)


def test_records(runner: InOneProcess) -> None:
    records = {record.technique: record for record in peft_axis(runner)}
    assert tuple(records) == TECHNIQUES
    trained = {name: record.num_trainable for name, record in records.items()}
    assert trained["lora"] == trained["rslora"] == trained["lora-plus"] == trained["pissa"] < trained["dora"]
    assert trained["full"] == records["full"].num_parameters
    before = [record.figures["loss_before"] for record in records.values()]
    assert max(before) - min(before) < 1e-4  # all start from the same function, PiSSA too
    state = {name: record.figures["optimizer_bytes"] for name, record in records.items()}
    assert max(state, key=lambda name: state[name]) == "full"
    for record in records.values():
        assert record.loss is not None
        assert record.loss < record.figures["loss_before"] + 0.1
        assert len(record.figures["steps_s"]) == runner.sizes.steps
        assert record.metrics.st is not None
        assert record.metrics.st > 0
        assert record.metrics.amu_bytes > record.figures["rows"]["weights/float32"]
    done = len(runner.calls)
    assert [r.technique for r in peft_axis(runner)] == list(TECHNIQUES)
    assert len(runner.calls) == done  # kept records are not made again


def test_the_domain_is_another_one() -> None:
    assert domain_text("A city.") == "N pvgl."


def test_declared_work_orders_methods() -> None:
    """Frozen layers below save two of three passes; gradients of all weights cost one more."""
    config = ModelConfig.from_dict({**CONFIG, "num_hidden_layers": 4})
    flop = {m: step_work(tune_method(m, settings_of(m, 0, TINY)), config, 100)[0] for m in ("freeze", "lora", "full")}
    assert flop["freeze"] < flop["lora"] < flop["full"]


CONFIG = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 128, "hidden_size": 256, "intermediate_size": 512,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
