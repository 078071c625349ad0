"""Contract tests that plug-ins of other packages can run on themselves."""
