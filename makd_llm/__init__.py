"""makd-llm: a pretrained language model distilled into a low-rank student that summarises."""

__version__ = "0.1.0"
