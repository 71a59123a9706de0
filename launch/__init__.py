"""Starts the ranks of a verb, here or on a cluster. Imports no torch, so that it runs on a login node too."""
