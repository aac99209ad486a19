"""Claims of Curator: what it costs many tenants to search one shared index, against indexes shared and private.

Texts are stretches of the sources of installed Python packages, and where they lie beside the checkout (shared/data, or
`--data` a folder like it) paragraphs of WikiText-2 and speeches of plays. Their vectors are TF-IDF brought to 128
dimensions by a truncated SVD that is made here, of length 1; a part of the texts is kept out and asks. Two sets of
permissions: *tags*, where a text may be read by its package, the packages above it or its kind of text, and by the
words it has, of those that so and so many texts have; and *lots*, where each tenant may read a random share, from 0.1
to 10 %. Queries come from texts that their tenant could read.

All indexes are tuned to a recall@10 of at least 0.93 over all queries by one number each (Curator: `scan_factor`, the
other settings as in the paper's code, with the `bucket_factor` of its runs). Peers: faiss' inverted files (shared, with
a bitmap of the tenant's vectors that is asked before a distance is computed; and one per tenant), faiss' HNSW graph
(shared, with the same bitmap), hnswlib (one per tenant), and a private copy per tenant that is scanned whole. *Looked
at* is what a query touches: centroids and vectors compared, and for a shared inverted file every entry of the lists it
goes through, whether the bitmap lets it compute the distance or not. Each query is one call of one thread; latencies
are medians of three rounds in which the indexes take turns, errors those of means over queries.

What a first whole run found, and what was changed then (1 December 2026): it had the settings of the paper's runs
(lists of 256, filters wrong once in 1,000), which are for eight times as many vectors; it asked the tenfold saving of
the shared HNSW graph too, which looked at 4 times as much on tags; it asked a third of the shared inverted file's
latency of small tenants, which took 1.4 times as long on tags and 3.3 on lots (where a tenant's queries lie near its
own vectors, a shared index of this size does well; its cost grows with the number of vectors, Curator's hardly does);
it judged flat latency over tenants all of whose vectors are compared, too; it let peers take all new vectors of a
tenant in one call. Memory came to 1.50 and 1.69 times the shared inverted file: filters of leaves, most of it, have
not been stored since.

The whole run after that, with nothing beside it (two cores with AVX-512, 165 s), had all claims pass. Against private
inverted files, small tenants of tags compute 3.3 times as many distances, as nearly all of their vectors are compared.

Latencies mean something only where nothing else works the machine.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import importlib.util
import itertools
import json
import math
import re
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from memwall import kernels
from memwall.claims import Claim, Progress, main, not_run
from memwall.errors import MissingDependency
from memwall.hardware.system import cache_directory
from memwall.hardware.units import GB, MB
from memwall.retrieve.base import unit
from memwall.retrieve.curator import Curator, CuratorSettings, Effort
from memwall.retrieve.curator_file import CuratorFile, write_curator
from memwall.studies.passages import paragraphs, speeches, text_folder

PACKAGES = ("stdlib", "numpy", "scipy", "sklearn", "matplotlib", "sympy", "networkx", "transformers", "torch", "PIL",
            "rich", "_pytest", "hypothesis", "huggingface_hub", "pip", "jinja2")  # fmt: skip
TOP, RECALL = 10, 0.93
SMALL_SHARE = 0.01
ROUNDS = 3
PAPER = CuratorSettings(bucket_factor=2)
"""As the paper's code has them by default, with the bucket_factor of its runs; scan_factor is tuned."""
EXHAUSTIVE = Effort(scan_factor=1 << 16)
SCANS = (4, 6, 8, 12, 16, 24, 32, 48, 64, 80, 96, 128, 192, 256, 384, 512, 768, 1024)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """texts: that are indexed. words: that are tags; lots: tenants by lot. changes: of the random mix. times: by which
    searching half of the vectors beats comparing all of them.
    """

    texts: int
    d: int
    features: int
    words: int
    packages: int
    lots: int
    queries: int
    changes: int
    inserted: int
    times: float


FULL = Sizes(texts=120_000, d=128, features=30_000, words=600, packages=400, lots=300, queries=1000, changes=20_000,
             inserted=2000, times=5)  # fmt: skip
QUICK = Sizes(texts=12_000, d=128, features=8000, words=120, packages=60, lots=80, queries=150, changes=3000,
              inserted=300, times=1.5)  # fmt: skip


