"""Models of other people's code bases, made tiny: one file each, which imports theirs when asked."""
