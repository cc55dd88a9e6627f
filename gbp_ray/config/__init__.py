"""The job file: what it may say, its defaults, and its faults in words."""
