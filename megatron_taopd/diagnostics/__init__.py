"""The fixed-context diagnostic: a frozen bank of positions, the gain of a checkpoint on them, and what tells it."""
