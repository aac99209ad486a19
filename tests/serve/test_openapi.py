"""The server against its own description: no body that a machine can think of makes it fail."""

from __future__ import annotations

from typing import Any

import pytest

from memwall.serve import parse
from memwall.serve.openapi import document
from memwall.serve.settings import ServerSettings
from tests.serve.conftest import Starter

pytest.importorskip("schemathesis", reason="needs schemathesis")
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode, checks

WRONG = (
    checks.not_a_server_error, checks.status_code_conformance, checks.content_type_conformance,
    checks.response_schema_conformance, checks.negative_data_rejection, checks.unsupported_method,
)  # fmt: skip


@pytest.fixture(scope="session")
def described(starter: Starter) -> Any:
    server = starter("--memory", "160MB", "--weights", "int4", "--context", "64", "--lora-dir", "tests")
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_no_request_makes_the_server_fail(described: Any, mode: GenerationMode) -> None:
    for found in described.get_all_operations():
        operation = found.ok()

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
        def attempt(case: Any) -> None:
            case.call_and_validate(checks=WRONG)

        try:
            attempt()
        except Unsatisfiable:
            assert mode is GenerationMode.NEGATIVE  # nothing in a plain GET can be wrong


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("Completion", parse.COMPLETION), ("Chat", parse.CHAT), ("Tokenize", parse.TOKENIZE),
        ("Detokenize", parse.DETOKENIZE), ("Embedding", parse.EMBEDDING),
    ],
)  # fmt: skip
def test_the_description_has_the_fields_that_the_parser_knows(name: str, fields: tuple[str, ...]) -> None:
    found = document(ServerSettings(name="demo"), vocab=10, adapters=False)["components"]["schemas"][name]
    assert set(found["properties"]) == set(fields)
    assert found["additionalProperties"] is False


def test_a_key_and_adapters_are_told() -> None:
    plain = document(ServerSettings(name="demo"), vocab=10, adapters=False)
    assert "security" not in plain
    assert "/v1/load_lora_adapter" not in plain["paths"]
    keyed = document(ServerSettings(name="demo", api_key="s"), vocab=10, adapters=True)
    assert keyed["security"] == [{"key": []}]
    assert "/v1/load_lora_adapter" in keyed["paths"]
