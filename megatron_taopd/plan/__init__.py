"""Does it fit, and how long does a step take at least? From configurations alone: nothing is built or loaded."""