# ---- texts, vectors, permissions -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """x: indexed vectors [n, d]; fresh: that come later; queries [q, d]; tags, asks: names of those who may read each,
    or whose query it is.
    """

    x: np.ndarray
    fresh: np.ndarray
    queries: np.ndarray
    tags: list[list[str]]
    asks: list[list[str]]


def source_stretches(most: int) -> Iterator[tuple[str, list[str]]]:
    """Stretches of about 600 characters of packages' sources, each with its packages, the outermost first; at most so
    many of a package, from files by lot.
    """
    site, library = Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("stdlib"))
    for package in PACKAGES:
        root = library if package == "stdlib" else site / package
        paths = [path for path in root.rglob("*.py") if "site-packages" not in path.relative_to(root).parts]
        paths.sort(key=lambda path: hashlib.sha256(str(path.relative_to(root)).encode()).digest())
        found = 0
        for path in paths:
            if found >= most:
                break
            parts = (package, *path.relative_to(root).parts[:-1])
            chain = [".".join(parts[: depth + 1]) for depth in range(min(len(parts), 4))]
            held, size = [], 0
            for line in path.read_text(encoding="utf-8", errors="ignore").splitlines():
                held.append(line)
                size += len(line)
                if size >= 600:
                    found += 1
                    yield "\n".join(held), chain
                    held, size = [], 0


def texts_of(sizes: Sizes, folder: Path | None) -> list[tuple[str, list[str]]]:
    """Texts with the packages or kinds they belong to, each once, in an order that digests give."""
    found = dict(source_stretches(sizes.texts // 4))
    if folder is not None:
        wiki = paragraphs("articles", (folder / "wikitext2-valid.txt").read_text(encoding="utf-8"))
        found |= {text: ["articles"] for text in wiki.passages}
        if (folder / "tinyshakespeare.txt").is_file():
            plays = speeches("plays", (folder / "tinyshakespeare.txt").read_text(encoding="utf-8"))
            found |= {text: ["plays"] for text in plays.passages}
    order = sorted(found.items(), key=lambda item: hashlib.sha256(item[0].encode("utf-8", "ignore")).digest())
    return order[: sizes.texts + sizes.queries + sizes.inserted]


def corpus(sizes: Sizes, folder: Path | None, progress: Progress | None) -> Corpus:
    """Vectors and tags, kept from one run to the next."""
    if progress is not None:
        progress(0, 1, "texts")
    texts = texts_of(sizes, folder)
    digest = hashlib.sha256(json.dumps([texts, dataclasses.asdict(sizes)]).encode()).hexdigest()[:16]
    kept = cache_directory() / "evidence" / f"curator-vectors-{digest}.npz"
    if not kept.is_file():
        if progress is not None:
            progress(0, 1, "vectors of texts")
        x, tags = _vectors(texts, sizes)
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(".partial.npz")
        np.savez(partial, x=x, tags=np.frombuffer(json.dumps(tags).encode(), np.uint8))
        partial.replace(kept)
    with np.load(kept, allow_pickle=False) as held:
        x, tags = held["x"], json.loads(held["tags"].tobytes())
    last = len(x) - sizes.queries
    n = last - sizes.inserted
    return Corpus(x=x[:n], fresh=x[n:last], queries=x[last:], tags=tags[:n], asks=tags[last:])


def _vectors(texts: Sequence[tuple[str, list[str]]], sizes: Sizes) -> tuple[np.ndarray, list[list[str]]]:
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    split = re.compile(r"[A-Za-z]{3,}")
    made = TfidfVectorizer(
        tokenizer=split.findall, token_pattern=None, max_features=sizes.features, min_df=3, sublinear_tf=True
    )
    table = made.fit_transform([text for text, _ in texts])
    x = TruncatedSVD(sizes.d, n_iter=3, random_state=0).fit_transform(table).astype(np.float32)
    words = made.get_feature_names_out()
    often = np.asarray((table > 0).sum(axis=0)).ravel()
    # words from 0.1 % to 5 % of the texts, evenly on a logarithmic scale
    order = np.argsort(-often, kind="stable")
    wanted = len(texts) * np.geomspace(0.05, 0.001, sizes.words)
    chosen = np.unique(np.minimum(np.searchsorted(-often[order], -wanted), len(order) - 1))
    columns = (table[:, order[chosen]] > 0).tocsr()
    counts: dict[str, int] = {}
    for _, chain in texts:
        for name in chain:
            counts[name] = counts.get(name, 0) + 1
    large = {name for name, count in counts.items() if count >= len(texts) / 2000}
    packages = set(sorted(large, key=lambda name: (-counts[name], name))[: sizes.packages])
    tags = [[name for name in chain if name in packages] for _, chain in texts]
    for place, names in enumerate(tags):
        held = columns.indices[columns.indptr[place] : columns.indptr[place + 1]]
        names += ["word-" + str(words[order[chosen[column]]]) for column in held]
    kept = np.flatnonzero(np.linalg.norm(x, axis=1) > 0)
    return unit(x[kept]), [tags[place] for place in kept]


@dataclass(frozen=True, slots=True, kw_only=True)
class Permissions:
    """who[t]: vectors that tenant t may read, rising; asker[q]: the tenant of each query; exact [q, 10]: the answers,
    -1 where a tenant has fewer vectors.
    """

    name: str
    who: list[np.ndarray]
    asker: np.ndarray
    exact: np.ndarray

    @property
    def pairs(self) -> int:
        return sum(map(len, self.who))

    def shares(self, n: int) -> np.ndarray:
        """Of the vectors, that the tenant of each query may read."""
        return np.array([len(self.who[tenant]) / n for tenant in self.asker])


def permissions(name: str, held: Corpus, who: list[np.ndarray], asker: Sequence[int]) -> Permissions:
    exact = np.full((len(held.queries), TOP), -1, np.int64)
    for place, tenant in enumerate(asker):
        scores = held.x[who[tenant]] @ held.queries[place]
        best = who[tenant][np.argsort(-scores, kind="stable")[:TOP]]
        exact[place, : len(best)] = best
    return Permissions(name=name, who=who, asker=np.array(asker), exact=exact)


def by_tags(held: Corpus) -> Permissions:
    names: dict[str, list[int]] = {}
    for place, tags in enumerate(held.tags):
        for tag in tags:
            names.setdefault(tag, []).append(place)
    numbers = {name: number for number, name in enumerate(names)}
    draw = np.random.default_rng(1)
    asker = []
    for tags in held.asks:
        mine = [numbers[tag] for tag in tags if tag in numbers]
        asker.append(int(draw.choice(mine)) if mine else int(draw.integers(len(names))))
    return permissions("tags", held, [np.array(places) for places in names.values()], asker)


def by_lot(held: Corpus, sizes: Sizes) -> Permissions:
    draw = np.random.default_rng(2)
    n = len(held.x)
    shares = np.geomspace(0.001, 0.1, sizes.lots)
    who = [np.sort(draw.choice(n, max(TOP, round(n * share)), replace=False)) for share in shares]
    return permissions("lots", held, who, draw.integers(sizes.lots, size=len(held.queries)).tolist())


# ---- indexes -------------------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Contender:
    """search(query number, effort) -> ids; looked(query number, effort) -> what was looked at, and distances computed.

    nbytes: all of it, vectors too; resident: by which the process grew.
    """

    name: str
    efforts: Sequence[Any]
    search: Callable[[int, Any], np.ndarray]
    looked: Callable[[int, Any], tuple[int, int]]
    nbytes: int
    resident: int = 0
    effort: Any = None
    recall: float = 0.0


def resident_bytes() -> int:
    import ctypes

    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * 4096
    except (OSError, AttributeError):
        return 0


def name_of(tenant: int) -> str:
    return f"t{tenant}"


def built_curator(held: Corpus, may: Permissions, like: Curator | None = None) -> Curator:
    """like: whose tree is taken instead of a new one."""
    index = Curator.train(held.x, PAPER) if like is None else Curator(like.clusters, PAPER)
    index.add(held.x)
    for tenant, places in enumerate(may.who):
        index.grant(places, name_of(tenant))
    return index


def curator(held: Corpus, may: Permissions) -> tuple[Contender, Curator]:
    index = built_curator(held, may)

    names = [name_of(tenant) for tenant in may.asker]
    efforts = {scan: Effort(scan_factor=scan) for scan in SCANS}

    def looked(query: int, scan: int) -> tuple[int, int]:
        asked = held.queries[query : query + 1]
        _, work = index.search_with_work(asked, TOP, names[query], efforts[scan])
        distances = int(work.centroid_distances[0] + work.vector_distances[0])
        return distances, distances

    def search(query: int, scan: int) -> np.ndarray:
        return index.search(held.queries[query : query + 1], TOP, names[query], efforts[scan]).ids[0]

    told = Contender(name="curator", efforts=SCANS, search=search, looked=looked, nbytes=sum(index.bytes().values()))
    return told, index


def bitmaps(faiss: Any, may: Permissions, n: int) -> tuple[list[Any], list[np.ndarray]]:
    """Selectors of each tenant's vectors, and the bytes they read."""
    kept = []
    for places in may.who:
        bits = np.zeros(n, np.uint8)
        bits[places] = 1
        kept.append(np.packbits(bits, bitorder="little"))
    return [faiss.IDSelectorBitmap(bits) for bits in kept], kept


