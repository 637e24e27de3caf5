"""The sub-commands, a file each: parse flags, put the rooms together, run."""
