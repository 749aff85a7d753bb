"""The names of the splits, and the version of how documents are read into them."""

TRAIN, VALIDATION = "train", "validation"
SPLITS = (TRAIN, VALIDATION)
BUILDER_VERSION = "1.0.0"  # raise it when corpora.py reads the same files differently
