"""The one exception of this package that a user is meant to read."""

from __future__ import annotations


class TrajectoryError(RuntimeError):
    """A record that cannot be written, read or applied: which file, what was found, what can be done."""
