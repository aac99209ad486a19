"""Claims of embedding storage: what fewer bits and fewer dimensions of stored vectors cost in ranking quality.

The encoder is trained here (`studies.text_encoder_torch`: hashed words, 19 million parameters, heads of 384 and 768
dimensions; some minutes, then kept in the cache folder as `evidence/embedding-encoder-*`). It learns from docstrings of
installed packages; maps and ranges are learned from vectors of those too, of at most 30,000. Judged are other texts:
docstrings of numerical packages and of the standard library (the first sentence asks for the rest), and where they lie
beside the checkout (shared/data, or `--data` a folder like it) paragraphs of WikiText-2 (a sentence taken out asks for
its paragraph) and speeches of plays (a line asks for its speech). Each query has one relevant passage.

nDCG@10 is the mean over corpora; losses are relative to float32, and their standard errors are those of paired
differences by query, at the larger dimension first where one is quoted alone. An ordering counts where it holds by two
standard errors.

What the whole run of 1 December 2026 found (two cores of an EPYC with AVX2, nothing beside it, 428 s, of them 130 for
the encoder; nDCG@10 of float32 0.116). Five claims failed:

- E4M3 over E5M2: 0.07 ± 0.21 % lost against 0.23 ± 0.32 %, an ordering that so many queries do not tell; and bfloat16,
  0.10 ± 0.06 % better than float32, stands at the edge of what is asked for.
- E4M3 over the paper's integers: 1.20 ± 0.62 % less is lost, two standard errors almost to the digit. A run before,
  with an encoder that was not stopped by held-out pairs, told them apart (1.37 ± 0.57 %).
- Half the components in 8-bit floats over the paper's integers: 4.83 ± 0.51 % lost against 1.27 ± 0.61 %. The encoder
  spreads its variance over all dimensions, so half of them are no spare ones.
- The autoencoder over projection: 41 % lost against 25 % at half of the dimensions. It learned from 20,000 to 30,000
  vectors, where the paper's had 250,000. PCA is best in all 16 cases.
- Throughput: 13.3 million vectors/s of e4m3 against 15.9 of float16, since decoding 8-bit floats takes AVX2 longer than
  reading them does; in a run before that widened bytes in portable code it was 6.3, and int8 2.6 instead of 14.0.

Throughput and resident bytes mean something only where nothing else works the machine.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from memwall.claims import Claim, Progress, alternately, main, not_run
from memwall.errors import MissingDependency
from memwall.hardware.system import cache_directory
from memwall.hardware.units import GB, MB
from memwall.retrieve.base import unit
from memwall.retrieve.embedding_storage import Fitted, Form, StoredVectors, choose, frontier
from memwall.retrieve.ranking import Judged, Measured, measure, ndcg
from memwall.retrieve.reducers import Pca, sample
from memwall.retrieve.vector_codecs import VECTOR_CODECS, vector_codec
from memwall.retrieve.vector_file import VectorFile, write_vectors
from memwall.studies.passages import Pairs, docstrings, paragraphs, speeches, text_folder

NUMERICAL = ("networkx", "numpy", "sklearn", "scipy", "matplotlib", "sympy")
LIBRARY = ("stdlib",)
OTHERS = ("rich", "_pytest", "hypothesis", "huggingface_hub", "jinja2", "PIL", "pip", "torch", "transformers")
TYPES = tuple(VECTOR_CODECS)
PCA_TYPES = ("float32", "e4m3", "int8", "e2m1-dimension", "signs")
FRACTIONS = (0.25, 0.5, 0.75, 0.9)
MAPS = ("kernel-pca", "projection", "autoencoder")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """encoder: what differs from its defaults. passages, queries: of each corpus. rows: that are scanned.

    errors: standard errors by which an ordering must hold. The quick form has few queries: below 0, the ordering must
    not be turned around by so many.
    """

    encoder: Mapping[str, Any]
    passages: int
    queries: int
    fitted: int
    trained: int
    rows: int
    fractions: tuple[float, ...]
    umap: int
    rounds: int
    errors: float


FULL = Sizes(encoder={}, passages=6000, queries=1000, fitted=20_000, trained=50_000, rows=200_000, fractions=FRACTIONS,
             umap=2500, rounds=7, errors=2.0)  # fmt: skip
QUICK = Sizes(
    encoder={"dimensions": (96, 192), "buckets": 1 << 14, "width": 128, "hidden": 256, "steps": 120, "batch": 128},
    passages=1500, queries=300, fitted=4000, trained=6000, rows=60_000, fractions=(0.5,), umap=0, rounds=3, errors=-2.0,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A corpus at one dimension. fitted: vectors of other texts, that maps and ranges are learned from."""

    name: str
    d: int
    judged: Judged
    fitted: np.ndarray


