"""Devices in nodes with a fast link inside a node and a slower one between nodes, and what collectives take on them.

Device numbers go along nodes: a group of neighbours stays inside a node as long as it can, so a group of n devices
spans `Cluster.group(n)`, nodes times devices of each.

`LinkModel` is the alpha-beta model (Hockney 1994) with the steps of rings inside a node, and of a ring over nodes of
what each device holds after that (the hierarchical form that NCCL uses). Sizes are those of the whole tensor, as in
the published tables: an all-gather of S bytes leaves S bytes on every device, a reduce-scatter begins with S; an
all-to-all's are what one device sends, its own part included.
"""

from __future__ import annotations

from dataclasses import dataclass

from memwall.errors import InputError
from memwall.hardware import Machine
from memwall.simulate.base import COLLECTIVES, Cost, Device, Operation

BASE_SECONDS = 5e-6
STEP_SECONDS = 1.2e-6
NETWORK_STEP_SECONDS = 1e-5
"""Least time of a collective inside a node, and what each step of a ring adds inside and between nodes (model; the
first two as in the H100 tables of apex_plus, where 2, 4 and 8 devices take 8, 10 and 14 us for no bytes)."""
LINK_EFFICIENCY = 0.75
"""Share of a link's rate that collectives reach (model)."""
LINK_LOAD = 0.3
"""Load of a device that sends and receives, as power counts it (model)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """`nodes` machines of `per_node` devices. link_bytes_per_s: between two devices of a node, one direction;
    network_bytes_per_s: what each device gets of its node's network, one direction.
    """

    device: Device
    nodes: int = 1
    per_node: int = 1
    link_bytes_per_s: float | None = None
    network_bytes_per_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("nodes", "per_node"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.per_node > 1 and self.link_bytes_per_s is None:
            raise InputError(
                f"{self.device.name} states no link between its devices; say it with --link, such as --link 50GB/s"
            )
        if self.nodes > 1 and self.network_bytes_per_s is None:
            raise InputError(
                f"{self.device.name} states no network; say what each device gets with --network, such as 400Gbit/s"
            )

    @staticmethod
    def of(
        machine: Machine,
        *,
        nodes: int = 1,
        per_node: int = 1,
        link_bytes_per_s: float | None = None,
        network_bytes_per_s: float | None = None,
        clock: float = 1.0,
    ) -> Cluster:
        """From a machine's description; the rates given win over its own."""
        unit = next((one for one in machine.compute if one.unit == "gpu"), None)
        place = unit.tier if unit is not None else "ram"
        link = machine.link(place, place)
        if link_bytes_per_s is None and link is not None:
            link_bytes_per_s = link.bytes_per_s
        if network_bytes_per_s is None and machine.has_tier("net"):
            network_bytes_per_s = machine.tier("net").read_bytes_per_s / per_node
        return Cluster(
            device=Device.of(machine).at_clock(clock),
            nodes=nodes,
            per_node=per_node,
            link_bytes_per_s=link_bytes_per_s,
            network_bytes_per_s=network_bytes_per_s,
        )

    @property
    def devices(self) -> int:
        """All of them."""
        return self.nodes * self.per_node

    def group(self, devices: int) -> tuple[int, int]:
        """(nodes, devices of each) of a group of neighbours; where the last node is not full, the fullest counts."""
        nodes = -(-devices // self.per_node)
        return nodes, min(devices, self.per_node)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkModel:
    """Collectives by latency and rate of the links."""

    cluster: Cluster
    efficiency: float = LINK_EFFICIENCY

    def cost(self, operation: Operation) -> Cost | None:
        """See `CostModel`; None for what is no collective."""
        if operation.kind not in COLLECTIVES:
            return None
        nodes, per_node = (int(n) for n in operation.shape)
        seconds = self.seconds(operation.kind, nodes, per_node, operation.link_bytes) * operation.repeat
        return Cost(seconds, self.cluster.device.joules(seconds, LINK_LOAD))

    def seconds(self, kind: str, nodes: int, per_node: int, nbytes: float) -> float:
        """Of one collective over nodes x per_node devices."""
        if nodes * per_node <= 1:
            return 0.0
        fast = (self.cluster.link_bytes_per_s or float("inf")) * self.efficiency
        slow = (self.cluster.network_bytes_per_s or float("inf")) * self.efficiency
        if kind == "sendrecv":
            rate, step = (slow, NETWORK_STEP_SECONDS) if nodes > 1 else (fast, STEP_SECONDS)
            return BASE_SECONDS + step + nbytes / rate
        if kind == "alltoall":  # each device keeps 1 of n parts; those for other nodes cross the network
            parts = nodes * per_node
            inside = nbytes * (per_node - 1) / parts / fast
            outside = nbytes * (nodes - 1) * per_node / parts / slow
            steps = (per_node - 1) * STEP_SECONDS + (nodes - 1) * NETWORK_STEP_SECONDS
            return BASE_SECONDS + steps + inside + outside
        half = self._half_ring(nodes, per_node, nbytes, fast, slow)
        return BASE_SECONDS + (2 * half if kind == "all_reduce" else half)

    @staticmethod
    def _half_ring(nodes: int, per_node: int, nbytes: float, fast: float, slow: float) -> float:
        """A reduce-scatter, or an all-gather: inside the nodes, then of 1 / per_node of it between them."""
        inside = (per_node - 1) * STEP_SECONDS + nbytes * (per_node - 1) / per_node / fast
        part = nbytes / per_node
        outside = (nodes - 1) * NETWORK_STEP_SECONDS + part * (nodes - 1) / nodes / slow
        return inside + outside
