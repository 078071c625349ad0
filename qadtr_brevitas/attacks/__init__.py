"""Attacks: one file each, over one shared patch geometry. An attack never decides whether it succeeded."""
