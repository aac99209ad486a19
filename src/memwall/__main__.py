"""`python -m memwall` and the `memwall` script are the command line."""

import os
import sys


def main() -> None:
    """An interrupt ends it quietly while it is still being imported, too; verbs see to themselves."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller, as `2>&-` does: what is written there goes nowhere
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    try:
        from memwall import cli

        cli.main()
    except KeyboardInterrupt:
        sys.stderr.write("memwall: interrupted\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
