"""What a rewritten model is written out as."""
