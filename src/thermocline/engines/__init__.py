"""Who computes: engines, and the HTTP API in front of them. The only room that imports torch."""