# ---- texts and vectors ---------------------------------------------------------------------------------------------


def corpora(folder: Path | None, most: int) -> list[Pairs]:
    """What is judged. most: docstrings that are read of a kind."""
    found = [docstrings("numerical packages", NUMERICAL, most), docstrings("standard library", LIBRARY, most)]
    if folder is not None:
        found.append(paragraphs("WikiText-2", (folder / "wikitext2-valid.txt").read_text(encoding="utf-8")))
        if (folder / "tinyshakespeare.txt").is_file():
            found.append(speeches("plays", (folder / "tinyshakespeare.txt").read_text(encoding="utf-8")))
    return [one for one in found if len(one) >= 100]


def encoder_file(pairs: Pairs, sizes: Sizes, progress: Progress | None) -> Path:
    """The trained weights: of now, or of an earlier run."""
    from memwall.studies.text_encoder_torch import EncoderSettings, train

    settings = EncoderSettings(**sizes.encoder)
    both = list(zip(pairs.queries, pairs.passages, strict=True))
    digest = hashlib.sha256(json.dumps([both, repr(settings)]).encode()).hexdigest()[:16]
    kept = cache_directory() / "evidence" / f"embedding-encoder-{digest}.safetensors"
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as name:
            train(both, settings, Path(name) / "weights", progress)
            os.replace(Path(name) / "weights", kept)
    return kept


def subjects(folder: Path | None, sizes: Sizes, progress: Progress | None) -> list[Subject]:
    """Every corpus at every dimension; those of one corpus lie side by side."""
    from memwall.studies.text_encoder_torch import EncoderSettings, embed

    settings = EncoderSettings(**sizes.encoder)
    others = docstrings("other packages", OTHERS, sizes.trained)
    kept = encoder_file(others, sizes, progress)
    embedded = partial(embed, settings=settings, kept=kept)
    fitted = embedded(others.passages[: sizes.fitted])
    found = []
    for one in corpora(folder, 3 * sizes.passages):
        told = f"vectors of {one.name}"
        if progress is not None:
            progress(0, 1, told)
        passages, queries = embedded(one.passages[: sizes.passages]), embedded(one.queries[: sizes.queries])
        for d, x, asked, learned in zip(settings.dimensions, passages, queries, fitted, strict=True):
            judged = Judged(vectors=x, queries=asked, relevant=[{at} for at in range(len(asked))])
            found.append(Subject(name=one.name, d=d, judged=judged, fitted=learned))
    return found


def measured(found: Sequence[Subject], sizes: Sizes, progress: Progress | None) -> list[dict[str, Measured]]:
    """Every form on every subject."""
    texts = [*TYPES, *(f"pca:{fraction}+{name}" for fraction in sizes.fractions for name in PCA_TYPES)]
    compared = [fraction for fraction in sizes.fractions if fraction <= 0.5]
    texts += [f"{kind}:{fraction}+float32" for kind in MAPS for fraction in compared]
    forms = [Form.parse(text) for text in texts]
    told = []
    reducers: dict[int, dict[Any, Any]] = {one.d: {} for one in found}  # learned from the same vectors
    for number, one in enumerate(found):

        def tell(done: int, whole: int, what: str, number: int = number, one: Subject = one) -> None:
            if progress is not None:
                progress(number * whole + done, len(found) * whole, f"{one.name} {one.d}: {what}")

        given = {"name": "docstrings of other packages", "reducers": reducers[one.d], "progress": tell}
        rows = measure(forms, one.judged, one.fitted, **given)
        told.append({row.point.form: row for row in rows})
    return told


# ---- figures -------------------------------------------------------------------------------------------------------


