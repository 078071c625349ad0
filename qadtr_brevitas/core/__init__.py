"""What every other folder builds on: errors, precisions, plug-in registries, seeds, files and devices."""
