"""Flower apps, unmodified, on the cores of one machine.

The only public module of fedmed that needs Flower to be imported.

Example:
    >>> from fedmed.grid import WorkerGrid
    >>> WorkerGrid.__name__
    'WorkerGrid'
"""

from __future__ import annotations

from fedmed.flower.worker_grid import WorkerGrid

__all__ = ["WorkerGrid"]
