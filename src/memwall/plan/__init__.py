"""From model, machine and goal to a plan: `make_plan` (or `Planner` for several goals) predicts bytes and speed,
searches, measures, chooses.

base: the `Plan` and its JSON. search: the enumeration. predict: bytes. speed, profile, kernel_rates: time. report:
table and page. store: kept figures.
"""

from memwall.plan.base import PLAN_VERSION as PLAN_VERSION
from memwall.plan.base import Choice as Choice
from memwall.plan.base import Option as Option
from memwall.plan.base import Plan as Plan
from memwall.plan.base import PlanRow as PlanRow
from memwall.plan.base import Quality as Quality
from memwall.plan.choose import Planner as Planner
from memwall.plan.choose import make_plan as make_plan
from memwall.plan.predict import RUNTIME as RUNTIME
from memwall.plan.predict import sampling_bytes as sampling_bytes
from memwall.plan.report import check_html as check_html
from memwall.plan.report import write_html as write_html
from memwall.plan.search import Goal as Goal
