"""Methods x budgets x seeds from one file: runs, their records, and the table over seeds."""
