"""`python -m soup.rules`: the table, for docs/rules.md."""

from soup.rules import markdown

print(markdown(), end="")
