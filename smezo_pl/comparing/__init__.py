"""Runs beside each other: read from their folders, finished or not, as a table and as curves."""
