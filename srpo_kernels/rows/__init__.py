"""Rows of logits: what a backend computes of them, and what it means."""
