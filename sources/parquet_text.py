"""Texts of a parquet file, column by column: no Python object for every row."""
