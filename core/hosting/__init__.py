"""Hosting worlds: in this process, in others, on a cluster."""
