"""Nexus: prefill and decode side by side, with shares of the compute chosen ahead by a cost model at every iteration.

Source: Nexus: Proactive Intra-GPU Disaggregation of Prefill and Decode in LLM Serving, Shi 2025, arXiv 2507.06608: cost
model 4.1, objective and greedy search 4.2, hysteresis and asynchronous switching 4.3, shortest-prompt-first 4.4.

Idea: what is about to run tells how long each phase would take at every share. Where pages are plenty prefill is
favoured: it gets all that decode can spare while staying within `beta` of its time alone; where they are short decode
is favoured, within `alpha` for prefill, so that requests end and free pages. The search starts from the share in force
and moves percent by percent. Prompts go shortest first, and older ones gain on younger ones.

Units and shapes: shares in percent that sum to 100, seconds, tokens. State in, step out.

Differs from the paper: `delta`, which it does not tell, is 5 points. Where no share meets the slack the favoured phase
keeps `least`, the bound. On the CPU a share is a quota of processor time that is changed in a running worker.

Cost: 2 to 4 evaluations of the model where little changed, each some tens of operations; no bytes moved.

Holds when: the costs were measured on this machine with this model (`phase_profile`).
"""

from __future__ import annotations

from dataclasses import dataclass

from memwall.engine.base import Phase, RequestView, Shares, State, Step
from memwall.engine.phase_costs import Costs, Demand
from memwall.engine.phases import phase_of, plan_phases, with_shares
from memwall.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Nexus:
    """beta, alpha: how many times as long decode and prefill may take as alone. kv_switch: the share of pages in use
    from which decode is favoured. delta: percent that shares must differ by to be changed. gamma: tokens that a second
    of age is worth. least: percent that either keeps, such as the smallest share at which costs were measured.
    """

    costs: Costs
    beta: float = 1.1
    alpha: float = 1.3
    kv_switch: float = 0.7
    delta: int = 5
    gamma: float = 15.0
    least: int = 1
    spare_pages: int = 1

    def __post_init__(self) -> None:
        if self.beta < 1 or self.alpha < 1:
            raise InputError(f"slacks of {self.beta} and {self.alpha}; both must be at least 1")
        if not 0 <= self.kv_switch <= 1:
            raise InputError(f"kv_switch is {self.kv_switch}; it must be 0 to 1")
        if self.delta < 0 or self.gamma < 0:
            raise InputError(f"delta {self.delta} and gamma {self.gamma}: neither may be negative")

        if not 1 <= self.least <= 50:
            raise InputError(f"least is {self.least} percent; it must be 1 to 50")

    def plan_step(self, state: State, now: float) -> Step:
        """See `Scheduler`."""
        assert state.lanes is not None

        def order(view: RequestView) -> tuple[float, ...]:
            return (view.remaining - view.hit - self.gamma * (now - view.arrival), view.id)

        step = plan_phases(state, self.spare_pages, order, whole=True)
        demand = demand_of(state, step)
        if not demand.prefill_tokens and not demand.decode_batch:
            return step
        found = self.split(state.lanes.shares, demand, 1 - max(state.free_pages, 0) / max(state.total_pages, 1))
        return with_shares(step, found)

    def split(self, shares: Shares, demand: Demand, used: float) -> Shares | None:
        """New shares where they differ enough from those in force. used: of the pages, 0 to 1."""
        favoured: Phase = "decode" if used > self.kv_switch else "prefill"
        own, _ = self.search(favoured, shares.of(favoured), demand)
        prefill = own if favoured == "prefill" else 100 - own
        if abs(prefill - shares.prefill) <= self.delta:
            return None
        return Shares(prefill=prefill, decode=100 - prefill)

    def search(self, favoured: Phase, start: int, demand: Demand) -> tuple[int, int]:
        """The favoured phase's largest percent that leaves the other one within its slack, found from `start`; and how
        often the model was asked. Both keep `least`.
        """
        slack = self.beta if favoured == "prefill" else self.alpha
        asked = 1
        limit = slack * self.seconds(favoured, 0, demand)

        def fits(own: int) -> bool:
            nonlocal asked
            asked += 1
            return self.seconds(favoured, own, demand) <= limit

        most = 100 - self.least
        own = min(max(start, self.least), most)
        while own > self.least and not fits(own):
            own -= 1
        if own < start:
            return own, asked
        while own < most and fits(own + 1):
            own += 1
        return own, asked

    def seconds(self, favoured: Phase, own: int, demand: Demand) -> float:
        """Of the phase that is not favoured while the favoured one has `own` percent; 0: the other has all of it."""
        left = (100 - own) / 100
        if favoured == "prefill":
            return self.costs.decode(demand, left, own / 100 if own else 0.01)
        return self.costs.prefill(demand, left)


def demand_of(state: State, step: Step) -> Demand:
    """What both workers have to do once a step is handed out: that, and what is under way."""
    assert state.lanes is not None
    views = {view.id: view for view in (*state.running, *state.waiting, *state.swapped)}
    prefill, decode = [], []
    for work in (*state.lanes.flying, *step.work):
        view = views[work.id]
        if phase_of(view) == "decode":
            decode.append(view.known)
        else:
            prefill.append((max(view.computed, view.hit), work.tokens))
    return Demand.of(prefill, decode)
