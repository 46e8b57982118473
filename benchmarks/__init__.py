"""What is measured, and gated, beyond the tests."""
