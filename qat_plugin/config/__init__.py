"""Recipes: what their keys are, how Hydra composes them, and what they may name."""
