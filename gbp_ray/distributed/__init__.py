"""Ranks and what they agree on: ordered sums and shards, the same bits on any number of workers."""
