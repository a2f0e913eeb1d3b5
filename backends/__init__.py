"""The backends: one folder per target."""
