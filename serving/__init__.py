"""An OpenAI-compatible HTTP server over the decoding engine, with metrics and a chat page."""
