"""xpert turns a handful of examples of a task into a serving expert.

Importing this package loads nothing heavy; each module imports what it needs when it is used.
"""

from __future__ import annotations

__version__ = "0.1.0"
