"""Where bytes live: the `Budget` a user gives, the `Ledger` of who holds what, the `Arena` that refuses what is over.

`resident` asks the operating system, so that the ledger can be checked against it.
"""

from __future__ import annotations

from memwall.memory.arena import Arena, Charge, Region
from memwall.memory.budget import Budget
from memwall.memory.ledger import Entry, Ledger, Row
from memwall.memory.page_pool import OutOfPages, PagePool
from memwall.memory.resident import (
    Resident,
    ledger_error,
    mapped_file_bytes,
    measure_runtime,
    peak_resident_bytes,
    reset_peak_resident,
    resident_bytes,
    resident_split,
)

__all__ = [
    "Arena",
    "Budget",
    "Charge",
    "Entry",
    "Ledger",
    "OutOfPages",
    "PagePool",
    "Region",
    "Resident",
    "Row",
    "ledger_error",
    "mapped_file_bytes",
    "measure_runtime",
    "peak_resident_bytes",
    "reset_peak_resident",
    "resident_bytes",
    "resident_split",
]
