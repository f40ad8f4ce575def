"""What every world promises, and the tool that looks whether one keeps it: `selfwright check`."""

from .check import Check, CheckReport, check, render

__all__ = ["Check", "CheckReport", "check", "render"]
