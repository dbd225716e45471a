"""The objective, the loop, its checkpoints and its log."""
