"""The passes: one folder per family, one file per method."""
