"""The command line: one file per command, each a thin front of a function of the package."""
