"""Ranks and what they agree on: ordered sums and shards, the same bits on any number of workers.

Floating-point sums depend on their order. Batches are therefore cut first, by global example index,
and dealt out whole. As the gradients of a batch arrive, they go to the ranks that own their rows,
which add them in batch order; no rank holds a second full gradient. Training does the same with the
microbatches of a step. Random draws are keyed by their purpose (seed, phase, step, microbatch),
never by the worker. What remains is the kernels' own order of additions, which the number of
threads fixes: runs agree to the bit on the same kind of machine with the same thread count.

Sharded networks (FSDP2) keep these bits because gradients are taken as they arrive, before FSDP2
averages them in an order of its own.
"""
