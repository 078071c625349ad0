"""Scripts for the compilers' own Python environments, which have nothing of this package."""
