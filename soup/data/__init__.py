"""Data files in; tokenised, masked and cached rows out. Nothing here imports torch, transformers or datasets.

files, read -> formats, shapes -> template, encode -> build -> arrow; `prepare` goes the whole way.
"""
