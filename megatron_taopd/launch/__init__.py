"""Starting any sub-command on several ranks: on this machine, as a SLURM job, through nemo-run."""
