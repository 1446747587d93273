"""How pictures are found, read, ordered and handed to processes."""
