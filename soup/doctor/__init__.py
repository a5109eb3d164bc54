"""What this machine can run: each capability is exercised in a process of its own, not looked up."""
