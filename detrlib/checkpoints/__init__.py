"""Weights from elsewhere and for elsewhere.

source, weights                         weights wherever they come from, and published ones by name
official, files, names                  what an official file is of, in and out, and its table of names
huggingface (_names), adapted           layouts of transformers, in and out
export, program                         a model for other programs, and one that runs by itself
"""
