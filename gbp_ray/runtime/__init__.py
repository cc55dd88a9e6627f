"""The verbs behind the Python API: a trial from lease to record, sweeps, estimates, submission.

State is in the results, not in Ray: running the same command again is how to resume. In a sweep the
dense network is trained once per workload, recipe and seed, and scored once per criterion and
calibration, by content hash and to the bits of a trial that runs alone. Schedulers compare trials
only at the same round of the same sparsities, and only after fine-tuning has followed the last
prune; otherwise the least pruned would always win. Ray is imported in `on_ray`, nowhere else.
"""
