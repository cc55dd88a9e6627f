"""Finds which slices of which weights are coupled, by rules for each operator of a graph."""