def quality(table: Sequence[dict[str, Measured]], form: str) -> float:
    """Mean nDCG@10 over subjects."""
    return float(np.mean([one[form].point.quality for one in table]))


def gap(table: Sequence[dict[str, Measured]], better: str, worse: str) -> tuple[float, float]:
    """How much of the better one's quality the worse one loses, and its standard error, by paired queries."""
    base = quality(table, better)
    parts = [one[better].ndcg - one[worse].ndcg for one in table]
    error = np.sqrt(sum(part.var(ddof=1) / len(part) for part in parts)) / len(parts)
    return float(np.mean([part.mean() for part in parts])) / base, float(error) / base


def certain(table: Sequence[dict[str, Measured]], better: str, worse: str, errors: float) -> bool:
    """Whether the better one is, by so many standard errors."""
    difference, error = gap(table, better, worse)
    return difference > errors * error


def by(errors: float) -> str:
    return "by two standard errors" if errors > 0 else "not turned around by two standard errors"


def percents(table: Sequence[dict[str, Measured]], forms: Sequence[str], base: str = "float32") -> str:
    """Losses with their standard errors."""
    found = ((form, *gap(table, base, form)) for form in forms)
    return ", ".join(f"{form} {loss:.2%} ± {error:.2%}" for form, loss, error in found)


# ---- claims --------------------------------------------------------------------------------------------------------


def cast_claim() -> Claim:
    """All codes, and a million numbers, against ml_dtypes."""
    kinds = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2, "e2m1": ml_dtypes.float4_e2m1fn}
    draw = np.random.default_rng(0)
    x = (draw.standard_normal(1_000_000) * np.ldexp(1.0, draw.integers(-18, 3, 1_000_000))).astype(np.float32)[:, None]
    wrong = {}
    for name, kind in kinds.items():
        one = vector_codec(name)
        codes = np.arange(16 if name == "e2m1" else 256, dtype=np.uint8)
        values = codes.view(kind).astype(np.float32)
        values = values[np.isfinite(values)][:, None]
        given = np.concatenate([x.clip(-6, 6) if name == "e2m1" else x, values])
        wrong[name] = int((one.decode(one.encode(given, {}), 1, {}) != given.astype(kind).astype(np.float32)).sum())
    return Claim(
        claim="8- and 4-bit floats are rounded as ml_dtypes rounds them, subnormals and ties included",
        measured="numbers that differ, of 1,000,000 and of all codes: "
        + ", ".join(f"{n} {w}" for n, w in wrong.items()),
        required="none",
        passed=not any(wrong.values()),
    )


def file_claim(x: np.ndarray) -> Claim:
    """Sizes of files as the system tells them, less header and tables."""
    told, exact = [], True
    with tempfile.TemporaryDirectory() as name:
        for form in [*TYPES, "pca:0.5+e4m3", "pca:0.25+e4m3"]:
            path = Path(name) / "vectors"
            fitted = Fitted.fit(Form.parse(form), x[:2000], name="the first 2000")
            write_vectors(path, fitted, x)
            size = os.stat(path).st_size
            beside = 8 + int.from_bytes(path.read_bytes()[:8], "little") + fitted.table_bytes + 32
            ratio = x.nbytes / (size - beside)
            wanted = 4 * x.shape[1] / fitted.vector_bytes
            exact &= ratio == wanted and (fitted.codec.scale_bytes > 0 or wanted in (1, 2, 4, 8, 16, 32))
            told.append(f"{form} {ratio:.4g} (and {beside / len(x):.2f} bytes a vector)")
    return Claim(
        claim="files shrink exactly by the bits, tables and header apart",
        measured=f"{len(x):,} vectors of {x.shape[1]}: " + ", ".join(told),
        required="1, 2, 4, 8, 32 times exactly; 16 with a quarter of the dimensions; scales take 2 bytes more",
        passed=exact,
    )


