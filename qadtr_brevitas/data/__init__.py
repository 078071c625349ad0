"""Data sets by name: a plug-in loads a whole split into memory, as bytes."""
