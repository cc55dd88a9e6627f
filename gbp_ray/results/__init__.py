"""Stored trials: written whole or not at all, read without torch or Ray.

Data first, flushed and checksummed; the record last: a round exists when its `round.json` does.
What is committed is never replaced and survives a power cut. Where a killed driver left other bytes
under a file's name, the record says under `stored_as` where the right ones are. Names in records
never lead out of their storage, nothing stored is unpickled, and `fetch` and `gc` touch only what
this package wrote. The index is a copy: it can be rebuilt from the records at any time. A trial has
one driver at a time, held by a lease; a dead driver is replaced.
"""
