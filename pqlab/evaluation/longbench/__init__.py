"""LongBench (Bai, Lv, Zhang et al., ACL 2024): 21 tasks over long documents, answered by plain `generate`.

`tasks` says what is asked and how an answer is marked, `metrics` marks it, `examples` reads the data, `answers` runs a
model. The prompts are in this project's own words (LongBench's own file takes their place where the data folder has
one, see `examples.prompts`), so scores with them stand beside each other, exact beside paged, and not beside tables of
others.
"""
