"""Rows from files, tokenizers and chat templates, padded batches."""
