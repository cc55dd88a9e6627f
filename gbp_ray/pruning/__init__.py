"""Which weights go: units, criteria, scores, one global decision, masks and rounds."""
