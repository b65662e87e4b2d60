"""Kernel tests; a package, so that its conftest.py does not stand in for the one above."""
