"""How good, how fast: measurements that end in records."""
