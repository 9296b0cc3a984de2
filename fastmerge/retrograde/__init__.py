"""Retrograde schedules (DKE-RS): walks back and forth between strong and weak models, measured.

``load`` reads a schedule, ``run`` walks it, evaluates, compares and reports.
"""

from __future__ import annotations

from fastmerge.retrograde.schedule import Schedule, load

__all__ = ["Schedule", "load"]
