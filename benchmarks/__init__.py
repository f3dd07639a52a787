"""Measurements: what a study costs, beside a bare loop and beside other frameworks."""
