"""How good: what codes lose, beside other caches; measurements that end in records. How fast is in `benchmarks`."""
