"""Tests of the run config: reading, refusing, suggesting."""
