"""The table of policy losses in docs/losses.md, from the registry."""
