"""What the operating system says about this machine: processor, caches, memory, limits, file systems. Nothing is
measured.
"""

from __future__ import annotations

import os
import platform
import threading
from dataclasses import dataclass
from pathlib import Path

from memwall.hardware.units import KIB, MIB

_IN_MEMORY = {"tmpfs", "ramfs", "devtmpfs", "hugetlbfs"}
_REMOTE = {"nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "glusterfs", "lustre", "virtiofs", "afs"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """One level of the processor's data caches, as one core sees it."""

    level: int
    nbytes: int
    num_sharing: int
    """How many processors share this one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """This machine as far as this process may use it: limits of containers are taken into account."""

    processor: str
    num_processors: int
    memory_bytes: int
    num_nodes: int
    caches: tuple[Cache, ...]
    system: str

    @property
    def last_cache_bytes(self) -> int:
        """The largest cache; a guess of 32 MiB where the system tells nothing."""
        return max((cache.nbytes for cache in self.caches), default=32 * MIB)


def describe_system() -> System:
    """Reads it all; takes a millisecond."""
    return System(
        processor=_processor(),
        num_processors=usable_processors(),
        memory_bytes=_memory_bytes(),
        num_nodes=max(len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))), 1),
        caches=_caches(),
        system=f"{platform.system()} {platform.machine()}",
    )


def usable_processors() -> int:
    """Processors this process may run on; a container's quota counts, rounded up."""
    if hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
    else:
        allowed = os.cpu_count() or 1
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit() and quota[1].isdigit() and int(quota[1]) > 0:
        allowed = min(allowed, max(-(-int(quota[0]) // int(quota[1])), 1))
    return max(allowed, 1)


def processor_order() -> list[int]:
    """Numbers of the processors this process may use, one of each core first and siblings last; empty when unknown."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    seen: dict[str, int] = {}
    turns = []
    for number in sorted(os.sched_getaffinity(0)):
        topology = f"/sys/devices/system/cpu/cpu{number}/topology"
        core = f"{_read(topology + '/physical_package_id')}/{_read(topology + '/core_id') or number}"
        seen[core] = seen.get(core, -1) + 1
        turns.append((seen[core], number))
    return [number for _, number in sorted(turns)]


def available_memory_bytes() -> int:
    """Memory that can be taken now without pushing anything out."""
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * KIB
    return _memory_bytes() // 2


def write_whole(path: Path, data: bytes | str) -> None:
    """A file that appears whole or not at all: temporary name, flush, rename. OSError names `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_native_id()}.partial")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def cache_directory() -> Path:
    """Where memwall keeps what can be made again: `$XDG_CACHE_HOME/memwall`, else `~/.cache/memwall`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "memwall"


def file_system(path: Path) -> str:
    """The type of file system under `path` (`ext4`, `tmpfs`, ...); empty when the system does not tell."""
    try:
        device = os.stat(path).st_dev
    except OSError:
        return ""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    found = ""
    for line in _read("/proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        if left.split()[2:3] == [wanted] and right:
            found = right.split()[0]
    return found


def is_in_memory(file_system_type: str) -> bool:
    """Whether files there live in memory, so that measuring them says nothing about a disk."""
    return file_system_type in _IN_MEMORY


def is_remote(file_system_type: str) -> bool:
    """Whether files there live on another machine."""
    return file_system_type in _REMOTE


def _processor() -> str:
    fields: dict[str, str] = {}
    for line in _read("/proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip().lower(), value.strip())
    for name in ("model name", "hardware", "model"):
        if fields.get(name) and not fields[name].isdigit():
            family = "-".join(
                fields[key] for key in ("cpu family", "model", "stepping") if fields.get(key, "").isdigit()
            )
            return f"{fields[name]} ({family})" if family else fields[name]
    if "cpu part" in fields:
        return f"implementer {fields.get('cpu implementer', '?')} part {fields['cpu part']}"
    return platform.processor() or platform.machine() or "unknown"


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for products of bfloat16 (AMX or AVX-512 BF16); where not told, no."""
    return not {"amx_bf16", "avx512_bf16"}.isdisjoint(_read("/proc/cpuinfo").split())


def _memory_bytes() -> int:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    return min(total, int(limit)) if limit.isdigit() and int(limit) > 0 else total


def _caches() -> tuple[Cache, ...]:
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index[0-9]*")):
        if _read(folder / "type").strip() not in ("Data", "Unified"):
            continue
        size, level = _read(folder / "size").strip(), _read(folder / "level").strip()
        if level.isdigit() and size[:-1].isdigit() and size[-1:] in ("K", "M"):
            nbytes = int(size[:-1]) * (KIB if size[-1] == "K" else MIB)
            sharing = _count_list(_read(folder / "shared_cpu_list").strip())
            found[int(level)] = Cache(level=int(level), nbytes=nbytes, num_sharing=sharing)
    return tuple(found[level] for level in sorted(found))


def _count_list(text: str) -> int:
    """Processors in a list such as `0-3,8`."""
    count = 0
    for part in text.split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            count += int(last) - int(first) + 1 if last.isdigit() else 1
    return max(count, 1)


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError):
        return ""