def type_claims(table: Sequence[dict[str, Measured]], what: str, errors: float) -> Iterator[Claim]:
    yield Claim(
        claim="16-bit floats lose nothing, 8-bit ones well under 1 % (E4M3 less than E5M2), and one bit far more",
        measured=f"{what}; lost of nDCG@10 {quality(table, 'float32'):.4f}: "
        + percents(table, ["float16", "bfloat16", "e4m3", "e5m2", "binary", "signs"]),
        required="float16 and bfloat16 within 0.1 %, e4m3 under 0.5 %, less than e5m2 "
        f"({by(errors)}), and that less than a tenth of binary",
        passed=abs(gap(table, "float32", "float16")[0]) < 1e-3
        and abs(gap(table, "float32", "bfloat16")[0]) < 1e-3
        and gap(table, "float32", "e4m3")[0] < 5e-3
        and certain(table, "e4m3", "e5m2", errors)
        and gap(table, "float32", "e5m2")[0] < gap(table, "float32", "binary")[0] / 10,
    )
    yield Claim(
        claim="8-bit floats beat the paper's 8-bit integers at equal bytes; integers that are clipped, rounded and "
        "mapped back are another matter",
        measured="lost: "
        + percents(table, ["e4m3", "int8-paper", "int8"])
        + "; against e4m3: "
        + percents(table, ["int8-paper", "int8"], "e4m3"),
        required=f"int8-paper loses more than e4m3, {by(errors)}; what int8 loses is told as it is",
        passed=certain(table, "e4m3", "int8-paper", errors),
    )
    yield Claim(
        claim="half the principal components in 8-bit floats, 8 times smaller, lose less than the paper's integers",
        measured="lost: " + percents(table, ["pca:0.5+e4m3", "int8-paper"]),
        required=f"less, {by(errors)}",
        passed=certain(table, "pca:0.5+e4m3", "int8-paper", errors),
    )
    scaled = ["e2m1-vector", "e2m1-dimension"]
    yield Claim(
        claim="4-bit floats need a scale: cast as they are, vectors of length 1 are nearly all zeros",
        measured="lost: " + percents(table, ["e2m1", *scaled, "pca:0.5+e2m1-dimension"]),
        required="both scaled ones lose less than a fifth of what the bare cast loses",
        passed=all(gap(table, "float32", one)[0] < gap(table, "float32", "e2m1")[0] / 5 for one in scaled),
    )


def error_claim(found: Sequence[Subject]) -> Claim:
    """Mean squared errors of numbers, on the judged vectors, with ranges of other texts."""
    told, lower = [], 0
    for one in found:
        errors = {}
        for name in ("e4m3", "int8"):
            fitted = Fitted.fit(Form(codec=name), one.fitted, name="others")
            held = fitted.decode(fitted.encode(one.judged.vectors))
            errors[name] = float(np.square(held - one.judged.vectors).mean())
        lower += errors["int8"] < errors["e4m3"]
        told.append(f"{one.name} {one.d}: {errors['int8'] / errors['e4m3']:.2f}")
    return Claim(
        claim="integers that are clipped, rounded and mapped back have a smaller error than 8-bit floats",
        measured="mean squared error of int8 over e4m3's: " + ", ".join(told),
        required="below 1 on every corpus",
        passed=lower == len(found),
    )


def reduction_claims(table: Sequence[dict[str, Measured]], found: Sequence[Subject], sizes: Sizes) -> Iterator[Claim]:
    compared = [fraction for fraction in sizes.fractions if fraction <= 0.5]
    told, ordered = [], True
    for fraction in compared:
        names = [f"{kind}:{fraction}+float32" for kind in ("pca", *MAPS)]
        told.append(f"{fraction:g} of the dimensions: " + percents(table, names))
        pca, kernel, projection, autoencoder = names
        ordered &= certain(table, pca, kernel, -2.0)
        ordered &= certain(table, kernel, autoencoder, sizes.errors)
        ordered &= certain(table, autoencoder, projection, sizes.errors)
    each = sum(
        row[f"pca:{fraction}+float32"].point.quality
        >= max(row[f"{kind}:{fraction}+float32"].point.quality for kind in MAPS[1:])
        for row in table
        for fraction in compared
    )
    yield Claim(
        claim="at equal dimensions PCA is best: as good as kernel PCA, then the autoencoder, then projection",
        measured="; ".join(told) + f"; PCA best of the last two in {each} of {len(table) * len(compared)} cases "
        f"({len({one.name for one in found})} corpora, {' and '.join(map(str, sorted({one.d for one in found})))})",
        required=f"in that order {by(sizes.errors)} (kernel PCA not above PCA by as much), PCA best in every case",
        passed=ordered and each == len(table) * len(compared),
    )
    yield umap_claim(found, sizes)


