"""Reading what was recorded: receipts in words, and the state of a disk."""
