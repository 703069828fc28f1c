"""Evaluation of the policy."""
