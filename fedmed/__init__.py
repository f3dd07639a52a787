"""fedmed: multi-hospital imaging studies, federated exactly.

Importing this package is cheap on purpose: torch, ray and flwr are imported where
they are used.
"""

__version__ = "0.1.0"
