"""soup's own exact kernels: each file holds one, with its formula, and `put_on` says which of them a trainer runs."""
