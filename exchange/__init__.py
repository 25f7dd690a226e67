"""Models from and for other programs: Hugging Face folders and other formats."""
