"""Features of many pictures by a backbone: read ahead, computed, kept in parts, written as one file."""
