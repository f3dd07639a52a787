"""Reading scans and pictures, checking them, bringing them on one grid, caching them.

Runs only where the data are: `strategies` never imports this package.
"""
