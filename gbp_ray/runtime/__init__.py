"""The verbs behind the Python API: a trial from lease to record, sweeps, estimates, submission."""
