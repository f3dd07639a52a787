"""Tiny hospitals, and studies on them, for the tests of strategies."""
