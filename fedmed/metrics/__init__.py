"""How good a prediction is: Dice, surface distances, accuracy, and their summaries.

Everything here but `classification` needs NumPy and SciPy only.
"""
