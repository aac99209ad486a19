"""Simulators: what serving would do on machines that are not here."""
