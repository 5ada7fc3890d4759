"""What is done to a trained model: explained, changed, shown other data, costed; and sweeps of many."""
