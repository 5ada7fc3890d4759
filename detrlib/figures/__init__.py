"""Figures as functions: data in, a matplotlib Figure out. Nothing here computes results or reads a model."""
