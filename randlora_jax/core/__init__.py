"""The numbers: bases, delta, and how a layer applies it."""
