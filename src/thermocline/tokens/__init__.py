"""Text to token ids, and to the keys that say how much of it an instance holds."""
