"""The choice of weights to remove, and what the kept ones become: units, criteria, scores, one
global decision, masks, reconstruction, rounds.

A criterion is an additive statistic plus a finish: statistics are summed over batches in batch
order over all ranks, and only then comes anything non-linear. The decision is exact whatever the
ties, bounds per layer or n:m pattern. Thresholds come from counts that are added over the ranks, so
nobody gathers the scores: masks, one bit a weight, are all that ranks exchange beyond counts.
"""
