"""What `soup report` writes: run folders, read as they are, on one page and one picture. Never imports torch."""

PACKAGES = {
    "plotly": "plotly",
    "jinja2": "jinja2",
    "matplotlib": "matplotlib",
    "optuna": "optuna",
}  # and modules
