"""Defaults of a person's own: a text file of a few keys, and LANTING_MODEL. `lanting config` shows and changes them.

A flag comes first, then the environment, then the file, then what is built in. Where there is no file, nothing of this
is read. Rejected: profiles and a file in the current folder, since a command must mean the same wherever it is typed;
and keys for every flag, since what belongs to one picture belongs to its command.
"""
