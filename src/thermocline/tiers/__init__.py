"""Where blocks lie: the `Tier` seam and its implementations."""
