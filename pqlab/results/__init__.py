"""What was measured: the committed records, where they come from (`provenance`), and how they are read (`shipped`)."""
