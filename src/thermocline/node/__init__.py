"""The host's daemon: one memory, one disk, one index for all engines of a machine."""
