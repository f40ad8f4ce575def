"""Recipes: data, no code."""
