"""The command line: one file per verb, no logic beyond parsing and printing."""