def umap_claim(found: Sequence[Subject], sizes: Sizes) -> Claim:
    claim, required = "UMAP is far below the other reductions", "less than half of PCA's nDCG@10"
    if importlib.util.find_spec("umap") is None:
        return not_run(claim, required, needs="umap-learn (pip install umap-learn)")
    if not sizes.umap:
        return not_run(claim, required, needs="the whole run")
    told, below = [], True
    form = Form.parse("umap:0.25+float32")
    for one in [one for one in found if one.d == min(each.d for each in found)][-2:]:
        judged = Judged(vectors=one.judged.vectors[: sizes.umap], queries=one.judged.queries[:500],
                        relevant=[{at} for at in range(500)])  # fmt: skip
        fit = sample(one.fitted, sizes.umap)
        theirs, ours = measure([form, Form.parse("pca:0.25+float32")], judged, fit, name="others")
        below &= theirs.point.quality < ours.point.quality / 2
        told.append(f"{one.name} {one.d}: {theirs.point.quality:.3f}, PCA {ours.point.quality:.3f}")
    measured = "nDCG@10 with a quarter of the dimensions: " + "; ".join(told)
    return Claim(claim=claim, measured=measured, required=required, passed=below)


def choice_claim(table: Sequence[dict[str, Measured]], found: Sequence[Subject]) -> Claim:
    """Of the larger dimension, mean over corpora; a million vectors."""
    d = max(one.d for one in found)
    rows = [row for row, one in zip(table, found, strict=True) if one.d == d]
    points = [
        type(first.point)(form=form, vector_bytes=first.point.vector_bytes, table_bytes=first.point.table_bytes,
                          quality=quality(rows, form))
        for form, first in rows[0].items()
    ]  # fmt: skip
    count = 1_000_000
    best = frontier(points, count)
    capacities = np.geomspace(best[0].total_bytes(count), 1.1 * best[-1].total_bytes(count), 60)
    chosen = [choose(int(capacity + 1), count, points) for capacity in capacities]
    beaten = sum(
        other.total_bytes(count) <= one.total_bytes(count)
        and other.quality >= one.quality
        and (other.total_bytes(count), other.quality) != (one.total_bytes(count), one.quality)
        for one in chosen
        for other in points
    )
    names = list(dict.fromkeys(one.form for one in chosen))
    hull = frontier(points, count, convex=True)
    return Claim(
        claim="the choice follows the capacity along the frontier and never takes a form that another one beats",
        measured=f"{d} dimensions, {count:,} vectors, {capacities[0] / MB:.0f} to {capacities[-1] / MB:.0f} MB: "
        + " > ".join(f"{one.form} ({one.vector_bytes:g} B, {one.quality:.4f})" for one in best)
        + f"; on the convex hull: {', '.join(one.form for one in hull)}; {len(names)} chosen, {beaten} beaten",
        required="4 forms or more chosen, all of the frontier, none beaten",
        passed=len(names) >= 4 and beaten == 0 and set(names) <= {one.form for one in best},
    )


def scan_claims(sizes: Sizes, quick: bool) -> Iterator[Claim]:
    """Drawn vectors: what they are makes no difference to a scan."""
    d = 768
    x = unit(np.random.default_rng(0).standard_normal((sizes.rows, d), np.float32))
    names = ("float32", "float16", "e4m3", "e2m1-dimension", "signs")
    indexes = {name: StoredVectors.of(Fitted.fit(Form(codec=name), x[:1000], name="drawn"), x) for name in names}
    indexes["int8"] = StoredVectors.of(Fitted.fit(Form(codec="int8"), x[:1000], name="drawn"), x)
    asked = x[:1] + np.float32(0.01)
    seconds = alternately({name: partial(one.search, asked, 10) for name, one in indexes.items()}, sizes.rounds)
    rates = {name: sizes.rows / each / 1e6 for name, each in seconds.items()}
    yield Claim(
        claim="a scan is faster the fewer bytes it reads, while memory is what limits it",
        measured=f"{sizes.rows:,} vectors of {d}, one query: "
        + ", ".join(
            f"{name} {rate:.1f} million vectors/s ({indexes[name].nbytes / seconds[name] / GB:.1f} GB/s)"
            for name, rate in rates.items()
        ),
        required="float32 < float16 < e4m3 < signs in vectors/s",
        passed=rates["float32"] < rates["float16"] < rates["e4m3"] < rates["signs"],
    )
    yield faiss_scan_claim(x, asked, indexes, sizes)
    yield resident_claim(x, names)


