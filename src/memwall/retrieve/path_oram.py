"""What an oblivious map is compared with: Path ORAM, a tree map over it, and a scan of everything.

All four hide which key is used, over the same logged store and seal. Path ORAM (Stefanov 2013, arXiv 1202.5150) keeps
blocks in buckets of a binary tree on the path to a random leaf, reads and writes a whole path an access, and gives the
block a new leaf. Which leaf a key has stands in a table in private memory, or in smaller Path ORAMs, one over the other
(recursion). Keys of both are places 0 to N - 1: they are arrays, to their advantage. `TreeMap` has any keys: an AVL
tree whose pointers hold their nodes' leaves (Wang 2014, as in Oblix and EnigMap), every operation filled up to the
deepest path that an AVL tree of N nodes can have. It marks what is deleted and does not balance for it, which is to its
advantage too.

Units and shapes: payloads are bytes of one length; leaves are numbers below 2^depth; a block is (id, leaf, payload).

Differs from the papers: 2^(ceil(log2 N) - 1) leaves, half of the N in the proof, as implementations with buckets of 4
have it. Nodes that an operation has read stay with it until it ends, and go through the stash.

Cost: (depth + 1) buckets are read and written per access; a tree map makes 1.44 log2 N of them, a scan moves all.
"""

from __future__ import annotations

import math
import secrets
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from memwall import _native
from memwall.errors import DoesNotFit, InputError, MemwallError
from memwall.retrieve.untrusted import KEY_BYTES, TAG_BYTES, Entropy, HostFile, HostMemory, SealedPages, UntrustedStore

NO_BLOCK = 0xFFFFFFFF
BUCKET_BLOCKS = 4
STASH_BLOCKS = 512
POSITIONS = 16
"""Leaves in a block of a map that lies in another ORAM."""
FEW_POSITIONS = 1 << 10
"""So many stay in private memory."""
SCAN_ROWS = 1 << 13
_WRITTEN_AT_ONCE = 1 << 16

NODE = struct.Struct("<IBIIBIIB")
"""Of a tree map: key, live; left: id, leaf, height; right: the same."""


def host_store(path: Path | None, num_pages: int, page_bytes: int) -> UntrustedStore:
    """In a file where a path is given, else in memory."""
    return HostMemory(num_pages, page_bytes) if path is None else HostFile(path, num_pages, page_bytes)


def path_depth(num_blocks: int) -> int:
    """Levels below the root."""
    return max(1, math.ceil(math.log2(max(num_blocks, 2))) - 1)


def path_bytes(num_blocks: int, payload_bytes: int) -> int:
    """Visible bytes of an access to Path ORAM."""
    return 2 * (path_depth(num_blocks) + 1) * (BUCKET_BLOCKS * (8 + payload_bytes) + TAG_BYTES)


def deepest_tree(num_nodes: int) -> int:
    """Nodes on the longest path of an AVL tree."""
    return math.ceil(1.4405 * math.log2(num_nodes + 2))


