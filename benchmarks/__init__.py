"""Programs that measure, each run by itself from the root of the repository."""
