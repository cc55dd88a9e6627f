"""The command line: verbs, tables and exit codes."""
