"""One keyword-only function per choice; its signature is the schema of the choice's YAML."""
