"""Features of many pictures to look at, and what they know of labels."""
