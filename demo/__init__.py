"""A small self-made Chinese corpus: facts, texts, questions and evaluation sets for the demo run."""
