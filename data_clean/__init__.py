"""Stage 0: raw corpora -> clean, deduplicated parquet."""
