"""Runs that are kept in an object store: their copies on machines, and who may write."""
