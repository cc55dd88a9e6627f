"""The job file: its fields, their defaults, and errors in words.

A job is checked whole before anything starts, and every fault is named at once, by dotted key and
with the nearest name. Jobs are frozen. A trial's id is a hash of the fields that differ from their
defaults, so a new field with a default never changes the id of an old trial.
"""
