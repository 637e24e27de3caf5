"""Evaluation: problems, answers taken from responses, verdicts, and the numbers with their intervals."""
