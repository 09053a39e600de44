"""What is known of a wrapped model: its layers, their names, its adapters, their files."""
