"""`--lora NAME=DIR` and `--lora-dir DIR`: adapters read before the model is, so that room is left for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memwall.cli.printing import note
from memwall.errors import InputError

if TYPE_CHECKING:
    from memwall.engine.serving import LoraSettings, Serving
    from memwall.models.config import ModelConfig
    from memwall.models.lora import LoraWeights

LoraOption = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        help="An adapter (PEFT's LoRA directory) served as a model of that name; may be given several times.",
        metavar="NAME=DIR",
    ),
]
LoraFolder = Annotated[
    Path | None,
    typer.Option(
        "--lora-dir",
        help="Folder of adapters: each folder in it is served under its name; more may be loaded from it by request.",
        metavar="DIR",
    ),
]
MostRank = Annotated[
    int, typer.Option("--max-lora-rank", help="Largest rank of adapters that may be loaded later.", min=1, max=512)
]
LoraBatch = Annotated[
    int | None,
    typer.Option(
        "--lora-batch", help="Distinct adapters in a batch before requests of those in it are preferred.", min=1
    ),
]
FirstToken = Annotated[
    float | None,
    typer.Option(
        "--first-token-limit",
        help="With adapters: requests that can no longer have their first token in so many seconds get 503, and under "
        "overload the newest go first.",
        min=1.0,
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedLoras:
    """What the options named, read as far as their headers."""

    adapters: dict[str, LoraWeights]
    folder: Path | None
    most_rank: int

    def settings(self, config: ModelConfig, page_tokens: int, kv: str) -> LoraSettings | None:
        """For the engine; None where no option was given. Room for the largest adapter is kept beside one request."""
        from memwall.engine.batch import lora_room
        from memwall.engine.loading import cache_shape
        from memwall.engine.serving import LoraSettings

        if not self.adapters and self.folder is None:
            return None
        room = lora_room(cache_shape(config), page_tokens, kv)
        largest = max((weights.paged(room).num_pages for weights in self.adapters.values()), default=0)
        rank = max([self.most_rank, *(weights.rank for weights in self.adapters.values())])
        return LoraSettings(most_rank=rank, room_bytes=largest * room.page_bytes)

    def add_to(self, serving: Serving) -> None:
        """Makes them known to a loaded engine."""
        for name, weights in self.adapters.items():
            serving.add_adapter(name, weights)


def read_loras(
    given: list[str] | None, folder: Path | None, most_rank: int, model: Path, base: str, *, quiet: bool
) -> AskedLoras:
    """Reads the headers of all adapters. A folder's that cannot be served are named and left out; one that was given by
    name is an error.
    """
    from memwall.models.config import ModelConfig
    from memwall.models.lora import CONFIG, LoraWeights

    adapters: dict[str, LoraWeights] = {}
    if not given and folder is None:
        return AskedLoras(adapters=adapters, folder=None, most_rank=most_rank)
    config = ModelConfig.from_directory(model)
    for text in given or []:
        name, equals, path = text.partition("=")
        if not equals or not path:
            raise InputError(f"--lora {text!r}: give NAME=DIR, such as --lora sql=adapters/sql")
        if name in adapters:
            raise InputError(f"--lora {text!r}: {name!r} is given twice")
        adapters[_checked(name, base)] = LoraWeights.read(path, config)
    if folder is not None:
        if not folder.is_dir():
            raise InputError(f"--lora-dir {folder}: there is no such folder")
        for each in sorted(folder.iterdir()):
            if not (each / CONFIG).is_file() or each.name in adapters:
                continue
            try:
                adapters[_checked(each.name, base)] = LoraWeights.read(each, config)
            except InputError as error:
                note(f"memwall: left out: {error}", quiet=quiet)
    return AskedLoras(adapters=adapters, folder=folder, most_rank=most_rank)


def _checked(name: str, base: str) -> str:
    from memwall.serve.fields import ApiError
    from memwall.serve.loras import checked_name

    try:
        return checked_name(name, base)
    except ApiError as error:
        raise InputError(f"--lora {name[:80]!r}: {error.message}") from None
