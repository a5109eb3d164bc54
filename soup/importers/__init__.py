"""Configurations of other tools as experiments of soup: one table for each tool, in a file of its own."""
