"""The public functions, and what they take and return."""
