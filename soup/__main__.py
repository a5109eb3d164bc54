"""`python -m soup`, the same as the console script `soup`."""

from soup.cli.main import console

if __name__ == "__main__":
    console()
