"""Generating text with a model: cache, sampling, batches that requests join and leave, streaming."""
