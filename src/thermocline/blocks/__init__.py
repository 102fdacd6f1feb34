"""What is stored: keys, layouts, frames and the memory they lie in."""
