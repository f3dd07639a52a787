"""Everything that speaks to Flower; no other package imports flwr."""
