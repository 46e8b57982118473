"""Compilers without a GPU: what every kernel takes, against a checked-in table."""
