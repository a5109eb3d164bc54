"""What `soup report` writes: run folders, read as they are, on one page and one picture. Never imports torch."""
