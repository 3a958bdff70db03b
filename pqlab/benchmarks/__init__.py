"""How fast: what each part costs in time and memory, beside the best alternative in the same run."""
