"""The mathematics of preference and policy optimisation: torch in, torch out, nothing else."""
