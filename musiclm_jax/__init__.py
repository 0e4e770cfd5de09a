"""MusicLM and its family in JAX: train, sample, evaluate and serve text-to-music models."""

__version__ = '0.1.0'
