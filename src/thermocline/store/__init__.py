"""The tiered store: match, plan, load, save, evict, and say why."""
