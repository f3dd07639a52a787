"""How exchanges travel. Every transport gives the same numbers."""
