"""Weights from elsewhere: what a file is (`official`), one table of names (`names`), in and out (`files`)."""