def rival_bytes(items: int, value_bytes: int) -> dict[str, int]:
    """Visible bytes of an access to each of the four."""
    recursive, level = path_bytes(items, value_bytes), items
    while level > FEW_POSITIONS:
        level = -(-level // POSITIONS)
        recursive += path_bytes(level, 4 * POSITIONS)
    scan_pages = -(-items // SCAN_ROWS)
    return {
        "path-oram": path_bytes(items, value_bytes),
        "path-oram-recursive": recursive,
        "tree-map": deepest_tree(items) * path_bytes(items, NODE.size + value_bytes),
        "scan": 2 * scan_pages * (SCAN_ROWS * (4 + value_bytes) + TAG_BYTES),
    }


class PathOram:
    """Blocks whose leaves the caller knows. Nothing here keeps a map of them."""

    def __init__(
        self, num_blocks: int, payload_bytes: int, path: Path | None = None, *, entropy: Entropy = secrets.token_bytes
    ) -> None:
        if num_blocks < 1 or payload_bytes < 1:
            raise InputError(f"{num_blocks} blocks of {payload_bytes} bytes: one at least of each")
        self.num_blocks, self.payload_bytes, self.entropy = num_blocks, payload_bytes, entropy
        self.depth = path_depth(num_blocks)
        self.leaves = 1 << self.depth
        self.block_bytes = 8 + payload_bytes
        page_bytes = BUCKET_BLOCKS * self.block_bytes + TAG_BYTES
        self.store = host_store(path, 2 * self.leaves - 1, page_bytes)
        self.pages = SealedPages(self.store, secrets.token_bytes(KEY_BYTES))
        self.stash, self.stash_count = np.zeros((STASH_BLOCKS, self.block_bytes), np.uint8), np.zeros(1, np.int64)
        self._tree = _native.PathTree(self.depth, BUCKET_BLOCKS, self.stash, self.stash_count)
        self._levels = np.arange(self.depth + 1)

    @property
    def bytes_per_access(self) -> int:
        """Visible, both directions; every access moves the same."""
        return 2 * (self.depth + 1) * self.store.page_bytes

    @property
    def private_bytes(self) -> int:
        return self.stash.nbytes + self.pages.versions.nbytes

    def new_leaf(self) -> int:
        return int.from_bytes(self.entropy(4), "little") & (self.leaves - 1)

    def new_leaves(self, count: int) -> np.ndarray:
        return np.frombuffer(self.entropy(4 * count), np.uint32) & np.uint32(self.leaves - 1)

    def fill(self, leaves: np.ndarray, payloads: np.ndarray) -> None:
        """First blocks 0 to n - 1, each as deep on its path as there is room; every bucket is written once."""
        ids = np.arange(len(leaves), dtype=np.uint32)
        blocks = np.concatenate(
            [ids.view(np.uint8).reshape(-1, 4), leaves.astype(np.uint32).view(np.uint8).reshape(-1, 4), payloads],
            axis=1,
        )
        left = ids
        for level in range(self.depth, -1, -1):
            bucket = leaves[left] >> (self.depth - level)
            order = np.argsort(bucket, kind="stable")
            left, bucket = left[order], bucket[order]
            rank = np.arange(len(left)) - np.searchsorted(bucket, bucket)
            taken = rank < BUCKET_BLOCKS
            self._write_level(level, bucket[taken], rank[taken], blocks[left[taken]])
            left = left[~taken]
        for block in left:
            self._tree.give(int(block), int(leaves[block]), payloads[block])

    def _write_level(self, level: int, buckets: np.ndarray, ranks: np.ndarray, blocks: np.ndarray) -> None:
        for first in range(0, 1 << level, _WRITTEN_AT_ONCE):
            stop = min(first + _WRITTEN_AT_ONCE, 1 << level)
            plain = np.full((stop - first, BUCKET_BLOCKS, self.block_bytes), 0xFF, np.uint8)
            part = slice(np.searchsorted(buckets, first), np.searchsorted(buckets, stop))
            plain[buckets[part].astype(np.int64) - first, ranks[part]] = blocks[part]
            pages = np.arange(first, stop, dtype=np.uint32) + np.uint32((1 << level) - 1)
            self.pages.write(pages, plain.reshape(stop - first, -1))

    def access(self, leaf: int, block: int, new_leaf: int, payload: np.ndarray, fate: str = "keep") -> bool:
        """Reads and writes the path to `leaf`. payload uint8 [payload_bytes] becomes that of the block, where there is
        one; fate `write` gives it this one (and makes it), `take` takes it out. Returns whether it was there.
        """
        pages = ((1 << self._levels) - 1 + (leaf >> (self.depth - self._levels))).astype(np.uint32)
        plain = self.pages.read(pages)
        try:
            found = bool(self._tree.access(plain, leaf, block, new_leaf, fate, payload))
        except ValueError:
            raise MemwallError(f"Path ORAM's stash of {STASH_BLOCKS} blocks is full") from None
        self.pages.write(pages, plain)
        return found

    def give(self, block: int, leaf: int, payload: np.ndarray) -> None:
        """A block that was taken comes back."""
        self._tree.give(block, leaf, payload)

    def dummy(self) -> None:
        """An access to nothing."""
        self.access(self.new_leaf(), NO_BLOCK, 0, np.zeros(self.payload_bytes, np.uint8))


class OramArray:
    """An array over Path ORAM. recursive: leaves of blocks lie in smaller ORAMs instead of private memory."""

    def __init__(
        self, values: np.ndarray, folder: Path | None = None, *, recursive: bool = False,
        entropy: Entropy = secrets.token_bytes,
    ) -> None:  # fmt: skip
        """values uint8 [N, V]: what the array holds at first. folder: where its files go; None: in memory."""
        self.orams: list[PathOram] = []
        payloads, level = values, 0
        while True:
            path = None if folder is None else folder / f"oram-{level}"
            oram = PathOram(len(payloads), payloads.shape[1], path, entropy=entropy)
            leaves = oram.new_leaves(len(payloads))
            oram.fill(leaves, payloads)
            self.orams.append(oram)
            if not recursive or len(leaves) <= FEW_POSITIONS:
                break
            padded = np.zeros(-(-len(leaves) // POSITIONS) * POSITIONS, np.uint32)
            padded[: len(leaves)] = leaves
            payloads, level = padded.view(np.uint8).reshape(-1, 4 * POSITIONS), level + 1
        self.positions = leaves.copy()
        """Of the smallest ORAM's blocks."""

    @property
    def bytes_per_access(self) -> int:
        return sum(oram.bytes_per_access for oram in self.orams)

    @property
    def private_bytes(self) -> int:
        return self.positions.nbytes + sum(oram.private_bytes for oram in self.orams)

    @property
    def visible_bytes(self) -> int:
        """Moved so far, by the stores' logs."""
        return sum(oram.store.trace.visible_bytes for oram in self.orams)

    def get(self, key: int) -> bytes:
        payload = np.zeros(self.orams[0].payload_bytes, np.uint8)
        self._access(key, payload, "keep")
        return payload.tobytes()

    def put(self, key: int, value: bytes) -> None:
        self._access(key, np.frombuffer(value, np.uint8).copy(), "write")

    def _access(self, key: int, payload: np.ndarray, fate: str) -> None:
        if not 0 <= key < self.orams[0].num_blocks:
            raise InputError(f"key {key}: this array has {self.orams[0].num_blocks:,} places")
        block = key // POSITIONS ** (len(self.orams) - 1)
        new = self.orams[-1].new_leaf()
        leaf, self.positions[block] = int(self.positions[block]), new
        for level in range(len(self.orams) - 1, 0, -1):
            oram, below = self.orams[level], self.orams[level - 1]
            held = np.zeros(oram.payload_bytes, np.uint8)
            oram.access(leaf, block, new, held, "take")
            child = key // POSITIONS ** (level - 1)
            table, child_new = held.view(np.uint32), below.new_leaf()
            child_leaf, table[child % POSITIONS] = int(table[child % POSITIONS]), child_new
            oram.give(block, new, held)
            block, leaf, new = child, child_leaf, child_new
        self.orams[0].access(leaf, block, new, payload, fate)

    def close(self) -> None:
        for oram in self.orams:
            oram.store.close()


# ---- a tree map ----------------------------------------------------------------------------------------------------

Pointer = tuple[int, int, int]
NOWHERE: Pointer = (NO_BLOCK, 0, 0)


@dataclass(slots=True)
class _Node:
    key: int
    live: bool
    left: Pointer
    right: Pointer
    value: bytes
    leaf: int

    @property
    def height(self) -> int:
        return 1 + max(self.left[2], self.right[2])

    def pack(self) -> np.ndarray:
        told = NODE.pack(self.key, self.live, *self.left, *self.right) + self.value
        return np.frombuffer(told, np.uint8)


class TreeMap:
    """An AVL tree over Path ORAM: any keys of 4 bytes."""

    def __init__(
        self, keys: np.ndarray, values: np.ndarray, capacity: int, path: Path | None = None,
        *, entropy: Entropy = secrets.token_bytes,
    ) -> None:  # fmt: skip
        """keys uint32 [n], all different; values uint8 [n, V]; capacity: most keys that it ever holds."""
        self.capacity, self.value_bytes, count = capacity, values.shape[1], len(keys)
        self.deepest = deepest_tree(capacity)
        self.oram = PathOram(capacity, NODE.size + self.value_bytes, path, entropy=entropy)
        self.count = count
        order = np.argsort(keys)
        leaves = self.oram.new_leaves(count)
        self.oram.fill(leaves, self._nodes(keys[order], values[order], leaves))
        middle = count // 2
        self.root: Pointer = (middle, int(leaves[middle]), count.bit_length()) if count else NOWHERE

    def _nodes(self, keys: np.ndarray, values: np.ndarray, leaves: np.ndarray) -> np.ndarray:
        """Payloads of a balanced tree: a node's id is its key's place, the middle of the places below it."""
        fields = np.dtype(
            {"names": ["key", "live", "left", "left_leaf", "left_height", "right", "right_leaf", "right_height"],
             "formats": ["<u4", "u1", "<u4", "<u4", "u1", "<u4", "<u4", "u1"],
             "offsets": [0, 4, 5, 9, 13, 14, 18, 22], "itemsize": NODE.size}
        )  # fmt: skip
        made: Any = np.zeros(len(keys), fields)
        made["key"], made["live"] = keys, 1
        low, high = np.zeros(min(1, len(keys)), np.int64), np.array([len(keys)] * min(1, len(keys)))
        while len(low):
            middle = (low + high) // 2
            parts = {"left": (low, middle), "right": (middle + 1, high)}
            for side, (start, stop) in parts.items():
                child, size = (start + stop) // 2, stop - start
                there = size > 0
                at = np.minimum(child, len(keys) - 1)
                made[side][middle] = np.where(there, child, NO_BLOCK)
                made[f"{side}_leaf"][middle] = np.where(there, leaves[at], 0)
                made[f"{side}_height"][middle] = np.ceil(np.log2(size + 1))
            low = np.concatenate([start for start, _ in parts.values()])
            high = np.concatenate([stop for _, stop in parts.values()])
            low, high = low[high > low], high[high > low]
        return np.concatenate([made.view(np.uint8).reshape(-1, NODE.size), values], axis=1)

    @property
    def bytes_per_access(self) -> int:
        """Visible, of every operation."""
        return self.deepest * self.oram.bytes_per_access

    @property
    def visible_bytes(self) -> int:
        return self.oram.store.trace.visible_bytes

    def get(self, key: int) -> bytes | None:
        return self._access(key, None, delete=False)

    def put(self, key: int, value: bytes) -> bytes | None:
        """Returns what the key had."""
        return self._access(key, value, delete=False)

    def delete(self, key: int) -> bytes | None:
        return self._access(key, None, delete=True)

    def _access(self, key: int, value: bytes | None, *, delete: bool) -> bytes | None:
        nodes: dict[int, _Node] = {}
        path: list[int] = []
        pointer = self.root
        while pointer[0] != NO_BLOCK:
            node = self._take(pointer)
            nodes[pointer[0]] = node
            path.append(pointer[0])
            if node.key == key:
                break
            pointer = node.left if key < node.key else node.right
        for _ in range(self.deepest - len(path)):
            self.oram.dummy()
        found = None
        if path and nodes[path[-1]].key == key:
            node = nodes[path[-1]]
            found = node.value if node.live else None
            node.live = not delete and (node.live or value is not None)
            node.value = node.value if value is None else value
        elif value is not None:
            if self.count == self.capacity:
                self._link(nodes, path)
                raise DoesNotFit(f"the tree map is full: {self.capacity:,} keys, deleted ones too")
            nodes[self.count] = _Node(key, True, NOWHERE, NOWHERE, value, self.oram.new_leaf())
            path.append(self.count)
            self.count += 1
        self._link(nodes, path)
        return found

    def _take(self, pointer: Pointer) -> _Node:
        payload = np.zeros(self.oram.payload_bytes, np.uint8)
        assert self.oram.access(pointer[1], pointer[0], 0, payload, "take")
        told = NODE.unpack_from(payload.tobytes())
        value = payload[NODE.size :].tobytes()
        return _Node(told[0], bool(told[1]), told[2:5], told[5:8], value, self.oram.new_leaf())

    def _link(self, nodes: dict[int, _Node], path: list[int]) -> None:
        """From the bottom up: pointers to the new leaves, heights, rotations; then all go back."""

        def pointer(at: int) -> Pointer:
            return (at, nodes[at].leaf, nodes[at].height)

        child: int | None = None
        for at in reversed(path):
            node = nodes[at]
            if child is not None:
                if nodes[child].key < node.key:
                    node.left = pointer(child)
                else:
                    node.right = pointer(child)
            child = self._balance(nodes, at)
        if child is not None:
            self.root = pointer(child)
        for at, node in nodes.items():
            self.oram.give(at, node.leaf, node.pack())

    def _balance(self, nodes: dict[int, _Node], at: int) -> int:
        """Rotates where one side is deeper by two; returns what stands there now. Only insertions lead to it, so all
        nodes that turn have been read.
        """
        node = nodes[at]
        lean = node.left[2] - node.right[2]
        if abs(lean) < 2:
            return at
        side, other = ("left", "right") if lean > 0 else ("right", "left")
        top = getattr(node, side)[0]
        if getattr(nodes[top], other)[2] > getattr(nodes[top], side)[2]:
            setattr(node, side, self._pointer(nodes, self._rotate(nodes, top, other, side)))
        return self._rotate(nodes, at, side, other)

    def _rotate(self, nodes: dict[int, _Node], at: int, side: str, other: str) -> int:
        """The child on `side` comes up."""
        node = nodes[at]
        up = getattr(node, side)[0]
        setattr(node, side, getattr(nodes[up], other))
        setattr(nodes[up], other, self._pointer(nodes, at))
        return int(up)

    @staticmethod
    def _pointer(nodes: dict[int, _Node], at: int) -> Pointer:
        return (at, nodes[at].leaf, nodes[at].height)

    def close(self) -> None:
        self.oram.store.close()


# ---- a scan --------------------------------------------------------------------------------------------------------


class Scan:
    """All pairs in large pages; every access reads and writes all of them."""

    def __init__(
        self, keys: np.ndarray, values: np.ndarray, path: Path | None = None, *, rows: int = SCAN_ROWS
    ) -> None:
        """rows: pairs a page."""
        self.count, self.rows = len(keys), rows
        self._fields = np.dtype([("key", "<u4"), ("value", "u1", (values.shape[1],))])
        pages = -(-len(keys) // rows)
        self.store = host_store(path, pages, rows * self._fields.itemsize + TAG_BYTES)
        self.pages = SealedPages(self.store, secrets.token_bytes(KEY_BYTES))
        told = np.zeros(pages * rows, self._fields)
        told["key"][: len(keys)], told["value"][: len(keys)] = keys, values
        self.pages.write(np.arange(pages, dtype=np.uint32), told.view(np.uint8).reshape(pages, -1))

    @property
    def bytes_per_access(self) -> int:
        return 2 * self.store.num_pages * self.store.page_bytes

    @property
    def visible_bytes(self) -> int:
        return self.store.trace.visible_bytes

    def access(self, key: int, value: bytes | None = None) -> bytes | None:
        """The value of a key that is there; value: what it gets."""
        found = None
        for page in range(self.store.num_pages):
            pages = np.array([page], np.uint32)
            plain = self.pages.read(pages)
            told = plain[0].view(self._fields)
            places = np.flatnonzero(told["key"][: self.count - page * self.rows] == key)
            if len(places):
                found = told["value"][places[0]].tobytes()
                if value is not None:
                    told["value"][places[0]] = np.frombuffer(value, np.uint8)
            self.pages.write(pages, plain)
        return found

    def close(self) -> None:
        self.store.close()
