"""The loops: training, evaluation, pretraining, and the doors that start them."""