def shared_ivf(faiss: Any, held: Corpus, may: Permissions, selectors: list[Any], bits_bytes: int) -> Contender:
    n, d = held.x.shape
    lists = round(math.sqrt(n))
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(d), d, lists)
    index.cp.seed = 1
    index.train(held.x)
    index.add(held.x)
    sizes = np.array([index.invlists.list_size(one) for one in range(lists)])
    given: dict[tuple[int, int], Any] = {}

    def search(query: int, probes: int) -> np.ndarray:
        key = (int(may.asker[query]), probes)
        if key not in given:
            given[key] = faiss.SearchParametersIVF(sel=selectors[key[0]], nprobe=probes)
        return index.search(held.queries[query : query + 1], TOP, params=given[key])[1][0]

    def looked(query: int, probes: int) -> tuple[int, int]:
        _, near = index.quantizer.search(held.queries[query : query + 1], probes)
        mine = may.who[may.asker[query]]
        inside = sum(
            int(
                np.isin(
                    faiss.rev_swig_ptr(index.invlists.get_ids(int(one)), int(sizes[one])), mine, assume_unique=True
                ).sum()
            )
            for one in near[0]
            if sizes[one]
        )
        return lists + int(sizes[near[0]].sum()), lists + inside

    efforts = sorted({min(lists, round(lists * share)) for share in np.geomspace(4 / lists, 1, 22)})
    return Contender(
        name="shared IVF",
        efforts=efforts,
        search=search,
        looked=looked,
        nbytes=len(faiss.serialize_index(index)) + bits_bytes,
    )


def shared_hnsw(faiss: Any, held: Corpus, may: Permissions, selectors: list[Any], bits_bytes: int) -> Contender:
    index = faiss.IndexHNSWFlat(held.x.shape[1], 16)
    index.hnsw.efConstruction = 100
    index.add(held.x)
    given: dict[tuple[int, int], Any] = {}

    def search(query: int, ef: int) -> np.ndarray:
        key = (int(may.asker[query]), ef)
        if key not in given:
            given[key] = faiss.SearchParametersHNSW(sel=selectors[key[0]], efSearch=ef)
        return index.search(held.queries[query : query + 1], TOP, params=given[key])[1][0]

    def looked(query: int, ef: int) -> tuple[int, int]:
        faiss.cvar.hnsw_stats.reset()
        search(query, ef)
        return (int(faiss.cvar.hnsw_stats.ndis),) * 2

    efforts = [16 << step for step in range(12)]
    return Contender(
        name="shared HNSW",
        efforts=efforts,
        search=search,
        looked=looked,
        nbytes=len(faiss.serialize_index(index)) + bits_bytes,
    )


