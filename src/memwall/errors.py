"""What memwall raises for its users. Each error knows the exit status it ends the program with."""

from __future__ import annotations


class MemwallError(Exception):
    """Base of all errors that name a user's input; `exit_status` is what the command line ends with."""

    exit_status = 2


class InputError(MemwallError, ValueError):
    """Bad input: the message names it, the range allowed and what would work."""


class DoesNotFit(MemwallError):
    """Valid input that does not fit the budget; the message says the smallest that works."""

    exit_status = 1


class BudgetExceeded(DoesNotFit):
    """An arena refused an allocation. Raised before any byte over the cap is touched."""

    def __init__(self, owner: str, requested_bytes: int, free_bytes: int, cap_bytes: int, tier: str = "ram") -> None:
        self.owner = owner
        self.requested_bytes = requested_bytes
        self.free_bytes = free_bytes
        self.cap_bytes = cap_bytes
        self.tier = tier
        super().__init__(
            f"{owner} needs {requested_bytes:,} bytes more on {tier}, "
            f"but only {free_bytes:,} of the {cap_bytes:,} allowed are left"
        )


class MissingDependency(MemwallError, ImportError):
    """An optional library is absent; the message is the line that installs it."""

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(f"{library} is not installed; install it with: pip install 'memwall[{extra}]'")
