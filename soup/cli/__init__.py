"""The command line: composes with Hydra, then hands resolved points to one function per command."""