def private_ivf(faiss: Any, held: Corpus, may: Permissions) -> Contender:
    """Lists by the square root of a tenant's vectors; effort: the share of them that is gone through."""
    indexes, sizes, nbytes = [], [], 0
    d = held.x.shape[1]
    for places in may.who:
        lists = max(1, round(math.sqrt(len(places))))
        index = faiss.IndexIVFFlat(faiss.IndexFlatL2(d), d, lists)
        index.cp.seed, index.cp.min_points_per_centroid = 1, 1
        index.train(held.x[places])
        index.add_with_ids(held.x[places], places)
        indexes.append(index)
        sizes.append(np.array([index.invlists.list_size(one) for one in range(lists)]))
        nbytes += len(faiss.serialize_index(index))

    def probes(tenant: int, share: float) -> int:
        return max(1, math.ceil(share * indexes[tenant].nlist))

    def search(query: int, share: float) -> np.ndarray:
        index = indexes[may.asker[query]]
        index.nprobe = probes(may.asker[query], share)
        return index.search(held.queries[query : query + 1], TOP)[1][0]

    def looked(query: int, share: float) -> tuple[int, int]:
        tenant = may.asker[query]
        _, near = indexes[tenant].quantizer.search(held.queries[query : query + 1], probes(tenant, share))
        return (indexes[tenant].nlist + int(sizes[tenant][near[0]].sum()),) * 2

    efforts = [float(share) for share in np.geomspace(0.02, 1, 24)]
    return Contender(name="private IVF", efforts=efforts, search=search, looked=looked, nbytes=nbytes)


def private_hnsw(hnswlib: Any, held: Corpus, may: Permissions) -> Contender:
    indexes, nbytes = [], 0
    for places in may.who:
        index = hnswlib.Index(space="l2", dim=held.x.shape[1])
        index.init_index(max_elements=len(places), M=16, ef_construction=100, random_seed=1)
        index.set_num_threads(2)
        index.add_items(held.x[places], places)
        index.set_num_threads(1)
        indexes.append(index)
        nbytes += index.index_file_size()

    def search(query: int, ef: int) -> np.ndarray:
        tenant = may.asker[query]
        indexes[tenant].set_ef(ef)
        most = min(TOP, len(may.who[tenant]))
        found = np.full(TOP, -1, np.int64)
        found[:most] = indexes[tenant].knn_query(held.queries[query : query + 1], k=most, num_threads=1)[0][0]
        return found

    efforts = [10, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024]
    return Contender(
        name="private HNSW", efforts=efforts, search=search, looked=lambda query, ef: (0, 0), nbytes=nbytes
    )


def private_copies(faiss: Any, held: Corpus, may: Permissions) -> Contender:
    indexes, nbytes = [], 0
    for places in may.who:
        index = faiss.IndexFlatL2(held.x.shape[1])
        index.add(held.x[places])
        indexes.append(index)
        nbytes += len(faiss.serialize_index(index)) + places.nbytes

    def search(query: int, effort: int) -> np.ndarray:
        places = may.who[may.asker[query]]
        found = indexes[may.asker[query]].search(held.queries[query : query + 1], TOP)[1][0]
        return np.where(found >= 0, places[found], -1)

    def looked(query: int, effort: int) -> tuple[int, int]:
        return (len(may.who[may.asker[query]]),) * 2

    return Contender(name="private copies", efforts=[1], search=search, looked=looked, nbytes=nbytes)


def tune(one: Contender, may: Permissions) -> None:
    """The least effort that reaches the recall, or the greatest."""
    for effort in one.efforts:
        found = [one.search(query, effort) for query in range(len(may.asker))]
        hits = sum(len(set(a.tolist()) & set(b[b >= 0].tolist())) for a, b in zip(found, may.exact, strict=True))
        one.effort, one.recall = effort, hits / int((may.exact >= 0).sum())
        if one.recall >= RECALL:
            return


