"""The Python interface: what `import qadtr_brevitas as qb` offers."""
