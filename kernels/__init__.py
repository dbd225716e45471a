"""Operators with a reference beside each implementation. A leaf: nothing here imports the rest of minift."""