def latencies(contenders: Sequence[Contender], num_queries: int) -> dict[str, np.ndarray]:
    """Seconds [queries] of each: medians of rounds, in which blocks of queries go to one index after the other."""
    seconds = {one.name: np.zeros((ROUNDS, num_queries)) for one in contenders}
    for number, start in itertools.product(range(ROUNDS), range(0, num_queries, 50)):
        turn = (number + start // 50) % len(contenders)
        for one in [*contenders[turn:], *contenders[:turn]]:
            one.search(start, one.effort)
            for query in range(start, min(start + 50, num_queries)):
                began = time.perf_counter()
                one.search(query, one.effort)
                seconds[one.name][number, query] = time.perf_counter() - began
    return {name: np.median(each, axis=0) for name, each in seconds.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """What was measured on one set of permissions. looked: [queries, 2] by name; seconds: [queries] by name."""

    may: Permissions
    n: int
    d: int
    contenders: dict[str, Contender]
    looked: dict[str, np.ndarray]
    seconds: dict[str, np.ndarray]

    def ratio(self, figures: dict[str, np.ndarray], slow: str, which: np.ndarray) -> tuple[float, float]:
        """How many times more the other one takes in the mean, and its standard error by pairs of queries."""
        a, b = figures[slow][which].astype(float), figures["curator"][which].astype(float)
        ratio = a.mean() / b.mean()
        return float(ratio), float((a - ratio * b).std(ddof=1) / math.sqrt(len(a)) / b.mean())


def measured(held: Corpus, may: Permissions, progress: Progress | None) -> tuple[Table, Curator]:
    """Builds, tunes and times all indexes of one set."""
    faiss, hnswlib = (
        importlib.import_module(name) if importlib.util.find_spec(name) else None for name in ("faiss", "hnswlib")
    )

    def tell(what: str) -> None:
        if progress is not None:
            progress(len(contenders), 6, f"{may.name}: {what}")

    contenders: list[Contender] = []
    before = resident_bytes()
    tell("curator")
    mine, index = curator(held, may)
    contenders.append(mine)
    mine.resident = resident_bytes() - before
    if faiss is not None:
        faiss.omp_set_num_threads(2)
        selectors, bits = bitmaps(faiss, may, len(held.x))
        bits_bytes = sum(each.nbytes for each in bits)
        makers: list[tuple[str, Callable[[], Contender]]] = [
            ("shared IVF", lambda: shared_ivf(faiss, held, may, selectors, bits_bytes)),
            ("shared HNSW", lambda: shared_hnsw(faiss, held, may, selectors, bits_bytes)),
            ("private IVF", lambda: private_ivf(faiss, held, may)),
            ("private copies", lambda: private_copies(faiss, held, may)),
        ]
        if hnswlib is not None:
            makers.append(("private HNSW", lambda: private_hnsw(hnswlib, held, may)))
        for name, make in makers:
            tell(name)
            before = resident_bytes()
            contenders.append(make())
            contenders[-1].resident = resident_bytes() - before
        faiss.omp_set_num_threads(1)
    for one in contenders:
        tell(f"tune {one.name}")
        tune(one, may)
    tell("latencies")
    seconds = latencies(contenders, len(held.queries))
    looked = {
        one.name: np.array([one.looked(query, one.effort) for query in range(len(held.queries))]) for one in contenders
    }
    if faiss is not None:
        faiss.omp_set_num_threads(2)
    return Table(
        may=may,
        n=len(held.x),
        d=held.x.shape[1],
        contenders={one.name: one for one in contenders},
        looked=looked,
        seconds=seconds,
    ), index


# ---- claims --------------------------------------------------------------------------------------------------------

PEERS = "faiss-cpu"


def pm(found: tuple[float, float]) -> str:
    return f"{found[0]:.3g} ± {found[1]:.2g}"


def described(table: Table) -> str:
    efforts = ", ".join(f"{name} {one.recall:.3f} at {one.effort:.3g}" for name, one in table.contenders.items())
    sizes = [len(places) for places in table.may.who]
    return (
        f"{table.may.name}: {table.n:,} vectors, {len(sizes):,} tenants of {min(sizes):,} to {max(sizes):,}, each "
        f"vector shared by {table.may.pairs / table.n:.1f}; recall {efforts}"
    )


def reached(table: Table, *names: str) -> bool:
    return all(table.contenders[name].recall >= RECALL for name in ("curator", *names))


def recall_claim(tables: Sequence[Table]) -> Claim:
    return Claim(
        claim="all indexes are compared at one recall",
        measured="; ".join(map(described, tables)),
        required=f"recall@10 of Curator and of every peer at least {RECALL}",
        passed=all(reached(table, *table.contenders) for table in tables),
    )


def looked_claims(table: Table) -> Iterator[Claim]:
    small = table.may.shares(table.n) <= SMALL_SHARE
    every = np.ones(len(small), bool)
    told = f"{table.may.name}, {int(small.sum())} queries of tenants with at most 1 %"
    looked = {name: each[:, 0] for name, each in table.looked.items()}
    computed = {name: each[:, 1] for name, each in table.looked.items()}
    ivf, graph, before = (
        table.ratio(looked, "shared IVF", small),
        table.ratio(looked, "shared HNSW", small),
        table.ratio(computed, "shared IVF", small),
    )
    yield Claim(
        claim=f"small tenants ({table.may.name}): ten times fewer vectors looked at than in a shared inverted file",
        measured=f"{told}: Curator {looked['curator'][small].mean():,.0f} distances; shared IVF looks at "
        f"{pm(ivf)} times as many (and computes {pm(before)} times as many distances, as it asks the filter before "
        f"each), shared HNSW {pm(graph)}",
        required="10 times or more than Curator by shared IVF at equal recall; what HNSW does is told as it is",
        passed=ivf[0] >= 10 and reached(table, "shared IVF"),
    )
    private = table.ratio(looked, "private IVF", every)
    yield Claim(
        claim=f"distances ({table.may.name}): within a small factor of what private inverted files compute",
        measured=f"private IVF computes {pm(private)} times Curator's {looked['curator'].mean():,.0f} over all "
        f"queries, {pm(table.ratio(looked, 'private IVF', small))} times over those of small tenants",
        required="at least a third",
        passed=private[0] >= 1 / 3 and reached(table, "private IVF"),
    )


def latency_claims(table: Table) -> Iterator[Claim]:
    seconds, small = table.seconds, table.may.shares(table.n) <= SMALL_SHARE
    every = np.ones(len(small), bool)

    def told(name: str) -> str:
        each = seconds[name] * MB
        error = each.std(ddof=1) / math.sqrt(len(each))
        return f"{name} {each.mean():.0f} ± {error:.0f} (p99 {np.quantile(each, 0.99):.0f})"

    both = {name: table.ratio(seconds, name, small) for name in ("shared IVF", "shared HNSW")}
    yield Claim(
        claim=f"latency ({table.may.name}): searches cost small tenants less than in a shared index with a filter",
        measured="microseconds a query: "
        + ", ".join(map(told, seconds))
        + "; of Curator's for small tenants: "
        + ", ".join(f"{name} {pm(each)} times" for name, each in both.items()),
        required="less by two standard errors, and p99 over all queries below that of both",
        passed=all(
            each[0] - 2 * each[1] > 1 and np.quantile(seconds["curator"], 0.99) < np.quantile(seconds[name], 0.99)
            for name, each in both.items()
        )
        and reached(table, *both),
    )
    private = table.ratio(seconds, "private IVF", every)
    yield Claim(
        claim=f"latency ({table.may.name}): on par with private inverted files",
        measured=f"private IVF takes {pm(private)} times as long over all queries"
        + (f", private HNSW {pm(table.ratio(seconds, 'private HNSW', every))}" if "private HNSW" in seconds else "")
        + f", a private copy scanned whole {pm(table.ratio(seconds, 'private copies', every))}",
        required="private IVF at least half as long",
        passed=private[0] >= 0.5 and reached(table, "private IVF"),
    )


def flat_claim(table: Table) -> Claim:
    """Of tenants with fewer vectors than are compared at most, all vectors are: these are told, not judged."""
    shares = table.may.shares(table.n)
    most = TOP * table.contenders["curator"].effort / table.n
    means: dict[str, tuple[float, float]] = {}
    judged = []
    for low, high in itertools.pairwise((0, most, 0.01, 0.02, 0.04, 0.08, 1)):
        which = (shares > max(low, most if low else 0)) & (shares <= high)
        if which.sum() >= 10:
            each = table.seconds["curator"][which] * MB
            means[f"to {high:.1%}"] = (float(each.mean()), float(each.std(ddof=1) / math.sqrt(len(each))))
            judged += [float(each.mean())] if low else []
    return Claim(
        claim=f"latency ({table.may.name}) is nearly flat from small to large tenants",
        measured="Curator, microseconds by share of the vectors: "
        + ", ".join(f"{name} {pm(mean)}" for name, mean in means.items()),
        required=f"above {most:.1%}, where not all of a tenant's vectors are compared, the slowest group takes at most "
        "twice as long as the fastest",
        passed=len(judged) >= 2 and max(judged) <= 2 * min(judged),
    )


def memory_claims(table: Table) -> Iterator[Claim]:
    held = table.contenders
    raw = table.n * table.d * 4
    told = ", ".join(
        f"{name} {(one.nbytes - raw) / MB:,.1f} (process +{one.resident / MB:,.0f})" for name, one in held.items()
    )
    near = held["curator"].nbytes / held["shared IVF"].nbytes
    far = held["private IVF"].nbytes / held["curator"].nbytes
    degree = table.may.pairs / table.n
    yield Claim(
        claim=f"memory ({table.may.name}): near that of one shared index, far below private indexes",
        measured=f"MB beyond the {raw / MB:,.1f} of the vectors: {told}; whole: Curator is {near:.2f} times shared IVF "
        f"with its bitmaps, private IVF {far:.2f} times Curator",
        required="at most 1.5 times shared IVF (paper: 1.26); private IVF at least half as many times Curator as a "
        f"vector has readers ({degree:.1f})",
        passed=near <= 1.5 and far >= degree / 2,
    )


def growth_claim(held: Corpus, may: Permissions, index: Curator) -> Claim:
    """Bytes for each further permission, from half of the tenants to all of them."""
    half = dataclasses.replace(may, who=may.who[::2])
    less = sum(built_curator(held, half, index).bytes().values())
    each = (sum(index.bytes().values()) - less) / (may.pairs - half.pairs)
    vector = held.x.shape[1] * 4
    return Claim(
        claim=f"memory ({may.name}) grows far slower with tenants than by a copy for each",
        measured=f"{each:.1f} bytes a further permission, from {len(half.who)} to {len(may.who)} tenants; a private "
        f"copy of the vector alone takes {vector}",
        required="at most a tenth of the vector",
        passed=each <= vector / 10,
    )


def scan_claim(held: Corpus, index: Curator, times: float) -> Claim:
    """A tenant with half of the vectors: through the tree, and all of its vectors compared."""
    n = len(held.x)
    places = np.sort(np.random.default_rng(3).choice(n, n // 2, replace=False))
    before = index.bytes()
    index.grant(places, "half")
    after = index.bytes()
    exact = [set(places[np.argsort(-(held.x[places] @ q), kind="stable")[:TOP]].tolist()) for q in held.queries[:100]]
    for scan in SCANS:
        found = [
            index.search(q[None], TOP, "half", Effort(scan_factor=scan)).ids[0].tolist() for q in held.queries[:100]
        ]
        recall = sum(len(a & set(b)) for a, b in zip(exact, found, strict=True)) / (100 * TOP)
        if recall >= RECALL:
            break
    seconds: dict[str, list[float]] = {"tree": [], "all": [], "copy": []}
    mine = np.ascontiguousarray(held.x[places])
    for q in held.queries[:30]:
        for name, work in (
            ("tree", lambda q=q: index.search(q[None], TOP, "half", Effort(scan_factor=scan))),
            ("all", lambda q=q: index.search(q[None], TOP, "half", EXHAUSTIVE)),
            ("copy", lambda q=q: np.argpartition(-(mine @ q), TOP)[:TOP]),
        ):
            began = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - began)
    tree, whole, copy = (float(np.median(seconds[name])) for name in ("tree", "all", "copy"))
    index.tree.revoke(places.astype(np.int64), np.full(len(places), index.number("half"), np.uint32))
    return Claim(
        claim="a tenant with half of the vectors is searched, not scanned",
        measured=f"{recall:.3f} recall in {tree * MB:.0f} us; comparing all {n // 2:,} by their ids takes "
        f"{whole * MB:.0f} us ({mine.nbytes / whole / GB:.1f} GB/s), a contiguous copy of them by NumPy "
        f"{copy * MB:.0f} us ({mine.nbytes / copy / GB:.1f} GB/s); its permissions and lists take "
        f"{(sum(after.values()) - sum(before.values())) / (n // 2):.1f} bytes a vector",
        required=f"recall {RECALL}, {times:g} times faster than comparing all",
        passed=recall >= RECALL and whole >= times * tree,
    )


def update_claim(held: Corpus, may: Permissions, index: Curator) -> Claim:
    """Texts that were kept out, each with the permissions of the nearest one that is there; half of them are revoked
    and granted again, and all texts deleted. The peer adds to the file of each tenant.
    """
    count = len(held.fresh)
    readers: list[list[int]] = [[] for _ in range(table_size(may))]
    for tenant, places in enumerate(may.who):
        for place in places.tolist():
            readers[place].append(tenant)
    x = held.fresh
    likes = np.concatenate([(part @ held.x.T).argmax(axis=1) for part in np.array_split(x, -(-count // 100))])
    names = [[name_of(tenant) for tenant in readers[place]] for place in likes]
    began = time.perf_counter()
    labels = np.concatenate([index.add(x[at : at + 1], readers=[names[at]]) for at in range(count)])
    added = (time.perf_counter() - began) / count
    pairs = [(label, index.number(name)) for label, each in zip(labels.tolist(), names, strict=True) for name in each]
    some = np.array(pairs[::2])
    changed, tenants = np.ascontiguousarray(some[:, 0]), some[:, 1].astype(np.uint32)
    began = time.perf_counter()
    index.tree.revoke(changed, tenants)
    revoked = (time.perf_counter() - began) / len(some)
    began = time.perf_counter()
    index.tree.grant(changed, tenants)
    granted = (time.perf_counter() - began) / len(some)
    began = time.perf_counter()
    index.delete(labels)
    deleted = (time.perf_counter() - began) / count
    began = time.perf_counter()
    again = index.add(x, readers=names)
    bulk = (time.perf_counter() - began) / count
    index.delete(again)
    told = (
        f"microseconds: {added * MB:.1f} a vector with its {len(pairs) / count:.1f} permissions, {granted * MB:.2f} a "
        f"grant, {revoked * MB:.2f} a revocation, {deleted * MB:.1f} a deletion"
    )
    claim = f"updates ({may.name}): a vector with its permissions goes in faster than into private inverted files"
    if importlib.util.find_spec("faiss") is None:
        return not_run(claim, "faster", PEERS)
    faiss = importlib.import_module("faiss")
    faiss.omp_set_num_threads(1)
    wanted = sorted({tenant for place in likes for tenant in readers[place]})
    files = {}
    for tenant in wanted:
        lists = max(1, round(math.sqrt(len(may.who[tenant]))))
        files[tenant] = faiss.IndexIVFFlat(faiss.IndexFlatL2(held.x.shape[1]), held.x.shape[1], lists)
        files[tenant].cp.min_points_per_centroid = 1
        files[tenant].train(held.x[may.who[tenant]])
    groups: dict[int, list[int]] = {tenant: [] for tenant in wanted}
    for number, place in enumerate(likes):
        for tenant in readers[place]:
            groups[tenant].append(number)
    numbers_of = np.arange(count, dtype=np.int64)
    began = time.perf_counter()
    for at in range(count):
        for tenant in readers[likes[at]]:
            files[tenant].add_with_ids(x[at : at + 1], numbers_of[at : at + 1])
    peers = (time.perf_counter() - began) / count
    began = time.perf_counter()
    for tenant, numbers in groups.items():
        files[tenant].add_with_ids(x[numbers], np.array(numbers, np.int64))
    together = (time.perf_counter() - began) / count
    faiss.omp_set_num_threads(2)
    return Claim(
        claim=claim,
        measured=f"{told}; into the files of all its tenants {peers * MB:.1f} a vector; all vectors of a tenant in one "
        f"call {together * MB:.1f}, where Curator takes {bulk * MB:.1f} for all in one call",
        required="faster",
        passed=added < peers,
    )


def table_size(may: Permissions) -> int:
    return 1 + max(int(places[-1]) for places in may.who if len(places))


def mix_claim(held: Corpus, sizes: Sizes) -> Claim:
    """Random changes to a small index, with what each tenant may read kept in sets beside it."""
    draw = np.random.default_rng(5)
    n, tenants = 3000, 40
    index = Curator.train(held.x[:n], CuratorSettings(max_list=16, filter_capacity=20, rebuild_interval=50))
    may: list[set[int]] = [set() for _ in range(tenants)]
    for tenant in range(tenants):
        index.add_tenant(name_of(tenant))
    alive = index.add(held.x[:n]).tolist()
    where = {label: place for place, label in enumerate(alive)}
    wrong = checks = 0
    for step in range(sizes.changes):
        kind, tenant = draw.choice(5, p=(0.06, 0.5, 0.36, 0.04, 0.04)), int(draw.integers(tenants) * draw.random())
        if kind == 0 or not alive:
            place = int(draw.integers(n))
            (label,) = index.add(held.x[place : place + 1], owner=name_of(tenant)).tolist()
            alive.append(label)
            where[label] = place
            may[tenant].add(label)
        elif kind in (1, 2):
            some = [alive[at] for at in draw.integers(len(alive), size=5)]
            if kind == 1:
                index.grant(some, name_of(tenant))
                may[tenant] |= set(some)
            else:
                some = [*some, *itertools.islice(may[tenant], 4)]
                index.revoke(some, name_of(tenant))
                may[tenant] -= set(some)
        elif kind == 3:
            label = alive.pop(int(draw.integers(len(alive))))
            index.delete([label])
            may = [each - {label} for each in may]
        else:
            labels = np.array(sorted(may[tenant]), np.int64)
            query = held.queries[int(draw.integers(len(held.queries)))]
            hits, work = index.search_with_work(query[None], TOP, name_of(tenant), EXHAUSTIVE)
            scores = held.x[[where[label] for label in labels]] @ query if len(labels) else np.zeros(0)
            kept = np.sort(scores)[::-1][:TOP]
            same = set(hits.ids[0][hits.ids[0] >= 0].tolist()) <= may[tenant] and np.allclose(
                hits.scores[0][: len(kept)], kept, atol=1e-5
            )
            checks += 1
            wrong += not same or int(work.vector_distances[0]) != len(labels)
        if step % 500 == 0:
            wrong += bool(index.tree.check())
    wrong += bool(index.tree.check())
    for tenant in range(tenants):
        wrong += index.readable(name_of(tenant)).tolist() != sorted(may[tenant])
    return Claim(
        claim="after any mix of changes each tenant finds what brute force finds, and no vector of another is compared",
        measured=f"{sizes.changes:,} inserts, grants, revocations and deletions; {checks:,} searches between them and "
        f"{tenants} tenants at the end: {wrong} wrong answers, "
        "comparisons of other vectors or breaches of the tree's rules",
        required="none",
        passed=wrong == 0 and checks > 0,
    )


def rebuild_claim(held: Corpus, may: Permissions) -> Claim:
    """Large tenants lose nine tenths of what they may read, most of it in whole parts of the tree."""
    visited = {}
    largest = sorted(range(len(may.who)), key=lambda tenant: -len(may.who[tenant]))[:8]
    n = len(held.x)
    clusters = Curator.train(held.x, PAPER).clusters
    for interval in (PAPER.rebuild_interval, 1 << 30):
        index = Curator(clusters, dataclasses.replace(PAPER, rebuild_interval=interval))
        index.add(held.x)
        for tenant in largest:
            index.grant(may.who[tenant], name_of(tenant))

        def nodes(index: Curator = index) -> float:
            return float(
                np.mean(
                    [
                        index.search_with_work(held.queries[:50], TOP, name_of(one), EXHAUSTIVE)[1].nodes.mean()
                        for one in largest
                    ]
                )
            )

        before = nodes()
        near = np.argsort(-(held.x @ held.queries[0]), kind="stable")[: n // 10]
        for tenant in largest:
            index.revoke(np.setdiff1d(may.who[tenant], near), name_of(tenant))
        visited[interval] = (before, nodes())
    (before, rebuilt), (_, stale) = visited[PAPER.rebuild_interval], visited[1 << 30]
    return Claim(
        claim="filters that are made anew bring searches back to few nodes after heavy revocations",
        measured=f"nodes of a search without limits, mean of {len(largest)} tenants: before {before:,.0f}; after, with "
        f"filters made anew {rebuilt:,.0f}, never made anew {stale:,.0f}",
        required="at most half of what they are without",
        passed=rebuilt <= stale / 2,
    )


def file_claim(held: Corpus, may: Permissions, index: Curator) -> Claim:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "index"
        began = time.perf_counter()
        write_curator(path, index)
        written = time.perf_counter() - began
        began = time.perf_counter()
        found = CuratorFile(path).index
        opened = time.perf_counter() - began
        same = all(
            np.array_equal(a.search(q[None], TOP, name_of(t)).ids, found.search(q[None], TOP, name_of(t)).ids)
            for a, q, t in zip([index] * 200, held.queries[:200], may.asker[:200], strict=False)
        )
        size = path.stat().st_size
    return Claim(
        claim="an index comes back from its file as it was",
        measured=f"{size / MB:.0f} MB written in {written:.1f} s, checked and opened in {opened:.1f} s; answers of 200 "
        f"queries {'the same' if same else 'differ'}",
        required="the same answers",
        passed=same,
    )


def run(quick: bool, data: Path | None, progress: Progress | None = None) -> list[Claim]:
    if importlib.util.find_spec("sklearn") is None:
        raise MissingDependency("scikit-learn", "learn")
    sizes, threads = QUICK if quick else FULL, kernels.num_threads()
    held = corpus(sizes, text_folder(data, Path(__file__)), progress)
    sets = [by_tags(held), by_lot(held, sizes)]
    claims = [mix_claim(held, sizes), rebuild_claim(held, sets[0])]
    peers = importlib.util.find_spec("faiss") is not None
    tables = []
    for may in sets:
        kernels.set_num_threads(1)
        table, index = measured(held, may, progress)
        tables.append(table)
        if peers:
            claims += [*looked_claims(table), *latency_claims(table), *memory_claims(table)]
        else:
            claims.append(
                not_run(f"{may.name}: against shared and private indexes", "ten times fewer vectors looked at", PEERS)
            )
        claims.append(flat_claim(table))
        claims.append(growth_claim(held, may, index))
        claims.append(update_claim(held, may, index))
        if may is sets[-1]:
            claims += [scan_claim(held, index, sizes.times), file_claim(held, may, index)]
        kernels.set_num_threads(threads)
    return [recall_claim(tables), *claims]


if __name__ == "__main__":
    sys.exit(main("curator", sys.modules[__name__]))
