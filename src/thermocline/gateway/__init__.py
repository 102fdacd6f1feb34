"""The HTTP door of a fleet: every request goes where its first token comes soonest, and passes through untouched."""
