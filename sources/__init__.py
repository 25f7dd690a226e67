"""Read any public dataset file: what it contains decides how it is read, its name never does."""
