"""Promises of data_prep: what is written, what is refused, what a second run does."""
