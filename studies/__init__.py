"""Experiments that take hours, with their results."""
