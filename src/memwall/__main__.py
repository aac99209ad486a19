"""`python -m memwall` is the command line."""

from memwall.cli import main

main()
