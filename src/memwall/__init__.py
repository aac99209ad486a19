"""memwall: run, compress and plan AI models inside the memory you have, and see where every byte went."""

__version__ = "0.1.0"
