"""The command line: verbs, tables and exit codes.

Standard output carries the result and nothing else, so that `--json` can be piped; progress, notes
and what a workload's code prints go to standard error. Help, the list of fields and the tables of
results import neither torch nor Ray, so that they come in a fraction of a second.
"""
