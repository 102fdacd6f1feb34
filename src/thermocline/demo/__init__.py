"""The demo: what thermocline promises, shown on this machine, in chapters of at most 20 seconds. See `story.play`."""
