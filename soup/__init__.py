"""soup: composes LLM fine-tuning experiments, checks them, trains them, and proves what took effect."""

__version__ = "0.1.0"
