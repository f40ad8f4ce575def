"""LLM and VLM agents that improve themselves, and prove it."""

__version__ = "0.1.0"
