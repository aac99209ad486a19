"""What a cache study says to somebody with no time: at each budget, which policy to take for what one wants to do.

Only memwall's own rows are offered, and only where the bytes that were really held in a task meet the budget there: a
policy that prunes a prompt may fit where answers are short and not where they are long. Of rows with as many right
answers the one that strays least on text is taken, of those the smaller one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memwall.studies.kv_study import Row, Study

TASKS = ("text", "recall", "talk")
ANSWERS = (("recall", "recall"), ("recall", "later"), ("talk", "talk"))
"""(task, figure) of shares of right answers."""
GOALS = {
    "going on with text": ("text", "kl_nats"),
    "a question at the prompt's end": ("recall", "recall"),
    "questions in later turns": ("recall", "later"),
    "a conversation": ("talk", "talk"),
}
"""What one wants to do -> the task and the figure that say how well."""
ALL = "anything"


@dataclass(frozen=True, slots=True)
class Pick:
    """What to take for a goal in a budget (a share of a float16 cache); no row where nothing measured fits."""

    budget: float
    goal: str
    row: Row | None

    @property
    def policy(self) -> str | None:
        """Of the row."""
        return None if self.row is None else self.row.policy


def share(row: Row, task: str) -> float | None:
    """Bytes held in a task over those of float16."""
    held, plain = row.get(task, "kv_bytes"), row.get(task, "float16_bytes")
    return held / plain if held and plain else None


def answers(row: Row) -> float:
    """Right answers of all three kinds, each weighed alike; 0 to 1."""
    return sum(row.get(task, name) or 0.0 for task, name in ANSWERS) / len(ANSWERS)


def picks(study: Study) -> list[Pick]:
    """For each budget of the study, largest first: one for all goals together, then one for each."""
    budgets = sorted({row.budget for row in study.rows if row.budget is not None}, reverse=True)
    own, found = _own(study), []
    for budget in budgets:
        found.append(Pick(budget, ALL, _best(own, budget, TASKS, answers)))
        for goal, (task, name) in GOALS.items():
            found.append(Pick(budget, goal, _best(own, budget, (task,), _answers_of(task, name))))
    return found


def _answers_of(task: str, name: str) -> Callable[[Row], float]:
    """Right answers of one kind; of text there are none, and what is left to compare is how far it strays."""

    def measure(row: Row) -> float:
        return 0.0 if name == "kl_nats" else float(row.get(task, name))

    return measure


def _own(study: Study) -> list[Row]:
    return [row for row in study.rows if row.library == "memwall" and row.policy and not row.skipped]


def _whole(study: Study) -> list[Row]:
    """Own rows that went through every task."""
    return [row for row in _own(study) if all(share(row, task) is not None for task in TASKS)]


def _most(row: Row) -> float:
    """The largest of its shares."""
    return max(share(row, task) or 0.0 for task in TASKS)


def _best(rows: Sequence[Row], budget: float, tasks: Sequence[str], measure: Callable[[Row], float]) -> Row | None:
    """The best of the rows that were measured and whose bytes meet the budget in all of these tasks."""
    fitting = []
    for row in rows:
        shares = [share(row, task) for task in {*tasks, "text"}]
        held = [share(row, task) for task in tasks]
        if None not in shares and all(part is not None and part <= budget for part in held):
            fitting.append(row)
    return min(
        fitting, key=lambda row: (-measure(row), row.get("text", "kl_nats"), share(row, tasks[0]) or 0.0), default=None
    )


def sentences(study: Study) -> list[str]:
    """One line a budget: what to take, and what float16 reaches beside it."""
    exact = next((row for row in study.rows if row.policy == "float16" and row.figures), None)
    found = []
    for pick in picks(study):
        if pick.goal != ALL:
            continue
        if pick.row is None:
            nearest = min(_whole(study), key=_most, default=None)
            if nearest is not None:
                found.append(
                    f"In {pick.budget:g} of float16's bytes nothing measured stays in every task; see the goals. "
                    f"Nearest is {nearest.policy}: {_told(nearest)}."
                )
            continue
        found.append(f"In {pick.budget:g} of float16's bytes take {pick.policy}: {_told(pick.row)}.")
    if found and exact is not None:
        found.append(f"float16 itself: {_told(exact)}.")
    return found


def _told(row: Row) -> str:
    """Figures of a row in words."""
    held = ", ".join(f"{share(row, task) or 0:.2f}" for task in TASKS)
    right = ", ".join(f"{row.get(task, name) or 0:.0%}" for task, name in ANSWERS)
    return (
        f"{row.get('text', 'kl_nats'):.4f} nats from the exact model on text; right at the prompt's end, later, in "
        f"conversation {right}; bytes {held} in text, recall, talk"
    )


COLUMNS = ("budget", ALL, *GOALS)


def table(study: Study) -> list[list[str]]:
    """A line a budget: the policy for each goal, with its figure."""
    found: dict[float, list[str]] = {}
    for pick in picks(study):
        line = found.setdefault(pick.budget, [f"{pick.budget:g}"])
        if pick.row is None:
            line.append("-")
        elif pick.goal == ALL:
            line.append(pick.row.policy)
        else:
            task, name = GOALS[pick.goal]
            value = pick.row.get(task, name)
            line.append(f"{pick.row.policy} ({f'{value:.4f}' if name == 'kl_nats' else f'{value:.0%}'})")
    return list(found.values())
