"""Definitions that the whole runtime uses: visibility, costs, values, messages, ops, errors."""
