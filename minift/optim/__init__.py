"""Learning rates; optimizers that torch does not have."""
