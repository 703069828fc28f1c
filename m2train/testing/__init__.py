"""Harnesses that tests and benchmarks share."""
