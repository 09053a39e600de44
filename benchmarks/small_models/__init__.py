"""Models of other people's code bases, made tiny: a file each, which imports theirs when asked."""
