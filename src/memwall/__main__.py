"""`python -m memwall` and the `memwall` script are the command line."""

import sys


def main() -> None:
    """An interrupt ends it quietly while it is still being imported, too; verbs see to themselves."""
    try:
        from memwall import cli

        cli.main()
    except KeyboardInterrupt:
        sys.stderr.write("memwall: interrupted\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
