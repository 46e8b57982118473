"""Fused against reference: timing, checks, cases, rows, reports."""

from .report import Report, Result, Row
from .suite import Settings, tasks
from .table import render

__all__ = ["Report", "Result", "Row", "Settings", "render", "tasks"]
