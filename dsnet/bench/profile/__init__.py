"""Where a network's time goes, operation by operation, before and after.

``steps`` tells from outside which step is running, ``times`` and ``counts`` watch the steps,
``run`` measures both sides, ``report`` is the schema, ``table`` and ``plot`` show it.
"""

from .report import Part, Profile, Side
from .run import profile
from .table import render

__all__ = ["Part", "Profile", "Side", "profile", "render"]
