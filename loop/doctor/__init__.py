"""Looks at the machine for what breaks runs: versions, devices, programs, disk, adapters."""
