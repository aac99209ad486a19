"""DistServe: prompts and tokens computed by processes with a memory of their own; who runs, and what is pulled when.

Source: DistServe: Disaggregating Prefill and Decoding for Goodput-optimized Large Language Model Serving, Zhong 2024,
OSDI 2024, arXiv 2401.09670, sections 4.2 and 4.3, with both stage schedulers of the released code. Where to put which
instances is `simulate.distserve`; the step loop is `apart`, the copies `hand_over`.

Idea: a finished prompt's keys and values stay where they were computed until the decode side has room and pulls them,
so that prefill's own memory is the buffer and a burst never fills the decode side. Prompts go first come first served
in batches near L_m tokens, from which on a longer batch is no faster per token; one that is longer goes by itself.

Units and shapes: pages and tokens as in `base`; state in, step out; `accepts` judges one offered prompt.

Differs from the paper: a prompt longer than a step comes in chunks; a page for each running sequence stays free when a
prompt is pulled (`spare_pages`; 0 is the released code's rule), else it would be swapped out with the next page that
somebody needs; a sequence that finds no room in the swap area is computed again, as a prompt. Weights are shared by the
processes of one machine.

Cost: keys and values of a prompt are held twice while they are copied, and moved once: 2 * layers * heads * head_dim
* 2 bytes * prompt tokens.

Holds when: both phases have work; the memory that each has to itself is not lent to the other.
"""

from __future__ import annotations

from dataclasses import dataclass

from memwall.engine.base import Preempt, RequestView, State, Step
from memwall.engine.phases import PhasedPlan
from memwall.errors import InputError

WAITING_SHARE = 0.05
"""Released code: of the decode side's blocks, pulled prompts that do not run yet may hold so much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A prompt that is done, and the decode side. need: pages it will take there; waiting: pages of those pulled before
    that are in no batch yet; running: sequences that may ask for a page; set_aside: whether any waits to come back.
    """

    need: int
    free: int
    total: int
    waiting: int = 0
    running: int = 0
    set_aside: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DistServe:
    """Decides for both sides. waiting_share and spare_pages: see the top of the file."""

    waiting_share: float = WAITING_SHARE
    spare_pages: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.waiting_share <= 1 or self.spare_pages < 0:
            raise InputError(
                f"a waiting share of {self.waiting_share} and {self.spare_pages} spare pages; the share must be above "
                "0 and at most 1, the pages 0 or more"
            )

    def plan_step(self, state: State, now: float) -> Step:
        """See `Scheduler`. The side is the one whose worker `state.lanes` tells of."""
        assert state.lanes is not None
        plan = SidePlan(state)
        plan.give_way()
        if "decode" in state.lanes.idle:
            plan.decode()
        if "prefill" in state.lanes.idle:
            # prompts do not grow here, so nothing is kept beside them
            plan.prefill(0, lambda view: view.rank, whole=True)
        return plan.step()

    def accepts(self, offer: Offer) -> bool:
        """Whether the decode side pulls it now."""
        few = offer.waiting < max(self.waiting_share * offer.total, 1)
        spare = self.spare_pages * (offer.running + 1) if offer.running else 0
        return few and not offer.set_aside and offer.need + spare <= offer.free


@dataclass(slots=True)
class SidePlan(PhasedPlan):
    """A step of one side in the making."""

    def decode(self) -> None:
        """A token for as many as a batch holds, first come first served; those set aside come back before new ones."""
        limits, short = self.state.limits, False
        for view in self.running:
            if view.id in self.gone or len(self.work) >= limits.max_sequences:
                continue
            need = self._pages_more(view, 1)
            if need > self.free and not self._make_room(need, view):
                short = True
                continue
            self.free -= need
            self.work[view.id] = 1
        if not (short or self.preempt or self.free < 0):
            self._return(sorted(self.state.swapped, key=lambda view: view.rank))

    def _return(self, views: list[RequestView]) -> None:
        count = len(self.running)
        for view in views:
            pages = self.state.limits.pages(view.known)
            if pages + (count + 1 if count else 0) > self.free:
                return
            self.free -= pages
            self.resume.append(view.id)
            count += 1
            if len(self.work) < self.state.limits.max_sequences:
                self.work[view.id] = 1

    def _set_aside(self, view: RequestView) -> None:
        """Swapped wherever there is room: to compute it again would take the other side's time."""
        swap = view.decodes and view.pages <= self.swap_free
        if swap:
            self.swap_free -= view.pages
        self.preempt.append(Preempt(id=view.id, by="swap" if swap else "recompute"))
        self.free += view.freeable
        self.work.pop(view.id, None)
