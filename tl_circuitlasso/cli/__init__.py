"""The commands of the command line, by subject; each is one call into the library, and prints what it found.

Modules of the library are imported where a command runs, so that `circuitlasso --help` answers at once.
"""
