"""Weights from elsewhere: a `source` and what builds it, what a file is (`official`), tables of names, in and out."""
