"""UNITE trained fast: one transformer that is both an image tokenizer and a latent flow-matching generator."""

__version__ = "0.1.0"
