"""What runs in a transformed model: reference functions, modules, checkpoints, stability."""