def resident_claim(x: np.ndarray, names: Sequence[str]) -> Claim:
    """The search command's own process."""
    held, files = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "q.npy", x[:1])
        for name in names:
            path = Path(folder) / name
            write_vectors(path, Fitted.fit(Form(codec=name), x[:1000], name="drawn"), x)
            files[name] = VectorFile(path, verify=False).vectors.nbytes
            arguments = ["search", str(path), str(Path(folder) / "q.npy"), "--json", "--quiet"]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
            done = subprocess.run([sys.executable, "-m", "memwall", *arguments], capture_output=True, text=True,
                                  check=True, env=environment)  # fmt: skip
            held[name] = json.loads(done.stdout)["peak_resident_bytes"]
            path.unlink()
    base = held[names[-1]] - files[names[-1]]
    near = all(abs(held[name] - base - files[name]) < 0.03 * held[name] + 4 * MB for name in names)
    return Claim(
        claim="the resident memory of a search falls with the codec: no decoded copy is made",
        measured="peak of the process less its vectors, in MB: "
        + ", ".join(f"{name} {held[name] / MB:.0f} - {files[name] / MB:.0f}" for name in names),
        required="falls from each to the next; each is its vectors and the same base, within 3 % and 4 MB",
        passed=near and all(held[a] > held[b] for a, b in itertools.pairwise(names)),
    )


# ---- peers ---------------------------------------------------------------------------------------------------------


def faiss_here() -> Any:
    if importlib.util.find_spec("faiss") is None:
        return None
    import faiss

    return faiss


def faiss_scan_claim(x: np.ndarray, asked: np.ndarray, indexes: Mapping[str, StoredVectors], sizes: Sizes) -> Claim:
    claim = "a scan takes no longer than faiss's scalar quantizers of as many bits do"
    required = "at most 1.1 times the time of SQfp16 and of SQ8"
    faiss = faiss_here()
    if faiss is None:
        return not_run(claim, required, needs="faiss (pip install faiss-cpu)")
    theirs = {}
    for name, kind in (("SQfp16", "QT_fp16"), ("SQ8", "QT_8bit")):
        one = faiss.IndexScalarQuantizer(x.shape[1], getattr(faiss.ScalarQuantizer, kind), faiss.METRIC_INNER_PRODUCT)
        one.train(x[:1000])
        one.add(x)
        theirs[name] = one
    works = {name: partial(one.search, asked, 10) for name, one in theirs.items()}
    works |= {name: partial(indexes[name].search, asked, 10) for name in ("float16", "e4m3", "int8")}
    seconds = alternately(works, sizes.rounds)
    return Claim(
        claim=claim,
        measured=", ".join(f"{name} {each * 1e3:.1f} ms" for name, each in seconds.items()),
        required=required,
        passed=seconds["float16"] <= 1.1 * seconds["SQfp16"]
        and max(seconds["e4m3"], seconds["int8"]) <= 1.1 * seconds["SQ8"],
    )


def peer_claims(found: Sequence[Subject], table: Sequence[dict[str, Measured]]) -> Iterator[Claim]:
    yield faiss_claim(found, table)
    yield faiss_pca_claim(found[0])
    yield library_claim(found[0])


