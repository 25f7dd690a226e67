"""Text <-> token ids: the tokenizer, the chat format, and the download of the ChatGLM2 vocabulary."""
