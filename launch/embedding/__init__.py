"""Features of many pictures by a backbone: computed, kept in parts, written as one file, and drawn."""
