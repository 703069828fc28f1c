"""Dialogues of the policy with simulated patients: engines, token streams, slices, journal."""
