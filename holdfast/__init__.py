"""Holdfast keeps a language-model training run alive while processes and nodes go away under it."""

__version__ = "0.1.0"
