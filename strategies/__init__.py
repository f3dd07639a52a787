"""The published methods, one file each. Nothing here may open a scan."""
