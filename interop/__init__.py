"""Files and random numbers shared with PyTorch, without PyTorch."""
