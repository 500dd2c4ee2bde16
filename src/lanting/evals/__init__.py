"""Judges: does the picture say what was asked? By measurement, never by eye alone."""
