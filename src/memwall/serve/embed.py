"""The route that makes vectors of texts: `/v1/embeddings`."""

from __future__ import annotations

import asyncio
import base64
from contextlib import aclosing
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from memwall.serve.control import answered
from memwall.serve.fields import read_object
from memwall.serve.parse import Parser
from memwall.serve.service import Service


class Embed:
    """Texts go through the engine as prompts do, beside requests that generate; nothing is drawn for them."""

    def __init__(self, service: Service, parser: Parser) -> None:
        self.service = service
        self.parser = parser

    @answered
    async def embeddings(self, request: Request) -> Response:
        """One vector of length 1 for each input, in their order."""
        body = request.scope["memwall.body"]
        # as texts for completions: encoding long ones takes a while
        asked, coded = await asyncio.to_thread(lambda: self.parser.embedding(read_object(body)))
        vectors: dict[int, np.ndarray] = {}
        async with aclosing(self.service.run(asked)) as pieces:
            async for index, choice, _ in pieces:
                if choice.vector is not None:
                    vectors[index] = choice.vector
        data = [
            {"object": "embedding", "index": index, "embedding": _written(vectors[index], coded)}
            for index in range(len(asked.requests))
        ]
        usage = {"prompt_tokens": asked.prompt_tokens, "total_tokens": asked.prompt_tokens}
        return JSONResponse({"object": "list", "data": data, "model": asked.model, "usage": usage})


def _written(vector: np.ndarray, coded: bool) -> Any:
    """Numbers, or little endian float32 in base64."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode() if coded else vector.tolist()
