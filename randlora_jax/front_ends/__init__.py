"""Where each framework keeps its arrays and how it runs its layers."""
