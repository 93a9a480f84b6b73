"""From raw text to packed token shards.

`sources` read, `extraction` cleans, `quality` judges, `dedup` and `decontaminate` compare,
`packing` lays tokens into rows; `corpus` and `corpus_shards` run them on Ray Data.
"""
