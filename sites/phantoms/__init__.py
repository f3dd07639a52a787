"""Parts of the phantom hospitals: bodies, scanners, annotators, presets."""
