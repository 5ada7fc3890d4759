"""The loops: training, evaluation, pretraining, and the doors that start them.

step, loop                       an update of the weights, and training around it
optimizer, state, start          rates, what changes in training, where weights come from
memory, pace                     what fits at a time, and how long it takes
evaluate, predict, examples      a pass over a data set, over any pictures, over a few of them with their maps
pretrain                         a backbone from the training data itself
advice, tracking                 what a person is told, and what trackers are
launch, notebooks                the doors: processes, and notebooks without a screen
children, agent                  signals that reach all of them, and nobody who outlives the others
"""