def faiss_claim(found: Sequence[Subject], table: Sequence[dict[str, Measured]]) -> Claim:
    claim = "16-bit floats and fair 8-bit integers rank as faiss's scalar quantizers do"
    required = "nDCG@10 within 0.3 % of SQfp16 and SQ8; SQ4 is told"
    faiss = faiss_here()
    if faiss is None:
        return not_run(claim, required, needs="faiss (pip install faiss-cpu)")
    theirs: dict[str, list[float]] = {"SQfp16": [], "SQ8": [], "SQ4": []}
    for one in found:
        for name, kind in (("SQfp16", "QT_fp16"), ("SQ8", "QT_8bit"), ("SQ4", "QT_4bit")):
            index = faiss.IndexScalarQuantizer(one.d, getattr(faiss.ScalarQuantizer, kind), faiss.METRIC_INNER_PRODUCT)
            index.train(one.fitted)
            index.add(one.judged.vectors)
            ids = index.search(one.judged.queries, 10)[1]
            theirs[name].append(float(ndcg(ids, one.judged.relevant).mean()))
    means = {name: float(np.mean(each)) for name, each in theirs.items()}
    ours = {name: quality(table, name) for name in ("float16", "int8", "e4m3", "e2m1-dimension", "e2m1-vector")}
    return Claim(
        claim=claim,
        measured=", ".join(f"{name} {each:.4f}" for name, each in {**means, **ours}.items()),
        required=required,
        passed=abs(ours["float16"] / means["SQfp16"] - 1) < 3e-3 and abs(ours["int8"] / means["SQ8"] - 1) < 3e-3,
    )


def faiss_pca_claim(one: Subject) -> Claim:
    claim, required = "PCA's directions are faiss's, up to signs", "products of directions within 0.001 of 1"
    faiss = faiss_here()
    if faiss is None:
        return not_run(claim, required, needs="faiss (pip install faiss-cpu)")
    m = one.d // 4
    theirs = faiss.PCAMatrix(one.d, m)
    theirs.train(one.fitted)
    rows = faiss.vector_to_array(theirs.A).reshape(m, one.d)
    near = np.abs((rows * Pca.fit(one.fitted, m).weights.T).sum(axis=1))
    return Claim(claim=claim, measured=f"{m} directions, the least alike {near.min():.6f}", required=required,
                 passed=bool(near.min() > 0.999))  # fmt: skip


def library_claim(one: Subject) -> Claim:
    claim = (
        "within the ranges the paper's integers are those of sentence-transformers, whose later releases clip outside"
    )
    required = "the same codes but for 1 in 10,000 (it divides in float64)"
    try:
        from sentence_transformers.util.quantization import quantize_embeddings
    except ImportError:
        try:
            from sentence_transformers.quantization import quantize_embeddings
        except ImportError:
            return not_run(claim, required, needs="sentence-transformers (pip install sentence-transformers)")
    codec = vector_codec("int8-paper")
    tables = codec.tables(one.fitted)
    x = one.judged.vectors
    ranges = np.stack([tables["least"], tables["largest"]])
    theirs = quantize_embeddings(x, precision="uint8", ranges=ranges)
    outside = (x < tables["least"]) | (x > tables["largest"])
    differ = int(((theirs != codec.encode(x, tables)["rows"]) & ~outside).sum())
    return Claim(
        claim=claim,
        measured=f"{differ} of {x.size:,} codes differ; {outside.mean():.2%} of the numbers lie outside",
        required=required,
        passed=differ <= x.size / 10_000,
    )


def run(quick: bool, data: Path | None, progress: Progress | None = None) -> list[Claim]:
    if importlib.util.find_spec("torch") is None:
        raise MissingDependency("torch", "torch")
    sizes, folder = QUICK if quick else FULL, text_folder(data, Path(__file__))
    claims = [cast_claim(), file_claim(unit(np.random.default_rng(1).standard_normal((20_000, 384), np.float32)))]
    found = subjects(folder, sizes, progress)
    table = measured(found, sizes, progress)
    what = "; ".join(
        f"{one.name} {len(one.judged.vectors):,} passages, {len(one.judged.queries):,} queries"
        for one in found
        if one.d == found[0].d
    )
    claims += type_claims(table, what, sizes.errors)
    claims.append(error_claim(found))
    claims += reduction_claims(table, found, sizes)
    claims.append(choice_claim(table, found))
    claims += peer_claims(found, table)
    claims += scan_claims(sizes, quick)
    claims.append(
        not_run("on a GPU, decode-and-dot goes by bytes per vector until arithmetic limits it", "10 million vectors")
    )
    return claims


if __name__ == "__main__":
    sys.exit(main("embedding-storage", sys.modules[__name__]))
